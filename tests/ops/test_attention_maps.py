"""Cross-entropy of attention maps: values and gradients against the whole maps, at any chunk."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import HEADS, KEY, draw
from test_hedgehog_window import make, phi

from ops.attention_maps import map_cross_entropy, split_rows
from ops.hedgehog_window import chunk_hedgehog_window, log_weights_hedgehog_window

LENGTH = 37
BOUNDS = {"whole": [0, LENGTH], "packed": [0, 1, 14, LENGTH]}


def positions_of(bounds) -> torch.Tensor:
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])[None]


def student_of(tokens, fixed, window):
    def weights(begin, mask):
        q = tokens["q"][:, begin : begin + mask.shape[-2]]
        k = tokens["k"][:, : mask.shape[-1]]
        return log_weights_hedgehog_window(q, k, mask, **fixed, window=window)

    return weights


def whole_maps(tokens, fixed, window, bounds):
    """[B, T, T, H]: the student's weights, one query at a time, from the equation."""
    q, k = tokens["q"], tokens["k"]
    phi_q, phi_k = phi(q, fixed["map_q"]), phi(k, fixed["map_k"])
    rows = []
    for i in range(LENGTH):
        first = max(b for b in bounds if b <= i)
        cut = max(first, i - window + 1)
        score = KEY**-0.5 * (q[:, i : i + 1] * k[:, cut : i + 1]).sum(-1)
        near = fixed["gamma"] * (score - score.max(1, keepdim=True).values).exp()
        far = (phi_q[:, i : i + 1] * phi_k[:, first:cut]).sum(-1)
        weight = torch.cat([far, near], 1)
        row = torch.zeros(*q.shape[:2], q.shape[2], dtype=q.dtype)
        row[:, first : i + 1] = weight / weight.sum(1, keepdim=True)
        rows.append(row)
    return torch.stack(rows, 1)


def teacher_maps(q, k, bounds, window):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = KEY**-0.5 * torch.einsum("bihk,bjhk->bijh", q, k)
    for i in range(LENGTH):
        first = max(b for b in bounds if b <= i)
        first = max(first, i - window + 1) if window else first
        scores[:, i, :first] = scores[:, i, i + 1 :] = -torch.inf
    return scores.softmax(2)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize(("window", "theirs"), [(5, 0), (1, 0), (64, 0), (5, 9)])
def test_equals_the_whole_maps_for_any_chunk(bounds, window, theirs):
    tokens, fixed = make(LENGTH)
    random = draw(3)
    q, k = random(2, LENGTH, HEADS, KEY).double(), random(2, LENGTH, 1, KEY).double()
    t = teacher_maps(q, k, bounds, theirs)
    mine = whole_maps(tokens, fixed, window, bounds)
    seen = t > 0
    want = (t * (t / torch.where(seen, mine, 1)).where(seen, 1).log()).sum()
    leaves = [tokens["q"], tokens["k"], *fixed.values()]
    grads = torch.autograd.grad(want, leaves)
    for chunk in (1, LENGTH * HEADS * 2 * 7, 10**9):  # 1, 7 and all queries at once
        loss = map_cross_entropy(
            student_of(tokens, fixed, window), q, k, positions_of(bounds).expand(2, -1),
            window=theirs, chunk_weights=chunk,
        )  # fmt: skip
        torch.testing.assert_close(loss, want)
        for mine_, right in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
            torch.testing.assert_close(mine_, right)


@pytest.mark.parametrize("window", [1, 6, 64])
def test_these_are_the_weights_of_the_op(window):
    tokens, fixed = make(LENGTH)
    maps = whole_maps(tokens, fixed, window, [0])
    o, _ = chunk_hedgehog_window(**tokens, **fixed, window=window)
    torch.testing.assert_close(torch.einsum("bijh,bjhv->bihv", maps, tokens["v"]), o)


def test_zero_for_equal_maps_and_only_for_them():
    tokens, fixed = make(LENGTH)
    q, k = tokens["q"], tokens["k"]
    positions = positions_of([0, LENGTH])
    same = map_cross_entropy(student_of(tokens, fixed, LENGTH), q, k, positions)
    other = map_cross_entropy(student_of(tokens, fixed, LENGTH), 2 * q, k, positions)
    assert abs(same) < 1e-9 < 1 < other


def test_packed_rows_are_cut_apart():
    x = torch.randn(1, 12, 3)
    assert split_rows(x, 4).equal(torch.stack([x[0, i : i + 3] for i in range(0, 12, 3)]))


def test_equal_maps_in_bfloat16_have_no_loss():
    generator = torch.Generator().manual_seed(0)
    q, k = (4 * torch.randn(1, LENGTH, 2, KEY, generator=generator).bfloat16() for _ in range(2))

    def same(begin, mask):
        some = q[:, begin : begin + mask.shape[-2]].float()
        return KEY**-0.5 * torch.einsum("bihd,bjhd->bhij", some, k[:, : mask.shape[-1]].float())

    loss = map_cross_entropy(same, q, k, positions_of([0, LENGTH]))
    assert abs(loss.item()) / (2 * LENGTH) < 1e-6
