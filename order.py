"""The order of rows: a shuffle without memory, and several corpora drawn in exact shares.

    python -m pytest tests/test_order.py

Everything is a pure function of the seed and of a sample's number, so that a run goes on from a
number and any count of ranks sees the same. No torch import here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import gcd, lcm

import numpy as np

from config import UserError

MAX_CYCLE = 100_000  # samples after which a mixture repeats which corpus is drawn


def permuted_index(i, n: int, seed: int, epoch: int):
    """Where a shuffle of range(n) puts `i` (an int, or an int array), without storing the shuffle.

    A Feistel network over the next even power of two is a bijection; walking its cycle until the
    value is below n keeps it one on range(n) (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). Fewer than four passes are expected.
    """
    index = np.array(i, dtype=np.uint64, ndmin=1)
    assert 1 <= n < 1 << 62 and (index < n).all(), "index outside range(n)"
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    key = hashlib.blake2b(f"{seed}/{epoch}/{n}".encode(), digest_size=64).digest()
    keys = np.frombuffer(key, "<u8")
    walking = np.arange(index.size)
    while walking.size:
        x = index[walking]
        left, right = x >> shift, x & mask
        for round_key in keys:
            left, right = right, left ^ (hashed(right ^ round_key) & mask)
        index[walking] = (left << shift) | right
        walking = walking[index[walking] >= n]
    return index.astype(np.int64) if np.ndim(i) else int(index[0])


def hashed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit changes about half of the output bits."""
    x = x.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def whole_weights(weights: Sequence[Fraction | int]) -> list[int]:
    """The smallest integers in the ratio of `weights`."""
    parts = [Fraction(w) for w in weights]
    scale = lcm(*(p.denominator for p in parts))
    whole = [int(p * scale) for p in parts]
    return [w // gcd(*whole) for w in whole]


def corpus_cycle(weights: Sequence[Fraction | int]) -> np.ndarray:
    """int64 [D]: which corpus sample 0, 1, ..., D - 1 is of; then it begins again. D is the sum of
    `whole_weights`.

    Of n samples, K corpora of weight w_k / D get n w_k / D each, to within 1 - 1 / (2K - 2):
    among those far enough behind their share goes the one that must be drawn soonest (Tijdeman,
    "The chairman assignment problem", 1980). Raises `UserError` if D is beyond MAX_CYCLE.
    """
    whole = whole_weights(weights)
    count, period = len(whole), sum(whole)
    if period > MAX_CYCLE:
        raise UserError(
            f"--data: the weights {', '.join(f'{float(w):g}' for w in weights)} come out even"
            f" after {period} samples only, at most {MAX_CYCLE} expected; use fewer digits"
        )
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    cycle, behind = np.empty(period, dtype=np.int64), [0] * count  # times D
    slack, unit = period * (2 * count - 3), 2 * count - 2
    for n in range(period):
        behind = [b + w for b, w in zip(behind, whole, strict=True)]
        k = min(
            (k for k in range(count) if behind[k] * unit >= period),
            key=lambda k: Fraction(slack - unit * behind[k], whole[k]),
        )
        cycle[n] = k
        behind[k] -= period
    return cycle


class Order:
    """Sample i of a run -> its row, for corpora of `sizes` rows drawn in the shares of `weights`.

    Corpus k's j-th sample is row `permuted_index(j % n, n, seed, j // n)` of its n; its rows are
    numbered from `first[k]` on.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction | int], seed: int):
        self.sizes, self.seed = list(sizes), seed
        self.first = list(accumulate(sizes, initial=0))
        self.cycle = corpus_cycle(weights)
        drawn = self.cycle[:, None] == np.arange(len(self.sizes))
        self.before = np.cumsum(np.vstack([np.zeros_like(drawn[:1]), drawn]), axis=0)  # [D + 1, K]

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """int64, as `samples`: their rows."""
        turns, at = np.divmod(samples, len(self.cycle))
        corpus, rows = self.cycle[at], np.empty_like(samples)
        for k, size in enumerate(self.sizes):
            mine = corpus == k
            drawn = turns[mine] * self.before[-1, k] + self.before[at[mine], k]
            epochs, index = np.divmod(drawn, size)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                index[here] = permuted_index(index[here], size, self.seed, int(epoch))
            rows[mine] = index + self.first[k]
        return rows

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` each corpus gives."""
        turns, at = divmod(samples, len(self.cycle))
        return (turns * self.before[-1] + self.before[at]).tolist()
