"""Two models on the same text: how far their predictions are apart. Proves a conversion, prices a compression."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse.config import ConfigError, LlamaConfig, check
from jsparse.inference.windows import Batch, Windows, exp, replicated
from jsparse.model import Params, logits, trunk
from jsparse.model.chunks import by_chunks, kl, nll


@dataclass(frozen=True)
class Comparison:
    """How far model b's predictions are from model a's, over the predicted tokens of a text."""

    max_abs_difference: float  # of logits
    mean_kl: float  # KL(a || b), nats a token
    max_kl: float  # of one token
    top1_agreement: float  # share of tokens where both think the same id most likely
    perplexity_a: float
    perplexity_b: float
    tokens: int
    windows: int
    seq_len: int
    stride: int
    bos: int | None


def compare(
    params_a: Params,
    config_a: LlamaConfig,
    params_b: Params,
    config_b: LlamaConfig,
    tokens: ArrayLike,
    *,
    seq_len: int = 2048,
    stride: int | None = None,
    bos: int | None = None,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares two models of one vocabulary, window by window; the protocol is that of `jsparse.inference.evaluate`.

    Each computes in the dtype of its parameters; logits are float32.

    Raises:
        ConfigError: the vocabularies differ, or the text or the windows fit not both models.
    """
    check(config_a.vocab_size == config_b.vocab_size, "vocab_size", f"the same in both models ({config_a.vocab_size})",
          config_b.vocab_size)  # fmt: skip
    Windows(tokens, config_b, seq_len, stride, bos)  # its context may be the shorter one
    windows = Windows(tokens, config_a, seq_len, stride, bos)
    found = (
        (done, batch, _both(params_a, params_b, batch, config_a, config_b))
        for done, batch in windows.batches(batch_size)
    )
    return _collect(found, windows, progress)


def compare_torch(
    folder: str | Path,
    params: Params,
    config: LlamaConfig,
    tokens: ArrayLike,
    *,
    seq_len: int = 512,
    stride: int | None = None,
    bos: int | None = None,
    batch_size: int = 1,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares with PyTorch: a is the model folder as `transformers` runs it in float32 on the CPU, b is ours.

    Args:
        trust_remote_code: lets transformers execute Python files of the folder. Only for folders you trust.

    Raises:
        ConfigError: torch or transformers are missing, or the vocabularies differ.
        ValueError: transformers cannot load the folder.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"comparing with PyTorch needs the package {error.name}: pip install 'jsparse[torch]'"
        ) from None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code
        ).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if not trust_remote_code and "trust_remote_code" in str(error):
            reason = "it brings Python files; trust_remote_code=True (--trust-remote-code) lets transformers run them"
        raise ValueError(f"{folder}: transformers cannot load it: {reason}") from None
    check(model.config.vocab_size == config.vocab_size, "vocab_size", f"that of {folder} ({model.config.vocab_size})",
          config.vocab_size)  # fmt: skip
    windows = Windows(tokens, config, seq_len, stride, bos)

    def theirs(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(batch.inputs).long(), use_cache=False).logits.numpy()

    found = (
        (done, batch, _against(theirs(batch), params, batch, config)) for done, batch in windows.batches(batch_size)
    )
    return _collect(found, windows, progress)


class Difference(NamedTuple):
    """Of one position; summed over T (the maxima: maximum over T) once the counted positions are taken."""

    max_abs: jax.Array
    max_kl: jax.Array
    kl: jax.Array
    agree: jax.Array
    nll_a: jax.Array
    nll_b: jax.Array


def _difference(a: jax.Array, b: jax.Array, targets: jax.Array) -> Difference:
    """float32 [B, T] each, of logits [B, T, V]."""
    apart = kl(a, b)
    agree = (jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)).astype(jnp.float32)
    return Difference(jnp.max(jnp.abs(a - b), axis=-1), apart, apart, agree, nll(a, targets), nll(b, targets))


def _reduce(each: Difference, counted: jax.Array) -> Difference:
    """[B, T] -> [B]."""
    most = [jnp.max(x, axis=1, where=counted, initial=0.0) for x in each[:2]]
    return replicated(Difference(*most, *(jnp.sum(x, axis=1, where=counted) for x in each[2:])))


@functools.partial(jax.jit, static_argnames=("config_a", "config_b"))
def _both(params_a: Params, params_b: Params, batch: Batch, config_a: LlamaConfig, config_b: LlamaConfig) -> Difference:
    a = trunk(params_a, batch.inputs, config_a)[0]
    b = trunk(params_b, batch.inputs, config_b)[0]

    def chunk(a: jax.Array, b: jax.Array, targets: jax.Array) -> Difference:
        return _difference(logits(a, params_a), logits(b, params_b), targets)

    return _reduce(by_chunks(chunk, a, b, batch.targets), batch.counted)


@functools.partial(jax.jit, static_argnames="config")
def _against(theirs: jax.Array, params: Params, batch: Batch, config: LlamaConfig) -> Difference:
    """Against given logits [B, T, V]."""
    x = trunk(params, batch.inputs, config)[0]

    def chunk(theirs: jax.Array, x: jax.Array, targets: jax.Array) -> Difference:
        return _difference(theirs, logits(x, params), targets)

    return _reduce(by_chunks(chunk, theirs, x, batch.targets), batch.counted)


def _collect(
    found: Iterable[tuple[int, Batch, Difference]], windows: Windows, progress: Callable[[int, int], None] | None
) -> Comparison:
    most, sums, counted = np.zeros(2), np.zeros(4), 0
    for done, batch, difference in found:
        rows = np.asarray(jax.device_get(difference), np.float64)  # [6, B]
        most = np.maximum(most, rows[:2].max(axis=1))
        sums += rows[2:].sum(axis=1)
        counted += int(batch.counted.sum())
        if progress:
            progress(done, windows.count)
    mean_kl, agree, nll_a, nll_b = sums / counted
    if np.isnan(mean_kl):  # XLA's maximum may pass over what is not a number, its sum never does
        most[:] = np.nan
    return Comparison(
        max_abs_difference=float(most[0]),
        mean_kl=float(mean_kl),
        max_kl=float(most[1]),
        top1_agreement=float(agree),
        perplexity_a=exp(nll_a),
        perplexity_b=exp(nll_b),
        tokens=counted,
        windows=windows.count,
        seq_len=windows.seq_len,
        stride=windows.stride,
        bos=windows.bos,
    )
