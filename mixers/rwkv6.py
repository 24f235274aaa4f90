"""RWKV-6 "Finch" time mixing (Peng et al. 2024, arXiv 2404.05892), as fla defines it.

Every projection reads its own mix of the token and the one before it, x'_t = x_{t-1}:

    lerp(x, m) = x + (x' - x) * m
    m_r, m_w, m_k, m_v, m_g = W_2 tanh(W_1 lerp(x, mu)) + x_bias        (five maps of rank 32)
    r, k, v = W lerp(x, m);  w = -exp(B tanh(A lerp(x, m_w)) + b)       (A, B of rank 64)
    out = W_o (GroupNorm(rwkv6(r, k, v, w, bonus)) * SiLU(W_g lerp(x, m_g)))

with scale 1 and one group per head.
Check: `pytest tests/test_mixer_rwkv6.py tests/test_mixers.py -k rwkv6`.
Shapes: B batch, T time, d hidden size, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers import SeqInfo, apply_rope, last_tokens, token_shift
from mixers.base import LinearMixer, at_least_float32, inverse_silu
from ops.rwkv6 import KERNELS, step_rwkv6

MIX_RANK = 32  # of each of the five data-dependent mixes
DECAY_RANK = 64  # of the data-dependent decay
NORM_EPS = 1e-5  # fla's default


class Map(nn.Module):
    """A linear map under the name `linear`. It is given the tokens already mixed."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class LerpMap(Map):
    """A map with a learned mix of its own, mu [d]."""

    def __init__(self, linear: nn.Module, size: int):
        super().__init__(linear)
        self.mu = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        """delta [B, T, d]: the token before minus x."""
        return self.linear(x + delta * self.mu.to(x.dtype))


class LowRank(nn.Module):
    """B tanh(A x) + b, the result and its bias in float32 at least."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(inputs, rank, bias=False), nn.Tanh(), nn.Linear(rank, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        down, tanh, up = self.lora
        y = at_least_float32(F.linear(tanh(down(x)), up.weight))
        return y + up.bias.to(y.dtype)


class HeadNorm(nn.Module):
    """Mean zero and variance one within each head, in float32; then a weight and a bias per
    channel: GroupNorm with one group per head, token by token."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, o: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, H * V]."""
        h = F.layer_norm(at_least_float32(o), o.shape[-1:], eps=self.eps).flatten(-2)
        return (h * self.weight.to(h.dtype) + self.bias.to(h.dtype)).to(o.dtype)


class RWKV6(LinearMixer):
    """Parameter names are fla's (`fla.layers.RWKV6Attention`)."""

    name = "rwkv6"
    kernels = KERNELS
    fla_op = "rwkv6"
    step = staticmethod(step_rwkv6)
    kept = 22
    projections = {"q": "r_proj.linear", "k": "k_proj.linear", "v": "v_proj.linear", "o": "o_proj"}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        d, bias = config.hidden_size, config.linear_bias
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        self.x_proj = nn.Sequential(
            LerpMap(nn.Linear(d, 5 * MIX_RANK, bias=False), d),
            nn.Tanh(),
            nn.Linear(5 * MIX_RANK, d, bias=False),
        )
        self.x_bias = nn.Parameter(torch.empty(5, d))
        self.r_proj = Map(nn.Linear(d, keys, bias=bias))
        self.w_proj = Map(LowRank(d, keys, DECAY_RANK))
        self.k_proj = Map(nn.Linear(d, keys, bias=bias))
        self.v_proj = Map(nn.Linear(d, values, bias=bias))
        self.g_proj = Map(nn.Linear(d, values, bias=False))
        self.bonus = nn.Parameter(torch.empty(self.num_heads, self.key_dim))
        self.g_norm = HeadNorm(values, NORM_EPS)
        self.o_proj = nn.Linear(values, d, bias=False)

    def init_weights(self) -> None:
        """Mixes, bonus and the decay's dependence on x start at zero, as in fla; the decay itself
        at e-folding times of e to e^6 tokens, Finch's range (fla's zero bias would forget all
        but the last token or two)."""
        super().init_weights()
        for p in (self.x_proj[0].mu, self.x_bias, self.bonus):
            nn.init.zeros_(p)
        self.g_norm.init_weights()
        down, _, up = self.w_proj.linear.lora
        nn.init.zeros_(down.weight)
        with torch.no_grad():
            up.bias.copy_(torch.linspace(-6, -1, up.bias.numel(), device=up.bias.device))

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        last = held.get("x")
        delta = token_shift(x, seq, last) - x
        kept = {"x": last_tokens(x, 1, seq, last)} if keep else {}
        r, w, k, v, g = (x + delta * m for m in self.mixes(x, delta).unbind(-2))
        r, k = self.heads(self.r_proj(r)), self.heads(self.k_proj(k))
        v = self.v_proj(v).unflatten(-1, (-1, self.value_dim))
        if self.rope:
            r, k = apply_rope(r, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        w = -self.heads(self.w_proj(w)).exp()
        return {"r": r, "k": k, "v": v, "w": w}, g, kept

    def mixes(self, x: Tensor, delta: Tensor) -> Tensor:
        """How much of the token before each of r, w, k, v, g reads: [B, T, 5, d]."""
        lerp, tanh, up = self.x_proj
        low = tanh(lerp(x, delta)).unflatten(-1, (5, -1))  # [B, T, 5, MIX_RANK]
        weight = up.weight.unflatten(1, (5, -1))  # [d, 5, MIX_RANK]
        mixes = torch.einsum("btnr,dnr->btnd", low, weight)
        return (mixes + self.x_bias.to(mixes.dtype)).to(x.dtype)

    def options(self) -> dict:
        return {"u": self.bonus, "scale": 1.0}

    def finish(self, o: Tensor, x: Tensor, aux: Tensor) -> Tensor:
        """aux: the gate's mix of tokens [B, T, d]."""
        return self.g_norm(o) * F.silu(self.g_proj(aux))

    def qkv_weights(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        layers = {"q": self.r_proj.linear, "k": self.k_proj.linear, "v": self.v_proj.linear}
        return {what: (layer.weight, layer.bias) for what, layer in layers.items()}

    def init_transfer(self) -> None:
        """Every mix is the token itself, the bonus one. Of each
        low-rank pair the first matrix is random, so that the second, zero, learns at once."""
        lerp, _, mix = self.x_proj
        down, _, up = self.w_proj.linear.lora
        for p in (lerp.mu, mix.weight, self.x_bias, up.weight, self.g_proj.linear.weight):
            nn.init.zeros_(p)
        for p in (lerp.linear.weight, down.weight):
            nn.init.normal_(p, std=self.init_std)
        nn.init.ones_(self.bonus)
        self.g_norm.init_weights()

    def start_decays(self, rates: Tensor) -> None:
        up = self.w_proj.linear.lora[2]
        up.bias.copy_(rates.repeat_interleave(self.key_dim).log())

    def gate_to_fit(self) -> tuple[Tensor, float]:
        return self.g_proj.linear.weight, inverse_silu(1.0)
