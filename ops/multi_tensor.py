"""Elementwise passes over many tensors: Muon's momentum, directions and updates; AdamW; clipping.

    B <- lerp(B, G, 1 - mu),   D = lerp(G, B, mu)  if nesterov else  B        and  ||D||_F
    out <- f D                                                                with f = 1 / ||D||_F
    W <- shrink W - scale O

`PLAIN` is PyTorch (any device and dtype). `TRITON` is a kernel each (CUDA, contiguous float32; for
clipping bfloat16 as well),
which reads and writes every element once; one launch takes all N matrices of a shape, whose
addresses it finds in a table on the device. Nothing in Triton waits for the device.
go [] float32 on the device: with 0 everything stays as it is. None: nothing does.
Check: `pytest tests/ops/test_multi_tensor.py`, which interprets the Triton code on a CPU.
Shapes: N matrices of R rows and C columns, P programs a matrix.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.kernels import has_triton

BLOCK, WARPS = 4096, 8  # of a program: elements at a time
BLOCKS = 8  # of a program that scales: so few programs that they cost nothing where the factor is 1


class Passes(NamedTuple):
    """One form of Muon's passes. Matrices are lists of N [R, C]."""

    momentum: Callable  # (buffers, grads, *, momentum, nesterov, go) -> norms [N] of the directions
    directions: Callable  # (out [N, R, C], buffers, grads, factors [N], *, momentum, nesterov)
    update: Callable  # (params, updates [N, R, C], *, shrink, scale, go)


# PyTorch


def _goes(go: Tensor | None) -> bool:
    return go is None or bool(go)


def _directions(
    buffers: list[Tensor], grads: list[Tensor], momentum: float, nesterov: bool
) -> Sequence[Tensor]:
    return torch._foreach_lerp(grads, buffers, momentum) if nesterov else buffers


def plain_momentum(
    buffers: list[Tensor],
    grads: list[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    go: Tensor | None = None,
) -> Tensor:
    """Buffers brought up to date, in place; the norms [N] of the directions."""
    if _goes(go):
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
    return torch.stack(torch._foreach_norm(_directions(buffers, grads, momentum, nesterov), 2))


def plain_directions(
    out: Tensor,
    buffers: list[Tensor],
    grads: list[Tensor],
    factors: Tensor,
    *,
    momentum: float,
    nesterov: bool,
) -> None:
    """The directions times factors [N] into out [N, R, C], in its dtype."""
    directions = _directions(buffers, grads, momentum, nesterov)
    for slot, direction, factor in zip(out, directions, factors, strict=True):
        torch.mul(direction, factor, out=slot)


def plain_update(
    params: list[Tensor], updates: Tensor, *, shrink: float, scale: float, go: Tensor | None = None
) -> None:
    """Parameters, in place, from updates [N, R, C] in any dtype."""
    if not _goes(go):
        return
    if shrink != 1:
        torch._foreach_mul_(params, shrink)
    for param, update in zip(params, updates, strict=True):
        param.add_(update, alpha=-scale)  # casts as it reads: no copy in float32


PLAIN = Passes(plain_momentum, plain_directions, plain_update)

# Triton


@functools.cache
def kernels():
    """The module of the Triton kernels. Triton is missing where there is no CUDA."""
    from ops import multi_tensor_kernels

    return multi_tensor_kernels


def uses_triton(tensors: Iterable[Tensor], dtypes=(torch.float32,)) -> bool:
    """Whether the Triton kernels can take these."""
    return has_triton() and all(
        t.is_cuda and t.dtype in dtypes and t.is_contiguous() for t in tensors
    )


def _to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Without waiting for it."""
    pinned = numbers.pin_memory() if device.type == "cuda" else numbers
    return pinned.to(device, non_blocking=True)


@functools.lru_cache(maxsize=1024)  # weights and momentum stay where they are, gradients mostly
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return _to_device(torch.tensor(addresses, dtype=torch.int64), device)


def aligned(*tensors: Tensor) -> bool:
    """Whether all begin at a multiple of 16 bytes. One that does not, as of DDP's gradients behind
    one of an odd size, would take the vectors from all of its launch."""
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def _tables(*lists: list[Tensor]) -> tuple[list[Tensor], int]:
    """The table of addresses [N] of each list, and 16 if all are multiples of 16 bytes, else the
    size of an element."""
    addresses = [tuple(t.data_ptr() for t in tensors) for tensors in lists]
    whole = all(a % 16 == 0 for some in addresses for a in some)
    align = 16 if whole else min(t.element_size() for some in lists for t in some)
    return [_table(some, lists[0][0].device) for some in addresses], align


def _grid(matrices: list[Tensor]) -> tuple[int, int]:
    assert all(m.shape == matrices[0].shape for m in matrices)
    return -(-matrices[0].numel() // BLOCK), len(matrices)


@functools.lru_cache(maxsize=16)
def _always(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def triton_momentum(
    buffers: list[Tensor],
    grads: list[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    go: Tensor | None = None,
) -> Tensor:
    """`plain_momentum`: the same order of the sums in every run."""
    (b, g), align = _tables(buffers, grads)
    grid = _grid(buffers)
    partial = torch.empty(grid[::-1], dtype=torch.float32, device=b.device)  # [N, P]
    go = _always(b.device) if go is None else go
    with torch.cuda.device_of(b):
        kernels().momentum_kernel[grid](
            b, g, partial, go, buffers[0].numel(), momentum, 1 - momentum, NESTEROV=nesterov,
            ALIGN=align, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return partial.sum(1).sqrt_()


def triton_directions(
    out: Tensor,
    buffers: list[Tensor],
    grads: list[Tensor],
    factors: Tensor,
    *,
    momentum: float,
    nesterov: bool,
) -> None:
    """`plain_directions`."""
    assert out.is_contiguous() and out.shape == (len(buffers), *buffers[0].shape)
    (b, g), align = _tables(buffers, grads)
    with torch.cuda.device_of(b):
        kernels().direction_kernel[_grid(buffers)](
            out, b, g, factors, buffers[0].numel(), momentum, NESTEROV=nesterov, ALIGN=align,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def triton_update(
    params: list[Tensor], updates: Tensor, *, shrink: float, scale: float, go: Tensor | None = None
) -> None:
    """`plain_update`."""
    assert updates.is_contiguous() and updates.shape == (len(params), *params[0].shape)
    (p,), align = _tables(params)
    go = _always(p.device) if go is None else go
    with torch.cuda.device_of(p):
        kernels().update_kernel[_grid(params)](
            p, updates, go, params[0].numel(), shrink, scale, ALIGN=align, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # autograd has seen none of this


TRITON = Passes(triton_momentum, triton_directions, triton_update)

# Clipping

KINDS = (torch.float32, torch.bfloat16)


@functools.lru_cache(maxsize=16)
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of a launch over tensors of these sizes: sizes [N], each tensor's first program [N] and each
    program's tensor [programs]."""
    numbers = torch.tensor(sizes, dtype=torch.int64)
    count = (numbers + BLOCK * BLOCKS - 1) // (BLOCK * BLOCKS)
    owners = torch.repeat_interleave(count)
    return tuple(_to_device(t, device) for t in (numbers, count.cumsum(0) - count, owners))


def _kind(tensors: list[Tensor]):
    """Triton's name of their dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[tensors[0].dtype]


def _launch(kernel: str, tensors: list[Tensor], other: Tensor | None = None) -> Tensor:
    """Run a kernel over tensors of one dtype; `other` is its factor, or else the result is what it
    finds for each program."""
    (table,), align = _tables(tensors)
    sizes, firsts, owners = _programs(tuple(t.numel() for t in tensors), table.device)
    if other is None:
        other = torch.empty(len(owners), dtype=torch.float32, device=table.device)
    if len(owners):
        with torch.cuda.device_of(table):
            getattr(kernels(), kernel)[len(owners),](
                table, sizes, firsts, owners, other, ALIGN=align, KIND=_kind(tensors),
                BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=WARPS,
            )  # fmt: skip
    return other


def _launches(tensors: list[Tensor]) -> list[list[Tensor]]:
    found = defaultdict(list)
    for t in tensors:
        found[t.dtype, aligned(t)].append(t)
    return list(found.values())


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Tensors of any shapes times a factor [] on their device, in place. The Triton kernel leaves
    the memory alone where the factor is 1."""
    if not uses_triton(tensors, KINDS) or not uses_triton([factor]):
        torch._foreach_mul_(tensors, factor)
        return
    for some in _launches(tensors):
        _launch("scale_kernel", some, factor)
    torch.autograd.graph.increment_version(tensors)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm [] of all elements together, in float32 (float64 where there is some)."""
    if uses_triton(tensors, KINDS):
        found = [_launch("squares_kernel", some) for some in _launches(tensors)]
        return torch.cat(found).sum().sqrt()
    wide = any(t.dtype == torch.float64 for t in tensors)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64 if wide else torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


# AdamW


def stochastic_bfloat16(x: Tensor) -> Tensor:
    """float32 in bfloat16, rounded up or down with probabilities that make the mean exact."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32).to(torch.bfloat16)


def plain_adamw(
    params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor],
    steps: list[Tensor], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    go: Tensor | None = None,
) -> None:  # fmt: skip
    """A step, in place, of tensors of any dtypes; steps [] float32 are counted up first. In float32
    at least; weights and second moments in bfloat16 are rounded stochastically."""
    if not _goes(go):
        return
    for p, g, m, v, step in zip(params, grads, firsts, seconds, steps, strict=True):
        step += 1
        count, kind = step.double().to(p.device), torch.promote_types(p.dtype, torch.float32)
        first = torch.lerp(m.to(kind), g.to(kind), 1 - beta1)
        second = beta2 * v.to(kind) + (1 - beta2) * g.to(kind).square()
        root = second.sqrt() / (1 - beta2**count).sqrt().to(kind) + eps
        new = p.to(kind) * (1 - lr * weight_decay)
        new -= lr / (1 - beta1**count).to(kind) * first / root
        rounded = stochastic_bfloat16 if p.dtype == torch.bfloat16 else Tensor.contiguous
        m.copy_(first)
        v.copy_(rounded(second))
        p.copy_(rounded(new))


def triton_adamw(
    params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor],
    steps: list[Tensor], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    go: Tensor | None = None,
) -> None:  # fmt: skip
    """`plain_adamw` of tensors of one dtype, float32 or bfloat16, in one launch."""
    go = _always(params[0].device) if go is None else go
    torch._foreach_add_(steps, [go] * len(steps))  # of one `go` the host would read the number
    count = torch.stack(steps)
    roots1 = (1 - beta1 ** count.double()).float()
    roots2 = (1 - beta2 ** count.double()).sqrt().float()
    tables, align = _tables(params, grads, firsts, seconds)
    sizes, starts, owners = _programs(tuple(t.numel() for t in params), count.device)
    if len(owners):
        with torch.cuda.device_of(count):
            kernels().adamw_kernel[len(owners),](
                *tables, sizes, starts, owners, count, roots1, roots2, go, lr,
                1 - lr * weight_decay, beta1, beta2, eps, ALIGN=align, KIND=_kind(params),
                BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=WARPS,
            )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *firsts, *seconds])
