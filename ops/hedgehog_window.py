"""Softmax attention inside a sliding window, linear attention before it, under one normaliser
(LoLCATs, Zhang et al. 2024, arXiv 2410.10254, section 3.3.1, with its sliding window).

Per head, with window w, s_ij = scale q_i . k_j, m_i = max of s_ij over the window of i, gamma > 0
and the features phi(x) = [softmax(x W), softmax(-x W)] (Hedgehog, arXiv 2402.04347):

    a_ij = gamma exp(s_ij - m_i)       for i - w < j <= i
    a_ij = phi_q(q_i) . phi_k(k_j)     for j <= i - w
    o_i = sum_j a_ij v_j / sum_j a_ij

Every query's window ends at the query itself, so the two parts meet w tokens back, wherever a
sequence ends. `naive_*` loops over time, `chunk_*` is the training form, `step_*` decodes one
token; fla has no kernel. Check: `pytest tests/ops/test_hedgehog_window.py`.

Shapes: B batch, T time, H heads, K key size, V value size, F features per sign, M = 2 F, w window,
N documents. q, k [B, T, H, K]; v [B, T, H, V]; map_q, map_k (W of phi_q, phi_k) [H, K, F];
gamma [H]. The state is a tuple in float32 (float64 for float64 input):

    sums    [B, H, M, V + 1]  sum of phi_k(k_j) [v_j, 1]^T over tokens that have left the window
    keys    [B, H, w, K]      the window, newest last; zeros before the first token
    values  [B, H, w, V + 1]  [v_j, 1]; the last column is 0 where there is no token

one per document (N in place of B, B = 1) when `cu_seqlens` [N + 1] is given. scale: K^-0.5 where
None. Outputs have v's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.chunked import CHUNK, Chunks, by_steps, linear_within, per_document, state_dtype

State = tuple[Tensor, Tensor, Tensor]


def features(x: Tensor, weight: Tensor) -> Tensor:
    """phi(x): [..., H, K] -> [..., H, 2 F], for weight [H, K, F]."""
    y = torch.einsum("...hk,hkf->...hf", x, weight)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


def counted(v: Tensor) -> Tensor:
    """[v, 1]: the sums of the last column are the normaliser."""
    return F.pad(v, (0, 1), value=1.0)


def empty_state(k: Tensor, v: Tensor, map_k: Tensor, window: int) -> State:
    """That of no tokens, for k [B, ..., H, K] and v [B, ..., H, V]."""
    batch, heads, size, wide = k.shape[0], k.shape[-2], k.shape[-1], v.shape[-1] + 1
    shapes = (2 * map_k.shape[-1], wide), (window, size), (window, wide)
    return tuple(k.new_zeros(batch, heads, *s, dtype=state_dtype(v)) for s in shapes)


def naive_hedgehog_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_k: Tensor,
    gamma: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """One step at a time. Returns o [B, T, H, V] and the last state."""
    return by_steps(
        step_hedgehog_window, (q, k, v), empty_state(k, v, map_k, window), initial_state,
        output_final_state, cu_seqlens, map_q=map_q, map_k=map_k, gamma=gamma, window=window,
        scale=scale,
    )  # fmt: skip


def step_hedgehog_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_k: Tensor,
    gamma: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: State,
) -> tuple[Tensor, State]:
    """One token: q, k [B, H, K], v [B, H, V]. Returns o [B, H, V], new state."""
    sums, keys, values = initial_state
    assert keys.shape[2] == window, (keys.shape, window)
    dtype, out_dtype = sums.dtype, v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, map_q, map_k, gamma = (x.to(dtype) for x in (q, k, v, map_q, map_k, gamma))
    with torch.autocast(q.device.type, enabled=False):  # the state stays in float32
        left = features(keys[:, :, 0], map_k)  # the oldest leaves; where there is none, [v, 1] = 0
        sums = sums + left.unsqueeze(-1) * values[:, :, :1]
        keys = torch.cat([keys[:, :, 1:], k.unsqueeze(2)], 2)
        values = torch.cat([values[:, :, 1:], counted(v).unsqueeze(2)], 2)
        scores = scale * torch.einsum("bhwk,bhk->bhw", keys, q)
        weights = window_weights(scores, values[..., -1] > 0) * gamma[:, None]
        total = torch.einsum("bhw,bhwv->bhv", weights, values)
        total = total + torch.einsum("bhmv,bhm->bhv", sums, features(q, map_q))
        o = total[..., :-1] / total[..., -1:]
    return o.to(out_dtype), (sums, keys, values)


def window_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """exp(s - max s) where mask, else 0; some key of every query must be allowed."""
    scores = scores.masked_fill(~mask, -torch.inf)
    return (scores - scores.amax(-1, keepdim=True)).exp()


def log_weights_hedgehog_window(
    q: Tensor, k: Tensor, mask: Tensor, map_q: Tensor, map_k: Tensor, gamma: Tensor, *,
    window: int, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """log a_ij of the C last of S tokens, for attention maps: [B, H, C, S] in float32 at least.
    q [B, C, H, K], k [B, S, H, K]; mask [B, C, S] bool: what may be seen at all, and without
    which the weights are not defined."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = state_dtype(q)
    q, k, map_q, map_k, gamma = (x.to(dtype) for x in (q, k, map_q, map_k, gamma))
    with torch.autocast(q.device.type, enabled=False):
        scores = scale * torch.einsum("bihk,bjhk->bhij", q, k)
        linear = torch.einsum("bihm,bjhm->bhij", features(q, map_q), features(k, map_k))
        near = torch.ones_like(mask[0]).tril(k.shape[1] - q.shape[1])
        near = (mask & near & ~near.tril(k.shape[1] - q.shape[1] - window))[:, None]
        most = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
        softmax = scores - most + gamma.log()[:, None, None]
        return torch.where(near, softmax, linear.clamp(min=torch.finfo(dtype).tiny).log())


def chunk_hedgehog_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_k: Tensor,
    gamma: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    rows: int = 1,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, State | None]:
    """Chunks of C = `chunk_size` queries against the C + w keys up to their end, and, for what is
    older, the chunked linear attention of q_i and k_{i-w}: memory grows with T (C + w). Any T.
    Returns o [B, T, H, V] and the last state.

    Documents of a packed row are kept apart by masks; only states per document (`initial_state`
    or `output_final_state` with `cu_seqlens`) run one by one. rows: with `cu_seqlens`, the packed
    tokens are this many rows of equal length, each of which begins a document.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        return per_document(
            chunk_hedgehog_window, (q, k, v), cu_seqlens, initial_state, output_final_state,
            empty_state(k, v, map_k, window), map_q=map_q, map_k=map_k, gamma=gamma,
            window=window, scale=scale,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sums, keys, values = (None, None, None) if initial_state is None else initial_state
    dtype, out_dtype, length = state_dtype(v), v.dtype, q.shape[1]
    q, k, v, map_q, map_k, gamma = (x.to(dtype) for x in (q, k, v, map_q, map_k, gamma))
    with torch.autocast(q.device.type, enabled=False):  # softmax and state need float32
        v = counted(v)
        chunks = Chunks(v, chunk_size, cu_seqlens, rows)
        stateful = initial_state is not None or output_final_state
        past = window if stateful else min(window, length)
        total = _window_part(scale * q, k, v, gamma, keys, values, window, past, chunks)

        # Token i - w leaves the window at i: from there on, plain linear attention.
        keys = _after(keys, k.transpose(1, 2), past)  # [B, H, past + T, K]
        values = _after(values, v.transpose(1, 2), past)
        gone = values[:, :, :length].transpose(1, 2)
        if chunks.packed:
            doc = chunks.doc.flatten(1)[:, : chunks.length].reshape(1, length)
            same = F.pad(doc, (past, 0), value=-1)[:, :length] == doc
            gone = gone * same[..., None, None]
        phi_k = features(keys[:, :, :length].transpose(1, 2), map_k)
        older, sums = linear_within(chunks, features(q, map_q), phi_k, gone, None, sums)
        total = total + older
        o = (total[..., :-1] / total[..., -1:]).to(out_dtype)
    if not output_final_state:
        return o, None
    return o, (sums, *(x[:, :, length:].contiguous() for x in (keys, values)))


def _after(held: Tensor | None, x: Tensor, past: int) -> Tensor:
    """x [B, H, T, *] after the `past` tokens held, or after so many zeros."""
    return F.pad(x, (0, 0, past, 0)) if held is None else torch.cat([held, x], 2)


def _window_part(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, keys: Tensor | None, values: Tensor | None,
    window: int, past: int, chunks: Chunks,
) -> Tensor:  # fmt: skip
    """sum of gamma exp(s_ij - m_i) [v_j, 1] over each window: [B, T, H, V + 1]; q scaled, v
    counted, `past` tokens before the first, held in keys and values or absent."""
    size = chunks.size
    near = size + past  # keys that a chunk of queries may see, [..., near] below
    k, v = (
        _after(held, chunks.cut(x).flatten(2, 3), past).unfold(2, near, size)
        for held, x in ((keys, k), (values, v))
    )  # [B, H, n, K, near], [B, H, n, V + 1, near]
    query = torch.arange(size, device=q.device)[:, None] + past
    key = torch.arange(near, device=q.device)[None]
    mask = (key <= query) & (key > query - window) & (v[:, :1, :, -1:] > 0)
    if chunks.packed:
        doc = F.pad(chunks.doc.flatten(2), (past, 0), value=-1).unfold(2, near, size)
        mask = mask & (chunks.doc[..., :, None] == doc[..., None, :])
    # A padded query sees itself, and adds zeros.
    weights = window_weights(chunks.cut(q) @ k, mask | (key == query))
    return chunks.join(gamma[:, None, None, None] * weights @ v.mT)


KERNELS = {"naive": naive_hedgehog_window, "chunk": chunk_hedgehog_window}
