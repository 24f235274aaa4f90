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


# ---- state space duality: 4 heads in 2 groups


def ssd_tokens(draw, b, t):
    groups = {name: draw(b, t, 2, KEY) for name in "BC"}
    return {"x": draw(b, t, 4, VALUE), "dt": F.softplus(draw(b, t, 4) - 2), **groups}


def ssd_fixed(draw):
    return {"A": -draw(4).exp(), "D": draw(4)}


def ssd_formula(x, state, scale):
    """Mamba-2 in the paper's layout, h [P, N]: h = exp(dt A) h + dt x B^T, y = h C + D x."""
    h, outs = state.mT, []
    for t in range(x["x"].shape[1]):
        b, c = (column(x[n].repeat_interleave(2, 2), t) for n in "BC")
        value, dt = column(x["x"], t), number(x["dt"], t)
        h = (dt * x["A"][:, None, None]).exp() * h + dt * value @ b.mT
        outs.append((h @ c + x["D"][:, None, None] * value)[..., 0])
    return torch.stack(outs, 1), h.mT


# ---- delta rule, and Kimi Delta Attention


def delta_rule_tokens(draw, b, t):
    return {**qkv(draw, b, t, unit="qk"), "beta": draw(b, t, HEADS).sigmoid()}


def delta_rule_formula(x, state, scale):
    """In the paper's layout, S [V, K]: S = S - (v_old - v_new) k^T, where v_old = S k and
    v_new = b v + (1 - b) v_old; o = S q."""
    s, outs = state.mT, []
    for t in range(x["q"].shape[1]):
        k, b = column(x["k"], t), number(x["beta"], t)
        old = s @ k
        new = b * column(x["v"], t) + (1 - b) * old
        s = s - (old - new) @ k.mT
        outs.append(scale * (s @ column(x["q"], t))[..., 0])
    return torch.stack(outs, 1), s.mT


def kda_tokens(draw, b, t):
    return {
        **qkv(draw, b, t, unit="qk"), "g": log_decay(draw, b, t, HEADS, KEY),
        "beta": draw(b, t, HEADS).sigmoid(),
    }  # fmt: skip


def kda_formula(x, state, scale):
    """S = (I - b k k^T) Diag(a) S + b k v^T, o = S^T q, the matrices written out."""
    s, outs, eye = state, [], torch.eye(KEY, dtype=state.dtype)
    for t in range(x["q"].shape[1]):
        k, b, decay = column(x["k"], t), number(x["beta"], t), x["g"][:, t].exp().diag_embed()
        s = (eye - b * k @ k.mT) @ decay @ s + b * k @ column(x["v"], t).mT
        outs.append(scale * (s.mT @ column(x["q"], t))[..., 0])
    return torch.stack(outs, 1), s


# ---- GLA and RWKV-6: rows, as in both papers


def gla_tokens(draw, b, t):
    return {**qkv(draw, b, t), "g": log_decay(draw, b, t, HEADS, KEY)}


def gla_formula(x, state, scale):
    """Section 4.1: S = (a^T 1) * S + k^T v elementwise, o = q S, with row vectors."""
    s, outs, ones = state, [], torch.ones(1, VALUE, dtype=state.dtype)
    for t in range(x["q"].shape[1]):
        q, k, v = (column(x[n], t).mT for n in "qkv")
        s = (column(x["g"], t).exp() @ ones) * s + k.mT @ v
        outs.append(scale * (q @ s)[..., 0, :])
    return torch.stack(outs, 1), s


def rwkv6_tokens(draw, b, t):
    tokens = qkv(draw, b, t)
    return {"r": tokens.pop("q"), **tokens, "w": log_decay(draw, b, t, HEADS, KEY)}


def rwkv6_fixed(draw):
    return {"u": draw(HEADS, KEY)}


def rwkv6_formula(x, state, scale):
    """Finch: wkv = s + diag(u) k^T v, s = diag(w) s + k^T v, o = r wkv, with row vectors."""
    s, outs = state, []
    for t in range(x["r"].shape[1]):
        r, k, v = (column(x[n], t).mT for n in "rkv")
        wkv = s + x["u"].diag_embed() @ k.mT @ v
        s = x["w"][:, t].exp().diag_embed() @ s + k.mT @ v
        outs.append(scale * (r @ wkv)[..., 0, :])
    return torch.stack(outs, 1), s


# ---- linear attention with a decay per head


def linear_attention_tokens(draw, b, t):
    return {**qkv(draw, b, t), "g": log_decay(draw, b, t, HEADS)}


def linear_attention_formula(x, state, scale):
    """As attention: o_i = sum_{j <= i} D_ij (q_i . k_j) v_j, where D_ij is the product of the
    decays from j + 1 to i, plus what is left of the state."""
    q, k, v, total = scale * x["q"], x["k"], x["v"], x["g"].cumsum(1)
    outs = []
    for i in range(q.shape[1]):
        decay = (total[:, i : i + 1] - total[:, : i + 1]).exp()  # [B, i + 1, H]
        weight = decay * (q[:, i : i + 1] * k[:, : i + 1]).sum(-1)
        old = (column(q, i) * state).sum(-2) * total[:, i, :, None].exp()
        outs.append((weight.unsqueeze(-1) * v[:, : i + 1]).sum(1) + old)
    left = (total[:, -1:] - total).exp()
    new = torch.einsum("bth,bthk,bthv->bhkv", left, k, v)
    return torch.stack(outs, 1), number(total, -1).exp() * state + new


# ---- RWKV-7


def rwkv7_tokens(draw, b, t):
    """As in the model: a is minus a unit vector, b its opposite scaled channel by channel."""
    x, removal = qkv(draw, b, t), F.normalize(draw(b, t, HEADS, KEY), dim=-1)
    return {
        "r": x["q"], "w": log_decay(draw, b, t, HEADS, KEY), "k": x["k"], "v": x["v"],
        "a": -removal, "b": removal * draw(b, t, HEADS, KEY).sigmoid(),
    }  # fmt: skip


def rwkv7_formula(x, state, scale):
    """The paper's layout, S [V, K]: S = S (diag(e^w) + a b^T) + v k^T, o = S r."""
    s, outs = state.mT, []
    for t in range(x["r"].shape[1]):
        r, k, v, a, b = (column(x[n], t) for n in "rkvab")
        s = s @ (torch.diag_embed(x["w"][:, t].exp()) + a @ b.mT) + v @ k.mT
        outs.append(scale * (s @ r)[..., 0])
    return torch.stack(outs, 1), s.mT


CASES = {
    case.name: case
    for case in (
        Case("gated_delta_rule", gated_delta_rule_tokens, gated_delta_rule_formula, decay="g"),
        Case("delta_rule", delta_rule_tokens, delta_rule_formula),
        Case("kda", kda_tokens, kda_formula, decay="g"),
        Case("linear_attention", linear_attention_tokens, linear_attention_formula, decay="g"),
        Case("ssd", ssd_tokens, ssd_formula, ssd_fixed, scale=None, state=(4, KEY, VALUE)),
        Case("gla", gla_tokens, gla_formula, decay="g"),
        Case("rwkv6", rwkv6_tokens, rwkv6_formula, rwkv6_fixed, decay="w"),
        Case("rwkv7", rwkv7_tokens, rwkv7_formula, scale=1.0, decay="w"),
    )
}
