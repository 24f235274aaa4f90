"""Which tokens a loss keeps: by hand, and independent of chunks, micro-batches and ties."""

import pytest
import torch
import torch.nn.functional as F

from ops.token_select import (
    excess_loss,
    kept,
    num_selected,
    select_tokens,
    spread_over_bytes,
    token_losses,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [0, 1, 7, 100])
def test_losses_of_tokens(dtype, chunk_size):
    hidden, weight = torch.randn(3, 7, 13), torch.randn(31, 13)
    labels = torch.randint(0, 29, (3, 7))
    labels[0, 2:5] = -100
    hidden[0, 2] = torch.nan  # whatever a masked token holds
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype)
    found = token_losses(hidden, weight, labels, vocab=29, chunk_size=chunk_size)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == (21,) and not found.requires_grad
    z = hidden.detach().double().flatten(0, 1) @ weight[:29].double().t()
    expected = F.cross_entropy(z.nan_to_num(), labels.flatten(), reduction="none")
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert (found - expected).abs().max() <= limit
    assert (found[labels.flatten() == -100] == 0).all() and found.max() > 1


def test_how_many_are_kept():
    valid = torch.tensor([0, 1, 2, 5, 10, 15])
    assert kept(valid, 0.6).tolist() == [0, 1, 1, 3, 6, 9]
    assert kept(valid, 0.01).tolist() == [0, 1, 1, 1, 1, 1]
    assert kept(valid, 0.99).tolist() == [0, 1, 2, 5, 10, 15]
    assert num_selected(valid.tolist(), 0.6) == 20 and num_selected(valid.tolist(), 1) == 33
    # The host and the device must agree on every number there is.
    for share in (0.1, 0.3, 0.55, 0.7):
        rows = list(range(4097))
        assert num_selected(rows, share) == sum(num_selected([n], share) for n in rows)
        assert all(num_selected([n], share) <= n for n in rows)


def test_by_hand():
    x = -100
    labels = torch.tensor([[3, x, 1, 4, 1], [5, 9, 2, 6, x], [x, x, x, x, x], [x, 5, x, x, x]])
    excess = torch.tensor([
        [0.1, 9.0, -2.0, 0.3, 0.2],  # 2 of 4: 0.3 and 0.2; 9.0 is masked
        [1.0, 1.0, 1.0, 2.0, 9.0],  # 2.0, and the first of the equal ones
        [9.0, 9.0, 9.0, 9.0, 9.0],
        [9.0, -5.0, 9.0, 9.0, 9.0],  # the only one there is
    ])  # fmt: skip
    total = num_selected([4, 4, 0, 1], 0.5)
    found = select_tokens(excess.flatten(), labels, 4, 0.5, total)
    assert found.tolist() == [3, 4, 5, 8, 16]


def test_rows_do_not_influence_each_other():
    labels = torch.randint(0, 9, (8, 33)).masked_fill(torch.rand(8, 33) < 0.3, -100)
    labels[3] = -100
    excess = torch.randn(8, 33)
    row_valid = (labels != -100).sum(1).tolist()

    def select(a, b):
        total = num_selected(row_valid[a:b], 0.4)
        found = select_tokens(excess[a:b].flatten(), labels[a:b], b - a, 0.4, total)
        return [33 * a + i for i in found.tolist()]

    whole = select(0, 8)
    assert whole == sorted(set(whole)) and len(whole) == num_selected(row_valid, 0.4)
    assert [i for a in range(0, 8, 2) for i in select(a, a + 2)] == whole
    assert [i for a in range(8) for i in select(a, a + 1)] == whole
    assert (labels.flatten()[whole] != -100).all()


def test_losses_spread_over_bytes_by_hand():
    # "the cat" as th|e cat by one tokenizer, as the| c|at by another.
    losses = torch.tensor([4.0, 10.0])
    source, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 2])
    share = torch.tensor([2 / 2, 1 / 5, 2 / 5, 2 / 5])
    assert spread_over_bytes(losses, source, target, share, 3).tolist() == [6.0, 4.0, 4.0]
    one = torch.tensor([0, 1])
    assert spread_over_bytes(losses, one, one, torch.ones(2), 3).tolist() == [4.0, 10.0, 0.0]
    found = spread_over_bytes(losses.double(), source, target, share, 3)
    assert found.dtype == torch.float64


def test_what_nobody_compared_is_chosen_last():
    own, reference = torch.tensor([9.0, 1.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 5.0, 1.0])
    known = torch.tensor([False, True, True, True])
    excess = excess_loss(own, reference, known)
    assert excess[1:].tolist() == [-1, -5, 2] and excess.isfinite().all()
    labels = torch.tensor([[5, 5, 5, 5], [5, -100, -100, -100]])
    for dtype in (torch.float32, torch.float64):
        both = torch.cat([excess, excess_loss(own, reference, torch.zeros(4, dtype=bool))])
        chosen = select_tokens(both.to(dtype), labels, 2, 0.75, 4)
        assert chosen.tolist() == [1, 2, 3, 4]
