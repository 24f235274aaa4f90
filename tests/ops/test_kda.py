"""Kimi Delta Attention against fla's own plain code."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from test_recurrences import compare, leaves, make, outcome, run


@pytest.mark.parametrize("length", [1, 64, 100])
@pytest.mark.parametrize("form", ["naive", "chunk", "step"])
def test_equals_fla(form, length):
    pytest.importorskip("fla")
    from fla.ops.kda.naive import naive_chunk_kda, naive_recurrent_kda

    inputs = make(CASES["kda"], length, dtype=torch.float32)
    tokens, fixed, state = inputs
    actual = run(CASES["kda"], form, *inputs)
    for peer in (naive_recurrent_kda, naive_chunk_kda):
        if peer is naive_chunk_kda and length % 64:
            continue
        o, final = peer(*tokens.values(), initial_state=state, output_final_state=True)
        compare(actual, outcome(o, final, leaves(tokens, fixed, state)))


def test_one_decay_for_all_keys_is_the_gated_delta_rule():
    tokens, fixed, state = make(CASES["gated_delta_rule"], 100)
    expected = run(CASES["gated_delta_rule"], "chunk", tokens, fixed, state)
    wide = {**tokens, "g": tokens["g"].unsqueeze(-1).expand_as(tokens["k"])}
    options = {"initial_state": state, "output_final_state": True}
    o, final = CASES["kda"].forms()["chunk"](**wide, **options)
    compare(outcome(o, final, leaves(tokens, fixed, state)), expected)
