"""cuDNN's attention of packed documents against explicit attention of each one, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from layers import causal_mask, explicit_attention, prefers_cudnn
from ops.cudnn_varlen import cudnn_varlen

here = torch.cuda.is_available() and prefers_cudnn()
BOUNDS = [0, 1, 130, 131, 700, 1000, 1000, 1000]  # lengths of 1, and empty documents at the end


def inputs(heads, groups, size, *, fused=False):
    generator = torch.Generator("cuda").manual_seed(0)
    total = heads + 2 * groups

    def random(count):
        shape = (BOUNDS[-1], count, size)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    if not fused:
        return [random(n).requires_grad_() for n in (heads, groups, groups)]
    joined = random(total)
    return [t.requires_grad_() for t in joined.split([heads, groups, groups], 1)]


def exact(q, k, v, window):
    """Document by document, in float64."""
    parts = []
    for begin, end in itertools.pairwise(BOUNDS):
        if end > begin:
            mask = causal_mask(end - begin, end - begin, window, q.device)
            parts.append(explicit_attention(*(t[None, begin:end] for t in (q, k, v)), mask)[0])
    return torch.cat(parts)


@pytest.mark.gpu
@pytest.mark.skipif(not here, reason="needs cudnn-frontend and a Hopper GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "window", "fused"),
    [(4, 4, 64, 0, False), (6, 2, 128, 0, False), (6, 2, 64, 0, True), (4, 1, 64, 100, False)],
)
def test_documents_are_each_alone(heads, groups, size, window, fused, compiled):
    given = inputs(heads, groups, size, fused=fused)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    run = torch.compile(cudnn_varlen, fullgraph=True) if compiled else cudnn_varlen
    out = run(*given, bounds, 600, window)
    wide = [t.detach().double().requires_grad_() for t in given]
    wanted = exact(*wide, window)
    weight = torch.randn(out.shape, device="cuda", dtype=torch.bfloat16)
    grads = torch.autograd.grad(out, given, weight)
    expected = torch.autograd.grad(wanted, wide, weight.double())
    for a, b in zip([out, *grads], [wanted, *expected], strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not here, reason="needs cudnn-frontend and a Hopper GPU")
def test_a_plan_serves_other_documents():
    q, k, v = (t.detach() for t in inputs(4, 2, 64))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    other = torch.tensor([0, 500, 600, 1000, 1000, 1000, 1000, 1000], device="cuda").int()
    both = [cudnn_varlen(q, k, v, b, 600) for b in (bounds, other)]
    alone = cudnn_varlen(
        q[500:600], k[500:600], v[500:600], torch.tensor([0, 100]).int().cuda(), 600
    )
    assert not torch.equal(*both)
    assert (both[1][500:600] - alone).norm() < 1e-3 * alone.norm()
