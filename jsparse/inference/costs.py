"""Whether skipping pays: the dense and the sparse time of a layer's FFN, from bytes and measured rates.

A step's time is close to a straight line in the bytes it reads: what its kernels take to start and to drain, plus bytes
over a rate. `LINES` holds both, fitted by `jsparse bench ffn` to its own measurements (docs/decoding.md). How many
bytes a step will read is known from the prompt: `jsparse.inference.decoder.used_share`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from jsparse.config import LlamaConfig
from jsparse.inference.decoder import Decoder, Ffn, Implementation, Kind, sparse_kind


@dataclass(frozen=True)
class Line:
    """Microseconds of a layer's FFN: start + bytes / rate."""

    start: float  # us
    rate: float  # bytes a us

    def us(self, size: float) -> float:
        return self.start + size / self.rate


Lines = dict[Kind | Literal["dense"], dict[int, Line]]  # by what is computed, then by the rows of the batch

# By the bytes of an FFN that was measured, of which the nearest counts: small layers neither fill a GPU nor start as
# large ones do. A batch takes the next larger entry. bfloat16 on an H100 80GB HBM3; docs/results/ffn_*.json. At 8
# and 16 rows "blocks" is Triton's kernel; Mosaic GPU's, taken there since, was faster where it was measured.
LINES: dict[int, Lines] = {
    270_532_608: {  # LLaMA2-7B
        "dense": {1: Line(8.9, 3.07e6), 2: Line(7.7, 3.07e6), 4: Line(10.7, 3.07e6), 8: Line(14.2, 3.06e6),
                  16: Line(18.8, 3.07e6)},
        "blocks": {1: Line(7.8, 2.77e6), 2: Line(13.6, 2.59e6), 4: Line(28.4, 3.41e6), 8: Line(38.3, 3.48e6),
                   16: Line(42.7, 3.11e6)},
        "neurons": {1: Line(11.3, 3.08e6), 2: Line(11.6, 2.38e6), 4: Line(25.8, 1.89e6), 8: Line(95.4, 0.42e6)},
        "predicted": {1: Line(16.6, 2.80e6), 2: Line(19.2, 2.06e6), 4: Line(29.1, 1.51e6), 8: Line(66.8, 0.46e6)},
        "packed": {1: Line(13.0, 3.06e6)},  # one size only; of more rows it is slower than dense
    },
    5_308_416: {  # SmolLM2-135M
        "dense": {1: Line(9.7, 3.07e6), 8: Line(8.5, 3.06e6)},
        "blocks": {1: Line(5.0, 1.34e6), 8: Line(15.5, 2.30e6)},
        "neurons": {1: Line(4.5, 0.98e6), 8: Line(15.0, 0.26e6)},
        "predicted": {1: Line(7.8, 0.23e6)},
    },
}  # fmt: skip


def choose(decoder: Decoder, config: LlamaConfig, batch: int, shares: np.ndarray | None) -> Implementation:
    """The faster implementation of a model for a batch whose rows use `shares` [L] of its layers.

    Dense where it is not known: on other devices than GPUs, and for larger batches than were measured.
    """
    kinds = [sparse_kind(layer.ffn, config) for layer in decoder.layers]
    if shares is None or jax.default_backend() != "gpu":
        return "dense"
    dense_us = sparse_us = 0.0
    for layer, kind, share in zip(decoder.layers, kinds, shares, strict=True):
        ffn = layer.ffn
        matrices = _dense_nbytes(ffn)
        lines = LINES[min(LINES, key=lambda size: abs(math.log(size / matrices)))]
        dense, sparse = _line(lines, "dense", batch), _line(lines, kind or "dense", batch)
        if dense is None or sparse is None:
            return "dense"
        whole = matrices + _nbytes(ffn.router)  # routers mask the dense implementation too
        dense_us += dense.us(whole)
        sparse_us += sparse.us(bytes_read(ffn, kind, float(share)) if kind else whole)
    return "sparse" if sparse_us < dense_us else "dense"


def bytes_read(ffn: Ffn, kind: Kind, share: float) -> float:
    """Bytes of the weights that a step reads which uses a share of the blocks or neurons of one layer."""
    matrices = _nbytes(ffn.weights)
    match kind:
        case "packed":
            return matrices
        case "blocks":
            return share * matrices + _nbytes(ffn.router)
        case "neurons":
            return (1 + 2 * share) / 3 * matrices
        case "predicted":
            return share * matrices + _nbytes(ffn.predictor)


def _line(lines: Lines, name: Kind | Literal["dense"], batch: int) -> Line | None:
    fitting = [rows for rows in lines.get(name, ()) if rows >= batch]
    return lines[name][min(fitting)] if fitting else None


def _dense_nbytes(ffn: Ffn) -> int:
    """Of the FFN's matrices, packed ones unpacked."""
    return sum(math.prod(w.shape) * w.dtype.itemsize for w in ffn.weights)


def _nbytes(tree: object) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))
