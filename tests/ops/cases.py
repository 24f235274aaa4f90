"""Every recurrence as its paper writes it, with random inputs; what test_recurrences.py runs over.

A new op file is one more entry of CASES. Shapes: B batch, T time, H = 3 heads, K = 8, V = 5.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, KEY, VALUE = 3, 8, 5


@dataclass(frozen=True)
class Case:
    """One op file. `tokens(draw, B, T)` gives its token inputs by name ([B, T, ...]), `fixed(draw)`
    those that are no tokens' (with gradients too); `formula(inputs, state, scale)` is the paper's
    recurrence in its own layout, with plain loops: o [B, T, H, V] and the state [B, H, K, V]."""

    name: str  # ops/<name>.py with naive_<name>, chunk_<name>, step_<name>
    tokens: Callable
    formula: Callable
    fixed: Callable = lambda draw: {}
    scale: float | None = KEY**-0.5  # the default; None: the op has none
    decay: str = ""  # which input is a log decay that may be -50 or 0
    state: tuple[int, ...] = (HEADS, KEY, VALUE)

    def forms(self) -> dict[str, Callable]:
        """naive, chunk and step."""
        module = importlib.import_module(f"ops.{self.name}")
        return {form: getattr(module, f"{form}_{self.name}") for form in ("naive", "chunk", "step")}


def draw(seed: int) -> Callable:
    """draw(*shape): float64 normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def qkv(draw, b: int, t: int, *, unit: str = "") -> dict[str, Tensor]:
    """q, k, v; those named in `unit` L2-normalised."""
    out = {"q": draw(b, t, HEADS, KEY), "k": draw(b, t, HEADS, KEY), "v": draw(b, t, HEADS, VALUE)}
    return {n: F.normalize(x, dim=-1) if n in unit else x for n, x in out.items()}


def log_decay(draw, *shape: int) -> Tensor:
    """Below zero, about -0.1."""
    return F.logsigmoid(draw(*shape) + 2)


def column(x: Tensor, t: int) -> Tensor:
    """Token t of [B, T, H, K] as a column [B, H, K, 1]."""
    return x[:, t].unsqueeze(-1)


def number(x: Tensor, t: int) -> Tensor:
    """Token t of [B, T, H] as [B, H, 1, 1]."""
    return x[:, t, :, None, None]


# ---- gated delta rule


def gated_delta_rule_tokens(draw, b, t):
    g, beta = log_decay(draw, b, t, HEADS), draw(b, t, HEADS).sigmoid()
    return {**qkv(draw, b, t, unit="qk"), "g": g, "beta": beta}


def gated_delta_rule_formula(x, state, scale):
    """Equation 10 in the paper's layout, S [V, K]: S = S (a (I - b k k^T)) + b v k^T, o = S q."""
    s, outs = state.mT, []
    for t in range(x["q"].shape[1]):
        k, b = column(x["k"], t), number(x["beta"], t)
        s = number(x["g"], t).exp() * (s - b * (s @ k) @ k.mT) + b * column(x["v"], t) @ k.mT
        outs.append(scale * (s @ column(x["q"], t))[..., 0])
    return torch.stack(outs, 1), s.mT


CASES = {
    case.name: case
    for case in (
        Case("gated_delta_rule", gated_delta_rule_tokens, gated_delta_rule_formula, decay="g"),
    )
}
