"""The chunked forms that the recurrences share: matrix products within a chunk of tokens, a state
carried from chunk to chunk, documents of a packed row kept apart by masks.

Two families. Linear: S_t = D_t S_{t-1} + k_t v_t^T; delta: the value written is first corrected
by what the state already holds. D_t is one, a number per head, or one per key. The op files give
the equations and their sources.
Check: `pytest tests/ops`.

Shapes: B batch (rows that run side by side), T time, H heads, K key size, V value size, n chunks,
C chunk size, N documents. Chunked tensors are [B, H, n, C, *]; states [B, H, K, V], in float32, or
float64 for float64 inputs. Log decays are <= 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
SMALLEST = 16  # the chunk of a short row
NEAR = 4  # with a decay per key, tokens in blocks of so many are paired one by one
State = Tensor | tuple[Tensor, ...]


def state_dtype(v: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def zero_state(k: Tensor, v: Tensor) -> Tensor:
    """[B, H, K, V] zeros for k [B, ..., H, K] and v [B, ..., H, V]."""
    shape = (k.shape[0], k.shape[-2], k.shape[-1], v.shape[-1])
    return torch.zeros(shape, dtype=state_dtype(v), device=v.device)


def per_document(
    op: Callable,
    inputs: tuple[Tensor | None, ...],
    cu_seqlens: Tensor,
    initial_state: State | None,
    output_final_state: bool,
    empty_state: State,
    **options,
) -> tuple[Tensor, State | None]:
    """Run `op` on each document alone: the plain definition of packing, and the form that takes
    and returns a state per document. inputs [1, T, ...]; `empty_state` [1, H, K, V] is that of a
    document without tokens (they pad cu_seqlens). A state may be a tuple of tensors."""
    outs, finals = [], []
    for i, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        state = initial_state
        if isinstance(state, tuple):
            state = tuple(x[i : i + 1] for x in state)
        elif state is not None:
            state = state[i : i + 1]
        if a == b:
            finals.append(empty_state if state is None else state)
            continue
        parts = (None if x is None else x[:, a:b] for x in inputs)
        o, final = op(*parts, initial_state=state, output_final_state=True, **options)
        outs.append(o)
        finals.append(final)
    if not output_final_state:
        return torch.cat(outs, 1), None
    if isinstance(empty_state, tuple):
        return torch.cat(outs, 1), tuple(map(torch.cat, zip(*finals, strict=True)))
    return torch.cat(outs, 1), torch.cat(finals)


def by_steps(
    step: Callable,
    inputs: tuple[Tensor | None, ...],
    empty_state: State,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    **options,
) -> tuple[Tensor, State | None]:
    """The body of every naive form: the recurrence one token at a time, document by document.
    inputs [B, T, ...] -> o [B, T, H, V] and, if wanted, the last state."""

    def run(*inputs, initial_state, output_final_state):
        state, outs = empty_state if initial_state is None else initial_state, []
        for t in range(inputs[0].shape[1]):
            token = (None if x is None else x[:, t] for x in inputs)
            o, state = step(*token, initial_state=state, **options)
            outs.append(o)
        return torch.stack(outs, 1), (state if output_final_state else None)

    if cu_seqlens is None:
        return run(*inputs, initial_state=initial_state, output_final_state=output_final_state)
    return per_document(run, inputs, cu_seqlens, initial_state, output_final_state, empty_state)


class Chunks:
    """How [B, T, H, *] is cut into chunks, and which tokens belong to the same document.

    With `cu_seqlens` [N + 1] (B = 1) the packed tokens are `rows` rows of equal length, each of
    which begins a document; they run side by side, as a batch.
    """

    def __init__(self, v: Tensor, size: int, cu_seqlens: Tensor | None = None, rows: int = 1):
        batch, length = v.shape[:2]
        self.dtype, self.out_dtype, self.shape = state_dtype(v), v.dtype, v.shape
        self.packed = cu_seqlens is not None
        if self.packed:
            batch, (length, rest) = rows, divmod(length, rows)
            assert rest == 0, (v.shape, rows)
        self.batch, self.length = batch, length
        size = max(SMALLEST, min(size, length))
        self.size = 1 << (size - 1).bit_length()  # rounded up to a power of two, for `scores`
        self.n = -(-length // self.size)
        self.pad = self.n * self.size - length
        square = torch.ones(self.size, self.size, dtype=torch.bool, device=v.device)
        self.causal = square.tril()  # [C, C], or [B, 1, n, C, C] with documents
        if self.packed:
            time = torch.arange(v.shape[1], device=v.device)
            doc = torch.searchsorted(cu_seqlens[1:].contiguous(), time, right=True)
            doc = doc.view(batch, length)
            doc = torch.cat([doc, doc[:, -1:].expand(-1, self.pad)], 1)
            doc = doc.view(batch, 1, self.n, self.size)
            self.doc = doc  # [B, 1, n, C]
            self.end = doc[..., -1:]  # the document whose state leaves the chunk
            first = torch.full_like(self.end[:, :, :1], -1)
            self.before = torch.cat([first, self.end[:, :, :-1]], 2)  # that of the entering state
            self.causal = self.causal & (doc[..., :, None] == doc[..., None, :])
            self.read = (doc == self.before).unsqueeze(-1)  # [B, 1, n, C, 1]
            self.write = (doc == self.end).unsqueeze(-1)
            self.keep = (self.end == self.before).unsqueeze(-1)  # [B, 1, n, 1, 1]

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, H] or [B, T, H, *] -> [B, H, n, C, 1 or *], zero-padded, in the state's type."""
        x = x.unsqueeze(-1) if x.dim() == 3 else x
        x = x.reshape(self.batch, self.length, *x.shape[2:]).to(self.dtype).transpose(1, 2)
        x = F.pad(x, (0, 0, 0, self.pad))
        return x.reshape(*x.shape[:2], self.n, self.size, x.shape[-1])

    def join(self, o: Tensor) -> Tensor:
        """[B, H, n, C, V] -> v's shape and type."""
        o = o.flatten(2, 3)[:, :, : self.length].transpose(1, 2)
        return o.reshape(self.shape).to(self.out_dtype)

    def reads(self, total: Tensor) -> Tensor:
        """Decay since the chunk began, exp(total); zero where another document's state enters."""
        return total.exp() * self.read if self.packed else total.exp()

    def writes(self, total: Tensor) -> Tensor:
        """Decay from each token to the chunk's end; zero if its document ends before."""
        left = (total[..., -1:, :] - total).exp()
        return left * self.write if self.packed else left

    def keeps(self, total: Tensor) -> Tensor:
        """Decay of the entering state over the chunk [B, H, n, 1 or K, 1]."""
        kept = total[..., -1:, :].exp()
        return (kept * self.keep if self.packed else kept).mT


def _blocks(mask: Tensor) -> Tensor:
    """[..., C, C] -> its blocks of NEAR tokens on the diagonal, [..., C / NEAR, NEAR, NEAR, 1]."""
    cut = mask.unflatten(-1, (-1, NEAR)).unflatten(-3, (-1, NEAR))
    return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).unsqueeze(-1)


def scores(q: Tensor, k: Tensor, gq: Tensor, gk: Tensor, mask: Tensor) -> Tensor:
    """sum_K q_i k_j exp(gq_i - gk_j) where mask, else 0: [B, H, n, C, C].

    q, k [B, H, n, C, K]; gq, gk: log decay accumulated since the chunk began (gq up to i or up to
    i - 1), [..., C, 1] or [..., C, K]; mask allows j <= i only (j < i for gq up to i - 1). Several
    sets of queries, [..., B, H, n, C, K], share the decays' cost.
    No exponent is ever positive. With a decay per key (C a power of two), pairs within a block of
    NEAR tokens are taken one by one; then blocks are joined two by two, queries of the second and
    keys of the first both relative to the end of the first.
    """
    if gq.shape[-1] == 1:
        # Masking before exp keeps the unused upper triangle from overflowing into NaN gradients.
        qk = torch.einsum("...ik,...jk->...ij", q, k)  # unlike @, without copies of k
        return qk * (gq - gk.mT).masked_fill(~mask, -torch.inf).exp()
    size = NEAR
    qi, kj, gi, gj = (x.unflatten(-2, (-1, size)) for x in (q, k, gq, gk))  # [..., blocks, NEAR, K]
    near = gi.unsqueeze(-2) - gj.unsqueeze(-3)
    decay = near.masked_fill(~_blocks(mask), -torch.inf).exp()
    out = torch.einsum("...ijk,...ik->...ij", decay * kj.unsqueeze(-3), qi)
    while size < q.shape[-2]:
        pairs = (x.unflatten(-2, (-1, 2, size)).unbind(-3) for x in (q, k, gq, gk))
        (_, qi), (kj, _), (_, gi), (gj, _) = pairs
        end = gj[..., -1:, :]
        far = torch.einsum("...ik,...jk->...ij", qi * (gi - end).exp(), kj * (end - gj).exp())
        first, second = out.unflatten(-3, (-1, 2)).unbind(-3)
        out = torch.cat([F.pad(first, (0, size)), torch.cat([far, second], -1)], -2)
        size *= 2
    return out.squeeze(-3).masked_fill(~mask, 0)


def linear_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    rows: int,
    chunk_size: int,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, in matrix products. Tensors
    [B, T, H, *]; g [B, T, H], [B, T, H, K] or None. With `bonus` u [H, K] (RWKV-6) the token itself
    counts with diag(u) instead of one, undecayed: o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T q_t.

    Masks keep the documents of a packed row apart, so they cost nothing extra; only states per
    document (`initial_state` or `output_final_state` with `cu_seqlens`) run one by one. rows: see
    `Chunks`. Returns o in v's shape and type, and the last state if wanted.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        alone = functools.partial(
            linear_chunks, scale=scale, cu_seqlens=None, rows=1, chunk_size=chunk_size, bonus=bonus
        )
        return per_document(
            alone, (q, k, v, g), cu_seqlens, initial_state, output_final_state, zero_state(k, v)
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):  # the state needs float32
        chunks = Chunks(v, chunk_size, cu_seqlens, rows)
        o, state = linear_within(chunks, q.to(chunks.dtype) * scale, k, v, g, initial_state, bonus)
    return o, (state if output_final_state else None)


def linear_within(
    chunks: Chunks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_chunks` within given chunks, q scaled already; returns the last state too."""
    q, k, v = chunks.cut(q), chunks.cut(k), chunks.cut(v)
    step = torch.zeros_like(q[..., :1]) if g is None else chunks.cut(g)
    total = step.cumsum(-2)
    seen, mask = total, chunks.causal
    if bonus is not None:
        seen, mask = F.pad(total, (0, 0, 1, -1)), mask.tril(-1)
    o = scores(q, k, seen, total, mask) @ v
    if bonus is not None:
        o = o + (q * bonus.to(q.dtype)[:, None, None] * k).sum(-1, keepdim=True) * v
    new = (k * chunks.writes(total)).mT @ v  # [B, H, n, K, V]
    states, state = carry(new, total, chunks, initial_state)
    # `reads` takes the document from the token; a token's own decay is in `seen`.
    return chunks.join(o + (q * chunks.reads(seen)) @ states), state


def carry(
    new: Tensor, total: Tensor, chunks: Chunks, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states entering each chunk [B, H, n, K, V], and the last, from what each adds."""
    if initial_state is None:
        initial_state = torch.zeros_like(new[:, :, 0])
    if total.shape[-1] > 1:
        return _carry_loop(new, chunks.keeps(total), initial_state)
    # One decay per head: a product with the [n + 1, n] matrix of decays between chunks.
    last = F.pad(total[..., -1, 0], (1, 0))  # [B, H, n + 1], of the chunk before each
    n = chunks.n
    earlier = torch.ones(n + 1, n, dtype=torch.bool, device=new.device).tril(-1)
    inner = earlier.tril(-2)
    if chunks.packed:
        end = chunks.end[..., 0]  # [B, 1, n]
        entering = torch.cat([chunks.before[..., 0], end[..., -1:]], -1)
        earlier = earlier & (entering[..., :, None] == end[..., None, :])
    # Each span is summed by itself: differences of sums over the row lose digits as it gets longer.
    spans = last.unsqueeze(-1).where(inner, 0).cumsum(-2)  # [B, H, n + 1, n]
    between = spans.masked_fill(~earlier, -torch.inf).exp()
    states = (between @ new.flatten(-2)).unflatten(-1, new.shape[-2:])
    if not chunks.packed:  # a packed row has no initial state
        states = states + last.cumsum(-1).exp()[..., None, None] * initial_state.unsqueeze(2)
    # A copy: as a view, the last state would keep those of all chunks.
    return states[:, :, :-1], states[:, :, -1].clone()


@torch.compiler.disable  # one step per chunk: unrolled, a long row takes minutes to compile
def _carry_loop(new: Tensor, keeps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    states = []
    # unbind, not indexing: the backward of x[:, :, i] fills a whole tensor of zeros per chunk.
    for add, keep in zip(new.unbind(2), keeps.unbind(2), strict=True):
        states.append(state)
        state = state * keep + add
    return torch.stack(states, 2), state


def delta_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    rows: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """S_t = D_t S_{t-1} + k_t (beta_t (v_t - (D_t S_{t-1})^T k_t))^T, o_t = scale S_t^T q_t, D_t =
    exp(g_t). Tensors [B, T, H, *]; g [B, T, H], [B, T, H, K] or None.

    The corrected values of a chunk solve a unit-triangular system (WY representation, Yang et al.
    2024, arXiv 2406.06484, section 3); Python loops over chunks only. Documents, states and rows as
    in `linear_chunks`.
    """
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        alone = functools.partial(
            delta_chunks, scale=scale, cu_seqlens=None, rows=1, chunk_size=chunk_size
        )
        inputs = (q, k, v, g, beta)
        return per_document(
            alone, inputs, cu_seqlens, initial_state, output_final_state, zero_state(k, v)
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):  # the solve and the state need float32
        chunks = Chunks(v, chunk_size, cu_seqlens, rows)
        o, state = _delta(chunks, q.to(chunks.dtype) * scale, k, v, g, beta, initial_state)
    return o, (state if output_final_state else None)


def _delta(
    chunks: Chunks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v, beta = chunks.cut(q), chunks.cut(k), chunks.cut(v), chunks.cut(beta)
    step = torch.zeros_like(beta) if g is None else chunks.cut(g)
    total = step.cumsum(-2)
    reads, kb = chunks.reads(total), k * beta
    lower, inner = scores(torch.stack([kb, q]), k, total, total, chunks.causal)
    rhs = torch.cat([v * beta, kb * reads], -1)
    solved = torch.linalg.solve_triangular(lower.tril(-1), rhs, upper=False, unitriangular=True)
    size = v.shape[-1]
    if initial_state is None:
        initial_state = v.new_zeros(*v.shape[:2], k.shape[-1], size)
    o, state = scan_delta(
        solved[..., :size], -solved[..., size:], inner, q * reads,
        (k * chunks.writes(total)).mT, chunks.keeps(total), initial_state,
    )  # fmt: skip
    return chunks.join(o), state


@torch.compiler.disable  # see _carry_loop
def scan_delta(
    u: Tensor, w: Tensor, inner: Tensor, q_in: Tensor, k_out: Tensor, keep: Tensor, state: Tensor,
    *, write: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunk by chunk: new = u + w S [C, V];  o = q_in S + inner new;  S <- keep S + k_out new.
    `write` [K, V] is added to S too. All but the state are [B, H, n, ...]. Returns o, all chunks'
    [B, H, n, C, V], and the last state."""
    outs = []
    writes = itertools.repeat(None, u.shape[2]) if write is None else write.unbind(2)
    pieces = zip(*(x.unbind(2) for x in (u, w, inner, q_in, k_out, keep)), writes, strict=True)
    for u_i, w_i, inner_i, q_i, k_i, keep_i, write_i in pieces:
        new = u_i + w_i @ state
        outs.append(q_i @ state + inner_i @ new)
        state = state * keep_i + k_i @ new
        if write_i is not None:
            state = state + write_i
    return torch.stack(outs, 2), state
