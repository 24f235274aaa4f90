"""The passes over many tensors: Triton against PyTorch in float64, on a GPU and, interpreted in a
process of its own, on a CPU (Triton decides when it is imported).

pytest tests/ops/test_multi_tensor.py
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from kit import assert_close_rms
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import SHAPES, give_grads, random_params

import muon as muon_module
from muon import Muon
from ops import multi_tensor
from ops.multi_tensor import (
    PLAIN,
    TRITON,
    plain_adamw,
    scale_,
    total_norm,
    triton_adamw,
    uses_triton,
)
from optimizer import StepGuard, build_optimizer, clip_grad_norm

# Blocks are 64 elements and 3 of them when interpreted, 4096 and 8 on a GPU.
MATRICES = {
    "cpu": [(40, 7), (7, 40), (16, 16), (8, 8), (1, 1), (3, 63)],
    "cuda": [(1536, 256), (256, 1544), (64, 64), (1, 1), (129, 1023), (4097, 33), (8960, 1536)],
}
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}
GUARD = 12.5


def placed(values: Tensor, offset: int, device: str) -> tuple[Tensor, Tensor]:
    """A float32 copy that starts `offset` elements into a buffer of guards, and the buffer."""
    buffer = torch.full((values.numel() + 16,), GUARD, device=device)
    inner = buffer[offset : offset + values.numel()].view(values.shape)
    return inner.copy_(values), buffer


def check_passes(device: str) -> None:
    """Each pass: both orientations, sizes that are no multiple of a block or a vector, addresses
    that are multiples of 16 bytes and others; nothing is written next to a matrix."""
    torch.manual_seed(0)
    cases = itertools.product(MATRICES[device], (4, 5), (True, False), (0.95, 0.3))
    dtypes = itertools.cycle(ROUNDING)  # 8 cases a shape, 3 dtypes: all of them meet
    for shape, offset, nesterov, momentum in cases:
        dtype = next(dtypes)
        exact = [[torch.randn(shape, device=device).double() for _ in range(3)] for _ in range(3)]
        small, guards = [], []
        for some in exact:
            inner, buffers = zip(*(placed(x, offset, device) for x in some), strict=True)
            small.append(list(inner))
            guards += buffers
        mix = {"momentum": momentum, "nesterov": nesterov}
        (params, buffers, grads), (p, b, g) = exact, small
        before = [x.clone() for x in g]

        wanted = PLAIN.momentum(buffers, grads, **mix)
        norms = TRITON.momentum(b, g, **mix)
        # atol: the two terms of a single element may cancel
        torch.testing.assert_close(norms.double(), wanted, rtol=1e-6, atol=2e-7)
        assert_close_rms(torch.stack(b), torch.stack(buffers), ROUNDING[torch.float32])

        want = torch.empty(3, *shape, dtype=torch.float64, device=device)
        out = torch.full((3, *shape), math.nan, dtype=dtype, device=device)
        PLAIN.directions(want, buffers, grads, 1 / wanted, **mix)
        TRITON.directions(out, b, g, 1 / norms, **mix)
        assert_close_rms(out, want, ROUNDING[dtype])

        for shrink, scale in ((1.0, 0.3), (0.9, 0.7)):
            PLAIN.update(params, out.double(), shrink=shrink, scale=scale)
            versions = [x._version for x in p]
            TRITON.update(p, out, shrink=shrink, scale=scale)
            assert all(x._version > v for x, v in zip(p, versions, strict=True))
            assert_close_rms(torch.stack(p), torch.stack(params), ROUNDING[torch.float32])
        assert all(x.equal(y) for x, y in zip(g, before, strict=True))
        for buffer in guards:
            rest = torch.cat([buffer[:offset], buffer[offset + math.prod(shape) :]])
            assert (rest == GUARD).all()


def check_not_finite(device: str) -> None:
    """A NaN reaches its own norm only."""
    b, g = ([torch.randn(9, 50, device=device) for _ in range(3)] for _ in range(2))
    g[1][8, 49] = math.nan
    norms = TRITON.momentum(b, g, momentum=0.95, nesterov=True)
    assert norms.isnan().tolist() == [False, True, False]


def check_refused(device: str) -> None:
    """go: 0 changes nothing, whatever the gradients are, 1 is as without."""
    shapes = [(9, 50), (3, 7)]

    def some() -> list[list[Tensor]]:
        torch.manual_seed(0)
        return [[torch.rand(s, device=device) for s in shapes] for _ in range(4)]

    def steps() -> list[Tensor]:
        return [torch.full((), 3.0, device=device) for _ in shapes]

    def run(go: float | None) -> list[Tensor]:
        flag = None if go is None else torch.tensor(go, device=device)
        params, grads, firsts, seconds = some()
        counts = steps()
        if go == 0:
            for g in grads:
                g.fill_(math.nan)
        triton_adamw(params, grads, firsts, seconds, counts, **ADAMW, go=flag)
        TRITON.momentum(firsts[:1], grads[:1], momentum=0.9, nesterov=True, go=flag)
        TRITON.update(params[:1], grads[0][None], shrink=0.9, scale=0.1, go=flag)
        return [*params, *firsts, *seconds, *counts]

    untouched = [t for kind in (0, 2, 3) for t in some()[kind]] + steps()
    assert all(a.equal(b) for a, b in zip(run(0.0), untouched, strict=True))
    changed = run(1.0)
    assert all(a.equal(b) for a, b in zip(changed, run(None), strict=True))
    assert not any(a.equal(b) for a, b in zip(changed, untouched, strict=True))


def stepped(device: str, nesterov: bool) -> list[Tensor]:
    """Weights and momentum after steps with two groups, whose matrices share stacks, and a
    schedule."""
    params = random_params([*SHAPES, *SHAPES], device=device)
    groups = [
        {"params": params[: len(SHAPES)], "lr": 0.02, "weight_decay": 0.1},
        {"params": params[len(SHAPES) :], "lr": 0.05},
    ]
    muon = Muon(groups, nesterov=nesterov, ns_dtype=torch.float32)
    for step in range(3):
        give_grads(params, seed=step)
        params[2].grad = None if step == 1 else params[2].grad
        muon.param_groups[1]["lr"] = 0.05 / (1 + step)
        muon.step()
    return [*(p.detach() for p in params), *(s["momentum_buffer"] for s in muon.state.values())]


def check_muon(device: str) -> None:
    """Whole steps: the same weights and momentum as with PyTorch's passes."""
    for nesterov in (True, False):
        with mock.patch.object(muon_module, "PLAIN", None):  # no stack falls back
            results = stepped(device, nesterov)
        with mock.patch.object(muon_module, "uses_triton", lambda tensors: False):
            wanted = stepped(device, nesterov)
        for x, y in zip(results, wanted, strict=True):
            assert_close_rms(x, y, 1e-5)


def random_tensors(device: str) -> list[Tensor]:
    """Around the elements of a program; a scalar, an empty one, one that starts in a vector."""
    whole = multi_tensor.BLOCK * multi_tensor.BLOCKS
    shapes = [(3,), (), (whole,), (0,), (whole + 1,), (2, whole - 1), (5, whole), (1,)]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def check_scale(device: str) -> None:
    for offset, value in itertools.product((4, 5), (0.37, 0.0, math.nan, math.inf)):
        factor = torch.tensor(value, device=device)
        pairs = [placed(x, offset, device) for x in random_tensors(device)]
        tensors = [inner for inner, _ in pairs]
        wanted = [x * factor for x in tensors]
        with mock.patch.object(torch, "_foreach_mul_", side_effect=AssertionError):
            scale_(tensors, factor)
        for (inner, buffer), want in zip(pairs, wanted, strict=True):
            assert torch.equal(inner.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
            rest = torch.cat([buffer[:offset], buffer[offset + inner.numel() :]])
            assert (rest == GUARD).all()


def check_scale_by_one(device: str) -> None:
    """Nothing is written: a multiplication, even by 1, makes a signalling NaN quiet."""
    signalling = 0x7F800001
    tensors = random_tensors(device)
    for factor, touched in ((1.0, False), (0.5, True)):
        for x in tensors:
            x.view(torch.int32).fill_(signalling)
        scale_(tensors, torch.tensor(factor, device=device))
        for x in tensors:
            assert ((x.view(torch.int32) != signalling) == touched).all()


def check_two_dtypes(device: str) -> None:
    """Norm and factor of float32 and bfloat16 tensors together, in float32."""
    tensors = [x.bfloat16() if i % 2 else x for i, x in enumerate(random_tensors(device))]
    tensors.append(torch.randn(70, device=device).bfloat16()[1:])  # at a multiple of 2 bytes only
    assert multi_tensor._tables(tensors[-1:])[1] == 2
    wanted = torch.cat([x.double().flatten() for x in tensors]).norm()
    with mock.patch.object(torch, "_foreach_norm", side_effect=AssertionError):
        torch.testing.assert_close(total_norm(tensors).double(), wanted, rtol=1e-6, atol=0)
    groups = multi_tensor._launches(tensors)
    assert sorted(multi_tensor._tables(group)[1] for group in groups) == [2, 16, 16]
    factor = torch.tensor(0.37, device=device)
    scaled = [(x.float() * factor).to(x.dtype) for x in tensors]
    scale_(tensors, factor)
    for x, y in zip(tensors, scaled, strict=True):
        unit = 2**-7 if x.dtype == torch.bfloat16 else 0  # the interpreter does not round to even
        assert ((x - y).abs() <= unit * y.abs()).all()


def check_clipping(device: str) -> None:
    """`clip_grad_norm` scales by the kernel, NaN included; other dtypes as before."""
    params = [nn.Parameter(x) for x in random_tensors(device)]
    for bad, max_norm in ((False, 0.5), (False, 1e9), (True, 0.5)):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).to(device)
        if bad:
            params[2].grad[-1] = math.inf
        norm = torch.cat([p.grad.flatten() for p in params]).double().norm()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        wanted = [p.grad * factor for p in params]
        foreach = dict.fromkeys(("_foreach_mul_", "_foreach_norm"))
        with mock.patch.multiple(torch, **foreach):
            measured = clip_grad_norm(params, max_norm)
        torch.testing.assert_close(measured, norm.float())
        for p, want in zip(params, wanted, strict=True):
            torch.testing.assert_close(p.grad, want.float(), equal_nan=True, rtol=1e-5, atol=1e-9)


ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def check_adamw(device: str) -> None:
    """Three steps from other counts, against float64; addresses that are no multiples of 16."""
    for offset in (4, 5):
        exact = [[x.double() for x in random_tensors(device)] for _ in range(4)]
        exact[3] = [x.abs() for x in exact[3]]
        pairs = [[placed(x, offset, device) for x in some] for some in exact]
        small = [[inner for inner, _ in some] for some in pairs]
        counts = [torch.tensor(float(i), device=device) for i in range(len(exact[0]))]
        mine = [c.clone() for c in counts]
        for _ in range(3):
            plain_adamw(*exact, counts, **ADAMW)
            triton_adamw(*small, mine, **ADAMW)
        for kind in (0, 2, 3):  # weights and both moments
            for x, y in zip(small[kind], exact[kind], strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(mine, counts, strict=True))
        for (inner, buffer), _ in zip(pairs[0], exact[0], strict=True):
            rest = torch.cat([buffer[:offset], buffer[offset + inner.numel() :]])
            assert (rest == GUARD).all()


def drift(step, device: str) -> Tensor:
    """Weights of 1 in bfloat16 after 20 steps of 1e-4, a fortieth of the next smaller number."""
    n = 5000
    p, g = (torch.ones(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    state = [torch.zeros_like(p) for _ in range(2)]
    counts = [torch.zeros((), device=device)]
    for _ in range(20):
        step([p], [g], *([s] for s in state), counts, **ADAMW | {"lr": 1e-4, "weight_decay": 0.0})
    return p


def check_stochastic_rounding(device: str) -> None:
    """Steps that nearest rounding would lose arrive in the mean, and are not all alike."""
    with mock.patch.object(multi_tensor, "BLOCK", 1024):  # an interpreter is slow at many programs
        rounding(device)


def rounding(device: str) -> None:
    for step in (plain_adamw, triton_adamw):
        p = drift(step, device).double()
        moved = 1 - p.mean().item()
        assert abs(moved - 20e-4) < 2.5e-4  # its standard deviation is 4e-5
        assert len(p.unique()) > 1 and (p <= 1).all()
    both = torch.stack([drift(triton_adamw, device) for _ in range(2)])
    assert torch.equal(*both)  # the same random numbers in every run


def check_tables(device: str) -> None:
    """A table is copied once while nothing moves, and anew when something does."""
    tensors = [torch.randn(5, device=device) for _ in range(3)]
    (table,), _ = multi_tensor._tables(tensors)
    assert table.tolist() == [x.data_ptr() for x in tensors]
    assert multi_tensor._tables(tensors)[0][0] is table
    held, tensors[1] = tensors[1], torch.randn(5, device=device)
    (other,), _ = multi_tensor._tables(tensors)
    assert other.tolist() == [x.data_ptr() for x in tensors] != table.tolist()
    assert held.data_ptr() == table.tolist()[1]


CHECKS = [
    check_passes, check_not_finite, check_refused, check_muon, check_scale, check_scale_by_one,
    check_two_dtypes, check_clipping, check_tables, check_adamw, check_stochastic_rounding,
]  # fmt: skip


def interpret() -> None:
    """What the process of `test_interpreted` runs."""
    everything = {"uses_triton": lambda tensors, dtypes=(): True}
    small = {"BLOCK": 64, "BLOCKS": 3, **everything}
    with mock.patch.multiple(multi_tensor, **small), mock.patch.multiple(muon_module, **everything):
        for check in CHECKS:
            check("cpu")


@pytest.mark.slow
def test_interpreted():
    pytest.importorskip("triton")
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(str(p) for p in (here, here.parent, here.parents[1]))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    code = "import test_multi_tensor as t; t.interpret()"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=600)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_on_a_gpu(check):
    check("cuda")


class NoReads(TorchDispatchMode):
    """Within it the host reads no tensor's number."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number was read"
        return function(*args, **(kwargs or {}))


def test_adamw_reads_no_number(monkeypatch):
    """The host of a GPU would wait for all work before it."""
    launched = mock.MagicMock()
    monkeypatch.setattr(multi_tensor, "kernels", lambda: launched)
    tensors = [[torch.ones(3), torch.ones(2, 2)] for _ in range(4)]
    counts = [torch.zeros(()), torch.zeros(())]
    for go, after in ((1.0, 1.0), (0.0, 1.0), (None, 2.0)):
        go = None if go is None else torch.tensor(go)
        with NoReads():
            triton_adamw(*tensors, counts, **ADAMW, go=go)
        assert [c.item() for c in counts] == [after, after]
    assert launched.adamw_kernel.__getitem__().call_count == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_the_gpu(monkeypatch):
    params = random_params([*SHAPES, *SHAPES], device="cuda")
    named = [(f"{i}.weight", p) for i, p in enumerate(params)]
    named += [("norm.weight", nn.Parameter(torch.ones(9, device="cuda")))]
    optimizer = build_optimizer(named, lr=0.02, use_muon=True)
    optimizer.init_state()
    guard = StepGuard(10.0, torch.device("cuda"))
    params.append(named[-1][1])
    give_grads(params, seed=0)
    monkeypatch.setattr("muon.PLAIN", None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(guard(clip_grad_norm(params, 1.0)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_triton_takes():
    good = torch.randn(4, 6, device="cuda")
    assert uses_triton([good, good[1:]])
    for bad in (good.T, good.double(), good.bfloat16(), good.cpu(), good[:, 1:]):
        assert not uses_triton([good, bad])


def test_a_cpu_takes_pytorch():
    assert not uses_triton([torch.randn(4, 6)])
