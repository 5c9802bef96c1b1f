"""The order of training data: a mix of sources, and a shuffle of each, as pure functions of a count.

Integers alone and nothing remembered, so that the billionth sequence costs as much as the first, and comes out the same
on every machine. See packed_dataset.py for how the two make up the global order.
"""

from typing import Literal, NamedTuple

import numpy as np

# --- a permutation of any number of things in constant memory --------------------------------------------------------

ROUNDS = 6


def permute(place: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where each of `place` (in [0, n)) lies in the random permutation of [0, n) that `key` (uint64) names.

    A Feistel network on pairs: place = left·b + right with left in [0, a), right in [0, b), a·b barely above n. Each
    round adds to one half a hash of the other, modulo its size, which can be undone; so it is a bijection of [0, a·b).
    A result that is not below n is sent through again until it is ("cycle walking": Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002), which happens to one in sqrt(n). At least 16·16 pairs: in a handful of them so few
    rounds would not mix well.
    """
    b = max(16, int(np.ceil(np.sqrt(n))))
    a, b = np.uint64(max(16, -(-n // b))), np.uint64(b)
    round_keys = hash64(key + np.arange(ROUNDS, dtype=np.uint64)[:, None])  # (ROUNDS, len(place))
    place, todo = place.astype(np.uint64), np.arange(len(place))
    while len(todo):
        left, right = np.divmod(place[todo], b)
        for r in range(0, ROUNDS, 2):
            left = (left + hash64(right ^ round_keys[r, todo]) % a) % a
            right = (right + hash64(left ^ round_keys[r + 1, todo]) % b) % b
        place[todo] = left * b + right
        todo = todo[place[todo] >= n]
    return place.astype(np.int64)


def hash64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a mix of all 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- the mix of sources ----------------------------------------------------------------------------------------------

SHARE_BITS = 30  # shares are fixed-point: whole numbers of 2^-30, so that the order is the same on every machine


class Segment(NamedTuple):
    """A stretch of the global order with constant shares."""

    start: int
    drawn: list[int]  # sequences drawn from each source before `start`
    shares: list[int]  # the share of each source in what the sources before it leave, in 2^-SHARE_BITS


class Mix:
    """Which source each global index is drawn from: in any stretch of the order, as near to the weights as whole
    numbers allow.

    Of the first i draws, round(i·share) are from the first source, round of its share of the rest from the second, and
    so on; an index belongs to the source whose count it raises.

    Args:
        weights: by source; not negative, only their ratios count.
        limits: sequences that the run may draw from each source, None for no limit.
        at_limit: "stop" at the first limit, or go on with the other sources in their ratios ("renormalise").
        start: first global index of this mix, when it takes over from another in mid-run, ...
        drawn: ... and what was drawn from each source before it, so that nothing is drawn twice.
    """

    def __init__(
        self,
        weights: dict[str, float],
        limits: dict[str, int | None],
        at_limit: Literal["stop", "renormalise"],
        start: int = 0,
        drawn: dict[str, int] | None = None,
    ):
        self.names = sorted(weights)  # so that the order in a configuration file does not matter
        self.weights, self.limits, self.at_limit = weights, limits, at_limit
        self.start, self.drawn = start, drawn or {}
        self._active = [s for s, name in enumerate(self.names) if weights[name] > 0]
        self.segments: list[Segment] = []
        self.end: int | None = None
        """Global index after the last, None when the sources are repeated without end"""
        self._lay_out_segments()

    def state_dict(self) -> dict:
        """The constructor's arguments."""
        return {key: getattr(self, key) for key in ("weights", "limits", "at_limit", "start", "drawn")}

    def _lay_out_segments(self) -> None:
        start, drawn = self.start, [self.drawn.get(name, 0) for name in self.names]
        active = self._active
        while active:
            shares = self._shares(active)
            self.segments.append(Segment(start, drawn, shares))
            limits = {s: self.limits[self.names[s]] for s in active}
            lengths = {s: _draws_until(shares, s, n - drawn[s]) for s, n in limits.items() if n is not None}
            if not lengths:
                return
            length = min(lengths.values())
            start += length
            drawn = [before + count for before, count in zip(drawn, _counts(shares, length), strict=True)]
            active = [s for s in active if lengths.get(s) != length] if self.at_limit == "renormalise" else []
        self.end = start

    def _shares(self, active: list[int]) -> list[int]:
        shares, whole = [0] * len(self.names), 1 << SHARE_BITS
        for position, s in enumerate(active):
            left = sum(self.weights[self.names[t]] for t in active[position:])
            shares[s] = min(max(round(self.weights[self.names[s]] / left * whole), 1), whole - 1)
        shares[active[-1]] = whole
        return shares

    def __str__(self) -> str:
        at_limit = f", {self.at_limit} at {self.limits} sequences" if any(self.limits.values()) else ""
        return f"{self.weights}{at_limit}"

    def same_order(self, other: "Mix") -> bool:
        """Whether both ask for the same, wherever they start; only the ratios of weights count."""
        mine, its = ((m.names, m._shares(m._active), m.limits, m.at_limit) for m in (self, other))
        return mine == its

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each global index: the number of its source in `names`, and which sequence of that source it is.

        Raises: ValueError for an index before this mix took over.
        """
        if len(indices) and indices.min() < self.start:
            raise ValueError(f"sequence {indices.min()} was drawn before this mix began, at {self.start}")
        source, k = np.zeros_like(indices), np.zeros_like(indices)
        segment_of = np.searchsorted([segment.start for segment in self.segments], indices, side="right") - 1
        for number in np.unique(segment_of):
            start, drawn, shares = self.segments[number]
            chosen = np.flatnonzero(segment_of == number)
            rest = indices[chosen] - start
            for s, share in enumerate(shares):
                count = _count(rest, share)
                mine = _count(rest + 1, share) > count
                source[chosen[mine]] = s
                k[chosen[mine]] = count[mine] + drawn[s]
                chosen, rest = chosen[~mine], (rest - count)[~mine]
        return source, k

    def drawn_before(self, index: int) -> dict[str, int]:
        """Sequences drawn from each source before a global index."""
        segment = max((segment for segment in self.segments if segment.start <= index), key=lambda s: s.start)
        counts = _counts(segment.shares, index - segment.start)
        return self.drawn | {n: b + c for n, b, c in zip(self.names, segment.drawn, counts, strict=True)}


def _count(draws, share: int):
    """round(draws · share / 2^SHARE_BITS), exact; split, so that int64 arrays do not overflow."""
    high, low = draws >> SHARE_BITS, draws & ((1 << SHARE_BITS) - 1)
    return high * share + ((low * share + (1 << SHARE_BITS - 1)) >> SHARE_BITS)


def _counts(shares: list[int], draws: int) -> list[int]:
    counts = []
    for share in shares:
        counts.append(_count(draws, share))
        draws -= counts[-1]
    return counts


def _draws_until(shares: list[int], source: int, limit: int) -> int:
    """The most draws that take no more than `limit` from a source, by bisection of its count."""
    low, high = 0, 1
    while _counts(shares, high)[source] <= limit:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _counts(shares, middle)[source] <= limit else (low, middle)
    return low
