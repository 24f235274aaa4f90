"""GLA against fla's own loop over time."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from test_recurrences import compare, leaves, make, outcome, run


@pytest.mark.parametrize("length", [1, 65, 100])
def test_equals_fla(length):
    pytest.importorskip("fla")
    from fla.ops.gla.naive import naive_recurrent_gla

    tokens, fixed, state = make(CASES["gla"], length, dtype=torch.float32)
    actual = run(CASES["gla"], "chunk", tokens, fixed, state)
    o, final = naive_recurrent_gla(*tokens.values(), initial_state=state, output_final_state=True)
    compare(actual, outcome(o, final, leaves(tokens, fixed, state)))
