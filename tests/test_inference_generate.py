"""Generation against transformers, and the promises about batches, seeds, stopping, streaming and compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import model, parallel
from jsparse.config import ConfigError, DynamicRope, MeshConfig, Relu
from jsparse.inference import Sampling, decoder, generate
from jsparse.inference.generate import Choice, _decode, _filters, _prefill, bucket, filter_logits
from tests.helpers import from_torch, tiny_config, torch_model

CONFIG = tiny_config(activation=Relu(), eos_token_id=None, max_position_embeddings=128)
WARM = Sampling(temperature=1.0)
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(1, CONFIG.vocab_size, size=n).tolist() for n in (17, 30, 2)]


@pytest.fixture(scope="module")
def params():
    return model.unstack(model.init(jax.random.key(0), dataclasses.replace(CONFIG, initializer_range=0.2)))


def texts(*args, **changes):
    return generate(*args, **{"max_new_tokens": 16} | changes).tokens


# --------------------------------------------------------------------------------------------------------------------
# Greedy
# --------------------------------------------------------------------------------------------------------------------


def test_greedy_equals_transformers():
    theirs = torch_model(CONFIG)
    params = from_torch(theirs.state_dict(), CONFIG)
    ours = texts(params, CONFIG, PROMPTS, max_new_tokens=40)
    assert ours == [greedy_torch(theirs, prompt, 40) for prompt in PROMPTS]


def test_prompt_beyond_the_original_context():
    config = dataclasses.replace(CONFIG, rope=DynamicRope(2.0), max_position_embeddings=16)
    theirs = torch_model(config)
    params = from_torch(theirs.state_dict(), config)
    for prompt in PROMPTS[:2]:
        assert texts(params, config, [prompt], max_new_tokens=1) == [greedy_torch(theirs, prompt, 1)]
    with pytest.raises(ConfigError, match=r"within the model's 32 positions, got '30 \+ 3'"):
        texts(params, config, PROMPTS, max_new_tokens=3)


def greedy_torch(model, prompt, count):
    import torch

    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.every_jax
@pytest.mark.parametrize("length", [16, 17, 100])
def test_greedy_takes_the_likeliest_of_the_full_forward(params, length):
    """Within and across buckets, and to the last position of the model."""
    prompt = rng.integers(CONFIG.vocab_size, size=length).tolist()
    new = min(40, CONFIG.max_position_embeddings - length)
    [text] = texts(params, CONFIG, [prompt], max_new_tokens=new)
    whole = np.zeros((1, CONFIG.max_position_embeddings), np.int32)
    whole[0, : length + new] = prompt + text
    scores = jax.jit(model.forward, static_argnums=2)(params, whole, CONFIG).logits[0, length - 1 : length + new - 1]
    assert text == np.argmax(scores, axis=-1).tolist() and len(text) == new


# --------------------------------------------------------------------------------------------------------------------
# Rows, seeds, streams
# --------------------------------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch(params):
    together = texts(params, CONFIG, PROMPTS, sampling=WARM, seed=7)
    for b, prompt in enumerate(PROMPTS):
        assert texts(params, CONFIG, [prompt], sampling=WARM, seed=7 + b) == [together[b]]
    assert texts(params, CONFIG, PROMPTS[::-1], sampling=WARM, seed=[9, 8, 7]) == together[::-1]
    assert texts(params, CONFIG, PROMPTS, sampling=WARM, seed=7, max_new_tokens=5) == [t[:5] for t in together]
    assert together != texts(params, CONFIG, PROMPTS, sampling=WARM, seed=8)


def test_seeds_give_different_texts_and_the_same_again(params):
    prompts = [PROMPTS[0]] * 3
    first = texts(params, CONFIG, prompts, sampling=WARM)
    assert len({tuple(t) for t in first}) == 3
    assert texts(params, CONFIG, np.array(prompts), sampling=WARM) == first
    assert texts(params, CONFIG, prompts, sampling=WARM, seed=[2] * 3) == [first[2]] * 3
    assert texts(params, CONFIG, prompts, sampling=WARM, seed=-1)[1] == first[0]


def test_a_text_goes_on_as_it_would_have(params):
    first = texts(params, CONFIG, PROMPTS, sampling=WARM)
    longer = [prompt + text[:9] for prompt, text in zip(PROMPTS, first, strict=True)]
    assert texts(params, CONFIG, longer, sampling=WARM, max_new_tokens=7) == [text[9:] for text in first]


def test_streaming_gives_the_same_texts(params):
    streamed = [[], [], []]
    stop = texts(params, CONFIG, PROMPTS, sampling=WARM)[0][11:12]
    plain = texts(params, CONFIG, PROMPTS, sampling=WARM, stop_ids=stop)
    found = texts(params, CONFIG, PROMPTS, sampling=WARM, stop_ids=stop,
                  on_token=lambda row, token: streamed[row].append(token))  # fmt: skip
    assert streamed == found == plain


# --------------------------------------------------------------------------------------------------------------------
# Stopping
# --------------------------------------------------------------------------------------------------------------------


def test_stop_ids_end_each_row(params):
    whole = texts(params, CONFIG, PROMPTS, sampling=WARM)
    stop = {whole[0][9], whole[1][13]}
    cut = [t[: 1 + next((i for i, x in enumerate(t) if x in stop), len(t))] for t in whole]
    assert len(set(map(len, cut))) > 1
    assert texts(params, CONFIG, PROMPTS, sampling=WARM, stop_ids=list(stop)) == cut
    config = dataclasses.replace(CONFIG, eos_token_id=tuple(stop))
    assert texts(params, config, PROMPTS, sampling=WARM) == cut
    assert texts(params, config, PROMPTS, sampling=WARM, stop_ids=()) == whole


def test_first_token_may_stop(params):
    [[first]] = texts(params, CONFIG, [PROMPTS[0]], max_new_tokens=1)
    found = generate(params, CONFIG, [PROMPTS[0]], max_new_tokens=9, stop_ids=[first])
    assert found.tokens == [[first]] and found.decode_tokens_per_second == 0
    assert found.prompt_tokens == len(PROMPTS[0])


def test_decoding_ends_when_all_rows_have_stopped(params):
    """The state stays where the last row stopped, however many tokens were allowed."""
    start, running = np.array([10, 3], np.int32), np.zeros(2, bool)
    prompts = np.ones((2, 16), np.int32)
    for stops, length in ((np.arange(CONFIG.vocab_size, dtype=np.int32), 16), (jnp.full(67, -1), 29)):
        choice = Choice(np.zeros(2, np.uint32), stops, {})
        state = _prefill(params, prompts, start, running, choice, config=CONFIG, slots=64)[0]
        assert _decode(params, state, choice, 30, config=CONFIG, implementation="dense").cache.length == length


# --------------------------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.3, top_k=1),
        Sampling(1.0, top_k=5),
        Sampling(1.0, top_k=1000),
        Sampling(0.8, top_p=0.9),
        Sampling(1.0, top_p=0.01),
        Sampling(1.0, top_p=0.999),
        Sampling(1.2, min_p=0.05),
        Sampling(1.2, min_p=1.0),
        Sampling(1.5, top_k=20, top_p=0.7),
        Sampling(2.0, top_k=30, top_p=0.9, min_p=0.1),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_filters_equal_transformers_warpers(sampling, traced):
    torch = pytest.importorskip("torch")
    from transformers import generation

    scores = np.random.default_rng(1).normal(scale=3, size=(16, 67)).astype(np.float32)
    warpers = [generation.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        warpers.append(generation.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p != 1:
        warpers.append(generation.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p != 0:
        warpers.append(generation.MinPLogitsWarper(sampling.min_p))
    expected = torch.tensor(scores)
    for warper in warpers:
        expected = warper(None, expected)
    call = jax.jit(filter_logits) if traced else filter_logits
    np.testing.assert_allclose(call(scores, **_filters(sampling)), expected.numpy(), rtol=1e-6)


def test_samples_follow_the_filtered_distribution(params):
    """1024 rows of one prompt: frequencies of the next token against its probabilities."""
    sampling = Sampling(temperature=1.5, top_k=12, top_p=0.95)
    drawn = texts(params, CONFIG, [PROMPTS[0]] * 1024, sampling=sampling, max_new_tokens=1)
    scores = model.forward(params, np.array([PROMPTS[0]]), CONFIG).logits[:, -1]
    p = np.asarray(jax.nn.softmax(filter_logits(scores, 1.5, top_k=12, top_p=0.95))[0])
    frequency = np.bincount(np.ravel(drawn), minlength=CONFIG.vocab_size) / 1024
    assert not frequency[p == 0].any()
    assert np.all(np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / 1024) + 1e-9)


# --------------------------------------------------------------------------------------------------------------------
# Shapes, meshes, bad input
# --------------------------------------------------------------------------------------------------------------------


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 64, 65, 100, 128, 129, 600, 4096)] == [
        16, 16, 32, 64, 80, 112, 128, 160, 640, 4096]  # fmt: skip
    assert len({bucket(n) for n in range(1, 4097)}) < 32


def test_calls_of_one_bucket_compile_once(params, monkeypatch):
    traces = []
    for name in ("trunk", "step"):
        real = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *a, real=real, name=name: traces.append(name) or real(*a))
    config = dataclasses.replace(CONFIG, rms_norm_eps=1.1e-5)  # nobody else's compiled functions
    generate(params, config, PROMPTS, max_new_tokens=10, sampling=Sampling(0.9, top_p=0.9), stop_ids=[3])
    assert traces == ["trunk", "step"]
    generate(params, config, [[*p, 5] for p in PROMPTS], max_new_tokens=12, sampling=Sampling(0.8, top_p=0.8),
             stop_ids=[4, 6], seed=5, on_token=lambda row, token: None)  # fmt: skip
    assert traces == ["trunk", "step"]


@pytest.mark.every_jax
def test_under_a_mesh():
    config = dataclasses.replace(CONFIG, vocab_size=72, initializer_range=0.2)
    params = model.init(jax.random.key(0), config)
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    sharded = jax.device_put(params, model.shardings(config, mesh))
    alone = texts(params, config, PROMPTS, sampling=WARM)
    with jax.set_mesh(mesh):
        assert texts(sharded, config, PROMPTS, sampling=WARM) == alone


def test_bfloat16_and_other_widths(params):
    """A searched subnet, in half precision: shapes and dtypes are the parameters' own."""
    layers = params["layers"]
    ffn = layers[1]["ffn"]
    narrow = layers[1] | {"ffn": {"gate": ffn["gate"][:, :20], "up": ffn["up"][:, :20], "down": ffn["down"][:20]}}
    subnet = model.cast(params | {"layers": [layers[0], narrow]}, CONFIG, "bfloat16")
    found = texts(subnet, CONFIG, PROMPTS)
    assert all(len(text) == 16 for text in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one, got 0"),
        ({"prompts": [[1], []]}, "prompts[1]: expected a list of token ids, got []"),
        ({"prompts": [1, 2]}, "prompts[0]: expected a list of token ids, got 1"),
        ({"prompts": [[1.5]]}, "prompts[0]: expected a list of token ids, got [1.5]"),
        ({"prompts": [[1, 67]]}, "prompts[0]: expected ids from 0 to 66, got [67]"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive number, got 0"),
        ({"max_new_tokens": 127},
         "max_new_tokens: expected prompt and new tokens within the model's 128 positions, got '2 + 127'"),
        ({"seed": [1, 2]}, "seed: expected one number, or one of each of the 1 prompts, got [1, 2]"),
        ({"implementation": "cuda"}, "implementation: expected one of auto, dense, sparse, reference, xla, triton, "
                                     "mosaic_gpu, mosaic_tpu, got 'cuda'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(changes, message):
    with pytest.raises(ConfigError) as error:
        generate({}, CONFIG, **{"prompts": [[1, 2]], "max_new_tokens": 5} | changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1}]
)
def test_bad_sampling(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)
