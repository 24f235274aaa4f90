"""Activation checkpointing: what a block computes again in the backward instead of keeping it.

    set_recompute(model, "selective")

none keeps everything; full keeps a block's input only, for a third more work; selective keeps the
outputs of attention, of fla's recurrences and of matmuls that do not double their input, and
computes the rest again: mostly the MLP's gate and up, two thirds of what a block holds for a fifth
of its forward's and backward's work. Nothing else changes: results are equal, to the last bit
without torch.compile.
Check: `pytest tests/test_recompute.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

MODES = ("none", "selective", "full")
MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
WIDE = 2  # a matmul widens its input if its output has at least so many times the columns
KEPT = re.compile(r"scaled_dot_product|varlen_attn|^flash_attn\.|^retort\.")  # by the ops' names


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    if op in MATMULS:
        right = args[-1]  # [columns of the input, columns of the output]
        keep = right.shape[1] < WIDE * right.shape[0]
    else:
        keep = KEPT.search(str(op)) is not None
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


RUN: dict[str, Callable] = {
    "full": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    ),
}


def set_recompute(model: nn.Module, mode: str) -> None:
    """What every block of a `Transformer` does when it is trained."""
    assert mode in MODES, mode
    for block in model.layers:
        block.recompute = mode
