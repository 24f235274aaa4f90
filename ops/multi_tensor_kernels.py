"""The Triton kernels of ops/multi_tensor.py.

Tensors come as tables of addresses, int64 on the device. A program has BLOCK elements of one matrix
(of one tensor, several BLOCKs): a base (64 bits) and an offset (32 bits). ALIGN is what all the
addresses are a multiple of, in bytes: with 16 loads and stores are vectors.
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
    buffers, grads, partial, size, momentum, weight, NESTEROV: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Buffers, in place, and sums of the squared direction into partial [N, programs]."""
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
    weights, updates, size, shrink, scale, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p <- shrink p - scale u, with updates [N, size] in any dtype."""
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
