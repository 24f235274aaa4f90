"""RWKV-7's recurrence against fla's own plain code, with a and b that are no delta rule's."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, draw
from kit import assert_close_rms
from test_recurrences import BOUNDS, compare, leaves, make, outcome, reference, run

from ops import fla_kernels, fla_reference
from ops.rwkv7 import KERNELS, chunk_rwkv7, naive_rwkv7

CASE = CASES["rwkv7"]


def general(length, **kwargs):
    """a and b without relation, short enough for the state not to explode."""
    tokens, fixed, state = make(CASE, length, **kwargs)
    for i, name in enumerate("ab"):
        value = 0.3 * draw(10 + i)(*tokens[name].shape)
        tokens[name] = value.to(tokens[name].dtype).requires_grad_()
    return tokens, fixed, state


@pytest.mark.parametrize("length", [1, 65, 100])
@pytest.mark.parametrize("inputs", [make, general], ids=["as in the model", "any a and b"])
def test_equals_fla(inputs, length):
    pytest.importorskip("fla")
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    args = (CASE, length) if inputs is make else (length,)
    tokens, fixed, state = inputs(*args, dtype=torch.float32)
    r, w, k, v, a, b = (x.transpose(1, 2) for x in tokens.values())
    o, final = dplr_recurrence(8**0.5 * r, k, v, a, b, w, initial_state=state)  # its scale is K^-.5
    expected = outcome(o.transpose(1, 2), final, leaves(tokens, fixed, state))
    for form in ("naive", "chunk", "step"):
        compare(run(CASE, form, tokens, fixed, state), expected)


def test_any_a_and_b_are_the_formula():
    inputs = general(100)
    for form in ("naive", "chunk", "step"):
        compare(run(CASE, form, *inputs), reference(CASE, *inputs))


def test_any_a_and_b_in_packed_documents():
    tokens, _, _ = general(BOUNDS[-1], batch=1)
    bounds = torch.tensor(BOUNDS)
    expected = naive_rwkv7(**tokens, cu_seqlens=bounds)[0]
    assert_close_rms(chunk_rwkv7(**tokens, cu_seqlens=bounds)[0], expected)


def test_decay_at_its_bound_in_a_long_row():
    """Every channel as fast as RWKV-7 allows, for many chunks, in float32."""
    tokens, fixed, state = make(CASE, 300, dtype=torch.float32)
    tokens["w"] = torch.full_like(tokens["w"], fla_kernels.RWKV7_LOWER_BOUND).requires_grad_()
    compare(run(CASE, "chunk", tokens, fixed, state), reference(CASE, tokens, fixed, state))


def loops_as_fla(*tensors, scale, initial_state, output_final_state, cu_seqlens):
    """`ops.fla_kernels.rwkv7` without a GPU."""
    x = dict(zip(("r", "w", "k", "v", "a", "b"), tensors, strict=True))
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    o, final = fla_reference.naive("rwkv7", x, initial_state, scale=scale, bounds=bounds)
    return o, (final if output_final_state else None)


@pytest.mark.parametrize("packed", [False, True])
def test_fla_form_is_the_formula(monkeypatch, packed):
    monkeypatch.setattr(fla_kernels, "rwkv7", loops_as_fla)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32) if packed else None
    shape = {"batch": 1, "states": len(BOUNDS) - 1} if packed else {}
    tokens, fixed, state = make(CASE, BOUNDS[-1], dtype=torch.float32, **shape)
    results = []
    for kernel in ("fla", "naive"):
        o, final = KERNELS[kernel](
            **tokens, initial_state=state, output_final_state=True, cu_seqlens=bounds
        )
        results.append(outcome(o, final, leaves(tokens, fixed, state)))
    compare(*results)
