"""Linear attention without decay, and against fla's own loops."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from kit import assert_close_rms
from test_recurrences import BOUNDS, compare, leaves, make, op, outcome, reference, run

from ops.linear_attention import chunk_linear_attention

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


def test_what_was_forgotten_long_ago_costs_no_digits():
    """A row of 16k tokens, half of which forget all: the last document is as it is alone."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16_384, 1, 8, generator=draw) for _ in range(3))
    g = -1.6 * torch.rand(1, 16_384, 1, generator=draw)
    g[:, torch.arange(16_384) % 1024 >= 512] *= 1e-3
    bounds = torch.tensor([0, 15_360, 16_384])
    packed, _ = chunk_linear_attention(q, k, v, g, cu_seqlens=bounds)
    alone, _ = chunk_linear_attention(*(x[:, 15_360:] for x in (q, k, v, g)))
    assert_close_rms(packed[:, 15_360:], alone, 2e-6)
