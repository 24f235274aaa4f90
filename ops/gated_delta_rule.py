"""The gated delta rule (Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464, eq. 10).

Per head, with decay a_t = exp(g_t) and write strength beta_t:

    S_t = a_t S_{t-1} + k_t (beta_t (v_t - (a_t S_{t-1})^T k_t))^T        o_t = scale S_t^T q_t

`naive_*` loops over time, `chunk_*` is the training form in matrix products (WY representation,
section 3.2 there), `step_*` decodes one token, `fla_*` calls fla's Triton kernel.
Check: `pytest tests/ops/test_gated_delta_rule.py`; time: `python benchmarks/gated_delta_rule.py`.

Shapes: B batch, T time, H heads, K key size, V value size, N documents, C chunk, n chunks.
q, k [B, T, H, K]; v [B, T, H, V]; g, beta [B, T, H]; states [B, H, K, V] in float32 (float64 for
float64 input), one per document ([N, H, K, V], B = 1) when `cu_seqlens` [N + 1] is given. g <= 0.
Keys are expected L2-normalised. Outputs have v's dtype.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def _state_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def _per_document(op, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """Run `op` on each document alone: the plain definition of packing, and the one form that
    takes and returns a state per document."""
    outs, finals = [], []
    bounds = cu_seqlens.tolist()
    shape = (1, q.shape[2], q.shape[3], v.shape[3])
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        state = None if initial_state is None else initial_state[i : i + 1]
        if a == b:  # the padding of cu_seqlens, or an empty document
            empty = torch.zeros(shape, dtype=_state_dtype(v), device=v.device)
            finals.append(empty if state is None else state)
            continue
        o, final = op(
            q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b], beta[:, a:b],
            scale=scale, initial_state=state, output_final_state=True,
        )  # fmt: skip
        outs.append(o)
        finals.append(final)
    return torch.cat(outs, 1), (torch.cat(finals) if output_final_state else None)


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
    if cu_seqlens is not None:
        return _per_document(
            naive_gated_delta_rule, q, k, v, g, beta, scale, initial_state, output_final_state,
            cu_seqlens,
        )  # fmt: skip
    state = initial_state
    if state is None:
        shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        state = torch.zeros(shape, dtype=_state_dtype(v), device=v.device)
    outs = []
    for t in range(q.shape[1]):
        o, state = step_gated_delta_rule(
            q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], scale=scale, initial_state=state
        )
        outs.append(o)
    return torch.stack(outs, 1), (state if output_final_state else None)


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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in chunks of `chunk_size` tokens: matrix products and one unit-triangular
    solve per chunk; Python loops over chunks only. Any T. Returns o [B, T, H, V], last state.

    Documents of a packed row are kept apart by masks, so they cost nothing extra; only states
    per document (`initial_state` or `output_final_state` with `cu_seqlens`) run one by one.
    rows: with `cu_seqlens`, the packed tokens are this many rows of equal length, each of which
    begins a document; they run side by side, so the loop is that much shorter.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return _per_document(
            chunk_gated_delta_rule, q, k, v, g, beta, scale, initial_state, output_final_state,
            cu_seqlens,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape, doc = v.shape, None
    if cu_seqlens is not None:
        length, rest = divmod(q.shape[1], rows)
        assert rest == 0, (q.shape, rows)
        time = torch.arange(q.shape[1], device=q.device)
        doc = torch.searchsorted(cu_seqlens[1:].contiguous(), time, right=True).view(rows, length)
        q, k, v, g, beta = (x.reshape(rows, length, *x.shape[2:]) for x in (q, k, v, g, beta))
    with torch.autocast(q.device.type, enabled=False):  # the solve and the state need float32
        o, state = _chunk(q, k, v, g, beta, scale, initial_state, doc, chunk_size)
    return o.reshape(shape), (state if output_final_state else None)


def _chunk(q, k, v, g, beta, scale, initial_state, doc, chunk_size) -> tuple[Tensor, Tensor]:
    """doc [B, T]: the document of each token, or None."""
    dtype, out_dtype = _state_dtype(v), v.dtype
    batch, length, heads, _ = q.shape
    value_dim = v.shape[-1]
    size = min(chunk_size, -(-length // 16) * 16)
    n = -(-length // size)
    pad = n * size - length

    def chunked(x: Tensor) -> Tensor:  # [B, T, H, *] -> [B, H, n, C, *]
        x = x.to(dtype).transpose(1, 2)
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad))  # zero k and beta leave the state alone
        return x.reshape(batch, heads, n, size, *x.shape[3:])

    q, k, v, g, beta = (chunked(x) for x in (q, k, v, g, beta))
    q = q * scale
    total = g.cumsum(-1)  # log decay since the chunk began, [B, H, n, C]
    last = total[..., -1:]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    reads, writes, keeps = total.exp(), (last - total).exp(), last.exp()
    if doc is not None:
        doc = torch.cat([doc, doc[:, -1:].expand(-1, pad)], 1).view(batch, 1, n, size)
        end = doc[..., -1:]
        before = torch.cat([torch.full_like(end[:, :, :1], -1), end[:, :, :-1]], 2)  # the state's
        causal = causal & (doc[..., :, None] == doc[..., None, :])  # [B, 1, n, C, C]
        reads = reads * (doc == before)
        writes = writes * (doc == end)
        keeps = keeps * (end == before)
    # Masking before exp keeps the unused upper triangle from overflowing into NaN gradients.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()

    kb = k * beta[..., None]
    lower = (kb @ k.mT * decay).tril(-1)
    rhs = torch.cat([v * beta[..., None], kb * reads[..., None]], -1)
    solved = torch.linalg.solve_triangular(lower, rhs, upper=False, unitriangular=True)
    scores = q @ k.mT * decay
    state = initial_state
    if state is None:
        state = torch.zeros(batch, heads, k.shape[-1], value_dim, dtype=dtype, device=q.device)
    o, state = _scan(
        solved[..., :value_dim], solved[..., value_dim:], scores, q * reads[..., None],
        (k * writes[..., None]).mT, keeps[..., None], state,
    )  # fmt: skip
    o = o.reshape(batch, heads, n * size, value_dim)[:, :, :length]
    return o.transpose(1, 2).to(out_dtype), state


@torch.compiler.disable  # one step per chunk: unrolled, a long row takes minutes to compile
def _scan(u, w, scores, q_in, k_out, keep, state) -> tuple[Tensor, Tensor]:
    """Carry the state [B, H, K, V] from chunk to chunk; everything else is [B, H, n, ...]."""
    outs = []
    # unbind, not indexing: the backward of x[:, :, i] fills a whole tensor of zeros per chunk.
    pieces = zip(*(x.unbind(2) for x in (u, w, scores, q_in, k_out, keep)), strict=True)
    for u_i, w_i, score, q_i, k_i, keep_i in pieces:
        new = u_i - w_i @ state  # [B, H, C, V], the corrected values
        outs.append(q_i @ state + score @ new)
        state = state * keep_i + k_i @ new
    return torch.stack(outs, 2), state


def fla_gated_delta_rule(
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
    """flash-linear-attention's Triton kernels (CUDA only); g stays float32."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as kernel

    return kernel(
        q, k, v, g.float(), beta, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )  # fmt: skip


KERNELS = {
    "naive": naive_gated_delta_rule,
    "chunk": chunk_gated_delta_rule,
    "fla": fla_gated_delta_rule,
}
