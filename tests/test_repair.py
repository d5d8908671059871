"""Repair of subnets: least squares by hand, ADMM, biases, block after block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse import model
from jsparse.config import ConfigError
from jsparse.methods.importance import Moments, moments
from jsparse.methods.repair import (
    Admm,
    Bias,
    ClosedForm,
    Short,
    admm,
    closed_form,
    relative_error,
    repair,
    repair_matrix,
    with_biases,
)
from jsparse.methods.subnet import compact, whole, zero_filled
from tests.aot import H100, compile_for
from tests.helpers import assert_trees_close, random_params, tiny_config, tokens

CONFIG = tiny_config(num_hidden_layers=3)
INPUTS, OUTPUTS = 24, 10
SOLVE = jax.jit(closed_form)
BLOCK = jax.jit(model.run_block, static_argnames="config")
ITERATE = jax.jit(admm, static_argnames=("iterations", "normalise"))


def problem(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """W [I, O], the Gram matrix of correlated inputs of very different scales, and which inputs are kept."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((INPUTS, 8)) @ rng.standard_normal((8, 300)) + 0.3 * rng.standard_normal((INPUTS, 300))
    x *= 10 ** rng.uniform(-1, 2, (INPUTS, 1))
    w, kept = rng.standard_normal((INPUTS, OUTPUTS)), rng.random(INPUTS) < 0.6
    kept[:2] = True, False
    return jnp.asarray(w, jnp.float32), jnp.asarray(x @ x.T, jnp.float32), jnp.asarray(kept)


def error(new: jax.Array, w: jax.Array, gram: jax.Array) -> float:
    return float(relative_error(w - new, w, gram))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_closed_form(seed: int) -> None:
    """The normal equations in float64, on the kept inputs alone; and never worse than masking."""
    w, gram, kept = problem(seed)
    new = np.asarray(SOLVE(w, gram, kept))
    g, wd, k = np.asarray(gram, np.float64), np.asarray(w, np.float64), np.asarray(kept)
    scale = np.sqrt(np.diag(g))
    h, scaled = g / np.outer(scale, scale), wd * scale[:, None]
    gain = np.linalg.solve(h[np.ix_(k, k)] + 0.1 * np.eye(k.sum()), h[np.ix_(k, ~k)] @ scaled[~k])
    expected = (scaled[k] + gain) / scale[k, None]
    np.testing.assert_allclose(new[k], expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    assert not new[~k].any()
    masked = jnp.where(kept[:, None], w, 0.0)
    assert error(new, w, gram) <= error(masked, w, gram) * (1 + 1e-4)


def test_admm_is_within_a_percent_of_the_closed_form() -> None:
    """At the paper's rho = 1 and 30 iterations, but only where the Gram matrix is normalised."""
    for seed in range(5):
        w, gram, kept = problem(seed)
        exact = SOLVE(w, gram, kept)
        scale = jnp.sqrt(jnp.diag(gram))[:, None]  # in the coordinates of the problem

        def distance(new: jax.Array, exact: jax.Array = exact, scale: jax.Array = scale) -> float:
            return float(jnp.linalg.norm((new - exact) * scale) / jnp.linalg.norm(exact * scale))

        assert distance(ITERATE(w, gram, kept)) < 0.01
        assert distance(ITERATE(w, gram, kept, iterations=3)) > 0.01
        masked = jnp.where(kept[:, None], w, 0.0)
        raw = ITERATE(w, 100 * gram, kept, normalise=False)
        assert error(raw, w, gram) > 0.5 * error(masked, w, gram) > error(exact, w, gram)


def test_what_is_short_is_made_up_for() -> None:
    """W^T X + R for a target: the normal equations on the kept inputs, their error, and ADMM's way there."""
    rng = np.random.default_rng(0)
    w, _, kept = problem()
    x, r = rng.standard_normal((INPUTS, 200)), rng.standard_normal((OUTPUTS, 200))
    r += rng.standard_normal((OUTPUTS, INPUTS)) @ x  # in part something that the inputs tell
    x = x.astype(np.float32)
    gram, short = jnp.asarray(x @ x.T), Short(jnp.asarray(x @ r.T, jnp.float32), jnp.asarray((r**2).sum(), jnp.float32))
    new = np.asarray(SOLVE(w, gram, kept, 1e-6, short.cross), np.float64)
    k, wanted = np.asarray(kept), np.asarray(w).T @ x + r
    expected = np.linalg.lstsq(x[k].T, wanted.T)[0]
    np.testing.assert_allclose(new[k], expected, atol=1e-3)
    left = ((wanted - new.T @ x) ** 2).sum() / (wanted**2).sum()
    np.testing.assert_allclose(relative_error(w - new, w, gram, short), left, rtol=1e-3)
    iterated, exact = ITERATE(w, gram, kept, cross=short.cross), SOLVE(w, gram, kept, 0.1, short.cross)
    assert float(jnp.linalg.norm(iterated - exact)) < 0.01 * float(jnp.linalg.norm(exact))


def test_nothing_lost_is_nothing_changed() -> None:
    w, gram, _ = problem()
    np.testing.assert_array_equal(SOLVE(w, gram, jnp.ones(INPUTS, bool)), w)
    params, ids = random_params(CONFIG), np.asarray(tokens(CONFIG, 4, 16))
    same, config, rows = repair(params, CONFIG, ids, whole(CONFIG))
    assert config == CONFIG and all(row.before == row.after == 0 for row in rows) and len(rows) == 6
    assert_trees_close(same, params, 0)


def test_dead_inputs() -> None:
    w, gram, kept = problem()
    gram = gram.at[3].set(0.0).at[:, 3].set(0.0)
    for new in (SOLVE(w, gram, kept), ITERATE(w, gram, kept)):
        assert np.isfinite(new).all()


def test_bias_makes_up_for_the_mean() -> None:
    """The error left is the variance of what is gone; the bias is what it put out on average."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 50, INPUTS)).astype(np.float32) + 2
    w, _, kept = problem()
    stats = moments(jnp.asarray(x), jnp.ones(4, bool))
    found = repair_matrix(w, jnp.ones(OUTPUTS), stats, kept, Bias(), "ffn.down")
    flat, gone = x.reshape(-1, INPUTS), ~np.asarray(kept)
    assert found.bias is not None
    np.testing.assert_allclose(found.bias, 1 + flat.mean(0)[gone] @ np.asarray(w)[gone], rtol=1e-4)
    lost = flat[:, gone] @ np.asarray(w)[gone]
    whole_energy = ((flat @ np.asarray(w)) ** 2).sum()
    np.testing.assert_allclose(found.before, (lost**2).sum() / whole_energy, rtol=1e-3)
    np.testing.assert_allclose(found.after, ((lost - lost.mean(0)) ** 2).sum() / whole_energy, rtol=1e-3)


def test_moments_of_half_precision_are_float32_sums() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7, 5)), jnp.bfloat16)
    found = moments(x, jnp.asarray([True, False, True]))
    flat = np.asarray(x[np.array([0, 2])], np.float64).reshape(14, 5)
    assert found.gram.dtype == jnp.float32 and found.tokens == 14
    np.testing.assert_allclose(found.gram, flat.T @ flat, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.variance, flat.var(0), rtol=1e-4)


def stream(params: model.Params, ids: np.ndarray) -> jax.Array:
    """The residual stream [B, T, D] after the last block."""
    x = params["embed"][ids]
    for layer in model.unstack(params)["layers"]:
        x = BLOCK(layer, x, config=CONFIG)[0]
    return x


@pytest.mark.parametrize("method", [ClosedForm(target="dense"), Admm(), Bias()])
def test_block_after_block(method: ClosedForm | Admm | Bias) -> None:
    """Each matrix is repaired on what the repaired ones before it put out, as one pass of the model shows; the result
    is exactly zero where the subnet has nothing, and its compact form computes the same."""
    params, ids = random_params(CONFIG), np.asarray(tokens(CONFIG, 5, 16))
    genome = whole(CONFIG)
    rng = np.random.default_rng(1)
    genome.layers[1] = False
    genome.ffn[:, rng.permutation(48)[:20]] = False
    genome.pairs[:, 0, 1] = genome.pairs[:, 1, 2] = False
    genome.values[:, :, [2, 5]] = False
    seen = []
    new, config, rows = repair(params, CONFIG, ids, genome, method, batch_size=2, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [row.name for row in rows] == [f"layers.{i}.{n}" for i in (0, 2) for n in ("attention.output", "ffn.down")]
    assert all(0 < row.after < row.before for row in rows)
    filled = zero_filled(new, genome)
    assert_trees_close(filled, new, 0)
    small, shapes = compact(new, config, genome)
    got, expected = (model.forward(p, ids, c).logits for p, c in ((small, shapes), (new, config)))
    np.testing.assert_allclose(got, expected, atol=1e-4)

    # The last matrix, from one pass of the repaired model whose last block has all of its neurons.
    dense, _ = with_biases(params, CONFIG) if isinstance(method, Bias) else (params, CONFIG)
    last = new["layers"]["ffn"]
    reading = {name: last[name].at[2].set(dense["layers"]["ffn"][name][2]) for name in last if name != "down_bias"}
    open_model = new | {"layers": new["layers"] | {"ffn": last | reading}}
    hidden = model.forward(open_model, ids, config, probe=lambda trace: trace.hidden).aux[2]
    stats = moments(hidden, jnp.ones(5, bool))
    bias = dense["layers"]["ffn"]["down_bias"][2] if isinstance(method, Bias) else None
    short = None
    if isinstance(method, ClosedForm):
        plain = repair(params, CONFIG, ids, genome, ClosedForm(), batch_size=2)[0]
        ideal, here, own, masked = (stream(p, ids) for p in (params, open_model, plain, zero_filled(params, genome)))
        r = (ideal - here).reshape(80, -1)
        short = Short(hidden.reshape(80, -1).T @ r, jnp.sum(r**2))
        far = [float(jnp.linalg.norm(x - ideal)) for x in (stream(new, ids), own, masked)]
        assert far[0] < 0.9 * far[1] < far[1] < far[2]
    found = repair_matrix(
        params["layers"]["ffn"]["down"][2], bias, stats, jnp.asarray(genome.ffn[2]), method, "ffn.down", short
    )
    np.testing.assert_allclose(new["layers"]["ffn"]["down"][2], found.weight, atol=2e-3)
    if isinstance(method, Bias):
        assert config.mlp_bias and config.attention_bias and found.bias is not None
        np.testing.assert_allclose(last["down_bias"][2], found.bias, atol=1e-4)


def test_compiles_for_an_h100_without_kernels_to_tune() -> None:
    """Exact products are cuBLAS calls, which compile at once, not Triton kernels that XLA tunes by compiling many."""
    weight, gram = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1536, 576), (1536, 1536)))
    stats = Moments(gram, jax.ShapeDtypeStruct((1536,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32))
    kept = jax.ShapeDtypeStruct((1536,), bool)
    args = weight, None, stats, kept
    text = compile_for(H100, repair_matrix, *args, method=ClosedForm(), name="ffn.down").as_text()
    assert "__cublas$lt$matmul" in text and "triton_nested_gemm" not in text


def test_what_repair_refuses() -> None:
    params, ids = random_params(CONFIG), np.asarray(tokens(CONFIG, 2, 8))
    genome = whole(CONFIG)
    genome.ffn[:, 3] = False
    small, shapes = compact(params, CONFIG, genome)
    del small
    ragged = dataclasses.replace(shapes, layers=shapes.layer_shapes)
    with pytest.raises(ConfigError, match="model: expected a model whose layers are of one shape"):
        repair(params, ragged, ids, genome)
    with pytest.raises(ConfigError, match="tokens: expected ids from 0 to 66"):
        repair(params, CONFIG, ids + 60, genome)
    up = params["layers"]["ffn"]["up"].at[1, 0, 3].set(jnp.nan)
    bad = params | {"layers": params["layers"] | {"ffn": params["layers"]["ffn"] | {"up": up}}}
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.down: weights are not finite after the repair"):
        repair(bad, CONFIG, ids, genome)
    with pytest.raises(ConfigError, match="rho: expected a positive number"):
        Admm(rho=0)
