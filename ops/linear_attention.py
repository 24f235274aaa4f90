"""Linear attention without a normaliser, with an optional decay per head.

Per head, with decay a_t = exp(g_t), or a_t = 1 where g is None:

    S_t = a_t S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Without decay: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 10, 18 and 20, for features q, k
that are mapped already. A constant decay per head: RetNet, Sun et al. 2023, arXiv 2307.08621,
eq. 6; Lightning attention has the same recurrence (Qin et al. 2024, arXiv 2401.04658). A decay
that depends on the token: the scalar A_t of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

`naive_*` loops over time, `chunk_*` is the training form in matrix products, `step_*` decodes one
token; fla's kernel: ops/fla_kernels.py.
Check: `pytest tests/ops -k linear_attention`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents.
q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H] <= 0 or None; states [B, H, K, V] in float32 (float64
for float64 input), one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given.
scale: K^-0.5 where None. Outputs have v's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import fla_kernels
from ops.chunked import CHUNK, by_steps, linear_chunks, zero_state


def naive_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as written, one step at a time. Returns o [B, T, H, V] and the last state."""
    return by_steps(
        step_linear_attention, (q, k, v, g), zero_state(k, v), initial_state, output_final_state,
        cu_seqlens, scale=scale,
    )  # fmt: skip


def step_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, H, K], v [B, H, V], g [B, H]. Returns o [B, H, V], new state."""
    dtype, out_dtype = initial_state.dtype, v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast(q.device.type, enabled=False):  # the state stays in float32
        state = initial_state
        if g is not None:
            state = state * g.to(dtype).exp()[..., None, None]
        state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
        o = scale * torch.einsum("bhkv,bhk->bhv", state, q)
    return o.to(out_dtype), state


def chunk_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
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
    return linear_chunks(
        q, k, v, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, rows=rows,
        chunk_size=chunk_size,
    )  # fmt: skip


KERNELS = {
    "naive": naive_linear_attention,
    "chunk": chunk_linear_attention,
    "fla": fla_kernels.linear_attention,
}
