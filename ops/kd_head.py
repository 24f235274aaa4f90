"""The distillation head: language-model heads and loss in one, without ever holding all the logits.

For N tokens and a vocabulary of V the full logits of a teacher and a student, their softmaxes and
their gradients are several [N, V] tensors: 20 GiB at N=8192, V=152k. Here tokens go through in
chunks. The gradient with respect to a chunk's logits has a closed form, so the forward computes
it at once, multiplies it into dh and dW, and drops the chunk: nothing of [N, V] is ever allocated
and the backward is a multiplication by the incoming scalar, or nothing.

    python -m pytest tests/ops/test_kd_head.py

Two forms: PyTorch operations on logits in float32 (ops/kd_chunk.py), anywhere; and on CUDA without
top_k a Triton kernel (ops/kd_kernels.py) on logits in the matmul's own
dtype, whose gradient takes the place of the student's logits. Evaluation has float32 logits.

Shapes: N tokens, C tokens of one chunk, V common vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.kd_chunk import LOSSES, HeadOptions, kd_chunk
from ops.kernels import has_triton

IGNORE_INDEX = -100  # label of padding and document tails, as in torch.nn.functional.cross_entropy

# Bytes of one [C, V] buffer. CUDA wants few large matmuls; on CPU, larger buffers cost fresh pages
# from the system at every allocation. About four are alive at once in PyTorch, two with Triton.
CHUNK_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20, "triton": 640 * 2**20}
TRITON = True  # the Triton kernel, where it can run
BLOCK, WARPS = 4096, 16  # of it: entries of a row at a time; on an H100 4.6 ms, 5.3 with 8 warps


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


# --- matrix products: operands in the matmul dtype, results in the loss dtype


def _has_mixed_mm(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether mm can take 16-bit operands and hand out its float32 accumulator (CUDA only)."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if _has_mixed_mm(a, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _has_mixed_mm(a, out.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


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


def _auto_chunk(n: int, row_bytes: int, kind: str) -> int:
    """Tokens a chunk: buffers of at most CHUNK_BYTES, and chunks of about equal size."""
    limit = CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"]) // row_bytes
    parts = -(-n // max(limit, 1))
    size = -(-n // max(parts, 1))
    return -(-size // 128) * 128 if kind == "triton" else size  # whole tiles of a matmul


def buffer_bytes(n: int, vocab: int, kind: str, itemsize: int) -> int:
    """Bytes of one [C, V] buffer of a head on n tokens; kind: triton, or the device's."""
    width = -(-vocab // 64) * 64 if kind == "triton" else vocab
    chunk = _auto_chunk(n, width * itemsize, kind)
    return min(n, chunk) * width * itemsize


def buffers_alive(loss: str, teacher: bool, ce: bool, tempered: bool) -> int:
    """How many such buffers PyTorch operations (ops/kd_chunk.py) hold at once; Triton: one for the
    student and one for the teacher."""
    if not teacher:
        return 2
    count = {"forward_kl": 4, "reverse_kl": 4, "js": 5, "mse": 3}[loss] + ce
    return count + (tempered and loss.endswith("_kl"))


def uses_triton(h: Tensor, options: HeadOptions, dtypes: set[torch.dtype], vocab: int) -> bool:
    """Whether the Triton kernel runs: if it may, on CUDA, in bfloat16 or float32, on the whole
    vocabulary."""
    whole = options.top_k in (0, vocab) or options.top_k > vocab
    supported = dtypes <= {torch.bfloat16, torch.float32} and len(dtypes) == 1
    return TRITON and h.is_cuda and whole and supported and has_triton()


class _Head(torch.autograd.Function):
    """Chunked forward that also computes dh and dW; the backward only scales them."""

    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, labels, normalizer, options, grad_enabled):
        # needs_input_grad ignores no_grad(), hence grad_enabled.
        need_dh = grad_enabled and ctx.needs_input_grad[0]
        need_dw = grad_enabled and ctx.needs_input_grad[1]
        ctx.dtypes = (h_s.dtype, w_s.dtype)
        ctx.unit_grad = options.unit_grad
        ctx.set_materialize_grads(False)
        vocab = w_s.shape[0] if w_t is None else min(w_s.shape[0], w_t.shape[0])
        dtype_s = _matmul_dtype(h_s)
        dtype_t = dtype_s if w_t is None else _matmul_dtype(h_t)
        valid = labels != IGNORE_INDEX  # [N]
        count = valid.sum()
        normalizer = count if normalizer is None else normalizer
        # Without a valid token every sum is 0, and so must the loss be.
        divisor = torch.where(normalizer == 0, 1, normalizer)
        run = _in_torch
        if uses_triton(h_s, options, {dtype_s, dtype_t}, vocab):
            run = _in_triton
        with torch.autocast(h_s.device.type, enabled=False):
            weight_s = w_s[:vocab].to(dtype_s)  # [V, Hs]; no copy when the dtype is right already
            weight_t = None if w_t is None else w_t[:vocab].to(dtype_t)  # [V, Ht]
            sums, grads, scaled = run(
                h_s, w_s, weight_s, h_t, weight_t, labels, valid, divisor, options, need_dh, need_dw
            )
            kd, ce, teacher_ce, agree = sums
            loss = kd * options.kd_weight
            if options.ce_weight != 0:  # ce may be NaN, and 0 * NaN is NaN
                loss = loss + ce * options.ce_weight
            loss = loss / divisor.to(kd.dtype)
        ctx.grads, ctx.divisor = grads, None if scaled else divisor
        outputs = (kd, ce, teacher_ce, agree.to(torch.int64), count)
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
        # Let go of, so that the weight's .grad can be this very tensor and not a copy. Whether
        # grad_loss is 1 cannot be asked (that would be a host sync): unit_grad promises it.
        (dh, dw), ctx.grads = ctx.grads, None
        if ctx.divisor is not None:
            grad_loss = grad_loss / ctx.divisor
        elif ctx.unit_grad:
            grad_loss = None
        return (
            _scale(dh, grad_loss, ctx.dtypes[0]),
            _scale(dw, grad_loss, ctx.dtypes[1]),
            *((None,) * 6),
        )


def _scale(grad: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if grad is None or scale is None:
        return grad if grad is None else grad.to(dtype)
    if grad.dtype == dtype:
        return grad.mul_(scale)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


def _rows(h: Tensor, rows: slice, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of hidden states. Zeroing a masked token's keeps its logits finite whatever it was,
    and its share of dW exactly 0, for [C, H] of work and not [C, V]."""
    return h[rows].masked_fill(~valid[rows, None], 0).to(dtype)


def _in_torch(h_s, w_s, weight_s, h_t, weight_t, labels, valid, divisor, options, need_dh, need_dw):
    """((kd, ce, teacher_ce, agree) summed, (dh, dW), False): the gradients are to be divided."""
    n, vocab, device = h_s.shape[0], weight_s.shape[0], h_s.device
    wide = torch.float64 in (weight_s.dtype, None if weight_t is None else weight_t.dtype)
    dtype = torch.float64 if wide else torch.float32
    chunk = options.chunk_size or _auto_chunk(n, vocab * dtype.itemsize, device.type)
    dh = torch.empty(h_s.shape, dtype=dtype, device=device) if need_dh else None
    dw = torch.zeros(w_s.shape, dtype=dtype, device=device) if need_dw else None
    known = (labels >= 0) & (labels < vocab)
    sums = torch.zeros(4, dtype=dtype, device=device)
    for start in range(0, n, max(chunk, 1)):
        rows = slice(start, start + chunk)
        masked, z_t = ~valid[rows], None
        if weight_t is not None:
            z_t = _mm(_rows(h_t, rows, valid, weight_t.dtype), weight_t.t(), dtype)  # [C, V]
        x = _rows(h_s, rows, valid, weight_s.dtype)
        out = kd_chunk(
            _mm(x, weight_s.t(), dtype), z_t, labels[rows].clamp(0, vocab - 1), options,
            need_dh or need_dw,
        )  # fmt: skip
        del z_t
        sums[1] += out.ce.masked_fill(~known[rows], torch.nan).masked_fill(masked, 0).sum()
        if out.kd is not None:
            sums[0] += out.kd.masked_fill(masked, 0).sum()
        if out.agree is not None:
            sums[2] += out.teacher_ce.masked_fill(masked, 0).sum()
            sums[3] += (out.agree & ~masked).sum()
        if out.dlogits is None:
            continue
        dz = out.dlogits.to(x.dtype)  # [C, V]
        del out
        if need_dh:
            dh[rows] = _mm(dz, weight_s, dtype).masked_fill_(masked[:, None], 0)
        if need_dw:
            _addmm_(dw[:vocab], dz.t(), x)
        del dz
    return sums, (dh, dw), False


def _in_triton(
    h_s, w_s, weight_s, h_t, weight_t, labels, valid, divisor, options, need_dh, need_dw
):  # fmt: skip
    """As `_in_torch`, but the gradients are divided already. dW goes straight into the weight's
    .grad where `options.unit_grad` allows it and there is one to add to."""
    o, n, device, grad = options, h_s.shape[0], h_s.device, need_dh or need_dw
    vocab, dtype = weight_s.shape[0], weight_s.dtype if grad else torch.float32
    width = -(-vocab // 64) * 64  # whole lines: an odd vocabulary would slow every row down
    chunk = min(n, o.chunk_size or _auto_chunk(n, width * dtype.itemsize, "triton"))
    pairs = [(h, w) for h, w in ((h_s, weight_s), (h_t, weight_t)) if w is not None]
    buffers = [torch.empty(chunk, width, dtype=dtype, device=device) for _ in pairs]
    dh = torch.empty(h_s.shape, dtype=weight_s.dtype, device=device) if need_dh else None
    into = w_s.grad if need_dw and o.unit_grad and w_s.is_leaf else None
    dw = into if into is not None and into.dtype == torch.float32 else None
    if need_dw and dw is None and (vocab < w_s.shape[0] or not n):
        dw = torch.zeros(w_s.shape, dtype=torch.float32, device=device)
    found = torch.zeros(4, n, dtype=torch.float32, device=device)
    for start in range(0, n, max(chunk, 1)):
        rows = slice(start, start + chunk)
        x = [_rows(h, rows, valid, weight.dtype) for h, weight in pairs]
        z = [buffer[: len(x[0]), :vocab] for buffer in buffers]
        for out, hidden, (_, weight) in zip(z, x, pairs, strict=True):
            _mm_into(out, hidden, weight.t())
        launch_chunk(z, labels[rows], divisor, found[:, rows], o, grad)
        if need_dh:
            torch.mm(z[0], weight_s, out=dh[rows])
        if need_dw and dw is None:
            dw = _mm(z[0].t(), x[0], torch.float32)
        elif need_dw:
            _addmm_(dw[:vocab], z[0].t(), x[0])
    return found.sum(1), (dh, None if dw is into else dw), True


def launch_chunk(
    z: list[Tensor], labels: Tensor, divisor: Tensor, out: Tensor, options: HeadOptions, grad: bool
) -> None:
    """Run the Triton kernel on a chunk: z = the student's logits [C, V] and, if there is one, the
    teacher's; out [4, C] gets the losses; with `grad` the student's logits become dlogits."""
    from ops import kd_kernels

    if not len(labels):
        return
    o, teacher = options, len(z) == 2
    square = o.temperature**2
    kd_scale, kd_factor = square, o.kd_weight * o.temperature
    if o.loss == "mse":
        vocab = z[0].shape[1]
        kd_scale, kd_factor = 1 / vocab, 2 * o.kd_weight / (vocab * o.temperature)
    with torch.cuda.device_of(labels):
        kd_kernels.kd_chunk_kernel[(len(labels),)](
            z[0], z[-1], labels, divisor, out, out.stride(0), z[0].stride(0),
            z[-1].stride(0), 1 / o.temperature, kd_scale, kd_factor, o.ce_weight, o.js_beta,
            VOCAB=z[0].shape[1], IGNORE=IGNORE_INDEX, LOSS=list(LOSSES).index(o.loss),
            TEACHER=teacher, CE=o.ce_weight != 0, GRAD=grad, METRICS=o.with_metrics,
            TEMPERED=o.temperature != 1, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


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
    unit_grad: bool = False,
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
    chunk, 0 = chosen from CHUNK_BYTES. Memory beyond the gradients: about four [chunk, V], two
    in the matmul's dtype with Triton.

    unit_grad: the caller promises to run backward on `loss` itself, nothing multiplied to it.
    Then the gradients are not scaled again, and with Triton a weight that has a float32 .grad
    gets its share there during the forward, and none from the backward: not where hooks wait for
    it (DDP).

    Raises ValueError for an unknown loss, impossible settings, shapes or dtypes that do not fit,
    and (CPU only) a label outside the common vocabulary; on other devices, where looking would
    stall the queue, such a label makes `ce` NaN, and `loss` too if ce_weight is not 0.
    """
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    weights = (kd_weight, ce_weight)
    options = HeadOptions(
        loss, temperature, *weights, top_k, js_beta, chunk_size, with_metrics, unit_grad
    )
    return _run(*tensors, normalizer, options)


def ce_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    chunk_size: int = 0,
    unit_grad: bool = False,
) -> HeadOutput:
    """Cross-entropy of a language-model head, for pretraining: `kd_head` without a teacher.

    hidden [..., H], weight [V, H], labels [...] int64 with -100 = masked; the rest as `kd_head`.
    """
    options = HeadOptions(kd_weight=0.0, ce_weight=1.0, chunk_size=chunk_size, unit_grad=unit_grad)
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
