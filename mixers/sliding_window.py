"""Softmax attention over the last `sliding_window` tokens: what linear attention has to beat.

Its memory is constant in the context like a linear layer's. In a checkpoint it is a layer of type
"sliding_attention", which stock classes have too.
Check: `pytest tests/test_mixers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from config import ModelConfig, Transfer
from layers import Attention, SeqInfo


class SlidingWindow(Attention):
    """The attention of the layer it replaces, weights and all, with a window."""

    name = "sliding_window"

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.sliding_window)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, D] right after projection, KV heads expanded and q/k-norm weights
        folded in as in the linear mixers (for the self-test)."""
        q, k, v = self.project(x)
        if self.q_norm is not None:
            q, k = q * self.q_norm.weight, k * self.k_norm.weight
        groups = self.num_heads // self.num_kv_heads
        return q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)

    @torch.no_grad()
    def from_attention(self, attention: nn.Module, parts: Transfer | None = None) -> None:
        """Every parameter is the teacher's."""
        self.load_state_dict(attention.state_dict())

    @torch.no_grad()
    def calibrate(
        self, x: Tensor, target: Tensor, seq: SeqInfo, parts: Transfer | None = None,
        distances: Tensor | None = None,
    ) -> float:  # fmt: skip
        """Nothing to fit; the relative error to `target` [B, T, d]."""
        error = target - self(x, seq)
        return (error.float().norm() / target.float().norm()).item()
