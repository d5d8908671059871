"""Rotary position embeddings, with every scaling that Hugging Face's LLaMA knows, computed in float32."""

import math
from functools import singledispatch

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.config import DefaultRope, DynamicRope, LinearRope, Llama3Rope, LlamaConfig, LongRope, Rope, YarnRope


def needs_length(rope: Rope) -> bool:
    """Whether the angles of a position depend on how long the sequence is: then keys are cached unrotated."""
    return isinstance(rope, DynamicRope | LongRope)


def table(positions: jax.Array, length: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each float32 [B, T, H/2], of integer positions [B, T] in a sequence of `length` tokens."""
    inverse, scale = frequencies(config.rope, config, length)
    angles = positions[..., None].astype(jnp.float32) * inverse[None, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, kept: tuple[tuple[int, ...], ...] | None = None) -> jax.Array:
    """Rotates x [B, T, heads, H] by the table of its positions; pairs are (i, i + H/2). Keeps x's dtype.

    kept: where x has but some of the table's pairs, the indices of those of each key-value head.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    if kept is None:
        cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    else:
        pairs = np.repeat(np.array(kept), x.shape[2] // len(kept), axis=0)  # [heads, H/2]
        cos, sin = cos[:, :, pairs], sin[:, :, pairs]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@singledispatch
def frequencies(rope: Rope, config: LlamaConfig, length: jax.Array) -> tuple[jax.Array | np.ndarray, float]:
    """Inverse frequencies float32 [H/2] and the factor on cosines and sines, for a sequence of `length` tokens."""
    raise TypeError(f"no such RoPE: {rope!r}")


@frequencies.register
def _(rope: DefaultRope, config: LlamaConfig, length: jax.Array) -> tuple[np.ndarray, float]:
    return 1 / _periods(rope, config), 1.0


@frequencies.register
def _(rope: LinearRope, config: LlamaConfig, length: jax.Array) -> tuple[np.ndarray, float]:
    return 1 / _periods(rope, config) / rope.factor, 1.0


@frequencies.register
def _(rope: DynamicRope, config: LlamaConfig, length: jax.Array) -> tuple[jax.Array, float]:
    """The base grows with the length, by a power that leaves the fastest pair alone and stretches the slowest fully."""
    limit, h = config.max_position_embeddings, config.head_dim
    growth = rope.factor * jnp.maximum(length, limit).astype(jnp.float32) / limit - (rope.factor - 1)
    exponents = jnp.arange(0, h, 2, dtype=jnp.float32) / (h - 2)
    return 1 / (growth**exponents * _periods(rope, config)), 1.0


@frequencies.register
def _(rope: Llama3Rope, config: LlamaConfig, length: jax.Array) -> tuple[np.ndarray, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    inverse = 1 / _periods(rope, config)
    wavelengths = 1 / inverse * (2 * math.pi)
    turns = rope.original_max_position_embeddings / wavelengths  # over the original context
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (1 - keep) * inverse / rope.factor + keep * inverse, 1.0


@frequencies.register
def _(rope: YarnRope, config: LlamaConfig, length: jax.Array) -> tuple[np.ndarray, float]:
    def boundary(turns: float) -> float:  # the pair that turns so many times over the original context
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = boundary(rope.beta_fast), boundary(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    high = high + 0.001 if high == low else high
    pairs = np.arange(config.head_dim // 2, dtype=np.float32)
    keep = 1 - np.clip((pairs - low) / (high - low), 0, 1)
    inverse = 1 / _periods(rope, config)
    return inverse * keep + inverse / rope.factor * (1 - keep), _yarn_scale(rope)


def _yarn_scale(rope: YarnRope) -> float:
    def temperature(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


@frequencies.register
def _(rope: LongRope, config: LlamaConfig, length: jax.Array) -> tuple[jax.Array, float]:
    original = rope.original_max_position_embeddings
    short, long = np.asarray(rope.short_factor, np.float32), np.asarray(rope.long_factor, np.float32)
    inverse = 1 / (jnp.where(length > original, long, short) * _periods(rope, config))
    factor = rope.factor if rope.factor is not None else config.max_position_embeddings / original
    if rope.attention_factor is not None:
        return inverse, rope.attention_factor
    return inverse, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _periods(rope: Rope, config: LlamaConfig) -> np.ndarray:
    """theta^(2i/H), float32 [H/2]. Computed on the host, rounded as PyTorch rounds it: devices differ in the last bits
    of a power, and one bit of a frequency is 0.01 rad at position 100 000."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
