"""The Triton kernels of ops/block_ops.py. Everything between load and store is float32."""

import triton
import triton.language as tl


@triton.jit
def swiglu_forward(gate, up, h, step, N: tl.constexpr, BLOCK: tl.constexpr):
    """gate, up [rows, N], `step` from row to row -> h [rows, N] = SiLU(gate) up. A program has
    BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = c < N
    g = tl.load(gate + row * step + c, mask=known, other=0).to(tl.float32)
    u = tl.load(up + row * step + c, mask=known, other=0).to(tl.float32)
    tl.store(h + row * N + c, (g / (1 + tl.exp(-g)) * u).to(h.dtype.element_ty), mask=known)


@triton.jit
def swiglu_backward(
    gate, up, dh, dgate, dup, h, step, step_out, N: tl.constexpr, BLOCK: tl.constexpr
):
    """dh [rows, N] -> dgate, dup [rows, N], and h once more."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = c < N
    g = tl.load(gate + row * step + c, mask=known, other=0).to(tl.float32)
    u = tl.load(up + row * step + c, mask=known, other=0).to(tl.float32)
    d = tl.load(dh + row * N + c, mask=known, other=0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    kind = h.dtype.element_ty
    tl.store(dgate + row * step_out + c, (d * u * s * (1 + g * (1 - s))).to(kind), mask=known)
    tl.store(dup + row * step_out + c, (d * g * s).to(kind), mask=known)
    tl.store(h + row * N + c, (g * s * u).to(kind), mask=known)


@triton.jit
def _angles(cos, sin, t, known, length, batch_step, HALF: tl.constexpr):
    """cos and sin [ROWS, HALF] of tokens t of all rows; batch_step 0: the same in every row."""
    at = (t // length) * batch_step + (t % length) * HALF
    at = at[:, None] + tl.arange(0, HALF)[None, :]
    c = tl.load(cos + at, mask=known[:, None], other=0).to(tl.float32)
    s = tl.load(sin + at, mask=known[:, None], other=0).to(tl.float32)
    return c, s


@triton.jit
def _halves(x, at, known, HALF: tl.constexpr):
    a = tl.load(x + at, mask=known[:, None], other=0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=known[:, None], other=0).to(tl.float32)
    return a, b


@triton.jit
def _weights(weight, NORM: tl.constexpr, HALF: tl.constexpr):
    """The two halves of a norm's weight [1, HALF]."""
    a = tl.full([1, HALF], 1.0, tl.float32)
    b = a
    if NORM:
        half = tl.arange(0, HALF)
        a = tl.load(weight + half).to(tl.float32)[None, :]
        b = tl.load(weight + HALF + half).to(tl.float32)[None, :]
    return a, b


@triton.jit
def _rotate(
    x, y, weight, cos, sin, t, known, first, stride, eps, HEADS: tl.constexpr, NORM: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of HEADS heads of x, which begin at column `first`, into y."""
    half = tl.arange(0, HALF)[None, :]
    wa, wb = _weights(weight, NORM, HALF)
    for h in range(0, HEADS):
        a, b = _halves(x, (t * stride + first + h * 2 * HALF)[:, None] + half, known, HALF)
        if NORM:
            mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
            r = 1 / tl.sqrt(mean + eps)
            a = a * r[:, None] * wa
            b = b * r[:, None] * wb
        to = ((t * HEADS + h) * 2 * HALF)[:, None] + half
        kind = y.dtype.element_ty
        tl.store(y + to, (a * cos - b * sin).to(kind), mask=known[:, None])
        tl.store(y + to + HALF, (b * cos + a * sin).to(kind), mask=known[:, None])


@triton.jit
def _copy(
    x, y, t, known, x_first, x_stride, y_first, y_stride, COUNT: tl.constexpr, SIZE: tl.constexpr
):
    """COUNT x SIZE columns of tokens t."""
    c = tl.arange(0, SIZE)[None, :]
    for i in range(0, COUNT):
        v = tl.load(x + (t * x_stride + x_first + i * SIZE)[:, None] + c, mask=known[:, None])
        tl.store(y + (t * y_stride + y_first + i * SIZE)[:, None] + c, v, mask=known[:, None])


@triton.jit
def qk_rope_forward(
    x, q, k, v, q_weight, k_weight, cos, sin, rows, length, batch_step, eps, H: tl.constexpr,
    G: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x [rows, (H + 2 G) D] -> q [rows, H, D], k and v [rows, G, D]. A program has ROWS tokens."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = t < rows
    stride: tl.constexpr = (H + 2 * G) * 2 * HALF
    c, s = _angles(cos, sin, t, known, length, batch_step, HALF)
    _rotate(x, q, q_weight, c, s, t, known, 0, stride, eps, H, NORM, HALF)
    _rotate(x, k, k_weight, c, s, t, known, H * 2 * HALF, stride, eps, G, NORM, HALF)
    _copy(x, v, t, known, (H + G) * 2 * HALF, stride, 0, G * 2 * HALF, G, 2 * HALF)


@triton.jit
def _rotate_back(
    x, dy, dx, weight, partial, cos, sin, t, known, first, stride, eps, HEADS: tl.constexpr,
    NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The gradient of `_rotate`, into dx, and the norm's share of these tokens [2, HALF]."""
    half = tl.arange(0, HALF)[None, :]
    wa, wb = _weights(weight, NORM, HALF)
    sum_a = tl.zeros([HALF], tl.float32)
    sum_b = tl.zeros([HALF], tl.float32)
    for h in range(0, HEADS):
        da, db = _halves(dy, ((t * HEADS + h) * 2 * HALF)[:, None] + half, known, HALF)
        ra = da * cos + db * sin
        rb = db * cos - da * sin
        at = (t * stride + first + h * 2 * HALF)[:, None] + half
        if NORM:
            a, b = _halves(x, at, known, HALF)
            mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
            r = (1 / tl.sqrt(mean + eps))[:, None]
            a = a * r
            b = b * r
            sum_a += tl.sum(ra * a, 0)
            sum_b += tl.sum(rb * b, 0)
            ra = ra * wa
            rb = rb * wb
            inner = ((tl.sum(ra * a, 1) + tl.sum(rb * b, 1)) / (2 * HALF))[:, None]
            ra = r * (ra - a * inner)
            rb = r * (rb - b * inner)
        kind = dx.dtype.element_ty
        tl.store(dx + at, ra.to(kind), mask=known[:, None])
        tl.store(dx + at + HALF, rb.to(kind), mask=known[:, None])
    if NORM:
        tl.store(partial + tl.arange(0, HALF), sum_a)
        tl.store(partial + HALF + tl.arange(0, HALF), sum_b)


@triton.jit
def qk_rope_backward(
    x, dq, dk, dv, dx, q_weight, k_weight, partial, cos, sin, rows, length, batch_step, eps,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """partial [programs, 2, D]: what each program's tokens add to the weights' gradients."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = t < rows
    stride: tl.constexpr = (H + 2 * G) * 2 * HALF
    c, s = _angles(cos, sin, t, known, length, batch_step, HALF)
    partial += tl.program_id(0) * 4 * HALF
    _rotate_back(x, dq, dx, q_weight, partial, c, s, t, known, 0, stride, eps, H, NORM, HALF)
    _rotate_back(
        x, dk, dx, k_weight, partial + 2 * HALF, c, s, t, known, H * 2 * HALF, stride, eps, G, NORM,
        HALF,
    )  # fmt: skip
    _copy(dv, dx, t, known, 0, G * 2 * HALF, (H + G) * 2 * HALF, stride, G, 2 * HALF)
