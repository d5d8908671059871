"""The kernels around a step of decoding, attention and norm: every backend against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_rms_norm import add_norm_route, add_rms_norm
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.matvec import matvec
from tests.aot import H100, compile_for
from tests.kernels import BACKENDS, assert_close, random, run

pytestmark = pytest.mark.every_jax

# rows, slots, query heads, key-value heads, head dim, filled slots
ATTENTION = [(1, 640, 8, 8, 32, 517), (3, 64, 4, 2, 32, 0), (2, 32, 4, 1, 64, 31), (2, 512, 6, 2, 32, 130)]


def attention_case(rows, slots, heads, kv_heads, head_dim, length, dtype=jnp.float32):
    cache = (rows, slots, kv_heads, head_dim)
    angles = random(4, rows, head_dim // 2)
    start = jnp.asarray(np.minimum(np.arange(rows) * 5, length), jnp.int32)
    return (random(0, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype), random(1, *cache, dtype=dtype),
            random(2, *cache, dtype=dtype), jnp.cos(angles), jnp.sin(angles), start, jnp.int32(length))  # fmt: skip


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention(shape, backend):
    case = attention_case(*shape)
    expected = run(decode_attention, *case, implementation="reference")
    assert_close(run(decode_attention, *case, **BACKENDS[backend]), expected)
    changed = np.any(np.asarray(expected[1]) != np.asarray(case[1]), axis=(0, 2, 3))
    assert np.flatnonzero(changed).tolist() == [shape[-1]]  # the new token's slot alone


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_attention_in_half_precision(backend):
    case = attention_case(2, 256, 4, 2, 32, 200, dtype=jnp.bfloat16)
    expected = run(decode_attention, *case, implementation="reference")
    assert_close(run(decode_attention, *case, **BACKENDS[backend]), expected, jnp.bfloat16)


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_attention_sees_what_it_should(backend):
    """Slots before a row's start and after the new token hold huge numbers, and nothing of them comes out."""
    qkv, keys, values, cos, sin, _, length = attention_case(2, 64, 2, 2, 32, 40)
    start = jnp.array([7, 40], jnp.int32)  # the second row begins with its new token
    slots = jnp.arange(64)[None, :, None, None]
    hidden = (slots < start[:, None, None, None]) | (slots > length)
    keys, values = (jnp.where(hidden, 1e9, x) for x in (keys, values))
    y, _, _ = run(decode_attention, qkv, keys, values, cos, sin, start, length, **BACKENDS[backend])
    np.testing.assert_allclose(y[1], qkv[1, 4 * 32 :], rtol=1e-6)
    assert np.abs(y).max() < 10


def test_attention_refuses():
    case = attention_case(1, 64, 4, 2, 32, 3)
    for position, wrong, told in [
        (0, jnp.zeros((1, 100)), "qkv: expected"),
        (2, jnp.zeros((1, 64, 2, 16)), "values: expected shape"),
        (3, jnp.zeros((1, 32)), "cos: expected shape"),
        (5, jnp.zeros(2, jnp.int32), "start: expected shape"),
        (0, case[0].astype(jnp.bfloat16), "one float dtype"),
    ]:
        with pytest.raises(ValueError, match=told):
            decode_attention(*case[:position], wrong, *case[position + 1 :])
    with pytest.raises(ValueError, match="'triton': expected slots that 16 divides, got 20"):
        decode_attention(*attention_case(1, 20, 4, 2, 32, 3), implementation="triton")
    with pytest.raises(ValueError, match="'triton': expected heads of a power of two and at least 32, got 48"):
        decode_attention(*attention_case(1, 32, 4, 2, 48, 3), implementation="triton")


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (3, 96), (2, 1100)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm(rows, width, dtype, backend):
    x, scale = random(0, rows, width), random(1, width)
    for delta in (None, random(2, rows, width)):
        expected = add_rms_norm(x, scale, 1e-5, dtype, delta=delta, implementation="reference")
        got = add_rms_norm(x, scale, 1e-5, dtype, delta=delta, **BACKENDS[backend])
        assert got[1].dtype == dtype and got[0].dtype == jnp.float32
        assert_close(got, expected, dtype)


def test_norm_refuses():
    x, scale = random(0, 2, 64), random(1, 64)
    with pytest.raises(ValueError, match=r"x: expected float32 \(2, 32\)"):
        add_rms_norm(x, scale[:32], 1e-5, jnp.float32)
    with pytest.raises(ValueError, match="delta: expected float32"):
        add_rms_norm(x, scale, 1e-5, jnp.float32, delta=x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="scale: expected float32"):
        add_rms_norm(x, scale.astype(jnp.bfloat16), 1e-5, jnp.float32)
    with pytest.raises(ValueError, match=r"router: expected \[E, 64\], got shape \(4, 32\)"):
        add_norm_route(x, scale, 1e-5, jnp.float32, random(3, 4, 32), jnp.float32(0.5))
    with pytest.raises(ValueError, match="'triton': expected a width of at most 16384, got 20000"):
        add_rms_norm(random(0, 1, 20000), random(1, 20000), 1e-5, jnp.float32, implementation="triton")


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize(("rows", "width", "blocks"), [(1, 128, 6), (3, 96, 5), (5, 64, 4)])
def test_norm_and_route(rows, width, blocks, backend):
    x, scale, delta, router = random(0, rows, width), random(1, width), random(2, rows, width), random(3, blocks, width)
    threshold = jnp.float32(0.6)
    for dtype in (jnp.float32, jnp.bfloat16):
        y, normed, mask = add_norm_route(x, scale, 1e-5, dtype, router, threshold, delta=delta, **BACKENDS[backend])
        assert_close((y, normed), add_rms_norm(x, scale, 1e-5, dtype, delta=delta, implementation="reference"), dtype)
        scores = np.asarray(normed, np.float64) @ np.asarray(router, np.float64).T  # of what it says it has normalised
        sure = np.abs(scores - np.log(0.6 / 0.4)) > 1e-5
        assert mask.dtype == bool and sure.mean() > 0.9
        np.testing.assert_array_equal(np.asarray(mask)[sure], (scores > np.log(0.6 / 0.4))[sure])
    y, normed, _ = add_norm_route(x, scale, 1e-5, jnp.float32, router, threshold, **BACKENDS[backend])
    assert_close((y, normed), add_rms_norm(x, scale, 1e-5, jnp.float32, implementation="reference"))


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 64, 40), (3, 2144, 12), (4, 48, 7)])
def test_product(tokens, inputs, outputs, dtype, backend):
    x, weight = random(0, tokens, inputs, dtype=dtype), random(1, outputs, inputs, dtype=dtype)
    got = matvec(x, weight, **BACKENDS[backend])
    assert got.dtype == jnp.float32
    assert_close(got, matvec(x, weight, implementation="reference"), dtype)
    rounded = matvec(x, weight, dtype=jnp.bfloat16, **BACKENDS[backend])
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


def test_product_refuses():
    with pytest.raises(ValueError, match="x, weight: expected"):
        matvec(random(0, 2, 32), random(1, 8, 16))
    with pytest.raises(ValueError, match="'triton': expected 1 to 4 tokens, got 5"):
        matvec(random(0, 5, 32), random(1, 8, 32), implementation="triton")


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 12288, 4096), (4, 32000, 4096), (1, 960, 576)])
def test_product_compiles_for_the_h100(tokens, outputs, inputs):
    x, weight = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, inputs), (outputs, inputs)))
    compile_for(H100, lambda x, weight: matvec(x, weight, implementation="triton"), x, weight)


@pytest.mark.parametrize("shape", [(1, 640, 32, 32, 128), (8, 640, 32, 8, 128), (1, 8192, 9, 3, 64)])
def test_attention_compiles_for_the_h100(shape):
    case = jax.eval_shape(lambda: attention_case(*shape, 600, dtype=jnp.bfloat16))
    compile_for(H100, lambda *args: decode_attention(*args, implementation="triton"), *case)


@pytest.mark.parametrize("width", [576, 4096, 5120])
def test_norm_compiles_for_the_h100(width):
    x, scale = jax.ShapeDtypeStruct((4, width), jnp.float32), jax.ShapeDtypeStruct((width,), jnp.float32)
    compile_for(H100, lambda x, scale, delta: add_rms_norm(
        x, scale, 1e-5, jnp.bfloat16, delta=delta, implementation="triton"), x, scale, x)  # fmt: skip
    router = jax.ShapeDtypeStruct((344, width), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    compile_for(H100, lambda x, scale, *router: add_norm_route(
        x, scale, 1e-5, jnp.bfloat16, *router, delta=x, implementation="triton"), x, scale, *router)  # fmt: skip
