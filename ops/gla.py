"""Gated linear attention (GLA, Yang et al. 2023, arXiv 2312.06635, section 4.1).

Per head, with a decay a_t = exp(g_t) for every key channel:

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

`naive_*` loops over time, `chunk_*` is the training form in matrix products (section 4.2 there),
`step_*` decodes one token; fla's kernel: ops/fla_kernels.py.
Check: `pytest tests/ops/test_recurrences.py tests/ops/test_gla.py -k gla`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents.
q, k, g [B, T, H, K]; v [B, T, H, V]; states [B, H, K, V] in float32 (float64 for float64 input),
one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given. g <= 0.
Outputs have v's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import fla_kernels
from ops.chunked import CHUNK, by_steps, linear_chunks, zero_state


def naive_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as written, one step at a time. Returns o [B, T, H, V] and the last state."""
    return by_steps(
        step_gla, (q, k, v, g), zero_state(k, v), initial_state, output_final_state,
        cu_seqlens, scale=scale,
    )  # fmt: skip


def step_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: q, k, g [B, H, K], v [B, H, V]. Returns o [B, H, V], new state."""
    dtype, out_dtype = initial_state.dtype, v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    with torch.autocast(q.device.type, enabled=False):  # the state stays in float32
        state = initial_state * g.exp().unsqueeze(-1) + k.unsqueeze(-1) * v.unsqueeze(-2)
        o = scale * torch.einsum("bhkv,bhk->bhv", state, q)
    return o.to(out_dtype), state


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
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


KERNELS = {"naive": naive_gla, "chunk": chunk_gla, "fla": fla_kernels.gla}
