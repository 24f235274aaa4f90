"""Gated linear attention (GLA, Yang et al. 2023, arXiv 2312.06635, section 4.4).

    q, k, v = W x;  g = logsigmoid(W_2 W_1 x + b) / 16, a decay for every key channel
    out = W_o (RMSNorm(gla(q, k, v, g)) * SiLU(W_g x))

W_1 has 16 rows. q and k get neither norm nor feature map, and there is no short convolution.
Check: `pytest tests/test_mixer_gla.py tests/test_mixers.py -k gla`.
Shapes: B batch, T time, d hidden size, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers import RMSNorm, SeqInfo, apply_rope
from mixers.base import LinearMixer, at_least_float32, inverse_silu, inverse_softplus
from ops.gla import KERNELS, step_gla

GATE_RANK = 16  # rows of W_1
GATE_NORMALIZER = 16  # the paper's tau: the decay is a sigmoid to the power 1 / tau


class GatedLinearAttention(LinearMixer):
    """Parameter names are fla's (`fla.layers.GatedLinearAttention`)."""

    name = "gla"
    kernels = KERNELS
    fla_op = "gla"
    step = staticmethod(step_gla)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        d, keys, values = (
            config.hidden_size, self.num_heads * self.key_dim, self.num_heads * self.value_dim,
        )  # fmt: skip
        self.add_heads(config)
        self.g_proj = nn.Linear(d, values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(d, GATE_RANK, bias=False), nn.Linear(GATE_RANK, keys)
        )
        self.g_norm_swish_gate = RMSNorm(self.value_dim, config.rms_norm_eps)

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        q, k = self.heads(self.q_proj(x)), self.heads(self.k_proj(x))
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        if self.rope:
            q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        return {"q": q, "k": k, "v": v, "g": self.log_decay(x)}, None, {}

    def log_decay(self, x: Tensor) -> Tensor:
        """g [B, T, H, K] <= 0, in float32 at least."""
        down, up = self.gk_proj
        # The bias, which says most of how long a channel remembers, is added in float32.
        logit = at_least_float32(F.linear(down(x), up.weight))
        return self.heads(F.logsigmoid(logit + up.bias.to(logit.dtype)) / GATE_NORMALIZER)

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        gate = F.silu(self.g_proj(x)).unflatten(-1, (-1, self.value_dim))
        return (self.g_norm_swish_gate(o) * gate).flatten(-2)

    def init_transfer(self) -> None:
        """Decays do not depend on x yet; the low-rank half that depends on x starts at zero, with
        its first matrix random so that the second learns from the first step."""
        nn.init.zeros_(self.g_proj.weight)
        down, up = self.gk_proj
        nn.init.normal_(down.weight, std=self.init_std)
        nn.init.zeros_(up.weight)
        self.g_norm_swish_gate.init_weights()

    def start_decays(self, rates: Tensor) -> None:
        # -logsigmoid(b) = softplus(-b)
        rates = GATE_NORMALIZER * rates.repeat_interleave(self.key_dim)
        self.gk_proj[1].bias.copy_(-inverse_softplus(rates))

    def gate_to_fit(self) -> tuple[Tensor, float]:
        return self.g_proj.weight, inverse_silu(1.0)
