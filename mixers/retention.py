"""Multi-scale retention (RetNet, Sun et al. 2023, arXiv 2307.08621, eq. 6 and 8), in the shape of
fla's `MultiScaleRetention`.

    q, k = RoPE(W_q x), RoPE(W_k x);  v = W_v x
    S_t = gamma_h S_{t-1} + k_t v_t^T,   gamma_h = 1 - 2^(-5 - h),  h = 0, 1, ...
    out = W_o (RMSNorm(S_t^T q_t) * SiLU(W_g x))

The decay is fixed: head h forgets over 32 2^h tokens. q and k are always rotated, `linear_rope`
or not, by the model's own angles: fla's, whose base is 10000, where `rope_theta` is 10000 and
there is no `rope_scaling`. Lightning attention (Qin et al. 2024, arXiv 2401.04658) is the same
recurrence with other decays, ALiBi's slopes.
Check: `pytest tests/test_mixer_retention.py`.
Shapes: B batch, T time, d hidden size, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, UserError
from layers import RMSNorm, SeqInfo, apply_rope
from mixers.base import LinearMixer, inverse_silu
from ops.linear_attention import KERNELS, step_linear_attention


class Retention(LinearMixer):
    """Parameter names are fla's (`fla.layers.MultiScaleRetention`)."""

    name = "retention"
    kernels = KERNELS
    fla_op = "linear_attention"
    step = staticmethod(step_linear_attention)
    kept = 6

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if self.key_dim != config.head_dim:
            raise UserError(
                f"linear_key_head_dim: {self.key_dim} found, {self.name} rotates q and k and "
                f"expects head_dim {config.head_dim}"
            )
        self.add_heads(config)
        self.g_proj = nn.Linear(config.hidden_size, self.num_heads * self.value_dim, bias=False)
        self.g_norm_swish_gate = RMSNorm(self.value_dim, config.rms_norm_eps)

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        q, k, v = self.projected(x)
        q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        g = log_gamma(self.num_heads, v).expand(v.shape[:3])
        return {"q": q, "k": k, "v": v, "g": g}, None, {}

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        gate = F.silu(self.g_proj(x)).unflatten(-1, (-1, self.value_dim))
        return (self.g_norm_swish_gate(o) * gate).flatten(-2)

    def init_transfer(self) -> None:
        """Norm one; the gate is `calibrate`'s, the decay is what it is."""
        nn.init.zeros_(self.g_proj.weight)
        self.g_norm_swish_gate.init_weights()

    def gate_to_fit(self) -> tuple[Tensor, float]:
        return self.g_proj.weight, inverse_silu(1.0)


def log_gamma(heads: int, like: Tensor) -> Tensor:
    """log(1 - 2^(-5 - h)) [H] on `like`'s device, in float32, or float64 for float64. log1p keeps
    every digit, where 1 - 2^(-5 - h) itself is one in float32 from head 20 on."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    head = torch.arange(heads, dtype=dtype, device=like.device)
    return torch.log1p(-torch.exp2(-5 - head))
