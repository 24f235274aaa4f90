"""Activation checkpointing changes what is kept, and nothing else.

pytest tests/test_recompute.py
"""

from __future__ import annotations

import pytest
import torch
from kit import random_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_layers import MIXERS
from recompute import MODES, set_recompute

BOUNDS = torch.tensor([0, 3, 20, 33], dtype=torch.int32)


class CountMatmuls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def model_with(name: str, dtype=torch.float64):
    """A softmax block and one of `name` ("softmax" or a mixer)."""
    kinds = {"softmax": "FF", "sliding_window": "FS"}.get(name, "FL")
    changes = {"mixer": [name]} if kinds == "FL" else {}
    changes["intermediate_size"] = 64  # an MLP as wide as real ones: what selective computes again
    return tiny_model(kinds, dtype=dtype, **changes)


def gradients(model, mode, packed):
    set_recompute(model, mode)
    model.zero_grad()
    hidden = model(random_ids(model, 1, 33), **({"cu_seqlens": BOUNDS} if packed else {}))
    hidden.square().sum().backward()
    return hidden, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("name", ["softmax", *MIXERS])
def test_same_gradients_more_work(name, packed):
    model, matmuls = model_with(name), []
    for mode in MODES:
        with CountMatmuls() as counted:
            hidden, grads = gradients(model, mode, packed)
        if mode == "none":
            expected, expected_grads = hidden, grads
        assert torch.equal(hidden, expected)
        for n, grad in grads.items():
            assert torch.equal(grad, expected_grads[n]), (mode, n)
        matmuls.append(counted.count)
    assert matmuls[0] < matmuls[1] < matmuls[2]


@pytest.mark.parametrize("mode", MODES[1:])
def test_compiled(mode):
    """In one graph a block."""
    torch._dynamo.reset()
    model = model_with("linear_attention")
    hidden, expected = gradients(model, "none", packed=False)
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    actual, grads = gradients(model, mode, packed=False)
    torch.testing.assert_close(actual, hidden)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


def test_only_while_training():
    """Evaluation, generation and taps call the block as it is."""
    model, direct = model_with("gla"), []
    set_recompute(model, "full")
    for block in model.layers:
        compute = block.compute
        block.compute = lambda *args, f=compute: (direct.append(len(args) == 5), f(*args))[1]
    ids = random_ids(model, 1, 5)
    model(ids)
    assert direct == [False] * 2
    with torch.no_grad():
        model(ids)
    list(model.attention_taps(ids, layers=[0, 1]))
    model(ids, cache=model.new_cache())
    assert direct[2:] == [True] * 5
