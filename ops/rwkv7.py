"""The recurrence of RWKV-7 (Peng et al. 2025, arXiv 2503.14456): a transition that is diagonal plus
rank one.

Per head, with log decay w_t per key and vectors a_t (what to read) and b_t (where to put it back):

    S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = scale S_t^T r_t

RWKV-7 itself has a = -kappa and b = kappa * (in-context learning rate), kappa the normalised
removal key: a delta rule whose rate differs by key. The order of inputs is that of fla's
`chunk_rwkv7`; the paper's state is the transpose of ours.

`naive_*` loops over time, `chunk_*` is the training form in matrix products, `step_*` decodes one
token, `fla_*` calls fla's Triton kernel.
Check: `pytest tests/ops -k rwkv7`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents, n chunks, C chunk size.
r, w, k, a, b [B, T, H, K]; v [B, T, H, V]; states [B, H, K, V] in float32 (float64 for float64 v),
one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given. w <= 0; scale 1 where
None. Outputs have v's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.chunked import CHUNK, Chunks, by_steps, per_document, scan_delta, scores, zero_state


def naive_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as written, one step at a time. Returns o [B, T, H, V] and the last state."""
    return by_steps(
        step_rwkv7, (r, w, k, v, a, b), zero_state(k, v), initial_state, output_final_state,
        cu_seqlens, scale=scale,
    )  # fmt: skip


def step_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: r, w, k, a, b [B, H, K], v [B, H, V]. Returns o [B, H, V] and the new state."""
    dtype, out_dtype = initial_state.dtype, v.dtype
    scale = 1.0 if scale is None else scale
    r, w, k, v, a, b = (x.to(dtype) for x in (r, w, k, v, a, b))
    with torch.autocast(r.device.type, enabled=False):  # the state stays in float32
        read = torch.einsum("bhkv,bhk->bhv", initial_state, a)
        state = initial_state * w.exp().unsqueeze(-1)
        state = state + b.unsqueeze(-1) * read.unsqueeze(-2) + k.unsqueeze(-1) * v.unsqueeze(-2)
        o = scale * torch.einsum("bhkv,bhk->bhv", state, r)
    return o.to(out_dtype), state


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    rows: int = 1,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in chunks of `chunk_size` tokens: matrix products and one unit-triangular
    solve per chunk; Python loops over chunks only. Any T. Returns o [B, T, H, V], last state.

    With W_i the log decay from the chunk's start to token i, and S the state at its start, what the
    tokens read, u_i = a_i^T S_{i-1}, solves a triangular system:

        u_i = (a_i e^{W_{i-1}})^T S + sum_{j<i} (a_i e^{W_{i-1} - W_j})^T (b_j u_j^T + k_j v_j^T)

    Packed documents, states and `rows` as in `ops.gated_delta_rule.chunk_gated_delta_rule`.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return per_document(
            chunk_rwkv7, (r, w, k, v, a, b), cu_seqlens, initial_state, output_final_state,
            zero_state(k, v), scale=scale, chunk_size=chunk_size,
        )  # fmt: skip
    with torch.autocast(r.device.type, enabled=False):  # the solve and the state need float32
        chunks = Chunks(v, chunk_size, cu_seqlens, rows)
        r, w, k, v, a, b = (chunks.cut(x) for x in (r, w, k, v, a, b))
        r = r * (1.0 if scale is None else scale)
        total = w.cumsum(-2)
        before = F.pad(total, (0, 0, 1, -1))  # up to the token before
        earlier = chunks.causal.tril(-1)
        columns = torch.stack([b, k])  # both against the same decays
        m_b, m_k = scores(a.unsqueeze(0), columns, before, total, earlier)
        o_b, o_k = scores(r.unsqueeze(0), columns, total, total, chunks.causal)
        solved = torch.linalg.solve_triangular(
            -m_b, torch.cat([m_k @ v, a * chunks.reads(before)], -1), upper=False,
            unitriangular=True,
        )  # fmt: skip
        size = v.shape[-1]
        if initial_state is None:
            initial_state = v.new_zeros(*v.shape[:2], k.shape[-1], size)
        left = chunks.writes(total)
        o, state = scan_delta(
            solved[..., :size], solved[..., size:], o_b, r * chunks.reads(total), (b * left).mT,
            chunks.keeps(total), initial_state, write=(k * left).mT @ v,
        )  # fmt: skip
        o = chunks.join(o + o_k @ v)
    return o, (state if output_final_state else None)


def fla_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """flash-linear-attention's Triton kernels (CUDA only), for w >= -e^-0.5, which is RWKV-7's own
    bound (unchecked); w stays float32."""
    from ops.fla_kernels import rwkv7 as kernel

    return kernel(
        r, w.float(), k, v, a, b, scale=1.0 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


KERNELS = {"naive": naive_rwkv7, "chunk": chunk_rwkv7, "fla": fla_rwkv7}
