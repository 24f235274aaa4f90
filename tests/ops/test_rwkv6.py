"""RWKV-6 against fla's own loop over time."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from test_recurrences import compare, leaves, make, outcome, run


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("length", [1, 65, 100])
def test_equals_fla(length, scale):
    pytest.importorskip("fla")
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    tokens, fixed, state = make(CASES["rwkv6"], length, dtype=torch.float32)
    actual = run(CASES["rwkv6"], "chunk", tokens, fixed, state, scale=scale)
    o, final = naive_recurrent_rwkv6(
        *(x.transpose(1, 2) for x in tokens.values()), fixed["u"], scale=scale,
        initial_state=state, output_final_state=True,
    )  # fmt: skip
    compare(actual, outcome(o.transpose(1, 2), final, leaves(tokens, fixed, state)))
