"""Evolution of subnets: mutation, crossover, survival; stops and goes on to the bit. On the host, in numpy.

The paper's algorithm and where this departs from it are told in `jsparse.methods.search`.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jsparse.config import ConfigError, check
from jsparse.files import replacing, write_text
from jsparse.methods.space import Ground, Space, Widths, fit, resize
from jsparse.methods.subnet import Genome, digest

# --------------------------------------------------------------------------------------------------------------------
# Mutation and crossover (section 3.3)
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evolution:
    """Defaults are the paper's."""

    epochs: int = 50  # generations, the first included
    population: int = 100  # subnets a generation
    mutants: int = 50  # of them; in the first generation all are
    crossovers: int = 30  # of them; the rest are mutants at the rates of the first generation
    parents: int = 10  # best subnets so far, from which the next generation comes
    mask_rate: float = 0.3  # share of index sets that a mutant changes
    ratio_rate: float = 0.1  # share of widths that it changes
    depth_rate: float = 0.1  # how often it changes layers
    first_mask_rate: float = 0.6  # the same in the first generation, where layers stay
    first_ratio_rate: float = 0.3
    similarity: float = 0.8  # share of an index set that a change of it leaves
    masks: Literal["constructive", "rejection"] = "constructive"  # rejection: the paper's, which seldom finds one
    # constructive: entries change places at random, weighted by importance to this power; 0: all alike
    sharpness: float = 1.0
    ratios: Literal["near", "grid"] = "near"  # how a width changes: by one or two steps, or to anywhere on its grid
    tries: int = 1000  # at a subnet that is new, and of the rejection
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "population", "parents", "tries"):
            check(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        room = self.mutants >= 0 and self.crossovers >= 0 and self.mutants + self.crossovers <= self.population
        check(room, "mutants", f"mutants and crossovers within the population of {self.population}",
              f"{self.mutants} and {self.crossovers}")  # fmt: skip
        for name in ("mask_rate", "ratio_rate", "depth_rate", "first_mask_rate", "first_ratio_rate", "similarity"):
            check(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1", getattr(self, name))
        check(self.sharpness >= 0, "sharpness", "a number of at least 0", self.sharpness)
        check(self.seed >= 0, "seed", "a number of at least 0", self.seed)


class Rates(NamedTuple):
    mask: float
    ratio: float
    depth: float


def mutate(
    parent: Genome, rates: Rates, settings: Evolution, ground: Ground, rng: np.random.Generator
) -> Genome | None:
    """Layers, then widths, then index sets change; None where that leads out of the budget."""
    widths = ground.widths(parent)
    if rng.random() < rates.depth:
        mutate_depth(widths, ground.space, rng)
    for level, grid in zip(widths[1:], ground.space[:3], strict=True):
        chosen = rng.random(len(level)) < rates.ratio
        if settings.ratios == "grid":
            new = rng.integers(len(grid), size=len(level))
        else:
            new = level + rng.choice([-2, -1, 1, 2], len(level))
        level[chosen] = np.clip(new, 0, len(grid) - 1)[chosen]
    if not fit(widths, ground, rng):
        return None
    return mutate_masks(resize(parent, widths, ground), rates.mask, settings, ground, rng)


def mutate_depth(widths: Widths, space: Space, rng: np.random.Generator) -> None:
    """One layer goes, comes back, or changes places with another, in place."""
    layers = widths.layers
    gone, here = np.flatnonzero(~layers), np.flatnonzero(layers & space.removable)
    change = int(rng.integers(-1, 2))
    leaves = len(gone) < space.depth if change > 0 else change == 0 and len(gone) > 0
    if leaves and len(here):
        layers[rng.choice(here)] = False
    if change <= 0 and len(gone):
        layers[rng.choice(gone)] = True


def mutate_masks(genome: Genome, rate: float, settings: Evolution, ground: Ground, rng: np.random.Generator) -> Genome:
    """Algorithm 1: each index set, of a layer's neurons or of a head's pairs or dims, changes with probability `rate`.

    It keeps its size K and at least `similarity` K of its entries.
    """
    parts = []
    for mask, score in zip(genome[1:], ground.scores, strict=True):
        rows = mask.reshape(-1, mask.shape[-1]).copy()
        chosen = rng.random(len(rows)) < rate
        change = _reject if settings.masks == "rejection" else _swap
        rows[chosen] = change(rows[chosen], score.reshape(rows.shape)[chosen], settings, rng)
        parts.append(rows.reshape(mask.shape))
    return Genome(genome.layers, *parts)


def _swap(rows: np.ndarray, scores: np.ndarray, settings: Evolution, rng: np.random.Generator) -> np.ndarray:
    """bool [rows, n]: in each a random number of kept entries changes places with as many that are gone.

    Which ones is drawn without replacement, likelier for a kept entry the lower its score is and for one that is gone
    the higher (Gumbel keys on the logarithm of the score).
    """
    size, n = rows.sum(-1), rows.shape[-1]
    most = np.minimum(np.floor((1 - settings.similarity) * size + 1e-9).astype(int), n - size)
    swaps = np.where(most > 0, rng.integers(1, np.maximum(most, 1) + 1), 0)[:, None]
    likely = settings.sharpness * np.log(np.maximum(scores, 1e-30))
    gumbel = rng.gumbel(size=rows.shape)
    leaving, coming = np.where(rows, gumbel - likely, -np.inf), np.where(rows, -np.inf, gumbel + likely)
    chosen = np.arange(n) < swaps
    rows = rows.copy()
    for keys, value in ((leaving, False), (coming, True)):
        first = np.zeros(rows.shape, bool)
        np.put_along_axis(first, np.argsort(-keys, axis=-1), chosen, axis=-1)
        rows[first] = value
    return rows


def _reject(rows: np.ndarray, scores: np.ndarray, settings: Evolution, rng: np.random.Generator) -> np.ndarray:
    """The paper's: random sets of size K are drawn until one overlaps by `similarity` times n, at most `tries` times.

    Only the sizes of the overlaps are drawn first, which are hypergeometric; given its size, an overlap is any.
    """
    rows = rows.copy()
    for row in rows:
        n, size = len(row), int(row.sum())
        overlaps = rng.hypergeometric(size, n - size, size, settings.tries) if size else np.zeros(1)
        good = np.flatnonzero(overlaps >= settings.similarity * n)
        if len(good):
            swaps = size - int(overlaps[good[0]])
            leaving, coming = (rng.permutation(np.flatnonzero(x))[:swaps] for x in (row, ~row))
            row[leaving], row[coming] = False, True
    return rows


def cross(a: Genome, b: Genome, ground: Ground, rng: np.random.Generator) -> Genome | None:
    """Of each layer attention and FFN come from one parent or the other, widths and index sets together; which layers
    are there comes from one parent. None where that leads out of the budget."""
    count = len(a.layers)
    attention, ffn = rng.random((2, count)) < 0.5
    layers = (a if rng.random() < 0.5 else b).layers
    child = Genome(
        layers.copy(),
        np.where(ffn[:, None], a.ffn, b.ffn),
        *(np.where(attention[:, None, None], x, y) for x, y in zip(a[2:], b[2:], strict=True)),
    )
    widths = ground.widths(child)
    return resize(child, widths, ground) if fit(widths, ground, rng) else None


# --------------------------------------------------------------------------------------------------------------------
# The search
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    genome: Genome
    origin: str  # initial, mutant, crossover or wild
    parameters: int
    loss: float = math.inf  # nats a token


class State(NamedTuple):
    """What a search carries from one generation to the next; random numbers follow from the seed and the epoch."""

    epoch: int  # generations done
    parents: tuple[Candidate, ...]  # the best of all so far, best first
    visited: frozenset[str]  # digests of all so far


class Progress(NamedTuple):
    epoch: int  # generations done
    epochs: int
    candidates: int  # scored so far
    best: Candidate


def evolve(
    starts: Sequence[Genome],
    fitness: Callable[[Sequence[Genome]], np.ndarray],
    ground: Ground,
    settings: Evolution = Evolution(),
    *,
    folder: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> State:
    """The best subnets that evolution finds: the state after the last generation.

    Args:
        starts: initial subnets, which are the first candidates, so that the best is never worse.
        fitness: losses of candidates, float [C]; inf is a loss.
        folder: where every candidate goes into candidates.jsonl, and the state into state.npz after each generation.
            A search that finds a state there goes on from it, to the bit as if it had never stopped; ConfigError where
            that state is of more generations than are asked for.
        progress: called after each generation.
    """
    state, starts = State(0, (), frozenset()), list({digest(start): start for start in starts}.values())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        state = load_state(folder, starts[0]) or state
        check(state.epoch <= settings.epochs, "epochs", f"at least the {state.epoch} that {folder} has done",
              settings.epochs)  # fmt: skip
        _cut_log(folder / "candidates.jsonl", state.epoch)
    while state.epoch < settings.epochs:
        rng = np.random.default_rng([settings.seed, state.epoch])
        children = _generation(state, starts, ground, settings, rng)
        losses = fitness([child.genome for child in children]) if children else np.zeros(0)
        children = [replace(child, loss=float(loss)) for child, loss in zip(children, losses, strict=True)]
        best = sorted([*state.parents, *children], key=lambda c: c.loss)[: settings.parents]  # stable: elders first
        visited = state.visited | {digest(child.genome) for child in children}
        if folder is not None:
            _log(folder / "candidates.jsonl", state.epoch, children, ground)
        state = State(state.epoch + 1, tuple(best), visited)
        if folder is not None:
            save_state(folder, state)
        if progress:
            progress(Progress(state.epoch, settings.epochs, len(visited), best[0]))
    return state


def _generation(
    state: State, starts: Sequence[Genome], ground: Ground, settings: Evolution, rng: np.random.Generator
) -> list[Candidate]:
    """The subnets of one generation, none of which was there before: fewer, where that many are not found."""
    size, early = settings.population, Rates(settings.first_mask_rate, settings.first_ratio_rate, 0.0)
    later = Rates(settings.mask_rate, settings.ratio_rate, settings.depth_rate)
    origins = ["mutant"] * settings.mutants + ["crossover"] * settings.crossovers
    if not state.epoch:
        origins = ["initial"] * min(len(starts), size)
    origins += ["wild"] * (size - len(origins))
    parents = [parent.genome for parent in state.parents] or starts
    seen, children, failures = set(state.visited), [], 0
    for number, origin in enumerate(origins):
        while failures < settings.tries:
            first, second = (parents[i] for i in rng.integers(len(parents), size=2))
            child: Genome | None
            if origin == "initial":
                child = starts[number]
            elif origin == "crossover":
                child = cross(first, second, ground, rng)
            else:
                child = mutate(first, later if origin == "mutant" else early, settings, ground, rng)
            if child is not None and (name := digest(child)) not in seen:
                seen.add(name)
                children.append(Candidate(child, origin, ground.sizes.count(child)))
                break
            failures += 1
    return children


# --------------------------------------------------------------------------------------------------------------------
# On disk
# --------------------------------------------------------------------------------------------------------------------


def save_state(folder: Path, state: State) -> None:
    """Writes state.npz, whole or not at all."""
    parents = state.parents
    arrays = {f"genome_{name}": np.stack([getattr(p.genome, name) for p in parents]) for name in Genome._fields}
    arrays |= {
        "epoch": np.array(state.epoch),
        "visited": np.array(sorted(state.visited)),
        "origins": np.array([p.origin for p in parents]),
        "parameters": np.array([p.parameters for p in parents]),
        "losses": np.array([p.loss for p in parents], np.float64),
    }
    write_arrays(folder / "state.npz", arrays)


def load_state(folder: Path, start: Genome) -> State | None:
    """The state of a search from this initial subnet, None where there is none yet.

    Raises:
        ConfigError: a state of a model of other shapes, or a damaged one.
    """
    path = folder / "state.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
        genomes = zip(*(found[f"genome_{name}"] for name in Genome._fields), strict=True)
        rest = zip(found["origins"], found["parameters"], found["losses"], strict=True)
        parents = tuple(Candidate(Genome(*genome), str(origin), int(size), float(loss))
                        for genome, (origin, size, loss) in zip(genomes, rest, strict=True))  # fmt: skip
        state = State(int(found["epoch"]), parents, frozenset(map(str, found["visited"])))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"{path}: damaged: {error}; begin anew in another folder") from None
    shapes = [[x.shape for x in genome] for genome in (parents[0].genome, start)]
    check(shapes[0] == shapes[1], str(path), f"a search of a model of shapes {shapes[1]}", shapes[0])
    return state


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file in place of an older one."""
    with replacing(path) as scratch, open(scratch, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def _log(path: Path, epoch: int, children: Sequence[Candidate], ground: Ground) -> None:
    with open(path, "a") as file:
        for child in children:
            widths = ground.widths(child.genome)
            line = {
                "epoch": epoch,
                "origin": child.origin,
                "loss": child.loss if math.isfinite(child.loss) else None,
                "perplexity": math.exp(child.loss) if child.loss < 700 else None,
                "parameters": child.parameters,
                "layers": np.flatnonzero(child.genome.layers).tolist(),
                "ffn": ground.space.ffn[widths.ffn].tolist(),
                "rope_pairs": ground.space.pairs[widths.pairs].tolist(),
                "value_dims": ground.space.values[widths.values].tolist(),
                "digest": digest(child.genome),
            }
            file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_log(path: Path, epoch: int) -> None:
    """Drops the lines of generations from `epoch` on, which are about to be made again, and what a kill left torn."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["epoch"] >= epoch:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a search into its folder; where it has begun already they must be what they were.

    Raises:
        ConfigError: names the first that changed.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        for name in dict.fromkeys([*settings, *before]):  # as declared: what is derived comes after what was asked for
            was, now = before.get(name), settings.get(name)
            if was != now:
                raise ConfigError(f"{folder}: a search with other settings began there: {name}: expected {was!r}, "
                                  f"got {now!r}; choose another folder (--run-folder) for another search")  # fmt: skip
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")
