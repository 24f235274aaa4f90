"""The teacher's softmax attention inside a sliding window, Hedgehog linear attention before it
(LoLCATs, Zhang et al. 2024, arXiv 2410.10254, section 3.3.1).

    q, k = RoPE(norm(W_q x)), RoPE(norm(W_k x));  v = W_v x;   norm: only with `qk_norm`
    out = W_o hedgehog_window(q, k, v),   gamma_h = sigmoid(window_factors_h)

with the two feature maps phi(x) = [softmax(x W), softmax(-x W)], W [K, F] per head, F = K, and
w = `linear_window` tokens (ops/hedgehog_window.py has the equation). No gate and no norm follow:
with a window as long as the context this is the softmax attention that it replaces, but for a
sink, which it has not. So RoPE is
always on, `linear_rope` or not, and the q/k-norms of a teacher stay norms, with their weights:
these cannot be folded into the projections, since the mean square is taken before the weight.
Check: `pytest tests/test_mixer_hedgehog_window.py`.
Shapes: B batch, T time, d hidden size, H heads, K key size, V value size, F features per sign.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import ModelConfig, Transfer, UserError
from layers import RMSNorm, SeqInfo, apply_rope
from mixers.base import LinearMixer, at_least_float32
from ops.attention_maps import split_rows
from ops.chunked import CHUNK
from ops.hedgehog_window import KERNELS, log_weights_hedgehog_window, step_hedgehog_window

# What a part alone is: gamma multiplied so that the other one's weights do not count beside it,
# unless, as before the first w tokens, there is nothing else.
BRANCHES = {"both": 1.0, "window": 1e30, "linear": 1e-30}


class HeadwiseMap(nn.Module):
    """The W of a Hedgehog map [H, K, F], one per head."""

    def __init__(self, heads: int, key_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, key_dim, key_dim))

    @torch.no_grad()
    def init_weights(self) -> None:
        """The identity; LoLCATs' code has it too, but its published configs start at random."""
        self.weight.copy_(torch.eye(self.weight.shape[-1]).expand_as(self.weight))


class HedgehogWindow(LinearMixer):
    """Parameters besides q, k, v, o: feature_map_q.weight, feature_map_k.weight [H, K, F],
    window_factors [H], and with `qk_norm` q_norm.weight, k_norm.weight [K]."""

    name = "hedgehog_window"
    kernels = KERNELS
    step = staticmethod(step_hedgehog_window)
    keeps_norms = True
    scales_o_proj = False
    has_maps = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if self.key_dim != config.head_dim:
            raise UserError(
                f"linear_key_head_dim: {self.key_dim} found, {self.name} rotates q and k and "
                f"expects head_dim {config.head_dim}"
            )
        self.window, self.branch = config.linear_window, "both"
        self.add_heads(config)
        self.q_norm = RMSNorm(self.key_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.key_dim, config.rms_norm_eps) if config.qk_norm else None
        self.feature_map_q = HeadwiseMap(self.num_heads, self.key_dim)
        self.feature_map_k = HeadwiseMap(self.num_heads, self.key_dim)
        self.window_factors = nn.Parameter(torch.empty(self.num_heads))

    def init_weights(self) -> None:
        """Identity maps, gamma = 1/2."""
        super().init_weights()
        self.init_transfer()

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        q, k, v = self.projected(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        return {"q": q, "k": k, "v": v}, None, {}

    def options(self) -> dict:
        gamma = at_least_float32(self.window_factors).sigmoid() * BRANCHES[self.branch]
        return {
            "map_q": self.feature_map_q.weight, "map_k": self.feature_map_k.weight,
            "gamma": gamma, "window": self.window,
        }  # fmt: skip

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        return o.flatten(-2)

    def log_maps(self, x: Tensor, seq: SeqInfo) -> Callable[[int, Tensor], Tensor]:
        """What `ops.attention_maps.map_cross_entropy` takes, for x [B, T, d]."""
        args, _, _ = self.inputs(x, seq, {}, False)
        q, k = (split_rows(args[name], seq.rows) for name in "qk")
        options = self.options()

        def weights(begin: int, mask: Tensor) -> Tensor:
            queries, keys = mask.shape[-2:]
            part = q[:, begin : begin + queries], k[:, :keys]
            return log_weights_hedgehog_window(*part, mask, **options)

        return weights

    def recurrence_flops(self) -> int:
        """Both signs of the features in the linear part, and the softmax of the window."""
        sizes = self.key_dim + self.value_dim
        linear = 4 * 2 * self.key_dim * self.value_dim
        return self.num_heads * (linear + 2 * sizes * self.window)

    def kept_more(self) -> int:
        """chunk_hedgehog_window keeps the window's weights and the maps' products in float32, and
        copies of the keys and values that a chunk may see."""
        k, v, near = self.key_dim, self.value_dim, CHUNK + self.window
        features = 2 * self.feature_map_q.weight.shape[-1]
        window = near * (2 + (k + v) / CHUNK)
        linear = features * (6 + v / CHUNK) + 2 * CHUNK
        return int(self.num_heads * (window + linear + 2 * k - 8 * v))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v right after projection, with the norms' weights as if folded in."""
        q, k, v = super().qkv(x)
        if self.q_norm is not None:
            q, k = q * self.q_norm.weight, k * self.k_norm.weight
        return q, k, v

    @torch.no_grad()
    def from_attention(self, attention: nn.Module, parts: Transfer | None = None) -> None:
        if (self.q_norm is None) != (attention.q_norm is None):
            raise ValueError(
                f"from_attention: qk_norm {self.q_norm is not None} found, the attention's "
                f"{attention.q_norm is not None} expected"
            )
        super().from_attention(attention, parts)
        if self.q_norm is not None:
            self.q_norm.weight.copy_(attention.q_norm.weight)
            self.k_norm.weight.copy_(attention.k_norm.weight)

    def init_transfer(self) -> None:
        """Identity maps, gamma = 1/2 (window_factors of 0; most of LoLCATs' configs have 1/10)."""
        self.feature_map_q.init_weights()
        self.feature_map_k.init_weights()
        nn.init.zeros_(self.window_factors)

    @torch.no_grad()
    def calibrate(
        self, x: Tensor, target: Tensor, seq: SeqInfo, parts: Transfer | None = None,
        distances: Tensor | None = None,
    ) -> float:  # fmt: skip
        """Nothing to fit, since the weights of the values sum to one as the teacher's do; the
        relative error to `target` [B, T, d]."""
        error = target - self(x, seq)
        return (error.float().norm() / target.float().norm()).item()
