"""Causal depthwise convolution over a few tokens, then SiLU, per document of a packed row.

    z_t = b + sum_{j < W} w[:, W - 1 - j] x_{t - j},   y_t = SiLU(z_t)

with x before the start of a document taken as zero. `plain_short_conv` is PyTorch (any device, one
fused kernel when compiled); `triton_short_conv` is one Triton kernel forward and two backward
(CUDA), each of which reads its inputs once from memory; z is computed again, nothing is kept.
Check: `pytest tests/ops/test_short_conv.py`, which runs the Triton code on a CPU too, interpreted.
Shapes: B batch, T time, C channels, W taps.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, CHANNELS, WARPS = 64, 64, 2  # of one program's tile; the fastest of twelve on an H100


def plain_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """x [B, T, C], weight [C, 1, W], bias [C] -> y [B, T, C] in x's dtype. positions [B, T] int64,
    restarting in every document, where rows are packed. held [B, W - 1, C]: the inputs before x,
    zeros where None."""
    taps, length = weight.shape[-1], x.shape[1]
    if held is None:
        held = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    padded = torch.cat([held.to(x.dtype), x], 1)
    weight = weight[:, 0].to(x.dtype)
    z = x * weight[:, -1]
    for j in range(1, taps):
        past = padded[:, taps - 1 - j : taps - 1 - j + length] * weight[:, -1 - j]
        if positions is not None:
            past = past * (positions >= j).unsqueeze(-1)
        z = z + past
    return F.silu(z if bias is None else z + bias.to(z.dtype))


@functools.cache
def kernels():
    """The module of the Triton kernels. Triton is missing where there is no CUDA."""
    from ops import short_conv_kernels

    return short_conv_kernels


def _launch(x: Tensor, positions: Tensor | None) -> tuple[Tensor, tuple[int, int], dict]:
    """x with contiguous channels, the grid, and what all kernels are told."""
    x = x if x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()
    assert positions is None or (positions.shape == x.shape[:2] and positions.is_contiguous())
    batch, length, channels = x.shape
    grid = (-(-batch * length // ROWS), -(-channels // CHANNELS))
    told = {
        "positions": positions, "rows": batch * length, "length": length, "C": channels,
        "PACKED": positions is not None, "ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": WARPS,
    }  # fmt: skip
    return x, grid, told


@torch.library.custom_op("retort::short_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None) -> Tensor:
    x, grid, told = _launch(x, positions)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        kernels().short_conv_forward[grid](
            x, weight.contiguous(), bias, y=y, stride=x.stride(1), W=weight.shape[-1],
            BIAS=bias is not None, **told,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x, weight, bias, positions):
    return x.new_empty(x.shape)


@torch.library.custom_op("retort::short_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of the taps and the bias [W + 1, C] in float32."""
    x, grid, told = _launch(x, positions)
    taps, channels, weight = weight.shape[-1], x.shape[-1], weight.contiguous()
    dz, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    # One partial sum a program, added up by PyTorch: the same order in every run.
    partial = torch.empty(grid[0], taps + 1, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels().short_conv_backward_z[grid](
            dy.contiguous(), x, weight, bias, dz=dz, partial=partial, stride=x.stride(1), W=taps,
            BIAS=bias is not None, **told,
        )  # fmt: skip
        kernels().short_conv_backward_x[grid](dz, weight, dx=dx, W=taps, **told)
    return dx, partial.sum(0)


@_backward.register_fake
def _(dy, x, weight, bias, positions):
    return x.new_empty(x.shape), x.new_empty(weight.shape[-1] + 1, x.shape[-1], dtype=torch.float32)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    x, weight, bias, positions = ctx.saved_tensors
    dx, total = _backward(dy, x, weight, bias, positions)
    dweight = total[:-1].t().unsqueeze(1).to(weight.dtype)
    return dx, dweight, None if bias is None else total[-1].to(bias.dtype), None


_forward.register_autograd(_autograd, setup_context=_setup)


def triton_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """`plain_short_conv` in Triton (CUDA only), in float32 between load and store. Inputs held of
    an earlier call are the plain form's: they come with the single tokens of decoding."""
    if held is not None:
        return plain_short_conv(x, weight, bias, positions, held)
    return _forward(x, weight, bias, positions)


KERNELS = {"plain": plain_short_conv, "triton": triton_short_conv}
