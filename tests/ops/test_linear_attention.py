"""Linear attention without decay, and against fla's own loops."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from kit import assert_close_rms
from test_recurrences import BOUNDS, compare, leaves, make, op, outcome, reference, run

CASE = CASES["linear_attention"]


@pytest.mark.parametrize("form", ["naive", "chunk", "step"])
@pytest.mark.parametrize("length", [1, 65, 100])
def test_without_g_nothing_decays(form, length):
    tokens, fixed, state = make(CASE, length)
    zero = {**tokens, "g": torch.zeros_like(tokens["g"]).requires_grad_()}
    expected = reference(CASE, zero, fixed, state)
    del tokens["g"], expected["d g"]
    compare(run(CASE, form, tokens, fixed, state), expected)


@pytest.mark.parametrize("form", ["naive", "chunk"])
@pytest.mark.parametrize("states", [False, True])
def test_without_g_packed(form, states):
    tokens, _, state = make(CASE, BOUNDS[-1], batch=1, states=len(BOUNDS) - 1)
    options = dict(cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32), output_final_state=states)
    if states:
        options["initial_state"] = state
    zero = {**tokens, "g": torch.zeros_like(tokens["g"])}
    expected = outcome(*op(CASE, form)(**zero, **options), leaves(zero | {"g": tokens["g"]}, {}))
    del tokens["g"], expected["d g"]
    compare(outcome(*op(CASE, form)(**tokens, **options), leaves(tokens, {})), expected)


def test_equals_flas_loop_without_decay():
    peer = pytest.importorskip("fla.ops.linear_attn.naive").naive_recurrent_linear_attn
    tokens, fixed, state = make(CASE, 65, dtype=torch.float32)
    del tokens["g"]
    o, final = peer(*tokens.values(), initial_state=state, output_final_state=True)
    expected = outcome(o, final, leaves(tokens, fixed, state))
    compare(run(CASE, "chunk", tokens, fixed, state), expected)


@pytest.mark.parametrize("name", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_equals_flas_loops_with_decay(name):
    peer = getattr(pytest.importorskip("fla.ops.simple_gla.naive"), name)
    tokens, fixed, state = make(CASE, 65, dtype=torch.float32)
    o, final = peer(*tokens.values(), initial_state=state, output_final_state=True)
    expected = outcome(o, final, leaves(tokens, fixed, state))
    compare(run(CASE, "chunk", tokens, fixed, state), expected)


def test_equals_flas_parallel_form():
    peer = pytest.importorskip("fla.ops.simple_gla.naive").naive_parallel_simple_gla
    tokens, _, _ = make(CASE, 65, dtype=torch.float32)
    with torch.no_grad():
        assert_close_rms(op(CASE, "chunk")(**tokens)[0], peer(*tokens.values())[0])
