"""Hidden-state alignment, and that the heads are reachable from `losses`."""

from __future__ import annotations

import pytest
import torch

import losses
from losses import align_loss, relative_error


def make(shape=(3, 7, 13), dtype=torch.float32):
    student = torch.randn(shape, dtype=dtype, requires_grad=True)
    teacher = torch.randn(shape, dtype=dtype)
    mask = torch.rand(shape[:-1]) < 0.6
    mask.view(-1)[:2] = torch.tensor([True, False])
    return student, teacher, mask


def test_align_loss_is_the_mean_of_scaled_norms():
    student, teacher, mask = make(dtype=torch.float64)
    norms = [
        ((t - s) ** 2).sum().sqrt() / 13**0.5
        for s, t, m in zip(
            student.view(-1, 13), teacher.view(-1, 13), mask.view(-1).tolist(), strict=True
        )
        if m
    ]
    want = sum(norms) / len(norms)
    got = align_loss(student, teacher, mask)
    torch.testing.assert_close(got, want)
    got_grad, want_grad = (torch.autograd.grad(x, student)[0] for x in (got, want))
    torch.testing.assert_close(got_grad, want_grad)
    torch.testing.assert_close(
        align_loss(student, teacher),
        align_loss(student, teacher, torch.ones_like(mask).long()),
    )
    torch.testing.assert_close(
        align_loss(student, teacher, mask, normalizer=2.0), want * len(norms) / 2
    )


def test_align_loss_independent_of_micro_batches():
    student, teacher, mask = make(dtype=torch.float64)
    want = align_loss(student, teacher, mask)
    parts = [align_loss(student[i], teacher[i], mask[i], normalizer=mask.sum()) for i in range(3)]
    torch.testing.assert_close(sum(parts), want)


def test_align_loss_gradient_is_finite_at_equality():
    _, teacher, mask = make()
    student = teacher.clone()
    student[0, 0, 0] += 1.0  # one unmasked token differs: its gradient must survive
    student.requires_grad_()
    loss = align_loss(student, teacher, mask)
    loss.backward()
    assert loss > 0
    assert student.grad.isfinite().all()
    assert student.grad[0, 0, 0] > 0
    assert (student.grad.view(-1, 13)[1:] == 0).all()


@pytest.mark.parametrize("value", [1e30, float("nan"), float("inf")])
def test_align_loss_ignores_masked_tokens(value):
    student, teacher, mask = make()
    want = align_loss(student, teacher, mask)
    want_grad = torch.autograd.grad(want, student)[0]
    spoilt = student.detach().clone()
    spoilt[~mask] = value
    spoilt.requires_grad_()
    got = align_loss(spoilt, teacher.masked_fill(~mask[..., None], -value), mask)
    got.backward()
    assert torch.equal(got, want)
    assert torch.equal(spoilt.grad, want_grad)
    assert (spoilt.grad[~mask] == 0).all()


def test_align_loss_without_a_token():
    student, teacher, mask = make()
    for normalizer in (None, 0, torch.tensor(0)):
        loss = align_loss(student, teacher, torch.zeros_like(mask), normalizer=normalizer)
        assert loss == 0
        assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_align_loss_of_bf16_is_taken_in_float32():
    student, teacher, mask = make(dtype=torch.bfloat16)
    loss = align_loss(student, teacher.requires_grad_(), mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, align_loss(student.float(), teacher.float(), mask))
    loss.backward()
    assert student.grad.dtype == torch.bfloat16
    assert teacher.grad is None


def test_relative_error():
    student, teacher, mask = make()
    want = (teacher - student)[mask].norm() / teacher[mask].norm()
    got = relative_error(student, teacher, mask)
    assert not got.requires_grad
    torch.testing.assert_close(got, want.detach())
    assert relative_error(torch.zeros_like(teacher), teacher) == 1
    assert relative_error(teacher, teacher) == 0
    assert relative_error(teacher * 0, teacher * 0) == 0


def test_refuses_shapes_that_differ():
    student, teacher, mask = make()
    for function in (align_loss, relative_error):
        with pytest.raises(ValueError, match="differ in shape"):
            function(student, teacher[:1])
        with pytest.raises(ValueError, match="mask"):
            function(student, teacher, mask[..., None])


def test_heads_are_here():
    hidden, weight = torch.randn(5, 3), torch.randn(11, 3)
    labels = torch.randint(0, 11, (5,))
    assert losses.ce_head(hidden, weight, labels).count == 5
    assert losses.kd_head(hidden, weight, hidden, weight, labels).kd.abs() < 1e-6
    with pytest.raises(ValueError, match="must be one of"):
        losses.kd_head(hidden, weight, hidden, weight, labels, loss="huber")
