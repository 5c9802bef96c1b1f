"""Evaluation questions that stand in the training data: runs of n tokens that both have.

    grams = Grams(question_ids, n=13)
    for shard_tokens in ...:
        grams.mark(shard_tokens)
    grams.found          # of each question, how many of its runs were met

Llama 2 (Touvron et al. 2023, arXiv:2307.09288, A.6) compares tokens, too; GPT-3 (Brown et al. 2020, arXiv:2005.14165,
appendix C) compared 13 words. Tokens need no decoding, and 13 of them are about ten words. A run is compared by a hash
of 64 bits: among 10^12 tokens and 10^6 runs of questions, one false match is expected in some twenty checks.
"""

from collections.abc import Sequence

import numpy as np

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses nothing modulo 2^64
TABLE_BITS = 26


class Grams:
    """The runs of n tokens of all questions, and which of them were met."""

    def __init__(self, questions: Sequence[Sequence[int]], n: int = 13) -> None:
        """
        Args:
            questions: ids of each question's text, no delimiters; shorter ones than n have no runs and cannot be found.
        """
        if n < 1:
            raise ValueError(f"n is {n}: a run has 1 or more tokens")
        self.n = n
        hashes = [rolling_hashes(np.asarray(ids), n) for ids in questions]
        self.counts = np.array([len(h) for h in hashes])
        """Runs of each question."""
        self._owner = np.repeat(np.arange(len(hashes)), self.counts)
        self._hashes, self._inverse = np.unique(np.concatenate(hashes or [np.empty(0, np.uint64)]), return_inverse=True)
        self.met = np.zeros(len(self._hashes), bool)
        # Nearly all tokens of the data belong to no question: a look into a table of bits says so for most.
        self._table = np.zeros(1 << TABLE_BITS, bool)
        self._table[self._slots(self._hashes)] = True

    def _slots(self, hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - TABLE_BITS)

    def mark(self, tokens: np.ndarray) -> int:
        """Note the runs that occur in a stretch of the data; returns at how many places one does."""
        hashes = rolling_hashes(tokens, self.n)
        hashes = hashes[self._table[self._slots(hashes)]]
        at = np.searchsorted(self._hashes, hashes)
        at[at == len(self._hashes)] = 0
        at = at[self._hashes[at] == hashes] if len(self._hashes) else at[:0]
        self.met[at] = True
        return len(at)

    @property
    def found(self) -> np.ndarray:
        """Of each question, how many of its runs were met."""
        return np.bincount(self._owner, self.met[self._inverse.reshape(-1)], len(self.counts)).astype(int)


def rolling_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of every run of n tokens: (N,) integers -> (N - n + 1,) uint64, empty where there are fewer than n."""
    if len(tokens) < n:
        return np.empty(0, np.uint64)
    # Mixed first, so that neighbouring ids differ in all bits: polynomials of small numbers collide.
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * FACTOR
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    end = len(tokens) - n + 1
    out = mixed[:end].copy()
    for i in range(1, n):
        out *= FACTOR
        out += mixed[i : i + end]
    out ^= out >> np.uint64(31)
    return out * np.uint64(0x94D049BB133111EB)
