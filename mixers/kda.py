"""Kimi Delta Attention (Kimi Linear, Kimi Team 2025, arXiv 2510.26692), in the shape of
fla's `KimiDeltaAttention` at its defaults.

    q, k, v = SiLU(conv(W x));  q, k L2-normalised;  beta = sigmoid(W_b x)
    g = -exp(A_log) softplus(W_f1 W_f0 x + dt_bias), one per key channel
    out = W_o (RMSNorm(kda(q, k, v, g, beta)) * sigmoid(W_g1 W_g0 x + b_g))

Check: `pytest tests/test_mixers.py tests/test_mixer_kda.py -k kda`.
Shapes: B batch, T time, d hidden size, H query/key heads, J value heads, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers import RMSNorm, SeqInfo, apply_rope, project_apart
from mixers.base import LinearMixer, at_least_float32, inverse_softplus, l2norm
from ops.kda import KERNELS, step_kda

OPEN_GATE = 2.0  # the output gate after a transfer is sigmoid of this, 0.88


class KimiDeltaAttention(LinearMixer):
    """Parameter names are fla's (`fla.layers.KimiDeltaAttention`)."""

    name = "kda"
    kernels = KERNELS
    fla_op = "kda"
    step = staticmethod(step_kda)
    passes = 3  # S^T k, k u^T, S^T q
    kept = 16
    grouped = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        d, heads, rank = config.hidden_size, self.num_value_heads, self.value_dim
        self.add_heads(config)
        self.add_convolutions(config)
        self.f_proj = nn.Sequential(  # decay
            nn.Linear(d, rank, bias=False), nn.Linear(rank, heads * self.key_dim, bias=False)
        )
        self.b_proj = nn.Linear(d, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * self.key_dim))
        self.g_proj = nn.Sequential(  # output gate
            nn.Linear(d, rank, bias=False), nn.Linear(rank, heads * self.value_dim)
        )
        self.o_norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def init_weights(self) -> None:
        super().init_weights()
        self.init_decay()

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        q, k, v, kept = self.convolved(x, seq, held, keep)
        if self.rope:
            q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        q, k = l2norm(q), l2norm(k)
        groups = self.num_value_heads // self.num_heads
        if groups > 1:
            q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
        (b,) = project_apart(x, self.b_proj)
        beta = b.sigmoid()  # [B, T, J]
        return {"q": q, "k": k, "v": v, "g": self.log_decay(x), "beta": beta}, None, kept

    def log_decay(self, x: Tensor) -> Tensor:
        """g [B, T, J, K] <= 0, in float32 at least."""
        f = at_least_float32(self.f_proj(x))
        rate = self.heads(F.softplus(f + self.dt_bias.to(f.dtype)))
        return -self.A_log.to(f.dtype).exp().unsqueeze(-1) * rate

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        gate = self.g_proj(x).sigmoid().unflatten(-1, (-1, self.value_dim))
        return (self.o_norm(o) * gate).flatten(-2)

    def init_transfer(self) -> None:
        """Taps that keep SiLU near its linear part, one decay for all of a head's channels, beta
        one half, the gate open. Decay and gate do not depend on the input
        yet; the first halves of their projections are random, so that the second can learn."""
        self.small_taps()
        for first, second in (self.f_proj, self.g_proj):
            nn.init.normal_(first.weight, std=self.init_std)
            nn.init.zeros_(second.weight)
        nn.init.constant_(self.g_proj[1].bias, OPEN_GATE)
        nn.init.zeros_(self.b_proj.weight)
        self.o_norm.init_weights()
        nn.init.zeros_(self.A_log)

    def start_decays(self, rates: Tensor) -> None:
        self.dt_bias.copy_(inverse_softplus(rates.repeat_interleave(self.key_dim)))
