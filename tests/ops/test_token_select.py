"""Which tokens a loss keeps: by hand, and independent of chunks, micro-batches and ties."""

import pytest
import torch
import torch.nn.functional as F

from ops.token_select import kept, num_selected, select_tokens, spread_over_bytes, token_losses


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
    losses, lengths = torch.tensor([4.0, 10.0]), torch.tensor([2, 5])
    other = torch.tensor([3, 2, 2])
    assert spread_over_bytes(losses, lengths, other).tolist() == [6.0, 4.0, 4.0]
    assert spread_over_bytes(losses, lengths, lengths).tolist() == [4.0, 10.0]
    assert spread_over_bytes(losses, lengths, torch.tensor([7])).tolist() == [14.0]
    with pytest.raises(ValueError, match="of 7 bytes and of 8: not one text"):
        spread_over_bytes(losses, lengths, torch.tensor([8]))
    with pytest.raises(ValueError, match="a token without bytes"):
        spread_over_bytes(losses, lengths, torch.tensor([3, 0, 4]))


def test_losses_spread_over_bytes_keep_their_sum():
    for _ in range(20):
        lengths, others = (torch.randint(1, 9, (50,)) for _ in range(2))
        gap = int(lengths.sum() - others.sum())
        lengths, others = (
            torch.cat([x, torch.tensor([max(0, g) + 1])])
            for x, g in ((lengths, -gap), (others, gap))
        )
        losses = torch.rand(51)
        found = spread_over_bytes(losses, lengths, others)
        assert found.sum() == pytest.approx(losses.double().sum().item())
        ends, marks = lengths.cumsum(0).double(), torch.cat([torch.zeros(1), losses.cumsum(0)])
        total = 0.0
        for end, loss in zip(others.cumsum(0).tolist(), found.tolist(), strict=True):
            total += loss  # the loss up to a byte is linear between the ends of tokens
            i = int((ends < end).sum())
            before = 0 if i == 0 else ends[i - 1].item()
            part = (end - before) / lengths[i].item()
            assert total == pytest.approx(marks[i].item() + part * losses[i].item(), abs=1e-4)
