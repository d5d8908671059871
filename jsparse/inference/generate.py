"""Text generation: prompts of any lengths in one batch, a static key-value cache, the decode loop inside one jit.

Prompts are left-padded to a common bucket of lengths, and the cache's size is rounded up likewise, so that few shapes
are ever compiled. A row's text depends on its prompt and seed alone: what else is in the batch, how far it was padded
and whether it was streamed change nothing but float rounding (and RoPE, where it scales with the longest row).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.config import LlamaConfig, check
from jsparse.inference import decoder
from jsparse.inference.costs import choose
from jsparse.inference.decoder import Decoder, Implementation, can_skip, pack
from jsparse.inference.windows import check_ids, positions, replicated
from jsparse.model import Cache, Params, init_cache, logits, trunk, unstack
from jsparse.parallel import batch_shards, round_up
from pallas_kernels.backend import Implementation as KernelImplementation

STREAM = 8  # tokens between two calls back to the host when streaming


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Filters apply in this order, each to what the one before left over; their defaults
    keep everything."""

    temperature: float = 0.0  # divides the logits; 0 is greedy: always the likeliest token
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    min_p: float = 0.0  # keep tokens at least this share as probable as the likeliest

    def __post_init__(self) -> None:
        check(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        check(self.top_k is None or self.top_k > 0, "top_k", "a positive number", self.top_k)
        check(0 < self.top_p <= 1, "top_p", "a probability above 0", self.top_p)
        check(0 <= self.min_p <= 1, "min_p", "a share from 0 to 1", self.min_p)


@dataclass(frozen=True)
class Generation:
    """Texts that followed the prompts, and what they took.

    The first call for a shape compiles: its `prefill_seconds` include that. `decode_seconds` never do.
    """

    tokens: list[list[int]]  # of each prompt: the new ids, a stop id included where one ended the text
    prompt_tokens: int
    prefill_seconds: float  # from the prompts to each row's first token
    decode_seconds: float  # all further tokens
    implementation: Implementation  # that decoding took

    @property
    def decode_tokens_per_second(self) -> float:
        """Of all rows together; the first token of a row belongs to the prefill."""
        decoded = sum(len(row) - 1 for row in self.tokens)
        return decoded / self.decode_seconds if decoded else 0.0


def generate(
    params: Params | Decoder,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    on_token: Callable[[int, int], None] | None = None,
    implementation: Implementation | Literal["auto"] = "auto",
) -> Generation:
    """Continues prompts, each until a stop id or `max_new_tokens`.

    Computes in the dtype of `params`, and under the mesh in context (`jax.set_mesh`).

    Args:
        params: of `jsparse.model`, or packed by `jsparse.inference.pack`. What is not packed is packed first, which
            copies the weights: for many calls do that once. Where a mesh of several devices is in context the model's
            own layers run instead, on parameters that are sharded as they are.
        prompts: token ids, rows of any lengths of at least 1.
        max_new_tokens: the most tokens a row gets.
        sampling: how tokens are chosen, greedily by default.
        stop_ids: a row ends with the first of these; by default the model's end tokens. () never stops.
        seed: of each row; a single number is the first row's, and the rows after it take the numbers after it. A row
            of one seed and prompt gives one text in whatever batch. A text continued from its own result goes on as
            it would have.
        on_token: called with (row, id) of every new token, as they come.
        implementation: how a step computes its FFNs: "dense" whole, "sparse" by the best kernel that skips what is not
            used, a kernel's name by that one; "auto" is the faster of the first two, given what the prompt used of the
            model (`jsparse.inference.costs`). Prompts are computed dense. "dense" unpacks packed N:M weights first: it
            takes the memory of the dense ones beside them, which "sparse" does not.

    Raises:
        ConfigError: no prompt, an empty one, unknown ids, more tokens than the model has positions, or an
            implementation for a model of which it can skip nothing.
    """
    rows = [np.asarray(row) for row in prompts]
    check(len(rows) > 0, "prompts", "at least one", len(rows))
    for b, row in enumerate(rows):
        check(row.ndim == 1 and row.size > 0 and row.dtype.kind in "iu", f"prompts[{b}]", "a list of token ids",
              row.tolist())  # fmt: skip
        check_ids(row, config, f"prompts[{b}]")
    check(max_new_tokens > 0, "max_new_tokens", "a positive number", max_new_tokens)
    longest, limit = max(map(len, rows)), positions(config)
    check(longest + max_new_tokens <= limit, "max_new_tokens",
          f"prompt and new tokens within the model's {limit} positions", f"{longest} + {max_new_tokens}")  # fmt: skip
    seeds = range(seed, seed + len(rows)) if isinstance(seed, int) else seed
    check(len(seeds) == len(rows), "seed", f"one number, or one of each of the {len(rows)} prompts", seed)
    stops = list(config.eos_token_ids if stop_ids is None else stop_ids)
    names = "auto", *get_args(Implementation)
    check(implementation in names, "implementation", f"one of {', '.join(names)}", implementation)

    length = bucket(longest)
    batch = round_up(len(rows), batch_shards())  # rows that fill it up are stopped from the start
    padded = np.zeros((batch, length), np.int32)
    start = np.full(batch, length - 1, np.int32)
    for b, row in enumerate(rows):
        start[b] = length - len(row)
        padded[b, start[b] :] = row
    choice = Choice(
        seeds=np.resize(np.array([s % 2**32 for s in seeds], np.uint32), batch),
        stops=np.array(stops + [-1] * (-len(stops) % 8), np.int32),  # few shapes
        filters=_filters(sampling),
    )
    end = length + max_new_tokens
    step = STREAM if on_token else max_new_tokens
    texts: list[list[int]] = [[] for _ in rows]
    if isinstance(params, dict):
        params = unstack(params) if _sharded() else pack(params, config)
    if implementation not in ("auto", "dense"):
        check(isinstance(params, Decoder), "implementation", "auto or dense on several devices", implementation)
        check(isinstance(params, Decoder) and can_skip(params, config), "implementation",
              "auto or dense, as no kernel knows what this model leaves out", implementation)  # fmt: skip

    began = time.perf_counter()
    surplus = np.arange(batch) >= len(rows)
    state, shares = _prefill(params, padded, start, surplus, choice, config=config, slots=bucket(end))
    if implementation == "auto":
        shares = jax.device_get(shares)
        implementation = choose(params, config, batch, shares) if isinstance(params, Decoder) else "dense"
    if implementation == "dense" and isinstance(params, Decoder):
        params = decoder.unpacked(params)  # once, not at every step
    decode = functools.partial(_decode, config=config, implementation=implementation)
    state = decode(params, state, choice, 0)  # decodes nothing, but compiles
    known = _take(state, length, texts, stops, on_token)
    prefilled = time.perf_counter()
    while known < end and not np.all(state.stopped):
        state = decode(params, state, choice, min(end, known + step))
        known = _take(state, known, texts, stops, on_token)
    return Generation(texts, sum(map(len, rows)), prefilled - began, time.perf_counter() - prefilled, implementation)


def bucket(n: int) -> int:
    """The next of 4 lengths an octave, all of them multiples of 16: at most a quarter is padding beyond 64."""
    return round_up(n, max(16, 2 ** (n.bit_length() - 3)))


def _take(
    state: "State", known: int, texts: list[list[int]], stops: list[int], on_token: Callable[[int, int], None] | None
) -> int:
    """Moves the tokens of slots from `known` on to the texts; returns the number of slots that are known now."""
    filled = int(state.cache.length) + 1
    for column in np.asarray(state.tokens)[: len(texts), known:filled].T.tolist():
        for row, (text, token) in enumerate(zip(texts, column, strict=True)):
            if text and text[-1] in stops:
                continue
            text.append(token)
            if on_token:
                on_token(row, token)
    return filled


# --------------------------------------------------------------------------------------------------------------------
# On the device
# --------------------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """What the choice of the next token depends on, besides its logits."""

    seeds: Any  # uint32 [B]
    stops: Any  # int32 [stop ids], -1 for none
    filters: dict[str, Any]  # arguments of `filter_logits`; none: greedy


class State(NamedTuple):
    cache: Cache
    tokens: jax.Array  # int32 [B, S], the text in its slots; always one token more than the cache holds
    stopped: jax.Array  # bool [B]


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _prefill(
    params: Params | Decoder,
    prompts: jax.Array,
    start: jax.Array,
    stopped: jax.Array,
    choice: Choice,
    *,
    config: LlamaConfig,
    slots: int,
) -> tuple[State, jax.Array | None]:
    """The state after left-padded prompts [B, T] and the first token of each, and what their last tokens used of each
    layer (`decoder.trunk`)."""
    shares = None
    if isinstance(params, Decoder):
        cache = decoder.empty_cache(params, prompts.shape[0], slots, start, config)
        x, filled, shares = decoder.trunk(params, prompts, config, cache)
        scores = decoder.logits(x[:, -1], params)
    else:
        cache = init_cache(params, prompts.shape[0], slots, start)
        scores, filled = _forward(params, prompts, config, cache)
    tokens = jnp.pad(prompts, ((0, 0), (0, slots - prompts.shape[1])))
    return _append(State(filled, tokens, stopped), scores, choice), shares


def _forward(params: Params, tokens: jax.Array, config: LlamaConfig, cache: Cache) -> tuple[jax.Array, Cache]:
    """By the model's own layers: the logits after tokens [B, T], float32 [B, V], and the cache with them."""
    x, _, filled = trunk(params, tokens, config, cache=cache)
    assert filled is not None
    return logits(x[:, -1], params), filled


def _sharded() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


@functools.partial(jax.jit, static_argnames=("config", "implementation", "rest"), donate_argnames="state")
def _decode(
    params: Params | Decoder,
    state: State,
    choice: Choice,
    until: int,
    *,
    config: LlamaConfig,
    implementation: Implementation,
    rest: KernelImplementation | None = None,
) -> State:
    """Decodes until `until` slots hold tokens or every row has stopped."""

    def more(state: State) -> jax.Array:
        return (state.cache.length + 1 < until) & ~jnp.all(state.stopped)

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.cache.length, 1, axis=1)
        if isinstance(params, Decoder):
            x, cache = decoder.step(params, last[:, 0], config, state.cache, implementation, rest)
            scores = decoder.logits(x, params, rest)
        else:
            scores, cache = _forward(params, last, config, state.cache)
        return _append(state._replace(cache=cache), scores, choice)

    return jax.lax.while_loop(more, step, state)


def _append(state: State, scores: jax.Array, choice: Choice) -> State:
    """Chooses the next token of every row by its logits [B, V]."""
    slot = state.cache.length
    if choice.filters:
        keys = jax.vmap(lambda seed, p: jax.random.fold_in(jax.random.key(seed), p))(
            choice.seeds, slot - state.cache.start
        )
        new = jax.vmap(jax.random.categorical)(keys, filter_logits(scores, **choice.filters))
    else:
        new = jnp.argmax(scores, axis=-1)
    new = jnp.where(state.stopped, 0, new).astype(jnp.int32)[:, None]
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, new, slot, axis=1)
    stopped = state.stopped | jnp.any(new == choice.stops[None], axis=1)
    return State(state.cache, *replicated((tokens, stopped)))


def filter_logits(
    scores: jax.Array,
    temperature: float | jax.Array,
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array | None = None,
    min_p: float | jax.Array | None = None,
) -> jax.Array:
    """Logits float32 [B, V] over temperature, -inf where a filter drops them. Numbers may be traced values.

    The filters and their order are those of Hugging Face's logits warpers. Each keeps a likeliest part of the
    vocabulary, so they come down to one cut a row; all tokens that tie at the cut are kept.
    """
    scores = scores / temperature
    cut = jnp.full(scores.shape[:1], -jnp.inf)
    if top_k is not None or top_p is not None:
        ranked = jnp.sort(scores, axis=-1, descending=True)
        if top_k is not None:
            cut = ranked[:, jnp.minimum(top_k, scores.shape[-1]) - 1]
        if top_p is not None:
            p = jax.nn.softmax(jnp.where(ranked >= cut[:, None], ranked, -jnp.inf), axis=-1)
            kept = jnp.cumsum(p, axis=-1) - p < top_p  # what is likelier does not suffice
            cut = jnp.maximum(cut, jnp.min(ranked, axis=-1, where=kept, initial=jnp.inf))
    if min_p is not None:
        cut = jnp.maximum(cut, jnp.max(scores, axis=-1) + jnp.log(min_p))
    return jnp.where(scores >= cut[:, None], scores, -jnp.inf)


def _filters(sampling: Sampling) -> dict[str, Any]:
    """The settings that are on. Which those are is compiled in; their values are not."""
    if sampling.temperature == 0:
        return {}
    values = {f.name: (getattr(sampling, f.name), f.default) for f in dataclasses.fields(sampling)}
    return {name: value for name, (value, default) in values.items() if value != default}
