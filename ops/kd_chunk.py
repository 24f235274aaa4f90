"""Losses and gradients of a chunk of logits, in PyTorch: the part of ops/kd_head.py between its
matrix products. ops/kd_kernels.py is the same in Triton.

The gradient of every loss with respect to the student's logits has a closed form. Check:
`pytest tests/ops/test_kd_head.py`.
Shapes: C tokens of one chunk, V common vocabulary, K entries compared (V, or top_k). p is the
student's distribution and q the teacher's, both at temperature T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadOptions:
    """Settings of a head that are the same for all of its chunks; see `kd_head`."""

    loss: str = "forward_kl"
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    top_k: int = 0
    js_beta: float = 0.5
    chunk_size: int = 0
    with_metrics: bool = False
    unit_grad: bool = False


# --- divergences: [C, K] log-probabilities (mse: logits) -> value [C], gradient [C, K] or None.
# They own their first two arguments and overwrite them: a [C, K] buffer is what memory is made of.


def _forward_kl(log_p: Tensor, log_q: Tensor, beta: float, with_grad: bool):
    """KL(q || p) = sum q (log q - log p); d/da = p - q, with p = softmax(a)."""
    q = log_q.exp()
    # The difference of the logs comes first: sum q log q - sum q log p would cancel near p = q.
    value = log_q.sub_(log_p).mul_(q).sum(-1)
    return value, log_p.exp_().sub_(q) if with_grad else None


def _reverse_kl(log_p: Tensor, log_q: Tensor, beta: float, with_grad: bool):
    """KL(p || q) = sum p r with r = log p - log q; d/da = p (r - KL)."""
    ratio = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    weighted = ratio.mul_(p)
    value = weighted.sum(-1)
    return value, weighted.addcmul_(p, value[:, None], value=-1.0) if with_grad else None


def _js(log_p: Tensor, log_q: Tensor, beta: float, with_grad: bool):
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    With u = log p - log m: d/da = (1 - beta) p (u - KL(p || m)).
    """
    q = log_q.exp()
    # log q - log m = -log(beta + (1 - beta) e^r) with r = log p - log q. Exact at r = 0, and
    # beyond |r| = 80 the term that the clamp changes has a weight below e^-80.
    ratio = torch.sub(log_p, log_q, out=log_q).clamp_(-80.0, 80.0)
    p = log_p.exp_()
    q_over_m = torch.expm1(ratio).mul_(1.0 - beta).log1p_().neg_()
    p_over_m = ratio.add_(q_over_m)
    kl_q = q.mul_(q_over_m).sum(-1)
    weighted = p_over_m.mul_(p)
    kl_p = weighted.sum(-1)
    value = beta * kl_q + (1.0 - beta) * kl_p
    if not with_grad:
        return value, None
    return value, weighted.addcmul_(p, kl_p[:, None], value=-1.0).mul_(1.0 - beta)


def _mse(a: Tensor, b: Tensor, beta: float, with_grad: bool):
    """mean over the K entries of (a - b)^2."""
    diff = a.sub_(b)
    # vector_norm, since square().mean() would allocate another [C, K].
    value = torch.linalg.vector_norm(diff, dim=-1).square() / diff.shape[-1]
    return value, diff.mul_(2.0 / diff.shape[-1]) if with_grad else None


LOSSES: dict[str, Callable] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "mse": _mse,
}


@dataclass
class ChunkOutput:
    kd: Tensor | None  # [C]; None without a teacher
    ce: Tensor  # [C]
    teacher_ce: Tensor | None  # [C]; None unless with_metrics
    agree: Tensor | None  # [C] bool; None unless with_metrics
    dlogits: Tensor | None  # [C, V] of kd_weight * kd + ce_weight * ce; None without with_grad


def kd_chunk(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    options: HeadOptions,
    with_grad: bool,
) -> ChunkOutput:
    """Losses and dlogits of one chunk of tokens; the logits are consumed (overwritten).

    student_logits, teacher_logits: [C, V], float32 or float64; labels: [C] int64 in [0, V).
    """
    o = options
    index = labels[:, None]
    teacher_ce = agree = None
    if o.with_metrics and teacher_logits is not None:
        agree = student_logits.argmax(-1) == teacher_logits.argmax(-1)
        teacher_ce = -teacher_logits.log_softmax(-1).gather(-1, index).squeeze(-1)

    log_p1 = student_logits.log_softmax(-1)  # [C, V], at temperature 1
    ce = -log_p1.gather(-1, index).squeeze(-1)
    dlogits = kd = None
    if with_grad and o.ce_weight != 0:
        dlogits = log_p1.exp_() if teacher_logits is None else log_p1.exp()
        dlogits.scatter_add_(-1, index, dlogits.new_full((1, 1), -1.0).expand_as(index))
        dlogits = dlogits if o.ce_weight == 1 else dlogits.mul_(o.ce_weight)
    if teacher_logits is None:
        return ChunkOutput(kd, ce, teacher_ce, agree, dlogits)

    vocab, top = student_logits.shape[-1], None
    student, teacher = student_logits, teacher_logits
    del student_logits, teacher_logits
    if 0 < o.top_k < vocab:
        top = teacher.topk(o.top_k, dim=-1).indices
        student, teacher = student.gather(-1, top), teacher.gather(-1, top)
    if o.temperature != 1:
        student.div_(o.temperature)
        teacher.div_(o.temperature)
    if o.loss != "mse":
        teacher = teacher.log_softmax(-1)
        is_log_p1 = top is None and o.temperature == 1
        student = log_p1 if is_log_p1 else student.log_softmax(-1)
    del log_p1

    kd, dkd = LOSSES[o.loss](student, teacher, o.js_beta, with_grad)
    factor = o.kd_weight / o.temperature  # dlogits / d(logits / T)
    if o.loss != "mse":
        kd = kd * o.temperature**2
        factor *= o.temperature**2
    if with_grad:
        dkd = dkd if factor == 1 else dkd.mul_(factor)
        if top is not None:
            base = dkd.new_zeros(dkd.shape[0], vocab) if dlogits is None else dlogits
            dlogits = base.scatter_add_(-1, top, dkd)
        else:
            dlogits = dkd if dlogits is None else dlogits.add_(dkd)
    return ChunkOutput(kd, ce, teacher_ce, agree, dlogits)
