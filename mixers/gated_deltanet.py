"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), in the shape of transformers'
`Qwen3_5GatedDeltaNet`.

    q, k, v = SiLU(conv(W x));  q, k L2-normalised;  beta = sigmoid(W_b x)
    g = -exp(A_log) softplus(W_a x + dt_bias)
    out = W_o (RMSNorm(gated_delta_rule(q, k, v, g, beta)) * SiLU(W_g x))

Check: `pytest tests/test_mixers.py`.
Shapes: B batch, T time, d hidden size, H query/key heads, J value heads, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers import RMSNorm, SeqInfo, apply_rope, project_apart
from mixers.base import LinearMixer, at_least_float32, inverse_silu, inverse_softplus, l2norm
from ops.gated_delta_rule import KERNELS, step_gated_delta_rule


class GatedDeltaNet(LinearMixer):
    """Parameter names are fla's (`fla.layers.GatedDeltaNet`)."""

    name = "gated_deltanet"
    kernels = KERNELS
    fla_op = "gated_delta_rule"
    step = staticmethod(step_gated_delta_rule)
    passes = 3  # S^T k, k u^T, S^T q
    grouped = True
    gate_optional = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        d, heads = config.hidden_size, self.num_value_heads
        self.add_heads(config)
        self.a_proj = nn.Linear(d, heads, bias=False)
        self.b_proj = nn.Linear(d, heads, bias=False)
        self.g_proj = None
        if config.linear_gate:
            self.g_proj = nn.Linear(d, heads * self.value_dim, bias=False)
        self.add_convolutions(config)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.o_norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def init_weights(self) -> None:
        super().init_weights()
        self.init_decay(0.01)  # fla's begins at 0, transformers' here

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        q, k, v, kept = self.convolved(x, seq, held, keep)
        if self.rope:
            q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        q, k = l2norm(q), l2norm(k)
        groups = self.num_value_heads // self.num_heads
        if groups > 1:
            q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
        gate = None
        if self.g_proj is None:
            a, b = self.a_proj(x), self.b_proj(x)
        else:
            gate, a, b = project_apart(x, self.g_proj, self.a_proj, self.b_proj)
        return {"q": q, "k": k, "v": v, "g": self.log_decay(a), "beta": b.sigmoid()}, gate, kept

    def log_decay(self, a: Tensor) -> Tensor:
        """a [B, T, J] -> g [B, T, J] <= 0, in float32 at least."""
        a = at_least_float32(a)
        return -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))

    def finish(self, o: Tensor, x: Tensor, aux: Tensor) -> Tensor:
        o = self.o_norm(o)
        if aux is not None:
            o = o * F.silu(aux).unflatten(-1, (-1, self.value_dim))
        return o.flatten(-2)

    def init_transfer(self) -> None:
        """Taps that keep SiLU near its linear part, decays by dt_bias alone, beta one half."""
        self.small_taps()
        for m in (self.b_proj, self.a_proj, self.g_proj):
            if m is not None:
                nn.init.zeros_(m.weight)
        self.o_norm.init_weights()
        nn.init.zeros_(self.A_log)

    def start_decays(self, rates: Tensor) -> None:
        self.dt_bias.copy_(inverse_softplus(rates))

    def gate_to_fit(self) -> tuple[Tensor, float] | None:
        return None if self.g_proj is None else (self.g_proj.weight, inverse_silu(1.0))
