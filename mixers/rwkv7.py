"""RWKV-7's time mixing (Peng et al. 2025, arXiv 2503.14456), with fla's parameters.

    x_i = x + mu_i (shifted x - x) for i in r, w, k, v, a, g
    r, k, v = W_r x_r, W_k x_k, W_v x_v
    log decay w = -e^-0.5 sigmoid(lora_w(x_w))        lora_w: tanh inside, a bias
    rate a = sigmoid(lora_a(x_a))                     lora_a: nothing inside, a bias
    gate g = lora_g(x_g)                              lora_g: sigmoid inside, no bias
    kappa = normalised k * k_k;  k' = k (1 + (a - 1) k_a)
    o = rwkv7(r, w, k', v, -kappa, kappa * a)
    out = W_o ((GroupNorm(o) + (r . r_k k') v) * g)

It is fla's `RWKV7Attention` with layer_idx = 0, the one without a value residual: in RWKV-7 every
later layer mixes the first layer's values into its own, but a converted layer has to give its
output from its own input alone, as the softmax layer did.
Check: `pytest tests/test_mixer_rwkv7.py`, `pytest tests/test_mixers.py -k rwkv7`.
Shapes: B batch, T time, d hidden size, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers import PROJECTIONS, SeqInfo, apply_rope, last_tokens, token_shift
from mixers.base import LinearMixer, at_least_float32
from ops.fla_kernels import RWKV7_LOWER_BOUND
from ops.rwkv7 import KERNELS, step_rwkv7

MIXED = "rwkvag"  # what has its own mixture of this token and the one before


def low_rank(factor: float, hidden_size: int) -> int:
    """factor sqrt(hidden_size), rounded to 32s, at least 32: fla's default ranks."""
    return max(32, round(factor * hidden_size**0.5 / 32) * 32)


class LoRA(nn.Module):
    """W2 f(W1 x) (+ bias), with fla's names: `lora.0` is W1, `lora.2` is W2. The bias is added in
    float32 at least: of a slow head's decay bfloat16 would keep two digits."""

    def __init__(self, d: int, out: int, rank: int, inner: nn.Module, bias: bool = True):
        super().__init__()
        down, up = nn.Linear(d, rank, bias=False), nn.Linear(rank, out, bias=bias)
        self.lora = nn.Sequential(down, inner, up)

    def start(self, bias: Tensor | float = 0.0) -> None:
        """The same output for every x, `bias`, from which W1 learns at once: W1 is zero and W2
        orthogonal times 0.1 (RWKV's and fla's start)."""
        down, up = self.lora[0].weight, self.lora[2].weight
        nn.init.zeros_(down)
        nn.init.orthogonal_(up, gain=0.1 * max(1.0, (up.shape[1] / up.shape[0]) ** 0.5))
        if self.lora[2].bias is not None:
            with torch.no_grad():
                self.lora[2].bias.copy_(torch.as_tensor(bias).expand_as(self.lora[2].bias))

    def forward(self, x: Tensor) -> Tensor:
        down, inner, up = self.lora
        low = inner(down(x))
        if up.bias is None:
            return up(low)
        y = at_least_float32(F.linear(low, up.weight))
        return y + up.bias.to(y.dtype)


class RWKV7(LinearMixer):
    """Parameter names are fla's (`fla.layers.RWKV7Attention`). H times K need not be d here."""

    name = "rwkv7"
    kernels = KERNELS
    fla_op = "rwkv7"
    step = staticmethod(step_rwkv7)
    passes = 4  # a^T S, b (a^T S), k v^T, S^T r
    kept = 22
    projections = {**PROJECTIONS, "q": "r_proj"}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        d, heads, bias = config.hidden_size, self.num_heads, config.linear_bias
        keys, values = heads * self.key_dim, heads * self.value_dim
        for i in MIXED:
            self.register_parameter(f"x_{i}", nn.Parameter(torch.empty(1, 1, d)))
        self.k_k = nn.Parameter(torch.empty(keys))
        self.k_a = nn.Parameter(torch.empty(keys))
        self.r_k = nn.Parameter(torch.empty(heads, self.key_dim))
        self.r_proj = nn.Linear(d, keys, bias=bias)
        self.k_proj = nn.Linear(d, keys, bias=bias)
        self.v_proj = nn.Linear(d, values, bias=bias)
        self.o_proj = nn.Linear(values, d, bias=False)
        rank = low_rank(2.5 * self.key_dim / 64, d)
        self.w_lora = LoRA(d, keys, rank, nn.Tanh())
        self.a_lora = LoRA(d, keys, rank, nn.Identity())
        self.g_lora = LoRA(d, values, low_rank(5, d), nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(heads, values, eps=self.key_dim * self.eps)

    def init_weights(self) -> None:
        """fla's for the first of many layers: mixtures, decays and rates spread over channels; but
        g_norm is one and o_proj a small normal, as in the other mixers."""
        super().init_weights()
        with torch.no_grad():
            channel = torch.arange(self.hidden_size, device=self.x_r.device) / self.hidden_size
            for i, power in zip(MIXED, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
                getattr(self, f"x_{i}").copy_(1 - channel**power)
            inside = torch.linspace(-1, 1, self.key_dim, device=self.k_k.device)
            zigzag = (inside * inside.abs()).repeat(self.num_heads)
            ramp = torch.linspace(-0.5, 0.5, self.k_k.numel(), device=self.k_k.device)
            self.k_k.copy_(0.71 - 0.1 * ramp)
            self.k_a.fill_(1.02)
            self.r_k.fill_(-0.04)
            self.w_lora.start(6 * ramp - 2.5 + 2.5 * zigzag)  # from -5.5 to 0.5 over the channels
            self.a_lora.start(-0.19 + 0.3 * zigzag + 0.4 * ramp)
            self.g_lora.start()
            self._norm_to_one()
            for proj, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
                nn.init.orthogonal_(proj.weight, gain=gain)

    def _norm_to_one(self) -> None:
        nn.init.ones_(self.g_norm.weight)
        nn.init.zeros_(self.g_norm.bias)

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        kept = {"x": last_tokens(x, 1, seq, held.get("x"))} if keep else {}
        change = token_shift(x, seq, held.get("x")) - x
        mix = {i: x + change * getattr(self, f"x_{i}").to(x.dtype) for i in MIXED}
        r, k = self.heads(self.r_proj(mix["r"])), self.heads(self.k_proj(mix["k"]))
        v = self.v_proj(mix["v"]).unflatten(-1, (-1, self.value_dim))
        if self.rope:
            r, k = apply_rope(r, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        w = RWKV7_LOWER_BOUND * self.w_lora(mix["w"]).sigmoid()
        rate = self.heads(self.a_lora(mix["a"]).sigmoid()).to(k.dtype)
        k_k, k_a = (p.to(k.dtype).view(-1, self.key_dim) for p in (self.k_k, self.k_a))
        kappa = F.normalize(at_least_float32(k * k_k), dim=-1).to(k.dtype)
        k = k * (1 + (rate - 1) * k_a)
        args = {"r": r, "w": self.heads(w), "k": k, "v": v, "a": -kappa, "b": kappa * rate}
        return args, (r, k, v, self.g_lora(mix["g"])), kept

    def options(self) -> dict:
        return {"scale": 1.0}

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        r, k, v, gate = aux
        norm = self.g_norm
        flat = at_least_float32(o).flatten(0, 1).flatten(1)  # [B T, H V]: each token by itself
        weight, bias = norm.weight.to(flat.dtype), norm.bias.to(flat.dtype)
        flat = F.group_norm(flat, norm.num_groups, weight, bias, norm.eps)
        o = flat.view(o.shape).to(o.dtype)
        o = o + (r * k * self.r_k.to(r.dtype)).sum(-1, keepdim=True) * v
        return o.flatten(-2) * gate

    # ---- transfer from softmax attention

    def qkv_weights(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        layers = {"q": self.r_proj, "k": self.k_proj, "v": self.v_proj}
        return {what: (layer.weight, layer.bias) for what, layer in layers.items()}

    def init_transfer(self) -> None:
        """No token shift, rate one half, no correction, a gate of one."""
        for i in MIXED:
            nn.init.zeros_(getattr(self, f"x_{i}"))
        nn.init.ones_(self.k_k)
        nn.init.zeros_(self.k_a)
        nn.init.zeros_(self.r_k)
        self.w_lora.start()
        self.a_lora.start()
        self._norm_to_one()
        # Before the gate's W2 stands sigmoid(0) = 1/2 throughout, so rows that sum to 2 give one.
        # They must differ within a row: equal inner channels would get equal gradients for ever.
        self.g_lora.start()
        up = self.g_lora.lora[2].weight
        up.add_(2 / up.shape[1] - up.mean(1, keepdim=True))

    def start_decays(self, rates: Tensor) -> None:
        share = (rates / -RWKV7_LOWER_BOUND).repeat_interleave(self.key_dim)
        self.w_lora.lora[2].bias.copy_(torch.logit(share))
