"""Linear attention with a feature map, without decay or gate (Katharopoulos et al. 2020, arXiv
2006.16236), in the shape of fla's `LinearAttention`.

    q, k = phi_q(W_q x), phi_k(W_k x);  v = W_v x
    S_t = S_{t-1} + k_t v_t^T
    out = W_o RMSNorm(S_t^T q_t)

The paper divides by q_t . sum_j k_j. That is one positive number per token and head, which the
RMSNorm takes out again, so it is left out (fla's do_feature_map_norm=False).
`config.linear_feature_map` names phi (mixers/feature_maps.py). With hedgehog the scale is F instead
of fla's F^-0.5, which is fla's layer with an eps smaller by F^3: there the first tokens' outputs
are so small that its eps of 1e-5 shrinks them, and the norm takes out no factor.
Check: `pytest tests/test_mixer_linear_attention.py`.
Shapes: B batch, T time, d hidden size, H heads, K key size, F feature size, V value size.
"""

from __future__ import annotations

from torch import Tensor

from config import ModelConfig
from layers import RMSNorm, SeqInfo, apply_rope
from mixers.base import LinearMixer
from mixers.feature_maps import feature_map
from ops.linear_attention import KERNELS, step_linear_attention


class LinearAttention(LinearMixer):
    """Parameter names are fla's (`fla.layers.LinearAttention`)."""

    name = "linear_attention"
    kernels = KERNELS
    fla_op = "linear_attention"
    step = staticmethod(step_linear_attention)
    kept = 7

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.add_heads(config)
        self.feature_map_q = feature_map(config.linear_feature_map, self.key_dim)
        self.feature_map_k = feature_map(config.linear_feature_map, self.key_dim)
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)
        self.features = self.state_key_dim(config)

    @classmethod
    def state_key_dim(cls, config: ModelConfig) -> int:
        doubled = config.linear_feature_map == "hedgehog"
        return config.linear_key_head_dim * (2 if doubled else 1)

    def recurrence_flops(self) -> int:
        return 2 * self.passes * self.num_heads * self.features * self.value_dim

    def init_weights(self) -> None:
        super().init_weights()
        self.feature_map_q.init_weights()
        self.feature_map_k.init_weights()

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        q, k, v = self.projected(x)
        if self.rope:
            q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        return {"q": self.feature_map_q(q), "k": self.feature_map_k(k), "v": v}, None, {}

    def options(self) -> dict:
        return {"scale": self.feature_map_q.scale}

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        return self.norm(o).flatten(-2)

    def init_transfer(self) -> None:
        """Feature maps and norm as from scratch: there is nothing else."""
        self.feature_map_q.init_weights()
        self.feature_map_k.init_weights()
        self.norm.init_weights()
