"""The Triton kernels of ops/short_conv.py.

A program has a tile of ROWS tokens of the B * T and CHANNELS channels. Neighbouring tokens are read
once per tap that needs them; all but the first read hit the cache. Tiles are addressed by a base
(64 bits) and an offset (32 bits).
"""

import triton
import triton.language as tl


@triton.jit
def _tile(rows, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The tile's first token, its tokens counted from there, its channels, what exists of both."""
    first = tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return first, r, c, first + r < rows, c < C


@triton.jit
def _positions(positions, t, known, length, PACKED: tl.constexpr):
    """Tokens before t [ROWS] in its document."""
    if PACKED:
        return tl.load(positions + t, mask=known, other=0).to(tl.int32)
    else:
        return t % length


@triton.jit
def _convolve(
    x, weight, bias, position, r, c, row, channel, stride, W: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """z [ROWS, CHANNELS] in float32; x is the tile's first token."""
    z = tl.zeros([ROWS, CHANNELS], tl.float32)
    if BIAS:
        z += tl.load(bias + c, mask=channel, other=0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        w = tl.load(weight + c * W + (W - 1 - j), mask=channel, other=0).to(tl.float32)
        known = (row & (position >= j))[:, None] & channel[None, :]
        past = tl.load(x + (r - j)[:, None] * stride + c[None, :], mask=known, other=0)
        z += w[None, :] * past.to(tl.float32)
    return z


@triton.jit
def short_conv_forward(
    x, weight, bias, positions, y, rows, length, stride, C: tl.constexpr, W: tl.constexpr,
    BIAS: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first, r, c, row, channel = _tile(rows, C, ROWS, CHANNELS)
    position = _positions(positions, first + r, row, length, PACKED)
    x += first.to(tl.int64) * stride
    y += first.to(tl.int64) * C
    z = _convolve(x, weight, bias, position, r, c, row, channel, stride, W, BIAS, ROWS, CHANNELS)
    out = (z * tl.sigmoid(z)).to(y.dtype.element_ty)
    tl.store(y + r[:, None] * C + c[None, :], out, mask=row[:, None] & channel[None, :])


@triton.jit
def short_conv_backward_z(
    dy, x, weight, bias, positions, dz, partial, rows, length, stride, C: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """dz = dy SiLU'(z), and this tile's part of dw and db, into partial [tiles, W + 1, C]."""
    first, r, c, row, channel = _tile(rows, C, ROWS, CHANNELS)
    position = _positions(positions, first + r, row, length, PACKED)
    x += first.to(tl.int64) * stride
    dy += first.to(tl.int64) * C
    dz += first.to(tl.int64) * C
    partial += tl.program_id(0).to(tl.int64) * (W + 1) * C
    z = _convolve(x, weight, bias, position, r, c, row, channel, stride, W, BIAS, ROWS, CHANNELS)
    inside = row[:, None] & channel[None, :]
    sigmoid = tl.sigmoid(z)
    grad = tl.load(dy + r[:, None] * C + c[None, :], mask=inside, other=0).to(tl.float32)
    grad *= sigmoid * (1 + z * (1 - sigmoid))
    tl.store(dz + r[:, None] * C + c[None, :], grad.to(dz.dtype.element_ty), mask=inside)
    for j in tl.static_range(W):
        known = (row & (position >= j))[:, None] & channel[None, :]
        past = tl.load(x + (r - j)[:, None] * stride + c[None, :], mask=known, other=0)
        dw = tl.sum(grad * past.to(tl.float32), 0)
        tl.store(partial + (W - 1 - j) * C + c, dw, mask=channel)
    tl.store(partial + W * C + c, tl.sum(grad, 0), mask=channel)


@triton.jit
def short_conv_backward_x(
    dz, weight, positions, dx, rows, length, C: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_s w[:, W - 1 - s] dz_{t + s} over the s < W tokens after t in its document."""
    first, r, c, row, channel = _tile(rows, C, ROWS, CHANNELS)
    dz += first.to(tl.int64) * C
    dx += first.to(tl.int64) * C
    grad = tl.zeros([ROWS, CHANNELS], tl.float32)
    for s in tl.static_range(W):
        later = first + r + s
        known = later < rows
        position = _positions(positions, later, known, length, PACKED)
        known = (known & (position >= s))[:, None] & channel[None, :]
        g = tl.load(dz + (r + s)[:, None] * C + c[None, :], mask=known, other=0).to(tl.float32)
        w = tl.load(weight + c * W + (W - 1 - s), mask=channel, other=0).to(tl.float32)
        grad += w[None, :] * g
    inside = row[:, None] & channel[None, :]
    tl.store(dx + r[:, None] * C + c[None, :], grad.to(dx.dtype.element_ty), mask=inside)
