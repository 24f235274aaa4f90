"""How far one attention map is from another, some queries at a time (LoLCATs, Zhang et al. 2024,
arXiv 2410.10254, equation 8: cross-entropy of the attention weights).

    loss = sum over queries i, heads h of  sum_j t_ij (log t_ij - log s_ij)

t and s are the teacher's and the student's normalised weights. This is their cross-entropy less
the teacher's entropy, which has no gradient; 0 where the maps are equal. Maps of all queries never
exist together: each chunk is computed again in the backward. Check:
`pytest tests/ops/test_attention_maps.py`.

Shapes: B rows, T time, H heads, G key heads, D head size, C queries of a chunk, S keys up to its
end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_WEIGHTS = 1 << 26  # of a chunk, over rows and heads: 256 MB in float32


def split_rows(x: Tensor, rows: int) -> Tensor:
    """[1, N, ...], packed from so many rows of equal length -> [rows, T, ...]."""
    return x.unflatten(1, (rows, -1)).flatten(0, 1)


def map_cross_entropy(
    log_weights: Callable[[int, Tensor], Tensor], q: Tensor, k: Tensor, positions: Tensor, *,
    window: int = 0, text: Tensor | None = None, chunk_weights: int = CHUNK_WEIGHTS,
) -> Tensor:  # fmt: skip
    """The loss above, in float32 at least; 0-d. The teacher is softmax attention with scale D^-0.5.

    q [B, T, H, D], k [B, T, G, D]: the teacher's, rotated; no gradient. positions [B, T]: of each
    token in its document; what came before it is not seen. window: of the teacher, 0 = full.
    text [B, T]: true for the queries that count, None = all.
    log_weights(begin, mask [B, C, S]): the student's weights of queries begin .. begin + C on keys
    0 .. S, [B, H, C, S], up to a constant of each query; any value where not mask.
    """
    rows, length, heads = q.shape[:3]
    size = max(1, min(length, chunk_weights // (rows * heads * length)))
    time = torch.arange(length, device=q.device)
    start = time - positions  # of the document
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.detach().to(wide).unflatten(2, (k.shape[2], -1)), k.detach().to(wide)

    def one(begin: int) -> Tensor:
        end = min(begin + size, length)
        query = time[begin:end, None]
        mask = (time[:end] <= query) & (time[:end] >= start[:, begin:end, None])
        hidden = ~mask[:, None]
        unseen = hidden | (time[:end] <= query - window) if window else hidden
        if text is not None:
            unseen = unseen | ~text[:, None, begin:end, None]
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            scores = torch.einsum("bigrd,bjgd->bgrij", q[:, begin:end], k[:, :end]).flatten(1, 2)
            theirs = (scores * q.shape[-1] ** -0.5).masked_fill_(unseen, -torch.inf).log_softmax(-1)
        mine = log_weights(begin, mask).masked_fill(hidden, -torch.inf).log_softmax(-1)
        # Where the teacher has no weight: e^0 (0 - 0).
        theirs, mine = theirs.masked_fill(unseen, 0), mine.masked_fill(unseen, 0)
        return F.kl_div(mine, theirs, reduction="none", log_target=True).sum()

    total = torch.zeros((), device=q.device)
    for begin in range(0, length, size):
        total = total + checkpoint(one, begin, use_reentrant=False)
    return total
