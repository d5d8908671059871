"""A pretrained model, run beside transformers in float32. Skipped unless JSPARSE_REAL_MODEL names its folder."""

import os

import numpy as np
import pytest

from jsparse import hf, model
from jsparse.inference import compare_torch, evaluate, generate

FOLDER = os.environ.get("JSPARSE_REAL_MODEL", "")
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "The mitochondria is the powerhouse of the cell. It is an organelle that is found in nearly all eukaryotic cells, "
    "and its main task is to",
)

pytestmark = [pytest.mark.real, pytest.mark.skipif(not FOLDER, reason="JSPARSE_REAL_MODEL is not set")]


@pytest.fixture(scope="module")
def ours():
    config, params = hf.load(FOLDER)
    return config, model.unstack(params)


@pytest.fixture(scope="module")
def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    ids = [tokenizer(text).input_ids for text in PROMPTS]
    assert len(set(map(len, ids))) == 3
    return ids


@pytest.fixture(scope="module")
def expected(prompts):
    """64 greedy tokens after each prompt alone; end tokens are not heeded."""
    torch = pytest.importorskip("torch")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def test_greedy_is_transformers(ours, prompts, expected):
    """64 tokens of each prompt, in one batch of unequal lengths and alone; with the model's end token up to it."""
    config, params = ours
    assert generate(params, config, prompts, max_new_tokens=64, stop_ids=()).tokens == expected
    for prompt, text in zip(prompts, expected, strict=True):
        assert generate(params, config, [prompt], max_new_tokens=64, stop_ids=()).tokens == [text]
    stopped = generate(params, config, prompts, max_new_tokens=64).tokens
    ends = [text.index(config.eos_token_id) + 1 if config.eos_token_id in text else 64 for text in expected]
    assert stopped == [text[:end] for text, end in zip(expected, ends, strict=True)] and min(ends) < 64


def test_logits_are_transformers(ours, tokenizer):
    config, params = ours
    text = tokenizer(" ".join(PROMPTS * 4)).input_ids
    found = compare_torch(FOLDER, params, config, text, seq_len=64)
    print(found)
    assert found.max_abs_difference < 1e-3 and found.max_kl < 1e-6 and found.top1_agreement == 1
    assert evaluate(params, config, text, seq_len=64).perplexity == pytest.approx(found.perplexity_a, rel=1e-5)
    assert np.all(np.array(evaluate(params, config, text, seq_len=64).sparsity) < 1e-3)  # SiLU
