"""The delta rule against fla's own plain code."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from test_recurrences import compare, leaves, make, outcome, run


@pytest.mark.parametrize("length", [1, 64, 100])
@pytest.mark.parametrize("form", ["naive", "chunk", "step"])
def test_equals_fla(form, length):
    pytest.importorskip("fla")
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    inputs = make(CASES["delta_rule"], length, dtype=torch.float32)
    tokens, fixed, state = inputs
    actual = run(CASES["delta_rule"], form, *inputs)
    heads_first = (x.transpose(1, 2) for x in tokens.values())
    o, final = delta_rule_recurrence(*heads_first, initial_state=state)
    compare(actual, outcome(o.transpose(1, 2), final, leaves(tokens, fixed, state)))


def test_full_write_strength_stores_the_value_under_its_key():
    """beta = 1 and unit keys: reading a key just written returns its value."""
    tokens, _, _ = make(CASES["delta_rule"], 70)
    tokens |= {"beta": torch.ones_like(tokens["beta"]), "q": tokens["k"]}
    for form in ("naive", "chunk"):
        o, _ = CASES["delta_rule"].forms()[form](**tokens, scale=1.0)
        torch.testing.assert_close(o, tokens["v"])
