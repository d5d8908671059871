"""Subnets of a LLaMA found by evolution and repaired without training.

Shen et al., "Search for Efficient Large Language Models", arXiv 2409.17372 (NeurIPS 2024).

    Phi_ij = W_ij^2 / [(2 X X^T)^-1]_jj                   importance of a weight                    Eq. 1
    s_attn = r(W_Q) + r(W_K) + r(W_V) + c(W_O)            of attention dims, r: rows, c: columns    Eq. 2
    s_mlp  = r(W_U) + r(W_G) + c(W_D)                     of neurons                                Eq. 3
    S_0    = the largest ceil(gamma size) of each         the initial subnet, one ratio for all
    generation 0:    N mutants of S_0
    each epoch:      N_m mutants, N_c crossovers and N - N_m - N_c wild mutants of the k best so far
    fitness:         perplexity of the masked model on a few windows of text
    at the end:      W_O and W_D by least squares         `jsparse.methods.repair`                  section 3.4

    paper                              here
    Phi, r, c, s_attn, s_mlp           importance.score_block, importance.Importance
    S, S_attn^i, S_mlp                 subnet.Genome: layers, pairs and values, ffn
    gamma, gamma_attn, gamma_mlp       space.Budget.keep; widths from the grids of space.Space
    S_0                                space.uniform
    N, N_m, N_c, k, epochs             evolution.Evolution.population, .mutants, .crossovers, .parents, .epochs
    P_m^0, P_s^0                       .first_mask_rate, .first_ratio_rate
    P_m, P_s, P_d                      .mask_rate, .ratio_rate, .depth_rate
    alpha, eta                         .similarity, .tries
    Algorithm 1                        evolution.mutate_masks
    fitness                            supernet.score

Where the paper is silent or does not work as printed:

- Attention dims go in RoPE pairs for queries and keys and by themselves for values; dropped one by one before the
  rotation, those of queries and keys would leave nothing smaller. Heads of a layer keep equally many. Pairs are ranked
  by their energy in attention's scores; `Obs.pairs = "weights"` sums their importance as Eq. 2 does.
- Algorithm 1 draws whole masks until one overlaps with the old by alpha N. Below a ratio of about 0.89 none ever does.
  Here a mask first takes its new size by importance, and then up to (1 - alpha) K of its K entries change places, so
  that |S'| = K and |S and S'| >= alpha K by construction. `Evolution.masks = "rejection"` is the paper's.
- A ratio moves by one or two steps of its grid (`ratios = "grid"`: anywhere on it), then random steps of random layers
  bring the subnet into its band of sizes, instead of throwing it away.
- Beside S_0 stands a second initial subnet, whose FFNs alone give way (`space.starts`): to prune
  attention hurts far more (the paper's Fig. 4), and the way there is long by steps of a grid.
- Any layers may go but the first two and the last two.
- Of the survivors of the last epoch the best on held-out windows is taken.
- The search may see repaired weights (`levels`): output and down of every layer, repaired beforehand for every width,
  with the index sets that importance gives, so that widths and layers alone evolve.
- The Z-update and the scale of rho in the repair, see `jsparse.methods.repair`.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check, to_dict
from jsparse.methods.evolution import Candidate, Evolution, Progress, check_settings, evolve, write_arrays
from jsparse.methods.importance import Fluctuation, Importance, Magnitude, Obs, RandomScore, Score, importance
from jsparse.methods.repair import ClosedForm, Repair, RepairReport, repair, repair_levels
from jsparse.methods.space import (
    Budget,
    Ground,
    Space,
    SpaceConfig,
    adaptive,
    depth_only,
    make_ground,
    make_space,
    starts,
    uniform,
)
from jsparse.methods.subnet import Genome, Sizes, check_dense, to_json, whole, zero_filled
from jsparse.methods.supernet import make_supernet, scorer
from jsparse.model import Params


@dataclass(frozen=True)
class SearchConfig:
    """How a subnet is found.

    The methods beside the search take what the paper is compared with: `uniform` is the initial subnet, `magnitude`
    and `random` the same with other scores, `fluctuation` FLAP's scores and widths, `depth` whole layers by ShortGPT.
    """

    method: Literal["search", "uniform", "magnitude", "fluctuation", "depth", "random"] = "search"
    budget: Budget = field(default_factory=Budget)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    score: Obs = field(default_factory=Obs)
    evolution: Evolution = field(default_factory=Evolution)
    repair: Repair | None = field(default_factory=ClosedForm)
    fitness: Literal["perplexity", "kl"] = "perplexity"  # kl: KL(dense || subnet)
    levels: bool = False  # the search sees weights repaired for each width
    batch_size: int = 8  # calibration sequences a forward pass
    together: int = 1  # candidates a forward pass, where the fitness windows alone do not fill the device

    def __post_init__(self) -> None:
        searches = self.method == "search"
        check(searches or not self.levels, "levels", "the method search beside it", self.method)
        check(searches or self.fitness == "perplexity", "fitness", "the method search beside it", self.method)


class Texts(NamedTuple):
    """Windows of text for the three uses, disjoint."""

    calibration: np.ndarray  # int [sequences, T], for importance and repair
    fitness: np.ndarray  # int [W, T + 1], for the search
    heldout: np.ndarray  # int [W, T + 1], for the final choice and the report


def draw_texts(
    tokens: ArrayLike, *, seq_len: int = 2048, calibration: int = 128, windows: int = 16, seed: int = 0
) -> Texts:
    """Draws `windows` windows for the fitness, as many held-out ones, and up to `calibration` of those left over.

    Raises:
        ConfigError: the text is too short for one calibration window beside the others.
    """
    for name, value in (("seq_len", seq_len), ("calibration", calibration), ("windows", windows)):
        check(value > 0, name, "a positive number", value)
    text = np.asarray(tokens)
    count, fewest = len(text) // (seq_len + 1), 2 * windows + 1
    wanted = f"a text of at least {fewest * (seq_len + 1):,} tokens (2 x {windows} windows of {seq_len} to search with "
    check(count >= fewest, "calibration", wanted + "and hold out, one to calibrate on)", len(text))
    drawn = np.random.default_rng(seed).permutation(count)[: 2 * windows + calibration]
    cut = np.stack([text[i * (seq_len + 1) : (i + 1) * (seq_len + 1)] for i in drawn])
    return Texts(cut[2 * windows :, :-1], cut[:windows], cut[windows : 2 * windows])


@dataclass(frozen=True)
class Report:
    """What was found. `dataclasses.asdict` gives plain JSON values."""

    method: str
    parameters: int
    dense_parameters: int
    keep: float  # share of all parameters
    keep_decoder: float  # share of the parameters without embedding, final norm and head
    perplexity_dense: float  # on the held-out windows; with method search they chose among the last survivors
    perplexity_before: float  # of the subnet with the weights it inherits
    perplexity: float  # of the subnet as it is returned
    candidates: int  # scored in the search
    fitness: float | None  # best loss of the search, nats a token
    repair: tuple[RepairReport, ...]  # errors on the calibration by matrix
    genome: dict[str, Any]  # kept indices of each layer


class Subnet(NamedTuple):
    params: Params  # zero-filled, in the shapes of `config`, stacked
    config: LlamaConfig  # the dense model's, with biases where the repair adds them
    genome: Genome
    report: Report


def search(
    params: Params,
    config: LlamaConfig,
    texts: Texts,
    settings: SearchConfig = SearchConfig(),
    *,
    folder: Path | None = None,
    on_stage: Callable[[str], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Subnet:
    """Finds a subnet and repairs it. `subnet.compact` makes it small.

    Computes in the dtype of the parameters, statistics and solutions in float32. Under a mesh (`jax.set_mesh`) windows
    and calibration sequences are split over "data" and "fsdp".

    Args:
        params: of the dense model.
        folder: of the search's state and of candidates.jsonl; a search that stopped goes on from there.
        on_stage: called with what begins: importance, levels, search, repair.
        progress: called after each generation of the search.

    Raises:
        ConfigError: a subnet already, a keep ratio out of the space's reach, a band that nothing meets, texts that do
            not fit the model, or a folder of a search with other settings.
        ValueError: statistics or repaired weights are not finite.
    """
    check_dense(config)
    check(config.router is None, "model", "a model without routers", config.router)
    params = model.stack(params)
    tell = on_stage or (lambda stage: None)
    space = make_space(config, settings.budget.keep, settings.space)
    if settings.method != "depth":
        _check_reach(config, settings.budget, space)
    if settings.method == "search" and folder is not None:
        check_settings(folder, _identity(params, config, texts, settings))

    tell("importance")
    scores, influence = _scores(params, config, texts, settings, folder)
    candidates, fitness = 0, None
    if settings.method == "depth":
        genome = depth_only(config, influence, settings.budget)
    else:
        ground = make_ground(config, scores, settings.budget, space)
        genome = adaptive(ground) if settings.method == "fluctuation" else uniform(ground)
    if settings.method == "search":
        best, candidates = _evolved(params, config, texts, settings, ground, folder, tell, progress)
        genome, fitness = best.genome, best.loss

    def perplexity(params: Params, config: LlamaConfig, *genomes: Genome) -> list[float]:
        net = make_supernet(params, config, texts.heldout)
        losses = scorer(net, config, batch=len(genomes))(genomes)
        return [math.exp(min(loss, 700.0)) for loss in losses]

    everything = whole(config)
    dense, before = perplexity(params, config, everything, genome)
    subnet, subnet_config, after = zero_filled(params, genome), config, before
    rows: tuple[RepairReport, ...] = ()
    if settings.repair is not None:
        tell("repair")
        subnet, subnet_config, rows = repair(params, config, texts.calibration, genome, settings.repair,
                                             batch_size=settings.batch_size)  # fmt: skip
        after, _ = perplexity(subnet, subnet_config, genome, genome)
    sizes, dense_sizes = Sizes.of(subnet_config), Sizes.of(config)
    count, total = sizes.count(genome), dense_sizes.count(everything)
    report = Report(
        method=settings.method,
        parameters=count,
        dense_parameters=total,
        keep=count / total,
        keep_decoder=(count - sizes.ends) / (total - sizes.ends),
        perplexity_dense=dense,
        perplexity_before=before,
        perplexity=after,
        candidates=candidates,
        fitness=fitness,
        repair=rows,
        genome=to_json(genome),
    )
    return Subnet(subnet, subnet_config, genome, report)


def score_kinds(settings: SearchConfig) -> Score:
    """The scores that a method ranks by."""
    kinds: dict[str, Score] = {
        "magnitude": Magnitude(),
        "fluctuation": Fluctuation(),
        "random": RandomScore(settings.evolution.seed),
    }
    return kinds.get(settings.method, settings.score)


def _check_reach(config: LlamaConfig, budget: Budget, space: Space) -> None:
    """Before anything is computed: raises what `make_ground` raises, whatever the scores."""
    make_ground(config, Importance(*(np.zeros(x.shape, np.float32) for x in whole(config)[1:])), budget, space)


def _scores(
    params: Params, config: LlamaConfig, texts: Texts, settings: SearchConfig, folder: Path | None
) -> tuple[Importance, np.ndarray]:
    """Importance and influence of layers. A search keeps them in its folder: scores computed anew might differ in the
    last bit."""
    stored = folder / "scores.npz" if folder is not None and settings.method == "search" else None
    if stored is not None and stored.exists():
        with np.load(stored, allow_pickle=False) as file:
            return Importance(*(file[name] for name in Importance._fields)), file["influence"]
    survey = importance(params, config, texts.calibration, (score_kinds(settings),), batch_size=settings.batch_size)
    if stored is not None:
        write_arrays(stored, survey.scores[0]._asdict() | {"influence": survey.influence})
    return survey.scores[0], survey.influence


def _evolved(
    params: Params,
    config: LlamaConfig,
    texts: Texts,
    settings: SearchConfig,
    ground: Ground,
    folder: Path | None,
    tell: Callable[[str], None],
    progress: Callable[[Progress], None] | None,
) -> tuple[Candidate, int]:
    """The survivor of the search that is best on the held-out windows, and how many candidates there were."""
    levels, evolution = None, settings.evolution
    if settings.levels:
        tell("levels")
        levels = repair_levels(params, config, texts.calibration, ground.scores, ground.space.values.tolist(),
                               ground.space.ffn.tolist(), batch_size=settings.batch_size)  # fmt: skip
        evolution = dataclasses.replace(evolution, mask_rate=0.0, first_mask_rate=0.0)
    batch = settings.together * max(1, 20 // settings.together)

    def fitness(windows: np.ndarray) -> Any:
        net = make_supernet(params, config, windows, kl=settings.fitness == "kl", levels=levels)
        return scorer(net, config, batch=batch, together=settings.together)

    tell("search")
    state = evolve(starts(ground), fitness(texts.fitness), ground, evolution, folder=folder, progress=progress)
    heldout = fitness(texts.heldout)([survivor.genome for survivor in state.parents])
    return state.parents[int(np.argmin(heldout))], len(state.visited)


def _identity(params: Params, config: LlamaConfig, texts: Texts, settings: SearchConfig) -> dict[str, Any]:
    """What a search depends on, but for the number of its epochs, which may grow, and for what comes after it."""
    values = to_dict(settings)
    del values["evolution"]["epochs"], values["repair"], values["batch_size"], values["together"]
    flat = {f"{part}.{name}": x for part in ("budget", "space", "evolution") for name, x in values.pop(part).items()}
    text = hashlib.sha256(b"".join(np.ascontiguousarray(part, np.int32).tobytes() for part in texts)).hexdigest()
    return values | flat | {"text": text[:16], "model": f"{hash_tree(params):016x}", "shape": to_dict(config)}


def hash_tree(tree: Any) -> int:
    """A number for the bits of a tree of arrays: sums modulo 2^32, which no order of summation changes."""
    sums = np.array(jax.device_get(jax.tree.leaves(jax.tree.map(_sum_of_bits, tree))), np.uint32)
    return int.from_bytes(hashlib.sha256(sums.tobytes()).digest()[:8], "big")


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
