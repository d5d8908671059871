"""Which window comes when, as pure functions: nothing here has a state, so a run resumes by knowing its step."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

_ROUNDS = 6  # of the Feistel network: 4 suffice for large sizes, tiny ones mix better with more
_SHARES = 1 << 16  # resolution of mixture weights


def permute(index: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """A pseudo-random bijection of [0, size), chosen by `key`, at each of `index`. O(1) memory.

    A Feistel network permutes the next power of 4; values that fall outside [0, size) are sent through it again until
    they fall inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 3).

    Args:
        index: [n] integers in [0, size).
        key: numbers of at least 0, such as (seed, source, epoch).

    Returns:
        int64 [n].
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))  # bits of each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return left << half | right

    x = network(np.atleast_1d(np.asarray(index)).astype(np.uint64))
    while (outside := x >= np.uint64(size)).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """Assigns examples 0, 1, 2, ... to sources in proportion to weights, evenly spread.

    One period of the assignment is a table: source k has counts[k] slots in it, at equal distances. Every full period
    has the exact proportions, every stretch of it is within one example a source of them.

    Attributes:
        counts: int64 [sources], slots of each source in a period: the weights, rounded to 1 in 65536, in lowest terms.
    """

    def __init__(self, weights: Sequence[float]):
        shares = np.asarray(weights, np.float64) / np.sum(weights)
        counts = np.maximum(1, np.rint(shares * _SHARES)).astype(np.int64)
        self.counts = counts // np.gcd.reduce(counts)
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in self.counts])
        slot = np.argsort(due, kind="stable")
        self._source = np.repeat(np.arange(len(self.counts)), self.counts)[slot]
        self._rank = np.concatenate([np.arange(n) for n in self.counts])[slot]

    def __call__(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of examples [n]: the source of each, and how many examples before it had the same source; int64 [n] both."""
        period, slot = np.divmod(examples, len(self._source))
        source = self._source[slot]
        return source, period * self.counts[source] + self._rank[slot]


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Packs pieces into windows: longest first, each into the fullest window that still has room for it.

    Best-fit decreasing, as Ding et al., "Fewer Truncations Improve Language Modeling" (2024), section 3.

    Args:
        lengths: [n] in [1, capacity].

    Returns:
        int64 [n], the window of each piece; windows are numbered from 0.
    """
    window_of = np.empty(len(lengths), np.int64)
    with_room: dict[int, list[int]] = {}  # free places -> the windows that have as many
    rooms: list[int] = []  # the keys of with_room, sorted
    windows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, window = capacity, windows
            windows += 1
        else:
            room = rooms[at]
            window = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        window_of[piece] = window
        if room := room - length:
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, []).append(window)
    return window_of
