"""The distillation head: language-model heads and loss in one, without ever holding all the logits.

For N tokens and a vocabulary of V the full logits of a teacher and a student, their softmaxes and
their gradients are several [N, V] tensors: 20 GiB at N=8192, V=152k. Here tokens go through in
chunks. The gradient with respect to a chunk's logits has a closed form, so the forward computes
it at once, multiplies it into dh and dW, and drops the chunk: nothing of [N, V] is ever allocated
and the backward is a multiplication by the incoming scalar.

    python -m pytest tests/ops/test_kd_head.py

`kd_chunk` is the seam for a faster kernel: a chunk's logits in, losses and dlogits out.

Shapes: N tokens, C tokens of one chunk, V common vocabulary, K entries compared (V, or top_k),
H hidden size. p is the student's distribution and q the teacher's, both at temperature T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # label of padding and document tails, as in torch.nn.functional.cross_entropy

# Bytes of one [C, V] buffer in the loss dtype; about four are alive at once. CUDA wants few large
# matmuls; on CPU, larger buffers cost fresh pages from the system at every allocation.
CHUNK_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}


@dataclass
class HeadOutput:
    """Results of one call, as 0-d tensors on the device (reading one is the caller's host sync).

    The sums are detached, over this call's valid tokens, and in float32 (float64 for float64
    inputs), so that they can be added over micro-batches and ranks.
    """

    loss: Tensor  # differentiable: (kd_weight * kd + ce_weight * ce) / normalizer
    kd: Tensor  # sum of the divergence; 0 from ce_head
    ce: Tensor  # sum of the student's cross-entropy on the labels, nats
    teacher_ce: Tensor | None  # sum of the teacher's; None unless with_metrics
    agree: Tensor | None  # tokens where both have the same argmax, int64; None unless with_metrics
    count: Tensor  # valid tokens, int64


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


# --- matrix products: operands in the matmul dtype, results in the loss dtype


def _has_mixed_mm(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether mm can take 16-bit operands and hand out its float32 accumulator (CUDA only)."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if _has_mixed_mm(a, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _has_mixed_mm(a, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if on, would run a matmul of x (it leaves float64 alone)."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _auto_chunk(n: int, vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """Tokens a chunk: buffers of at most CHUNK_BYTES, and chunks of about equal size."""
    limit = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // (vocab * dtype.itemsize)
    parts = -(-n // max(limit, 1))
    return -(-n // max(parts, 1))


class _Head(torch.autograd.Function):
    """Chunked forward that also computes dh and dW; the backward only scales them."""

    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, labels, normalizer, options, grad_enabled):
        # needs_input_grad ignores no_grad(), hence grad_enabled.
        need_dh = grad_enabled and ctx.needs_input_grad[0]
        need_dw = grad_enabled and ctx.needs_input_grad[1]
        ctx.dtypes = (h_s.dtype, w_s.dtype)
        ctx.set_materialize_grads(False)
        n = h_s.shape[0]
        vocab = w_s.shape[0] if w_t is None else min(w_s.shape[0], w_t.shape[0])
        dtype_s = _matmul_dtype(h_s)
        dtype_t = None if w_t is None else _matmul_dtype(h_t)
        dtype = torch.float64 if torch.float64 in (dtype_s, dtype_t) else torch.float32
        chunk = options.chunk_size or _auto_chunk(n, vocab, dtype, h_s.device.type)

        with torch.autocast(h_s.device.type, enabled=False):
            weight_s = w_s[:vocab].to(dtype_s)  # [V, Hs]; no copy when the dtype is right already
            weight_t = None if w_t is None else w_t[:vocab].to(dtype_t)  # [V, Ht]
            dh = torch.empty(h_s.shape, dtype=dtype, device=h_s.device) if need_dh else None
            dw = torch.zeros(w_s.shape, dtype=dtype, device=w_s.device) if need_dw else None
            valid = labels != IGNORE_INDEX  # [N]
            count = valid.sum()
            known = (labels >= 0) & (labels < vocab)
            kd_sum, ce_sum, teacher_ce_sum = torch.zeros(3, dtype=dtype, device=h_s.device)
            agree_sum = torch.zeros_like(count)

            for start in range(0, n, max(chunk, 1)):
                rows = slice(start, start + chunk)
                masked = ~valid[rows]
                # Zeroing a masked token's hidden state keeps its logits finite whatever it was,
                # and its share of dW exactly 0, for [C, H] of work and not [C, V].
                x_s = h_s[rows].masked_fill(masked[:, None], 0).to(dtype_s)  # [C, Hs]
                z_t = None
                if weight_t is not None:
                    x_t = h_t[rows].masked_fill(masked[:, None], 0).to(dtype_t)  # [C, Ht]
                    z_t = _mm(x_t, weight_t.t(), dtype)  # [C, V]
                out = kd_chunk(
                    _mm(x_s, weight_s.t(), dtype),
                    z_t,
                    labels[rows].clamp(0, vocab - 1),
                    options,
                    need_dh or need_dw,
                )
                del z_t
                ce = out.ce.masked_fill(~known[rows], torch.nan).masked_fill(masked, 0)
                ce_sum += ce.sum()
                if out.kd is not None:
                    kd_sum += out.kd.masked_fill(masked, 0).sum()
                if out.agree is not None:
                    teacher_ce_sum += out.teacher_ce.masked_fill(masked, 0).sum()
                    agree_sum += (out.agree & ~masked).sum()
                if out.dlogits is None:
                    continue
                dz = out.dlogits.to(dtype_s)  # [C, V]
                del out
                if need_dh:
                    dh[rows] = _mm(dz, weight_s, dtype).masked_fill_(masked[:, None], 0)
                if need_dw:
                    _addmm_(dw[:vocab], dz.t(), x_s)
                del dz

            normalizer = count if normalizer is None else normalizer
            # Without a valid token every sum is 0, and so must the loss be.
            divisor = torch.where(normalizer == 0, 1, normalizer).to(dtype)
            loss = kd_sum * options.kd_weight
            if options.ce_weight != 0:  # ce may be NaN, and 0 * NaN is NaN
                loss = loss + ce_sum * options.ce_weight
            loss = loss / divisor

        ctx.grads, ctx.divisor = (dh, dw), divisor
        outputs = (kd_sum, ce_sum, teacher_ce_sum, agree_sum, count)
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 8
        if ctx.grads is None:
            raise RuntimeError(
                "kd_head: its gradients were already handed out; call the head again instead of "
                "running backward twice on one graph"
            )
        # Scaled in place, without asking whether grad_loss is 1 (that would be a host sync), and
        # let go of, so that the weight's .grad can be this very tensor and not a copy.
        scale = grad_loss / ctx.divisor
        (dh, dw), ctx.grads = ctx.grads, None
        return _scale(dh, scale, ctx.dtypes[0]), _scale(dw, scale, ctx.dtypes[1]), *(None,) * 6


def _scale(grad: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    if grad is None or grad.dtype == dtype:
        return grad if grad is None else grad.mul_(scale)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


def _check(h_s, w_s, h_t, w_t, labels, options: HeadOptions) -> None:
    o = options
    if o.loss not in LOSSES:
        raise ValueError(f"loss={o.loss!r}: must be one of {', '.join(LOSSES)}")
    if not o.temperature > 0:
        raise ValueError(f"temperature={o.temperature}: must be above 0")
    if o.loss == "js" and not 0 < o.js_beta < 1:
        raise ValueError(f"js_beta={o.js_beta}: must lie between 0 and 1, both excluded")
    if o.top_k < 0 or o.chunk_size < 0:
        raise ValueError(f"top_k={o.top_k}, chunk_size={o.chunk_size}: neither may be negative")
    vocab = w_s.shape[0] if w_t is None else min(w_s.shape[0], w_t.shape[0])
    for name, h, w in (("student", h_s, w_s), ("teacher", h_t, w_t)):
        if w is None:
            continue
        if h.shape[-1] != w.shape[1] or h.numel() // max(h.shape[-1], 1) != labels.numel():
            raise ValueError(
                f"{name}: hidden {tuple(h.shape)} does not fit weight {tuple(w.shape)} and "
                f"{labels.numel()} labels"
            )
        if _matmul_dtype(h) != _matmul_dtype(w):
            raise ValueError(f"{name}: hidden is {h.dtype} but weight is {w.dtype}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: must be torch.int64")
    if labels.device.type == "cpu" and labels.numel():  # elsewhere it would be a host sync
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab))]
        if wrong.numel():
            raise ValueError(f"label {wrong[0]}: must be {IGNORE_INDEX} or in [0, {vocab})")


def _run(h_s, w_s, h_t, w_t, labels, normalizer, options: HeadOptions) -> HeadOutput:
    _check(h_s, w_s, h_t, w_t, labels, options)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().to(h_s.device)
    elif normalizer is not None:  # full is a fill on the device; torch.tensor would wait
        normalizer = torch.full((), normalizer, device=h_s.device)
    loss, kd, ce, teacher_ce, agree, count = _Head.apply(
        h_s.reshape(-1, h_s.shape[-1]),
        w_s,
        None if h_t is None else h_t.detach().reshape(-1, h_t.shape[-1]),
        None if w_t is None else w_t.detach(),
        labels.reshape(-1),
        normalizer,
        options,
        torch.is_grad_enabled(),
    )
    if not options.with_metrics:
        teacher_ce = agree = None
    return HeadOutput(loss, kd, ce, teacher_ce, agree, count)


def kd_head(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    loss: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    top_k: int = 0,
    js_beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_size: int = 0,
    with_metrics: bool = False,
) -> HeadOutput:
    """Distillation loss of a student's language-model head against a teacher's.

    student_hidden [..., Hs], student_weight [Vs, Hs], teacher_hidden [..., Ht],
    teacher_weight [Vt, Ht], labels [...] int64: the next token of each position, -100 where it
    counts for nothing (padding, document tails). If Vs != Vt (padding), both are cut to the first
    min(Vs, Vt) rows. Gradients go to student_hidden and student_weight only, once: a second
    backward on the same graph raises RuntimeError.

    Per token, with z the logits, p = softmax(z_s / T), q = softmax(z_t / T):

        forward_kl  T^2 KL(q || p)
        reverse_kl  T^2 KL(p || q)
        js          T^2 (beta KL(q || m) + (1 - beta) KL(p || m)), m = beta q + (1 - beta) p
        mse         mean over the vocabulary of (z_s / T - z_t / T)^2, without a T^2

    T^2 keeps the size of the gradients when T changes (Hinton et al. 2015, arXiv:1503.02531); js
    is the generalised divergence of GKD (Agarwal et al. 2024, arXiv:2306.13649). top_k > 0
    compares only the teacher's k largest logits, p and q renormalised over them. Cross-entropy
    is on the full vocabulary at temperature 1.

    loss = (kd_weight * sum kd + ce_weight * sum ce) / normalizer. Give the step's global number
    of valid tokens as normalizer and the loss does not depend on how tokens are spread over
    micro-batches and ranks. Default: this call's own number (no valid token: loss 0).

    Matmuls run in the inputs' dtype, or in autocast's where it is on; softmax, losses, dlogits
    and the accumulation of dW in float32 (float64 for float64 inputs). chunk_size: tokens a
    chunk, 0 = chosen from CHUNK_BYTES. Memory beyond the gradients: about four [chunk, V].

    Raises ValueError for an unknown loss, impossible settings, shapes or dtypes that do not fit,
    and (CPU only) a label outside the common vocabulary; on other devices, where looking would
    stall the queue, such a label makes `ce` NaN, and `loss` too if ce_weight is not 0.
    """
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    weights = (kd_weight, ce_weight)
    options = HeadOptions(loss, temperature, *weights, top_k, js_beta, chunk_size, with_metrics)
    return _run(*tensors, normalizer, options)


def ce_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    chunk_size: int = 0,
) -> HeadOutput:
    """Cross-entropy of a language-model head, for pretraining: `kd_head` without a teacher.

    hidden [..., H], weight [V, H], labels [...] int64 with -100 = masked; the rest as `kd_head`.
    """
    options = HeadOptions(kd_weight=0.0, ce_weight=1.0, chunk_size=chunk_size)
    return _run(hidden, weight, None, None, labels, normalizer, options)


def naive_kd_head(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    loss: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    top_k: int = 0,
    js_beta: float = 0.5,
    normalizer: float | Tensor | None = None,
    chunk_size: int = 0,
    with_metrics: bool = False,
) -> HeadOutput:
    """`kd_head` by its definition: all logits, plain autograd; the tests' reference (no chunks)."""
    options = HeadOptions(loss, temperature, top_k=top_k, js_beta=js_beta, chunk_size=chunk_size)
    _check(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, options)
    vocab = min(student_weight.shape[0], teacher_weight.shape[0])
    labels = labels.reshape(-1)
    valid = labels != IGNORE_INDEX

    def logits(h: Tensor, w: Tensor) -> Tensor:
        z = h.reshape(-1, h.shape[-1])[valid] @ w[:vocab].t()
        return z if z.dtype == torch.float64 else z.float()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    z_s = logits(student_hidden, student_weight)
    z_t = logits(teacher_hidden.detach(), teacher_weight.detach())
    a, b = z_s / temperature, z_t / temperature
    if 0 < top_k < vocab:
        top = z_t.topk(top_k, dim=-1).indices
        a, b = a.gather(-1, top), b.gather(-1, top)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    if loss == "forward_kl":
        kd = kl(log_q, log_p) * temperature**2
    elif loss == "reverse_kl":
        kd = kl(log_p, log_q) * temperature**2
    elif loss == "js":
        m = (js_beta * log_q.exp() + (1 - js_beta) * log_p.exp()).log()
        kd = (js_beta * kl(log_q, m) + (1 - js_beta) * kl(log_p, m)) * temperature**2
    else:
        kd = (a - b).square().mean(-1)
    kd = kd.sum()
    ce, teacher_ce = (F.cross_entropy(z, labels[valid], reduction="sum") for z in (z_s, z_t))
    agree = (z_s.argmax(-1) == z_t.argmax(-1)).sum()
    if not with_metrics:
        teacher_ce = agree = None
    count = valid.sum()
    total = kd_weight * kd + ce_weight * ce
    total = total / (count.clamp(min=1) if normalizer is None else normalizer)
    return HeadOutput(total, kd.detach(), ce.detach(), teacher_ce, agree, count)
