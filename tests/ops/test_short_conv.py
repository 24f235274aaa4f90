"""The short convolution: PyTorch's conv1d is the reference; documents; the Triton code, on a GPU
and, interpreted in a process of its own, on a CPU.

pytest tests/ops/test_short_conv.py
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kit import TOLERANCE, assert_close_rms

from ops.short_conv import plain_short_conv, triton_short_conv

BOUNDS = [0, 1, 3, 3, 40, 71]


def reference(x, weight, bias=None):
    taps = weight.shape[-1]
    return F.silu(F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight, bias, groups=x.shape[-1]).mT)


def inputs(batch, length, channels, taps, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, channels), (channels, 1, taps), (channels,)]
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    wide = torch.promote_types(dtype, torch.float32)  # parameters stay in float32
    each = ((x, dtype), (weight, wide), (bias, wide))
    return [t.to(device=device, dtype=d).requires_grad_() for t, d in each]


def with_gradients(y, leaves):
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, leaves, probe.to(y))]


def document_positions(device="cpu"):
    ages = [torch.arange(b - a) for a, b in itertools.pairwise(BOUNDS)]
    return torch.cat(ages)[None].to(device)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_equals_conv1d(taps, length):
    leaves = inputs(2, length, 5, taps)
    expected = with_gradients(reference(*leaves), leaves)
    for actual, e in zip(with_gradients(plain_short_conv(*leaves), leaves), expected, strict=True):
        assert_close_rms(actual, e)


def test_stops_at_documents():
    leaves = inputs(1, BOUNDS[-1], 5, 4)
    x, weight, bias = leaves
    y = plain_short_conv(x, weight, bias, document_positions())
    alone = [reference(x[:, a:b], weight, bias) for a, b in itertools.pairwise(BOUNDS) if b > a]
    expected = with_gradients(torch.cat(alone, 1), leaves)
    for actual, e in zip(with_gradients(y, leaves), expected, strict=True):
        assert_close_rms(actual, e)


def check_triton(device: str) -> None:
    """Against the plain form in float64: rows and packed documents, with and without a bias, a
    slice of wider rows, more channels and tokens than one tile, compiled in one graph."""
    for dtype, packed in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        taps = 4 if packed else 3
        batch = 1 if packed else 2
        x, weight, bias = inputs(batch, BOUNDS[-1], 70, taps, dtype, device)
        positions = document_positions(device) if packed else None
        wide = torch.cat([x, x], -1)
        for given, b in ((x, bias), (wide[..., :70], None)):
            leaves = [x, weight] if b is None else [x, weight, b]
            exact = [t.detach().double().requires_grad_() for t in leaves]
            expected = plain_short_conv(*exact[:2], None if b is None else exact[2], positions)
            expected = with_gradients(expected, exact)
            for run in (triton_short_conv, compiled):
                results = with_gradients(run(given, weight, b, positions), leaves)
                for actual, e in zip(results, expected, strict=True):
                    assert actual.dtype in (dtype, torch.float32)
                    assert_close_rms(actual, e, TOLERANCE[dtype])


def compiled(*args):
    torch._dynamo.reset()
    return torch.compile(triton_short_conv, fullgraph=True, backend="aot_eager")(*args)


@pytest.mark.slow
def test_triton_interpreted():
    """Triton decides when it is imported whether it interprets: a process of its own."""
    pytest.importorskip("triton")
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(str(p) for p in (here, here.parent, here.parents[1]))
    subprocess.run(
        [sys.executable, "-c", "import test_short_conv as t; t.check_triton('cpu')"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}, check=True, timeout=300,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_triton_on_a_gpu():
    check_triton("cuda")


def test_held_inputs_are_the_plain_form():
    x, weight, bias = inputs(2, 1, 5, 4)
    held = torch.ones(2, 3, 5, dtype=torch.float64)
    expected = plain_short_conv(x, weight, bias, held=held)
    assert torch.equal(triton_short_conv(x, weight, bias, held=held), expected)
    assert not torch.equal(plain_short_conv(x, weight, bias), expected)
