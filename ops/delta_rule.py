"""The delta rule (Schlag et al. 2021, arXiv 2102.11174; in chunks: DeltaNet, Yang et al. 2024,
arXiv 2406.06484).

Per head, with write strength beta_t:

    S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T        o_t = scale S_t^T q_t

What the state holds under the key k_t moves towards v_t by the fraction beta_t; nothing decays.
`naive_*` loops over time, `chunk_*` is the training form in matrix products (section 3 of the
second paper), `step_*` decodes one token; fla's kernel: ops/fla_kernels.py.
Check: `pytest tests/ops/test_recurrences.py -k 'delta_rule and not gated'`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents.
q, k [B, T, H, K]; v [B, T, H, V]; beta [B, T, H]; states [B, H, K, V] in float32 (float64 for
float64 input), one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given.
Keys are expected L2-normalised: beyond beta |k|^2 = 2 the state grows without bound. Outputs have
v's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import fla_kernels
from ops.chunked import CHUNK, by_steps, delta_chunks, zero_state


def naive_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as written, one step at a time. Returns o [B, T, H, V] and the last state."""
    return by_steps(
        step_delta_rule, (q, k, v, beta), zero_state(k, v), initial_state, output_final_state,
        cu_seqlens, scale=scale,
    )  # fmt: skip


def step_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, H, K], v [B, H, V], beta [B, H]. Returns o [B, H, V], new state."""
    dtype, out_dtype = initial_state.dtype, v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    with torch.autocast(q.device.type, enabled=False):  # the state stays in float32
        error = v - torch.einsum("bhkv,bhk->bhv", initial_state, k)
        state = initial_state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
        o = scale * torch.einsum("bhkv,bhk->bhv", state, q)
    return o.to(out_dtype), state


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    rows: int = 1,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in chunks of `chunk_size` tokens: ops/chunked.py. Any T. Returns o
    [B, T, H, V] and the last state. rows: with `cu_seqlens`, the packed tokens are so many rows of
    equal length, each of which begins a document; they run side by side."""
    return delta_chunks(
        q, k, v, None, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, rows=rows,
        chunk_size=chunk_size,
    )  # fmt: skip


KERNELS = {
    "naive": naive_delta_rule,
    "chunk": chunk_delta_rule,
    "fla": fla_kernels.delta_rule,
}
