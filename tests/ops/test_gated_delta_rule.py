"""The gated delta rule against transformers' own code."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from kit import stock
from test_recurrences import compare, leaves, make, outcome, run


@pytest.mark.parametrize("length", [1, 65, 100])
def test_equals_transformers(length):
    qwen = stock("transformers.models.qwen3_5.modeling_qwen3_5")
    case = CASES["gated_delta_rule"]
    tokens, fixed, state = make(case, length, dtype=torch.float32)
    actual = run(case, "chunk", tokens, fixed, state)
    for peer in (qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule):
        o, final = peer(*tokens.values(), initial_state=state, output_final_state=True)
        compare(actual, outcome(o, final, leaves(tokens, fixed, state)))
