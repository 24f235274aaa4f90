"""DeltaNet (Yang et al. 2024, arXiv 2406.06484), in the shape of fla's `DeltaNet` at its defaults.

    q, k, v = SiLU(conv(W x));  q, k L2-normalised;  beta = sigmoid(W_b x)
    out = W_o RMSNorm(delta_rule(q, k, v, beta))

No decay and no output gate: the state forgets only what is written over.
Check: `pytest tests/test_mixers.py tests/test_mixer_deltanet.py -k deltanet`.
Shapes: B batch, T time, H heads, K key size, V value size.
"""

from __future__ import annotations

from torch import Tensor, nn

from config import ModelConfig
from layers import RMSNorm, SeqInfo, apply_rope, project_apart
from mixers.base import LinearMixer, l2norm
from ops.delta_rule import KERNELS, step_delta_rule


class DeltaNet(LinearMixer):
    """Parameter names are fla's (`fla.layers.DeltaNet`)."""

    name = "deltanet"
    kernels = KERNELS
    fla_op = "delta_rule"
    step = staticmethod(step_delta_rule)
    passes = 3  # S^T k, k u^T, S^T q

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.add_heads(config)
        self.b_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.add_convolutions(config)
        self.o_norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        q, k, v, kept = self.convolved(x, seq, held, keep)
        if self.rope:
            q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        (b,) = project_apart(x, self.b_proj)
        beta = b.sigmoid()  # [B, T, H]
        return {"q": l2norm(q), "k": l2norm(k), "v": v, "beta": beta}, None, kept

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        return self.o_norm(o).flatten(-2)

    def init_transfer(self) -> None:
        """Taps that keep SiLU near its linear part, beta one half."""
        self.small_taps()
        nn.init.zeros_(self.b_proj.weight)
        self.o_norm.init_weights()
