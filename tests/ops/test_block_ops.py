"""SwiGLU and the rotation of joined q, k and v: the plain forms against what layers.py does with
them apart, the Triton kernels against the plain forms."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import TOLERANCE, assert_close_rms

from layers import RMSNorm, apply_rope
from ops import block_ops
from ops.block_ops import plain_qk_rope, plain_swiglu_mm

H, G, BATCH, LENGTH, EPS = 3, 2, 2, 21, 1e-6


def random(*shape, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def angles(batch, size, device="cpu"):
    """cos and sin [batch, T, 1, D / 2], other ones in every row."""
    a = random(batch, LENGTH, 1, size // 2, seed=5, device=device).float() * 3
    return a.cos(), a.sin()


def gradients(out, leaves):
    """[outputs, gradients of a weighted sum of them]."""
    outs = out if isinstance(out, tuple | list) else (out,)
    total = sum(
        (o.double() * random(*o.shape, seed=i + 9, device=o.device)).sum()
        for i, o in enumerate(outs)
    )
    return [*outs, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("norm", [False, True])
def test_plain_rotation_is_that_of_the_layers(norm):
    size = 8
    x = random(BATCH, LENGTH, (H + 2 * G) * size)
    cos, sin = (t.double() for t in angles(BATCH, size))
    norms = [RMSNorm(size, EPS).double() for _ in range(2)]
    for i, m in enumerate(norms):
        m.weight.data.copy_(random(size, seed=i + 2))
    q, k, v = x.unflatten(-1, (-1, size)).split([H, G, G], 2)
    if norm:
        q, k = norms[0](q), norms[1](k)
    wanted = apply_rope(q, cos, sin), apply_rope(k, cos, sin), v
    weights = [m.weight if norm else None for m in norms]
    for a, b in zip(plain_qk_rope(x, cos, sin, *weights, H, G, EPS), wanted, strict=True):
        assert_close_rms(a, b)


def test_plain_swiglu_is_gate_times_up():
    gate, up, weight = random(3, 5), random(3, 5, seed=1), random(4, 5, seed=2)
    wanted = (gate * gate.sigmoid() * up) @ weight.T
    assert_close_rms(plain_swiglu_mm(gate, up, weight), wanted)
    assert_close_rms(plain_swiglu_mm(torch.cat([gate, up], -1), None, weight), wanted)


def compiled(op):
    torch._dynamo.reset()
    return torch.compile(op, fullgraph=True, backend="aot_eager")


def check_swiglu(device: str) -> None:
    """Widths below, at and above a program's columns; gate and up joined and apart."""
    cases = itertools.product((torch.float32, torch.bfloat16), (8, 1024, 1500), (True, False))
    for dtype, width, joint in cases:
        gate, up = (random(2, 3, width, seed=i, dtype=dtype, device=device) for i in range(2))
        both = [torch.cat([gate, up], -1)] if joint else [gate, up]
        weight = (random(4, width, seed=2) * width**-0.5).to(device, dtype)
        leaves = [t.requires_grad_() for t in (*both, weight)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        expected = gradients(plain_swiglu_mm(*(with_none(exact))), exact)
        for run in (block_ops._swiglu_mm, compiled(block_ops._swiglu_mm)):
            found = gradients(run(*with_none(leaves)), leaves)
            for a, e in zip(found, expected, strict=True):
                assert a.dtype == dtype and a.shape == e.shape
                assert_close_rms(a, e, TOLERANCE[dtype])


def with_none(leaves):
    """gate, up, weight of [gate, up, weight] or [joined, weight]."""
    return leaves if len(leaves) == 3 else [leaves[0], None, leaves[1]]


def check_rotation(device: str) -> None:
    """Head sizes, with and without norms, angles of every row or the same in all."""
    cases = itertools.product((torch.float32, torch.bfloat16), (32, 64), (False, True), (1, BATCH))
    for dtype, size, norm, rows in cases:
        x = random(BATCH, LENGTH, (H + 2 * G) * size, dtype=dtype, device=device).requires_grad_()
        cos, sin = angles(rows, size, device)
        weights = [random(size, seed=i + 2, dtype=torch.float32, device=device) for i in range(2)]
        leaves = [x, *(w.requires_grad_() for w in weights)] if norm else [x]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        theirs = exact[1:] if norm else (None, None)
        wanted = plain_qk_rope(exact[0], cos.double(), sin.double(), *theirs, H, G, EPS)
        expected = gradients(wanted, exact)
        mine = weights if norm else (None, None)
        for run in (block_ops._qk_rope, compiled(block_ops._qk_rope)):
            found = gradients(run(x, cos, sin, *mine, H, G, EPS), leaves)
            for a, e in zip(found, expected, strict=True):
                assert a.dtype in (dtype, torch.float32) and a.shape == e.shape
                assert_close_rms(a, e, TOLERANCE[dtype])


CHECKS = [check_swiglu, check_rotation]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_triton_interpreted(check):
    """Triton decides when it is imported whether it interprets: a process of its own."""
    pytest.importorskip("triton")
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(str(p) for p in (here, here.parent, here.parents[1]))
    subprocess.run(
        [sys.executable, "-c", f"import test_block_ops as t; t.{check.__name__}('cpu')"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}, check=True, timeout=300,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_on_a_gpu(check):
    check("cuda")
