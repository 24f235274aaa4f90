"""The Triton kernels of ops/short_conv.py.

A program has a tile of ROWS tokens of the B * T and CHANNELS channels. Neighbouring tokens are read
once per tap that needs them; all but the first read hit the cache.
"""

import triton
import triton.language as tl


@triton.jit
def _positions(positions, t, rows, length, PACKED: tl.constexpr):
    """Tokens before t [ROWS] in its document."""
    if PACKED:
        return tl.load(positions + t, mask=t < rows, other=0)
    else:
        return t % length


@triton.jit
def _convolve(
    x, weight, bias, position, t, c, rows, stride, C: tl.constexpr, W: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """z [ROWS, CHANNELS] in float32."""
    inside = c < C
    z = tl.zeros([ROWS, CHANNELS], tl.float32)
    if BIAS:
        z += tl.load(bias + c, mask=inside, other=0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        w = tl.load(weight + c * W + (W - 1 - j), mask=inside, other=0).to(tl.float32)
        known = ((t < rows) & (position >= j))[:, None] & inside[None, :]
        past = tl.load(x + (t - j)[:, None] * stride + c[None, :], mask=known, other=0)
        z += w[None, :] * past.to(tl.float32)
    return z


@triton.jit
def short_conv_forward(
    x, weight, bias, positions, y, rows, length, stride, C: tl.constexpr, W: tl.constexpr,
    BIAS: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = _positions(positions, t, rows, length, PACKED)
    z = _convolve(x, weight, bias, position, t, c, rows, stride, C, W, BIAS, ROWS, CHANNELS)
    inside = (t < rows)[:, None] & (c < C)[None, :]
    out = z * tl.sigmoid(z)
    tl.store(y + t[:, None] * C + c[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def short_conv_backward(
    dy, x, weight, bias, positions, dx, partial, rows, length, stride, C: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_s w[:, W - 1 - s] dz_{t + s} over the s tokens after t in its document; of dw
    and db this tile's part, into partial [tiles, W + 1, C]."""
    tile = tl.program_id(0).to(tl.int64)
    t = tile * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    grad = tl.zeros([ROWS, CHANNELS], tl.float32)
    for s in tl.static_range(W):
        later = t + s
        position = _positions(positions, later, rows, length, PACKED)
        z = _convolve(x, weight, bias, position, later, c, rows, stride, C, W, BIAS, ROWS, CHANNELS)
        sigmoid = tl.sigmoid(z)
        known = ((later < rows) & (position >= s))[:, None] & inside[None, :]
        dz = tl.load(dy + later[:, None] * C + c[None, :], mask=known, other=0).to(tl.float32)
        dz *= sigmoid * (1 + z * (1 - sigmoid))
        w = tl.load(weight + c * W + (W - 1 - s), mask=inside, other=0).to(tl.float32)
        grad += w[None, :] * dz
        if s == 0:
            out = partial + tile * (W + 1) * C + c
            for j in tl.static_range(W):
                past = ((t < rows) & (position >= j))[:, None] & inside[None, :]
                xj = tl.load(x + (t - j)[:, None] * stride + c[None, :], mask=past, other=0)
                tl.store(out + (W - 1 - j) * C, tl.sum(dz * xj.to(tl.float32), 0), mask=inside)
            tl.store(out + W * C, tl.sum(dz, 0), mask=inside)
    mask = (t < rows)[:, None] & inside[None, :]
    tl.store(dx + t[:, None] * C + c[None, :], grad.to(dx.dtype.element_ty), mask=mask)
