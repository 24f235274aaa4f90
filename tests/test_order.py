"""Which sample is which row: exact shares at every prefix, every row once an epoch."""

import time
from fractions import Fraction

import numpy as np
import pytest

from config import UserError
from order import Order, corpus_cycle, permuted_index, whole_weights


@pytest.mark.parametrize(
    "weights",
    [
        ["0.7", "0.3"],
        ["0.5", "0.5"],
        ["0.01", "0.01", "0.98"],
        ["1", "1", "1", "1", "1", "0.1", "0.1"],
        ["0.333", "0.333", "0.334"],
        ["5", "0.02", "0.7", "0.11", "0.3"],
        ["0.001", "0.002", "0.003", "0.004", "0.99"],
    ],
)
def test_shares_are_exact_at_every_prefix(weights):
    whole = whole_weights([Fraction(w) for w in weights])
    cycle, total = corpus_cycle([Fraction(w) for w in weights]), sum(whole)
    assert len(cycle) == total
    n = np.arange(1, 3 * total + 4)[:, None]
    counts = np.cumsum(np.resize(cycle, 3 * total + 3)[:, None] == np.arange(len(whole)), axis=0)
    off = np.abs(counts * total - n * np.array(whole)) / total
    assert off.max() <= 1 - 1 / (2 * len(whole) - 2) + 1e-12 < 1
    order = Order([10**9] * len(whole), [Fraction(w) for w in weights], seed=0)
    for k in (0, 1, 5, total - 1, total, total + 3, 2 * total):
        assert order.counts(k) == (counts[k - 1].tolist() if k else [0] * len(whole))


def test_weights_become_the_smallest_integers():
    assert whole_weights([Fraction("0.7"), Fraction("0.30")]) == [7, 3]
    assert whole_weights([Fraction("1e-1"), Fraction("2"), Fraction("0.3")]) == [1, 20, 3]
    with pytest.raises(UserError, match=r"come out even after 1000001 samples only, at most"):
        corpus_cycle([Fraction("1"), Fraction("0.000001")])


def test_the_longest_cycle_takes_seconds_at_most():
    start = time.perf_counter()
    assert len(corpus_cycle([99_991, 7, 2])) == 100_000
    assert time.perf_counter() - start < 20


def test_each_corpus_comes_in_its_own_order():
    """By hand: sample i is the j-th of corpus k, which is its permuted row j."""
    order = Order([11, 4, 30], [3, 1, 2], seed=9)
    samples, drawn, expected = np.arange(100), [0, 0, 0], []
    for i in samples:
        k = order.cycle[i % 6]
        epoch, j = divmod(drawn[k], (11, 4, 30)[k])
        expected.append((0, 11, 15)[k] + permuted_index(j, (11, 4, 30)[k], 9, epoch))
        drawn[k] += 1
    assert order.rows(samples).tolist() == expected
    assert order.rows(samples[37:61]).tolist() == expected[37:61]
    assert drawn == order.counts(100) and drawn[1] > 3 * 4  # the small one went round
    small = [row for row in expected if 11 <= row < 15]
    assert sorted(small[:4]) == sorted(small[4:8]) == [11, 12, 13, 14]


def test_one_corpus_has_the_order_it_always_had():
    order = Order([101], [1], seed=5)
    rows = order.rows(np.arange(303))
    for epoch in range(3):
        expected = permuted_index(np.arange(101), 101, 5, epoch)
        assert np.array_equal(rows[101 * epoch : 101 * (epoch + 1)], expected)
    # Checkpoints go on with it: these are the first rows of seed 5, whatever the version.
    assert rows[:6].tolist() == [42, 5, 78, 54, 84, 69]
