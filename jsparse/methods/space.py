"""Where subnets are searched: the grids that their widths are taken from, and how large they may be.

    space = make_space(config, keep=0.8)
    ground = make_ground(config, scores, Budget(0.8), space)
    genome = uniform(ground)

A `Genome` says what is kept, `Widths` how much of each layer, as positions on the grids. Scores turn widths into
genomes: what is kept is what is most important.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jsparse.config import ConfigError, LlamaConfig, check
from jsparse.methods.importance import Importance, keep_top
from jsparse.methods.subnet import Genome, Sizes, whole

# Table 1 of the paper, by keep ratio: lowest ratio of attention dims and of neurons, and the largest share of layers
# that goes. At 70 % the paper prints 0.3 for attention, between 0.8 and 0.6: taken for 0.7.
_TABLE_1 = {0.5: (0.6, 0.1, 4 / 32), 0.6: (0.6, 0.1, 4 / 32), 0.7: (0.7, 0.2, 2 / 32), 0.8: (0.8, 0.4, 0.0),
            0.9: (0.9, 0.6, 0.0), 1.0: (1.0, 1.0, 0.0)}  # fmt: skip


@dataclass(frozen=True)
class SpaceConfig:
    """What a subnet may look like; what is not given is Table 1's for its keep ratio."""

    ffn_low: float | None = None  # smallest share of an FFN's neurons
    ffn_high: float = 1.0
    ffn_multiple: int = 64  # of an FFN's width; 128 suits tensor cores, DeciLM knows multiples of 256 alone
    attention_low: float | None = None  # smallest share of a head's dims; 1 leaves attention whole
    attention_multiple: int = 8  # of a head's dims
    depth: int | None = None  # most layers that may go
    protected: int = 2  # layers at either end that stay

    def __post_init__(self) -> None:
        for name in ("ffn_low", "attention_low"):
            value = getattr(self, name)
            check(value is None or 0 < value <= 1, name, "a share above 0, up to 1", value)
        check((self.ffn_low or 0) <= self.ffn_high <= 1, "ffn_high", "a share from ffn_low to 1", self.ffn_high)
        check(self.ffn_multiple > 0, "ffn_multiple", "a positive number", self.ffn_multiple)
        good = self.attention_multiple > 0 and self.attention_multiple % 2 == 0
        check(good, "attention_multiple", "a positive even number (RoPE rotates pairs)", self.attention_multiple)
        check(self.depth is None or self.depth >= 0, "depth", "a number of at least 0", self.depth)
        check(self.protected >= 0, "protected", "a number of at least 0", self.protected)


class Space(NamedTuple):
    """The grids that widths are taken from, rising."""

    ffn: np.ndarray  # neurons of a layer
    pairs: np.ndarray  # RoPE pairs of a head
    values: np.ndarray  # value dims of a head
    removable: np.ndarray  # bool [L], layers that may go
    depth: int  # how many of them


def make_space(config: LlamaConfig, keep: float, given: SpaceConfig = SpaceConfig()) -> Space:
    """The space for a dense model and a keep ratio. Raises ConfigError where a grid has no width."""
    attention, ffn, depth = (
        float(np.interp(keep, list(_TABLE_1), column)) for column in zip(*_TABLE_1.values(), strict=True)
    )
    attention = attention if given.attention_low is None else given.attention_low
    ffn = ffn if given.ffn_low is None else given.ffn_low
    count = config.num_hidden_layers
    number = np.arange(count)
    removable = (number >= given.protected) & (number < count - given.protected)
    depth = round(depth * count) if given.depth is None else given.depth
    room = int(removable.sum())
    check(given.depth is None or depth <= room, "depth", f"at most the {room} layers that are not protected", depth)

    def grid(size: int, low: float, high: float, multiple: int, name: str) -> np.ndarray:
        widths = np.array([*range(multiple, size, multiple), size])
        widths = widths[(widths >= low * size - 1e-9) & (widths <= high * size + 1e-9)]
        check(len(widths) > 0, name, f"a multiple of {multiple} from {low * size:g} to {high * size:g}", "none")
        return widths

    return Space(
        ffn=grid(config.intermediate_size, ffn, given.ffn_high, given.ffn_multiple, "ffn"),
        pairs=grid(config.head_dim // 2, attention, 1.0, given.attention_multiple // 2, "attention"),
        values=grid(config.head_dim, attention, 1.0, given.attention_multiple, "attention"),
        removable=removable,
        depth=min(depth, room),
    )


@dataclass(frozen=True)
class Budget:
    """How large a subnet is to be, as a band of its number of parameters."""

    keep: float = 0.8
    of: Literal["total", "decoder"] = "total"  # decoder: without embedding, final norm and head, which are never pruned
    band: float = 0.01  # a subnet keeps from keep - band to keep

    def __post_init__(self) -> None:
        check(0 < self.keep <= 1, "keep", "a share above 0, up to 1", self.keep)
        check(0 < self.band < self.keep, "band", f"a share above 0, below keep ({self.keep})", self.band)

    def bounds(self, config: LlamaConfig) -> tuple[int, int]:
        """Fewest and most parameters, all of them counted."""
        sizes = Sizes.of(config)
        fixed = 0 if self.of == "total" else sizes.ends
        size = sizes.count(whole(config)) - fixed
        return fixed + math.ceil((self.keep - self.band) * size), fixed + math.floor(self.keep * size + 1e-6)


class Widths(NamedTuple):
    """The sizes of a subnet without its index sets: positions on the space's grids, int [L] each."""

    layers: np.ndarray  # bool [L]
    ffn: np.ndarray
    pairs: np.ndarray
    values: np.ndarray

    def copy(self) -> "Widths":
        return Widths(*(x.copy() for x in self))


@dataclass(frozen=True)
class Ground:
    """All that stays the same during a search."""

    space: Space
    sizes: Sizes
    bounds: tuple[int, int]
    scores: Importance

    @functools.cached_property
    def ranks(self) -> Importance:
        """How many entries of a row are less important than each; of equals the first is the most, as in `keep_top`."""
        falling = (np.argsort(-x, axis=-1, kind="stable") for x in self.scores)
        return Importance(*(x.shape[-1] - 1 - np.argsort(x, axis=-1) for x in falling))

    @property
    def heads(self) -> int:
        return self.scores.pairs.shape[1]

    def count(self, widths: Widths) -> int:
        """Parameters of a subnet of these widths."""
        space = self.space
        return self.sizes.by_layer(widths.layers, space.ffn[widths.ffn], self.heads * space.pairs[widths.pairs],
                                   self.heads * space.values[widths.values])  # fmt: skip

    def widths(self, genome: Genome) -> Widths:
        """Of a genome in the space."""
        kept = genome.ffn.sum(-1), genome.pairs[:, 0].sum(-1), genome.values[:, 0].sum(-1)
        grids = self.space.ffn, self.space.pairs, self.space.values
        return Widths(genome.layers.copy(), *(np.searchsorted(g, k) for g, k in zip(grids, kept, strict=True)))


def make_ground(config: LlamaConfig, scores: Importance, budget: Budget, space: Space) -> Ground:
    """Raises ConfigError where no subnet in the space is of the size wanted."""
    ground = Ground(space, Sizes.of(config), budget.bounds(config), scores)
    low, high = ground.bounds
    count = config.num_hidden_layers
    top = Widths(np.ones(count, bool), *(np.full(count, len(g) - 1) for g in space[:3]))
    bottom = Widths(np.ones(count, bool), *(np.zeros(count, int) for _ in range(3)))
    bottom.layers[np.flatnonzero(space.removable)[: space.depth]] = False
    least, most = ground.count(bottom), ground.count(top)
    fixed = 0 if budget.of == "total" else ground.sizes.ends
    size = ground.sizes.count(whole(config)) - fixed
    if least > high or most < low:
        reach = f"{(least - fixed) / size:.1%} to {(most - fixed) / size:.1%}"
        raise ConfigError(f"keep: expected a ratio that the space reaches ({reach} of {budget.of}; smaller ffn_low, "
                          f"attention_low or multiples widen it), got {budget.keep:.1%}")  # fmt: skip
    fitted = any(fit(top.copy(), ground, np.random.default_rng(seed)) for seed in range(20))
    check(fitted, "band", f"a band of sizes that a subnet of the space meets ({low:,} to {high:,} parameters)",
          budget.band)  # fmt: skip
    return ground


def fit(widths: Widths, ground: Ground, rng: np.random.Generator) -> bool:
    """Moves random widths of random layers by single steps, in place, until the size is within the bounds.

    False where no step leads closer.
    """
    low, high = ground.bounds
    prices = ground.sizes.neuron, ground.sizes.pair * ground.heads, ground.sizes.value * ground.heads
    size = ground.count(widths)
    genes = list(zip(widths[1:], ground.space[:3], prices, strict=True))
    while not low <= size <= high:
        step = 1 if size < low else -1
        moves = []  # of each kind: layers that can move, and by how much the size changes
        for level, grid, price in genes:
            new = level + step
            can = widths.layers & (new >= 0) & (new < len(grid))
            change = price * (grid[np.clip(new, 0, len(grid) - 1)] - grid[level])
            lands = size + change <= high if step > 0 else size + change >= low  # not across the whole band
            moves.append((np.flatnonzero(can & lands), change))
        total = sum(len(layers) for layers, _ in moves)
        if not total:
            return False
        pick = int(rng.integers(total))
        for (layers, change), (level, _, _) in zip(moves, genes, strict=True):
            if pick < len(layers):
                level[layers[pick]] += step
                size += int(change[layers[pick]])
                break
            pick -= len(layers)
    return True


# --------------------------------------------------------------------------------------------------------------------
# Subnets from importance alone
# --------------------------------------------------------------------------------------------------------------------


def uniform(ground: Ground, *, spare_attention: bool = False) -> Genome:
    """S_0: one ratio for all, clipped to the grids, and what is most important; single steps fill the budget up.

    spare_attention: the ratio is that of FFNs alone, and attention gives way only where they reach their smallest.
    """
    space, count = ground.space, len(ground.scores.ffn)
    for ratio in np.linspace(1, 0, 401):
        levels = [int(np.argmin(np.abs(grid - ratio * full))) for grid, full in _grids(ground)]
        if spare_attention:
            levels[1:] = len(space.pairs) - 1, len(space.values) - 1
        widths = Widths(np.ones(count, bool), *(np.full(count, level) for level in levels))
        if ground.count(widths) <= ground.bounds[1]:
            break
    rng = np.random.default_rng(0)
    if not fit(widths, ground, rng):  # fewer layers, where their number is in the space
        widths.layers[rng.permutation(np.flatnonzero(space.removable))[: space.depth]] = False
        check(fit(widths, ground, rng), "band", "a band of sizes that a subnet of the space meets", ground.bounds)
    return of_widths(widths, ground)


def starts(ground: Ground) -> list[Genome]:
    """Where a search begins: S_0, and the subnet that spares attention, where the band has room for it."""
    found = [uniform(ground)]
    with contextlib.suppress(ConfigError):
        found.append(uniform(ground, spare_attention=True))
    return found


def _grids(ground: Ground) -> list[tuple[np.ndarray, int]]:
    """Each grid with the size of the whole."""
    space, scores = ground.space, ground.scores
    return list(zip(space[:3], (x.shape[-1] for x in scores), strict=True))


def of_widths(widths: Widths, ground: Ground) -> Genome:
    """The genome of these widths that keeps what is most important."""
    empty = Genome(widths.layers, *(np.zeros(x.shape, bool) for x in ground.scores))
    return resize(empty, widths, ground)


def resize(genome: Genome, widths: Widths, ground: Ground) -> Genome:
    """The genome at other widths: the least important go, the most important of what was gone come back."""
    parts = []
    for mask, rank, grid, level in zip(genome[1:], ground.ranks, ground.space[:3], widths[1:], strict=True):
        wanted = grid[level]  # [L]
        mask = mask.copy()
        for i in np.flatnonzero(
            np.any(mask.reshape(len(mask), -1, mask.shape[-1]).sum(-1) != wanted[:, None], axis=-1)
        ):
            mask[i] = keep_top(rank[i] + mask[i] * mask.shape[-1], int(wanted[i]))
        parts.append(mask)
    return Genome(widths.layers.copy(), *parts)


def adaptive(ground: Ground) -> Genome:
    """Widths as FLAP finds them: scores standardised within each layer, and one threshold for all layers."""
    count = len(ground.scores.ffn)
    rows = [x.reshape(count, -1) for x in ground.scores]
    standard = [(x - x.mean(1, keepdims=True)) / np.maximum(x.std(1, keepdims=True), 1e-20) for x in rows]
    for share in np.linspace(0, 1, 401):
        kept = [np.mean(x >= np.quantile(x, share), axis=1) for x in standard]  # of each layer
        levels = [np.argmin(np.abs(grid - k[:, None] * full), axis=1)
                  for (grid, full), k in zip(_grids(ground), kept, strict=True)]  # fmt: skip
        widths = Widths(np.ones(count, bool), *levels)
        if ground.count(widths) <= ground.bounds[1]:
            break
    check(fit(widths, ground, np.random.default_rng(0)), "band", "a band of sizes that a subnet of the space meets",
          ground.bounds)  # fmt: skip
    return of_widths(widths, ground)


def depth_only(config: LlamaConfig, influence: np.ndarray, budget: Budget) -> Genome:
    """Whole layers alone, those of least influence first, until the subnet is not above the budget (ShortGPT)."""
    genome, sizes = whole(config), Sizes.of(config)
    for i in np.argsort(influence, kind="stable")[:-1]:
        if sizes.count(genome) <= budget.bounds(config)[1]:
            return genome
        genome.layers[i] = False
    check(sizes.count(genome) <= budget.bounds(config)[1], "keep", "a ratio that one layer is not above", budget.keep)
    return genome
