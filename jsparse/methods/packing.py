"""Packed N:M matrices in a parameter tree: half the numbers and where they stand, instead of zeros.

    params = pack_params(params)      # gate, up and down become `pallas_kernels.PackedNM` where their zeros make N:M
    params = unpack_params(params)    # and are dense again

Of stacked layers a PackedNM is stacked too, its two arrays led by L.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jsparse.config import check
from jsparse.methods.patterns import MLP, Axis, NofM, Pattern, get, matrix, observe, parse_pattern, replace
from jsparse.model import Params
from pallas_kernels import PackedNM, pack, unpack

SIZES = (2, 4, 8, 16)  # groups that can be packed


def check_packable(pattern: Pattern) -> NofM:
    """Raises ConfigError for a pattern that has no packed form."""
    check(isinstance(pattern, NofM) and pattern.m in SIZES, "packed", "a pattern N:M with M of 2, 4, 8 or 16",
          str(pattern))  # fmt: skip
    return pattern  # type: ignore[return-value]


def packable(params: Params, names: Iterable[str] = MLP) -> dict[str, tuple[NofM, Axis]]:
    """The matrices whose zeros make the same N:M in every layer, by name, with the axis of the groups."""
    rows = observe(params)
    found = {}
    for name in names:
        patterns = {row.pattern for row in rows if row.name.split(".", 2)[2] == name}
        text = patterns.pop() if len(patterns) == 1 else None
        if text is not None:
            pattern, axis = text.split()
            parsed = parse_pattern(pattern)
            if isinstance(parsed, NofM) and parsed.m in SIZES:
                found[name] = parsed, axis
    return found  # type: ignore[return-value]


def pack_params(params: Params, names: Iterable[str] = MLP) -> Params:
    """The tree with every named matrix that is `packable` as a PackedNM; the others, and those packed already, as they
    are."""
    names = [name for name in names if not isinstance(_first(params, name), PackedNM)]
    for name, (pattern, axis) in packable(params, names).items() if names else ():
        params = _each(params, name, lambda x, n=name, p=pattern, a=axis: pack(matrix(x, n), p.n, p.m, a))
    return params


def unpack_params(params: Params) -> Params:
    """The tree with every PackedNM as the dense matrix [I, O] that it is. Raises nothing where there is none."""
    for name in MLP:
        if isinstance(_first(params, name), PackedNM):
            params = _each(params, name, unpack)
    return params


def _first(params: Params, name: str) -> Any:
    layers = params["layers"]
    return get(layers if isinstance(layers, dict) else layers[0], name)


def _each(params: Params, name: str, change: Any) -> Params:
    """The tree with one matrix of every layer changed; a stack is taken apart and put together again."""
    layers = params["layers"]
    if isinstance(layers, dict):
        stack = get(layers, name)
        count = jax.tree.leaves(stack)[0].shape[0]
        changed = [change(jax.tree.map(lambda x, i=i: x[i], stack)) for i in range(count)]
        return params | {"layers": replace(layers, {name: jax.tree.map(lambda *x: jnp.stack(x), *changed)})}
    return params | {"layers": [replace(layer, {name: change(get(layer, name))}) for layer in layers]}
