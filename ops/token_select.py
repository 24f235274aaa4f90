"""Which tokens take part in a loss: in each row those on which the student is furthest behind.

RHO-1 (Lin et al. 2024, "Not All Tokens Are What You Need", arXiv:2404.07965) keeps of the tokens
the share with the largest excess loss, the student's cross-entropy minus a reference's. Here it is
the share of each row, so that what is kept depends neither on micro-batches nor on ranks, and how
many are kept is known before any loss is.

    python -m pytest tests/ops/test_token_select.py

Shapes: R rows, T tokens of a row, N = R * T, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import kd_head as head
from ops.kd_head import IGNORE_INDEX, HeadOptions


def kept(valid: Tensor, share: float) -> Tensor:
    """How many of each row's `valid` labels [R] a share is: the nearest whole number, at least one
    where there is any. float32 on every device, so that all agree."""
    return (valid.float() * share).round().long().clamp(min=1).minimum(valid)


def num_selected(row_valid: Sequence[int], share: float) -> int:
    """Labels kept in all of rows with so many valid ones each; 1 keeps every one."""
    return sum(row_valid) if share == 1 else int(kept(torch.tensor(row_valid), share).sum())


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: int = 0, chunk_size: int = 0
) -> Tensor:
    """Cross-entropy of each token in nats, [N] in float32 (float64 for float64); 0 where masked.

    hidden [..., H], weight [V, H], labels [...] int64. vocab: the first rows of `weight` to take,
    0 = all. Logits exist for a chunk of tokens at a time, as in `kd_head`, in float32.
    """
    h, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    dtype = head._matmul_dtype(h)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    valid, options = labels != IGNORE_INDEX, HeadOptions(ce_weight=1.0)
    losses = torch.zeros(4, len(h), dtype=wide, device=h.device)
    with torch.autocast(h.device.type, enabled=False):
        weight = weight[: vocab or len(weight)].to(dtype)
        chunk = chunk_size or head._auto_chunk(len(h), len(weight) * wide.itemsize, h.device.type)
        for start in range(0, len(h), max(chunk, 1)):
            rows = slice(start, start + chunk)
            z = head._mm(head._rows(h, rows, valid, dtype), weight.t(), wide)  # [C, V]
            if head.uses_triton(h, options, {dtype}, len(weight)):
                one = torch.ones((), device=h.device)
                head.launch_chunk([z], labels[rows], one, losses[:, rows], options, False)
            else:
                losses[1, rows] = F.cross_entropy(
                    z, labels[rows], reduction="none", ignore_index=IGNORE_INDEX
                )
    return losses[1]


def excess_loss(own: Tensor, reference: Tensor, known: Tensor) -> Tensor:
    """own - reference [N]; below every excess where no loss of the reference is known, so that what
    nobody has compared takes the place of nothing that was."""
    return torch.where(known, own - reference, torch.finfo(own.dtype).min)


def select_tokens(excess: Tensor, labels: Tensor, rows: int, share: float, total: int) -> Tensor:
    """Positions [total] of the tokens kept, increasing: of each row's labels that are not -100 the
    share with the largest excess [N], of equals the first.

    total: `num_selected` of these rows, known to the caller, as asking the device would wait.
    """
    valid = labels.reshape(rows, -1) != IGNORE_INDEX
    excess = excess.reshape(rows, -1).masked_fill(~valid, -torch.inf)
    order = excess.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(valid.shape[1], device=valid.device)
    best = (place < kept(valid.sum(1), share)[:, None]).expand_as(order)
    chosen = torch.zeros_like(valid).scatter(1, order, best).flatten()
    return chosen.to(torch.uint8).argsort(descending=True, stable=True)[:total]


def spread_over_bytes(
    losses: Tensor, source: Tensor, target: Tensor, share: Tensor, count: int
) -> Tensor:
    """Losses [M] of one tokenizer's tokens as losses [count] of another's of the same text: each
    byte has an equal share of its token's loss, each token the sum of its bytes' shares.

    Of what two tokens have in common [P]: source and target, which they are; share, the bytes in
    common over those of source. `retokenize.Retokenizer` finds them.
    """
    shares = losses.index_select(0, source) * share.to(losses.dtype)
    return losses.new_zeros(count).index_add(0, target, shares)
