"""Every recurrence that ops/fla_kernels.py runs, one token at a time in float64, with random inputs
for it: what the kernels are held against, by tests/ops/test_fla_kernels.py on CPU and GPU and by
scripts/tune_kernels.py, which ships no configuration that computes something else.

Shapes as in ops/fla_kernels.py. A variant is an op's name, or "linear_attention without g".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.fla_kernels import OPS, RWKV7_LOWER_BOUND

VARIANTS = [*OPS, "linear_attention without g"]
LOW = frozenset(("q", "k", "v", "r", "a", "b", "beta", "u"))  # the inputs in the model's dtype


def op_of(variant: str) -> str:
    return variant.split()[0]


def random_inputs(
    variant: str,
    length: int,
    *,
    batch: int = 1,
    heads: int = 2,
    key_dim: int = 16,
    value_dim: int = 32,
    states: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor | None], Tensor]:
    """name -> float64 input, in the op's order; and initial states [states or B, H, K, V].

    Those of LOW hold bfloat16 values, so that rounding them to bfloat16 changes nothing. The states
    have the size of one token's k v^T, as those that a model builds: the gradient of a decay holds
    <state, its gradient>, K V terms of either sign, where larger states would drown the rest.
    """
    op = op_of(variant)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, length, heads)
    per_channel = op not in ("gated_delta_rule", "linear_attention")

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x: dict[str, Tensor | None] = {}
    for name in OPS[op].inputs.replace("?", "").split():
        if name == "v":
            x[name] = normal(*shape, value_dim)
        elif name == "beta":
            x[name] = normal(*shape).sigmoid()
        elif name == "u":
            x[name] = normal(heads, key_dim)
        elif name in "gw":
            logits = normal(*shape, key_dim) if per_channel else normal(*shape)
            x[name] = F.logsigmoid(logits + 2)
            if op == "rwkv7":
                x[name] = RWKV7_LOWER_BOUND * logits.sigmoid()
        else:
            x[name] = F.normalize(normal(*shape, key_dim), dim=-1)
    if op == "rwkv7":  # b writes back a part of what a reads, as in the model
        x["b"] = -x["a"] * normal(*shape, key_dim).sigmoid()
    if variant.endswith("without g"):
        x["g"] = None
    state = normal(states or batch, heads, key_dim, value_dim) / key_dim**0.5
    x = {n: t if t is None or n not in LOW else t.bfloat16() for n, t in x.items()}
    return {n: t if t is None else t.double() for n, t in x.items()}, state.double()


def naive(
    op: str,
    x: dict[str, Tensor | None],
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    bounds: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the last states; with `bounds`, of each document alone."""
    first = next(iter(x.values()))
    scale = first.shape[-1] ** -0.5 if scale is None else scale
    if state is None:
        documents = first.shape[0] if bounds is None else len(bounds) - 1
        state = first.new_zeros(documents, *first.shape[2:], x["v"].shape[-1])
    if bounds is None:
        return _loop(op, x, state, scale)
    outs, finals = [], []
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        final = state[i : i + 1]
        if b > a:
            piece = {n: t if t is None or n == "u" else t[:, a:b] for n, t in x.items()}
            o, final = _loop(op, piece, final, scale)
            outs.append(o)
        finals.append(final)
    return torch.cat(outs, 1), torch.cat(finals)


def _loop(op: str, x: dict, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The equations of the docstrings in ops/fla_kernels.py."""
    outs = []
    q, k, v = x["q" if "q" in x else "r"], x["k"], x["v"]
    log_decay = x.get("g", x.get("w"))
    for t in range(v.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        new = state
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            new = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        if "beta" in x:
            error = v_t - torch.einsum("bhkv,bhk->bhv", new, k_t)
            v_t = x["beta"][:, t, :, None] * error
        write = k_t[..., None] * v_t[:, :, None]  # [B, H, K, V]
        if op == "rwkv7":
            read = torch.einsum("bhkv,bhk->bhv", state, x["a"][:, t])
            write = write + x["b"][:, t, :, :, None] * read[:, :, None]
        new = new + write
        seen = state + x["u"][..., None] * write if op == "rwkv6" else new
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", seen, q[:, t]))
        state = new
    return torch.stack(outs, 1), state


def results(
    function: Callable,
    x: dict[str, Tensor | None],
    state: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    final: bool = True,
    **kwargs,
) -> dict[str, Tensor]:
    """function(x, state, **kwargs) -> (o, final): both, and every gradient of a random sum of them.

    dtype: of the inputs in LOW; the others and the state are then float32. None: as they are.
    An input that has no part in the sum (a decay of an empty state) has zeros for a gradient.
    """
    high = None if dtype is None else torch.float32
    x = {
        n: None if t is None else t.to(dtype if n in LOW else high).requires_grad_()
        for n, t in x.items()
    }
    state = None if state is None else state.clone().to(high).requires_grad_()
    o, last = function(x, state, **kwargs)
    outs = {"o": o, "final": last} if final else {"o": o}
    total = 0
    for seed, out in enumerate(outs.values(), start=10_000):  # other numbers than the inputs
        generator = torch.Generator(out.device).manual_seed(seed)
        weight = torch.randn(out.shape, generator=generator, device=out.device).bfloat16()
        total = total + (out * weight.to(out)).sum()
    wanted = {n: t for n, t in {**x, "state": state}.items() if t is not None}
    grads = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
    return {**outs, **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}
