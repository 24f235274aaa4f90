"""What lies between a block's matmuls, in single kernels: SwiGLU, and RoPE with norms of q and k.

Inductor fuses the same operations, but reads and writes joined tensors through masks, twice over.
These read a joint projection and their gradients write one, so that the input goes through one
matmul and its gradient comes out of one.

Check: `pytest tests/ops/test_block_ops.py`.
Shapes: B batch, T time, H query heads, G key/value heads, D head size, F width of the MLP.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.kernels import has_triton

ROWS, ROW_WARPS = 16, 4  # tokens of one program of the rotation
BLOCK, BLOCK_WARPS = 1024, 4  # columns of one program of SwiGLU

HAS_TRITON = has_triton()  # asked here: compiled blocks would trace through the cache


@functools.cache
def kernels():
    """The module of the Triton kernels. Triton is missing where there is no CUDA."""
    from ops import block_kernels

    return block_kernels


# ---- SwiGLU and the projection after it


def plain_swiglu_mm(gate: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
    """gate, up [..., F] (or both joined [..., 2 F], gate first), weight [d, F] ->
    (SiLU(gate) up) weight^T [..., d]."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.linear(F.silu(gate) * up, weight)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up [rows, F], contiguous but for a common step from row to row."""
    if up is None:
        return gate.contiguous().flatten(0, -2).chunk(2, -1)
    return tuple(t.contiguous().flatten(0, -2) for t in (gate, up))


def _swiglu_grid(gate: Tensor) -> tuple[tuple[int, int], dict]:
    rows, width = gate.shape
    return (rows, -(-width // BLOCK)), {"N": width, "BLOCK": BLOCK, "num_warps": BLOCK_WARPS}


@torch.library.custom_op("retort::swiglu_mm", mutates_args=())
def _swiglu_mm(gate: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
    lead = gate.shape[:-1]
    gate, up = _halves(gate, up)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid, told = _swiglu_grid(gate)
    with torch.cuda.device_of(h):
        kernels().swiglu_forward[grid](gate, up, h, gate.stride(0), **told)
    return torch.mm(h, weight.t()).unflatten(0, lead)


@_swiglu_mm.register_fake
def _(gate, up, weight):
    return gate.new_empty(*gate.shape[:-1], weight.shape[0])


@torch.library.custom_op("retort::swiglu_mm_backward", mutates_args=())
def _swiglu_mm_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate (of both, if joined), of up (empty, if joined) and of the weight."""
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = gate.new_empty(0) if up is None else torch.empty_like(dgate)
    outs = _halves(dgate, None if up is None else dup)
    gate, up = _halves(gate, up)
    dy = dy.contiguous().flatten(0, -2)
    dh, h = torch.mm(dy, weight), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid, told = _swiglu_grid(gate)
    with torch.cuda.device_of(h):
        kernels().swiglu_backward[grid](
            gate, up, dh, *outs, h, gate.stride(0), outs[0].stride(0), **told
        )
    return dgate, dup, torch.mm(dy.t(), h)


@_swiglu_mm_backward.register_fake
def _(dy, gate, up, weight):
    kind = {"memory_format": torch.contiguous_format}
    dup = gate.new_empty(0) if up is None else torch.empty_like(up, **kind)
    return torch.empty_like(gate, **kind), dup, torch.empty_like(weight, **kind)


def _swiglu_autograd(ctx, dy):
    gate, up, weight = ctx.saved_tensors
    dgate, dup, dweight = _swiglu_mm_backward(dy, gate, up, weight)
    return dgate, None if up is None else dup, dweight


_swiglu_mm.register_autograd(
    _swiglu_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu_mm(gate: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
    """`plain_swiglu_mm`; on CUDA in Triton and cuBLAS, with the weight in the inputs' dtype. What
    goes into the matmul, F values a token, is not kept for the backward but computed once more,
    beside its gradient."""
    triton = gate.is_cuda and HAS_TRITON
    return (_swiglu_mm if triton else plain_swiglu_mm)(gate, up, weight.to(gate.dtype))


# ---- RoPE with q/k-norms


def plain_qk_rope(
    x: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    heads: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [B, T, (H + 2 G) D], q, k and v joined -> q [B, T, H, D] and k [B, T, G, D], normed (where
    there are weights [D]) and rotated, and v [B, T, G, D]. cos, sin [B or 1, T, 1, D / 2]. In
    float32 at least until the end."""
    x = x.unflatten(-1, (heads + 2 * groups, -1))
    wide = torch.promote_types(x.dtype, torch.float32)
    *both, v = x.split([heads, groups, groups], 2)
    out = []
    for h, weight in zip(both, (q_weight, k_weight), strict=True):
        h = h.to(wide)
        if weight is not None:
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
        a, b = h.chunk(2, -1)
        out.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype))
    return *out, v


def _launch(x: Tensor, cos: Tensor, heads: int, groups: int) -> tuple[tuple[int], dict]:
    """The grid, and what both kernels are told."""
    batch, length, size = *x.shape[:2], x.shape[2] // (heads + 2 * groups)
    assert cos.shape[1:] == (length, 1, size // 2) and cos.shape[0] in (1, batch), cos.shape
    told = {
        "rows": batch * length, "length": length,
        "batch_step": 0 if cos.shape[0] == 1 else length * (size // 2), "H": heads, "G": groups,
        "HALF": size // 2, "ROWS": ROWS, "num_warps": ROW_WARPS,
    }  # fmt: skip
    return (-(-batch * length // ROWS),), told


@torch.library.custom_op("retort::qk_rope", mutates_args=())
def _qk_rope(
    x: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    heads: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = x.contiguous()
    size = x.shape[2] // (heads + 2 * groups)
    q, k, v = (x.new_empty(*x.shape[:2], n, size) for n in (heads, groups, groups))
    grid, told = _launch(x, cos, heads, groups)
    with torch.cuda.device_of(x):
        kernels().qk_rope_forward[grid](
            x, q, k, v, q_weight, k_weight, cos.contiguous(), sin.contiguous(), eps=eps,
            NORM=q_weight is not None, **told,
        )  # fmt: skip
    return q, k, v


@_qk_rope.register_fake
def _(x, cos, sin, q_weight, k_weight, heads, groups, eps):
    size = x.shape[2] // (heads + 2 * groups)
    return tuple(x.new_empty(*x.shape[:2], n, size) for n in (heads, groups, groups))


@torch.library.custom_op("retort::qk_rope_backward", mutates_args=())
def _qk_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of x, and those of the weights [2, D] in float32. Only norms need x."""
    (heads, size), groups, norm = dq.shape[2:], dk.shape[2], x is not None
    dx = dq.new_empty(*dq.shape[:2], (heads + 2 * groups) * size)
    grid, told = _launch(dx, cos, heads, groups)
    # One partial sum a program, added up by PyTorch: the same order in every run.
    shape = (grid[0] if norm else 1, 2, size)
    partial = torch.empty(shape, dtype=torch.float32, device=dx.device)
    with torch.cuda.device_of(dx):
        kernels().qk_rope_backward[grid](
            x.contiguous() if norm else None, dq.contiguous(), dk.contiguous(), dv.contiguous(), dx,
            q_weight, k_weight, partial, cos.contiguous(), sin.contiguous(), eps=eps, NORM=norm,
            **told,
        )  # fmt: skip
    return dx, partial.sum(0)


@_qk_rope_backward.register_fake
def _(dq, dk, dv, x, cos, sin, q_weight, k_weight, eps):
    (heads, size), groups = dq.shape[2:], dk.shape[2]
    dx = dq.new_empty(*dq.shape[:2], (heads + 2 * groups) * size)
    return dx, dq.new_empty(2, size, dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, cos, sin, q_weight, k_weight, *_, ctx.eps = inputs
    ctx.save_for_backward(None if q_weight is None else x, cos, sin, q_weight, k_weight)


def _autograd(ctx, dq, dk, dv):
    dx, dweight = _qk_rope_backward(dq, dk, dv, *ctx.saved_tensors, ctx.eps)
    q_weight = ctx.saved_tensors[3]
    weights = (None, None) if q_weight is None else (d.to(q_weight.dtype) for d in dweight)
    return dx, None, None, *weights, None, None, None


_qk_rope.register_autograd(_autograd, setup_context=_setup)


def fits_triton(size: int) -> bool:
    """Head sizes that the kernel takes."""
    return HAS_TRITON and size in (32, 64, 128, 256)


def qk_rope(
    x: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    heads: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`plain_qk_rope`; on CUDA in Triton."""
    run = plain_qk_rope
    if x.is_cuda and fits_triton(x.shape[2] // (heads + 2 * groups)):
        run = _qk_rope
    return run(x, cos, sin, q_weight, k_weight, heads, groups, eps)
