"""Linear attention without a normaliser, with an optional decay per head.

Per head, with decay a_t = exp(g_t), or a_t = 1 where g is None:

    S_t = a_t S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Without decay: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 10, 18 and 20, for features q, k
that are mapped already. A constant decay per head: RetNet, Sun et al. 2023, arXiv 2307.08621,
eq. 6; Lightning attention has the same recurrence (Qin et al. 2024, arXiv 2401.04658). A decay
that depends on the token: the scalar A_t of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

`naive_*` loops over time, `chunk_*` is the training form in matrix products, `step_*` decodes one
token, `fla_*` calls fla's Triton kernel.
Check: `pytest tests/ops -k linear_attention`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents.
q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H] <= 0 or None; states [B, H, K, V] in float32 (float64
for float64 input), one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given.
scale: K^-0.5 where None. Outputs have v's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.chunked import CHUNK, Chunks, linear_chunks, per_document, run_steps, zero_state


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
    empty = zero_state(k, v)
    if cu_seqlens is not None:
        return per_document(
            naive_linear_attention, (q, k, v, g), cu_seqlens, initial_state, output_final_state,
            empty, scale=scale,
        )  # fmt: skip
    state = empty if initial_state is None else initial_state
    inputs = (q, k, v) if g is None else (q, k, v, g)
    o, state = run_steps(step_linear_attention, inputs, state, scale=scale)
    return o, (state if output_final_state else None)


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
    """The recurrence in chunks of `chunk_size` tokens, in matrix products only. Any T. Returns
    o [B, T, H, V] and the last state.

    Documents of a packed row are kept apart by masks; only states per document (`initial_state`
    or `output_final_state` with `cu_seqlens`) run one by one. rows: with `cu_seqlens`, the packed
    tokens are this many rows of equal length, each of which begins a document.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return per_document(
            chunk_linear_attention, (q, k, v, g), cu_seqlens, initial_state, output_final_state,
            zero_state(k, v), scale=scale,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):  # the state needs float32
        chunks = Chunks(v, chunk_size, cu_seqlens, rows)
        o, state = linear_chunks(q.to(chunks.dtype) * scale, k, v, g, chunks, initial_state)
    return o, (state if output_final_state else None)


def fla_linear_attention(
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
    """flash-linear-attention's Triton kernels (CUDA only); g stays float32."""
    from ops.fla_kernels import linear_attention as kernel

    return kernel(
        q, k, v, g, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


KERNELS = {
    "naive": naive_linear_attention,
    "chunk": chunk_linear_attention,
    "fla": fla_linear_attention,
}
