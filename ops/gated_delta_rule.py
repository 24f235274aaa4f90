"""The gated delta rule (Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464, eq. 10).

Per head, with decay a_t = exp(g_t) and write strength beta_t:

    S_t = a_t S_{t-1} + k_t (beta_t (v_t - (a_t S_{t-1})^T k_t))^T        o_t = scale S_t^T q_t

`naive_*` loops over time, `chunk_*` is the training form in matrix products (section 3.2 there),
`step_*` decodes one token; fla's kernel: ops/fla_kernels.py.
Check: `pytest tests/ops/test_gated_delta_rule.py`; time: `python benchmarks/gated_delta_rule.py`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents.
q, k [B, T, H, K]; v [B, T, H, V]; g, beta [B, T, H]; states [B, H, K, V] in float32 (float64 for
float64 input), one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given. g <= 0.
Keys are expected L2-normalised. Outputs have v's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import fla_kernels
from ops.chunked import CHUNK, by_steps, delta_chunks, zero_state


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as written, one step at a time. Returns o [B, T, H, V] and the last state."""
    return by_steps(
        step_gated_delta_rule, (q, k, v, g, beta), zero_state(k, v), initial_state,
        output_final_state, cu_seqlens, scale=scale,
    )  # fmt: skip


def step_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, H, K], v [B, H, V], g, beta [B, H]. Returns o [B, H, V], new state."""
    dtype, out_dtype = initial_state.dtype, v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    with torch.autocast(q.device.type, enabled=False):  # the state stays in float32
        state = initial_state * g.exp()[..., None, None]  # [B, H, K, V]
        error = v - torch.einsum("bhkv,bhk->bhv", state, k)
        state = state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
        o = scale * torch.einsum("bhkv,bhk->bhv", state, q)
    return o.to(out_dtype), state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
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
        q, k, v, g, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, rows=rows,
        chunk_size=chunk_size,
    )  # fmt: skip


KERNELS = {
    "naive": naive_gated_delta_rule,
    "chunk": chunk_gated_delta_rule,
    "fla": fla_kernels.gated_delta_rule,
}
