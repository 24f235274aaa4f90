"""The Triton kernels of ops/multi_tensor.py.

Tensors come as tables of addresses, int64 on the device. A program has BLOCK elements of one matrix
(of one tensor, several BLOCKs): a base (64 bits) and an offset (32 bits). ALIGN is what all the
addresses are a multiple of, in bytes: with 16 loads and stores are vectors. Where `go` holds 0
nothing is changed.
"""

import triton
import triton.language as tl


@triton.jit
def _tensor(table, n, ALIGN: tl.constexpr, KIND: tl.constexpr = tl.float32):
    """The n-th tensor of a table."""
    return tl.multiple_of(tl.load(table + n).to(tl.pointer_type(KIND)), ALIGN)


@triton.jit
def _tile(size, BLOCK: tl.constexpr):
    """The program's matrix, its first element there, its elements from there, what exists."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    return tl.program_id(1).to(tl.int64), first, lane, lane < tl.minimum(size - first, BLOCK)


@triton.jit
def _lerp(a, b, weight):
    """torch.lerp: the form that rounds less."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))


@triton.jit
def momentum_kernel(
    buffers, grads, partial, go, size, momentum, weight, NESTEROV: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Buffers, in place, and sums of the squared direction into partial [N, programs]."""
    if tl.load(go) == 0:
        return
    n, first, lane, inside = _tile(size, BLOCK)
    at = _tensor(buffers, n, ALIGN) + first + lane
    g = tl.load(_tensor(grads, n, ALIGN) + first + lane, mask=inside, other=0)
    b = _lerp(tl.load(at, mask=inside, other=0), g, weight)
    tl.store(at, b, mask=inside)
    d = b
    if NESTEROV:
        d = _lerp(g, b, momentum)
    tl.store(partial + n * tl.num_programs(0) + tl.program_id(0), tl.sum(d * d, 0))


@triton.jit
def direction_kernel(
    out, buffers, grads, factors, size, momentum, NESTEROV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The direction once more, times its matrix's factor, into out [N, size]."""
    n, first, lane, inside = _tile(size, BLOCK)
    d = tl.load(_tensor(buffers, n, ALIGN) + first + lane, mask=inside, other=0)
    if NESTEROV:
        g = tl.load(_tensor(grads, n, ALIGN) + first + lane, mask=inside, other=0)
        d = _lerp(g, d, momentum)
    d *= tl.load(factors + n)
    tl.store(out + n * size + first + lane, d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def update_kernel(
    weights, updates, go, size, shrink, scale, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p <- shrink p - scale u, with updates [N, size] in any dtype."""
    if tl.load(go) == 0:
        return
    n, first, lane, inside = _tile(size, BLOCK)
    at = _tensor(weights, n, ALIGN) + first + lane
    u = tl.load(updates + n * size + first + lane, mask=inside, other=0).to(tl.float32)
    p = tl.load(at, mask=inside, other=0)
    tl.store(at, p * shrink - scale * u, mask=inside)


@triton.jit
def _share(
    tensors, sizes, firsts, owners, ALIGN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Where the program's share of all the tensors begins, its lanes, how much of its tensor is
    left from there. owners [programs]: each program's tensor; firsts [N]: each tensor's first."""
    n = tl.load(owners + tl.program_id(0))
    first = (tl.program_id(0) - tl.load(firsts + n)) * (BLOCK * BLOCKS)
    lane = tl.arange(0, BLOCK)
    return _tensor(tensors, n, ALIGN, KIND) + first + lane, lane, tl.load(sizes + n) - first


@triton.jit
def scale_kernel(
    tensors, sizes, firsts, owners, factor, ALIGN: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Each tensor times the factor, in place; nothing is read or written where that is 1 (a NaN is
    not)."""
    factor = tl.load(factor)
    if factor == 1:
        return
    at, lane, left = _share(tensors, sizes, firsts, owners, ALIGN, KIND, BLOCK, BLOCKS)
    if left >= BLOCK * BLOCKS:  # without masks, which would split vectors: sizes are unknown
        for i in range(BLOCKS):
            x = tl.load(at + i * BLOCK).to(tl.float32)
            tl.store(at + i * BLOCK, (x * factor).to(KIND))
    else:
        for i in range(BLOCKS):
            inside = i * BLOCK + lane < left
            x = tl.load(at + i * BLOCK, mask=inside, other=0).to(tl.float32)
            tl.store(at + i * BLOCK, (x * factor).to(KIND), mask=inside)


@triton.jit
def squares_kernel(
    tensors, sizes, firsts, owners, partial, ALIGN: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """partial [programs]: the sum of the squares of each program's share."""
    at, lane, left = _share(tensors, sizes, firsts, owners, ALIGN, KIND, BLOCK, BLOCKS)
    total = tl.zeros([BLOCK], tl.float32)
    if left >= BLOCK * BLOCKS:
        for i in range(BLOCKS):
            x = tl.load(at + i * BLOCK).to(tl.float32)
            total += x * x
    else:
        for i in range(BLOCKS):
            x = tl.load(at + i * BLOCK, mask=i * BLOCK + lane < left, other=0).to(tl.float32)
            total += x * x
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _random(seed, place):
    """32 random bits [BLOCK]: C. Wellons' lowbias32 hash of place and seed."""
    x = place.to(tl.uint32) ^ seed.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round(x, bits, KIND: tl.constexpr):
    """x in KIND; in bfloat16 rounded up with the probability of what is cut off. bits < 2^16."""
    if KIND.primitive_bitwidth == 16:
        whole = (x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
        x = whole.to(tl.float32, bitcast=True)
    return x.to(KIND)


@triton.jit
def _load(at, inside, MASKED: tl.constexpr):
    x = tl.load(at, mask=inside, other=0) if MASKED else tl.load(at)
    return x.to(tl.float32)


@triton.jit
def _store(at, x, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(at, x, mask=inside)
    else:
        tl.store(at, x)


@triton.jit
def _adamw(
    p_at, g_at, m_at, v_at, inside, bits, decay, rate, beta1, beta2, eps, root, KIND: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    g = _load(g_at, inside, MASKED)
    m = _load(m_at, inside, MASKED)
    m += (1 - beta1) * (g - m)
    v = beta2 * _load(v_at, inside, MASKED) + (1 - beta2) * g * g
    p = _load(p_at, inside, MASKED) * decay - rate * m / (tl.sqrt(v) / root + eps)
    _store(p_at, _round(p, bits & 0xFFFF, KIND), inside, MASKED)
    _store(m_at, m.to(KIND), inside, MASKED)
    _store(v_at, _round(v, bits >> 16, KIND), inside, MASKED)


@triton.jit
def adamw_kernel(
    weights, grads, first_moments, second_moments, sizes, firsts, owners, steps, roots1, roots2, go,
    lr, decay, beta1, beta2, eps, ALIGN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """AdamW on tensors of one dtype. steps [N]; roots1, roots2 [N]: what the first moment and the
    root of the second are divided by."""
    if tl.load(go) == 0:
        return
    n = tl.load(owners + tl.program_id(0))
    first = (tl.program_id(0) - tl.load(firsts + n)) * (BLOCK * BLOCKS)
    lane = tl.arange(0, BLOCK)
    left = tl.load(sizes + n) - first
    p = _tensor(weights, n, ALIGN, KIND) + first + lane
    g = _tensor(grads, n, ALIGN, KIND) + first + lane
    m = _tensor(first_moments, n, ALIGN, KIND) + first + lane
    v = _tensor(second_moments, n, ALIGN, KIND) + first + lane
    rate = lr / tl.load(roots1 + n)
    root = tl.load(roots2 + n)
    seed = (tl.load(steps + n).to(tl.int64) * 65599 + n) * 0x9E3779B1
    for i in range(BLOCKS):
        at = i * BLOCK + lane
        bits = _random(seed, first + at)
        j = i * BLOCK
        if left >= j + BLOCK:  # without masks, which would split vectors: sizes are unknown
            _adamw(
                p + j, g + j, m + j, v + j, at < left, bits, decay, rate, beta1, beta2, eps, root,
                KIND, False,
            )  # fmt: skip
        elif left > j:
            _adamw(
                p + j, g + j, m + j, v + j, at < left, bits, decay, rate, beta1, beta2, eps, root,
                KIND, True,
            )  # fmt: skip
