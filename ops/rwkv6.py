"""The recurrence of RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892, Finch time mixing).

Per head, with a log decay w_t <= 0 for every key channel and a bonus u for the present token:

    o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

The output reads the state before the token has decayed it or been written to it, which is why the
token itself comes in through the bonus. The paper's w_t is exp(w_t) here.
`naive_*` loops over time, `chunk_*` is the training form in matrix products, `step_*` decodes one
token; fla's kernel: ops/fla_kernels.py.
Check: `pytest tests/ops/test_recurrences.py tests/ops/test_rwkv6.py -k rwkv6`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents.
r, k, w [B, T, H, K]; v [B, T, H, V]; u [H, K]; states [B, H, K, V] in float32 (float64 for float64
input), one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given.
Outputs have v's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import fla_kernels
from ops.chunked import CHUNK, by_steps, linear_chunks, zero_state


def naive_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as written, one step at a time. Returns o [B, T, H, V] and the last state."""
    return by_steps(
        step_rwkv6, (r, k, v, w), zero_state(k, v), initial_state, output_final_state,
        cu_seqlens, u=u, scale=scale,
    )  # fmt: skip


def step_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: r, k, w [B, H, K], v [B, H, V]. Returns o [B, H, V], new state."""
    dtype, out_dtype = initial_state.dtype, v.dtype
    scale = r.shape[-1] ** -0.5 if scale is None else scale
    r, k, v, w, u = (x.to(dtype) for x in (r, k, v, w, u))
    with torch.autocast(r.device.type, enabled=False):  # the state stays in float32
        write = k.unsqueeze(-1) * v.unsqueeze(-2)  # [B, H, K, V]
        o = scale * torch.einsum("bhkv,bhk->bhv", initial_state + u.unsqueeze(-1) * write, r)
        state = initial_state * w.exp().unsqueeze(-1) + write
    return o.to(out_dtype), state


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
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
        r, k, v, w, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, rows=rows,
        chunk_size=chunk_size, bonus=u,
    )  # fmt: skip


KERNELS = {"naive": naive_rwkv6, "chunk": chunk_rwkv6, "fla": fla_kernels.rwkv6}
