"""Rotary tables against transformers' own, to positions where one bit of a frequency would show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.config import DefaultRope, DynamicRope, LinearRope, Llama3Rope, LlamaConfig, LongRope, Rope, YarnRope
from jsparse.model import rope
from tests.helpers import tiny_config, torch_model

H = 64
SHORT = tuple(1 + 0.01 * i for i in range(H // 2))
LONG = tuple(2 + 0.5 * i for i in range(H // 2))
CONTEXT = 8192  # max_position_embeddings

STATIC = {
    "default": DefaultRope(),
    "theta": DefaultRope(theta=500_000.0),
    "linear": LinearRope(factor=4.0),
    "llama3": Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=2048),
    "llama3_low_2": Llama3Rope(32.0, low_freq_factor=2.0, high_freq_factor=16.0, original_max_position_embeddings=2048),
    "yarn": YarnRope(factor=4.0, original_max_position_embeddings=2048),
    "yarn_theta": YarnRope(factor=4.0, original_max_position_embeddings=2048, theta=500_000.0),
    "yarn_factor_1": YarnRope(factor=1.0, original_max_position_embeddings=CONTEXT),
    "yarn_attention": YarnRope(factor=4.0, original_max_position_embeddings=2048, attention_factor=0.7),
    "yarn_betas": YarnRope(factor=4.0, original_max_position_embeddings=2048, beta_fast=20.0, beta_slow=2.0),
    "yarn_mscale": YarnRope(factor=4.0, original_max_position_embeddings=2048, mscale=0.7, mscale_all_dim=1.3),
    "yarn_mscale_alone": YarnRope(factor=4.0, original_max_position_embeddings=2048, mscale=0.7),
    "yarn_untruncated": YarnRope(factor=4.0, original_max_position_embeddings=2048, truncate=False),
    "yarn_narrow": YarnRope(factor=4.0, original_max_position_embeddings=2048, beta_fast=4.0, beta_slow=4.0),
    "yarn_one_pair": YarnRope(4.0, 2048, beta_fast=4.0, beta_slow=4.0, truncate=False),
}
BY_LENGTH = {
    "dynamic": DynamicRope(factor=4.0),
    "longrope": LongRope(SHORT, LONG, original_max_position_embeddings=2048),
    "longrope_factor": LongRope(SHORT, LONG, original_max_position_embeddings=2048, factor=16.0),
    "longrope_attention": LongRope(SHORT, LONG, original_max_position_embeddings=2048, attention_factor=1.3),
    "longrope_factor_1": LongRope(SHORT, LONG, original_max_position_embeddings=CONTEXT),
}


def config(scaling: Rope) -> LlamaConfig:
    return tiny_config(rope=scaling, head_dim=H, max_position_embeddings=CONTEXT)


def theirs(scaling: Rope, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """transformers' cosines and sines [B, T, H/2] and inverse frequencies [H/2], from a fresh model: its dynamic
    table remembers the longest sequence it saw."""
    torch = pytest.importorskip("torch")
    module = torch_model(config(scaling)).model.rotary_emb
    cos, sin = module(torch.zeros(1), torch.tensor(positions))
    return cos.numpy()[..., : H // 2], sin.numpy()[..., : H // 2], module.inv_freq.numpy()


def ours(scaling: Rope, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = jnp.asarray(positions.max() + 1, jnp.int32)
    cos, sin = jax.jit(rope.table, static_argnums=2)(jnp.asarray(positions, jnp.int32), length, config(scaling))
    assert cos.dtype == sin.dtype == jnp.float32
    return np.asarray(cos), np.asarray(sin)


@pytest.mark.parametrize("scaling", [*STATIC.values(), *BY_LENGTH.values()], ids=[*STATIC, *BY_LENGTH])
def test_table_equals_transformers(scaling):
    """Exact to float32 rounding at any position, where the frequencies do not hang on the length, 131 071 included."""
    positions = np.array([[0, 1, 2, 63, 1000, 2047], [2048, 4096, 8191, 20_000, 100_000, 131_071]])
    if isinstance(scaling, DynamicRope):
        positions = np.minimum(positions, 20_000)  # its power of a traced length may differ in the last bit
    cos, sin, _ = theirs(scaling, positions)
    tolerance = 2e-3 if isinstance(scaling, DynamicRope) else 3e-7
    for got, expected in zip(ours(scaling, positions), (cos, sin), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scaling", BY_LENGTH.values(), ids=BY_LENGTH)
@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 8191, 8192, 8193, 40_000])
def test_frequencies_follow_the_length(scaling, length):
    _, _, expected = theirs(scaling, np.array([[length - 1]]))
    inverse, _ = rope.frequencies(scaling, config(scaling), jnp.int32(length))
    np.testing.assert_allclose(inverse, expected, rtol=5e-7)


def test_dynamic_within_the_context_is_the_default_to_the_bit():
    positions = np.arange(CONTEXT)[None]
    np.testing.assert_array_equal(ours(DynamicRope(factor=4.0), positions), ours(DefaultRope(), positions))


def test_only_scalings_by_length_rotate_cached_keys_late():
    assert [rope.needs_length(r) for r in (*STATIC.values(), *BY_LENGTH.values())] == [False] * 15 + [True] * 5


def test_rotation_is_a_rotation_by_the_distance():
    """Lengths stay, and the product of a query and a key hangs on the distance of their positions alone."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, H))
    every = jnp.arange(30, dtype=jnp.int32)[None]
    cos, sin = rope.table(every, jnp.int32(30), config(DefaultRope()))
    q, k = (rope.rotate(jnp.broadcast_to(x, (1, 30, 1, H)), cos, sin) for x in (q, k))
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), jnp.linalg.norm(q[0, 0, 0]), rtol=1e-5)
    product = np.einsum("BTNH,BSNH->TS", q, k)
    for t in range(5, 25):
        np.testing.assert_allclose(product[t, t - 5 : t + 5], product[5, 0:10], rtol=1e-4, atol=1e-4)


def test_rotation_computes_in_float32_and_keeps_the_dtype():
    x = jax.random.normal(jax.random.key(0), (1, 7, 2, H))
    table = rope.table(jnp.arange(7, dtype=jnp.int32)[None], jnp.int32(7), config(DefaultRope()))
    half = rope.rotate(x.astype(jnp.bfloat16), *table)
    assert half.dtype == jnp.bfloat16
    exact = rope.rotate(x.astype(jnp.bfloat16).astype(jnp.float32), *table)
    np.testing.assert_array_equal(half.astype(jnp.float32), exact.astype(jnp.bfloat16).astype(jnp.float32))
