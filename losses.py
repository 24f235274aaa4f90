"""Every loss a trainer uses: heads on logits (`kd_head`, `ce_head`) and hidden-state alignment.

The heads live in `ops/kd_head.py`, the choice of tokens in `ops/token_select.py`, the comparison
of attention maps in `ops/attention_maps.py`; all are re-exported, so that trainers import this file
only.

    python -m pytest tests/test_losses.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.attention_maps import map_cross_entropy, split_rows
from ops.kd_head import IGNORE_INDEX, LOSSES, HeadOutput, ce_head, kd_head
from ops.token_select import (
    excess_loss,
    num_selected,
    select_tokens,
    spread_over_bytes,
    token_losses,
)

__all__ = [
    "IGNORE_INDEX",
    "LOSSES",
    "HeadOutput",
    "align_loss",
    "ce_head",
    "excess_loss",
    "heads_loss",
    "kd_head",
    "map_cross_entropy",
    "num_selected",
    "relative_error",
    "select_tokens",
    "split_rows",
    "spread_over_bytes",
    "token_losses",
]


def _difference(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(t - s, t) in at least float32, both 0 at masked tokens whatever they held."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
        )
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ValueError(
            f"mask {tuple(mask.shape)} must have the shape of the tokens, "
            f"{tuple(student.shape[:-1])}"
        )
    teacher = teacher.detach().to(torch.promote_types(student.dtype, torch.float32))
    diff = teacher - student  # casts the student as it reads it
    if mask is None:
        return diff, teacher
    # masked_fill and not a multiplication: 0 * NaN is NaN, in the value and in the gradient.
    masked = ~mask.bool()[..., None]
    return diff.masked_fill_(masked, 0), teacher.masked_fill(masked, 0)


class _SumOfNorms(torch.autograd.Function):
    """sum over tokens of ||t - s||_2, with a gradient in one reading and one writing."""

    @staticmethod
    def forward(ctx, student, teacher, mask):
        diff, _ = _difference(student, teacher, mask)
        norm = torch.linalg.vector_norm(diff, dim=-1)
        ctx.save_for_backward(diff, norm)
        ctx.dtype = student.dtype
        return norm.sum()

    @staticmethod
    def backward(ctx, grad):
        diff, norm = ctx.saved_tensors
        factor = torch.where(norm == 0, 0, -grad / norm)  # 0, not NaN, where they are equal
        out = torch.empty_like(diff, dtype=ctx.dtype)
        return torch.mul(diff, factor[..., None], out=out), None, None


def align_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean over unmasked tokens of ||t - s||_2 / sqrt(d): the loss of the align stage.

    student, teacher: [..., d]; mask: [...] bool or 0/1, true where a token counts. Gradients go
    to the student only. In float32 (float64 for float64 inputs); returns a 0-d tensor. The sum is
    divided by normalizer; default: the number of unmasked tokens (none: the loss is 0).
    Raises ValueError for shapes that differ. Source: KL-guided layer selection, arXiv:2512.20569.
    """
    total = _SumOfNorms.apply(student, teacher.detach(), mask) / student.shape[-1] ** 0.5
    if normalizer is None:
        normalizer = student[..., 0].numel() if mask is None else mask.bool().sum()
    if isinstance(normalizer, Tensor):
        return total / torch.where(normalizer == 0, 1, normalizer)
    return total / (normalizer or 1)


def heads_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, normalizer: float | Tensor
) -> Tensor:
    """Sum over tokens of the mean squared difference of their channels, over normalizer; 0-d.

    student, teacher [..., H * D]: the heads' outputs before o_proj. mask [...]: true where a token
    counts. Gradients go to the student only. In float32 at least. LoLCATs (arXiv 2410.10254) takes
    1000 times its mean over tokens.
    """
    diff, _ = _difference(student, teacher, mask)
    return diff.square().sum() / (student.shape[-1] * normalizer)


@torch.no_grad()
def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """||t - s||_F / ||t||_F over the unmasked tokens, for reporting; 0-d, no gradient.

    1 is what an output of zeros scores. Shapes as in `align_loss`.
    """
    diff, teacher = _difference(student, teacher, mask)
    norm = torch.linalg.vector_norm(teacher)
    return torch.linalg.vector_norm(diff) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
