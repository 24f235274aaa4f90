"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), in the shape of transformers'
`Qwen3_5GatedDeltaNet`, with the transfer of a softmax layer's weights.

    q, k, v = SiLU(conv(W x));  q, k L2-normalised;  beta = sigmoid(W_b x)
    g = -exp(A_log) softplus(W_a x + dt_bias)
    out = W_o (RMSNorm(gated_delta_rule(q, k, v, g, beta)) * SiLU(W_g x))

Check: `pytest tests/test_mixers.py`.
Shapes: B batch, T time, d hidden size, H query/key heads, J value heads, K key size, V value size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers import LayerCache, RMSNorm, SeqInfo, ShortConvolution, apply_rope
from ops.gated_delta_rule import KERNELS, step_gated_delta_rule
from ops.kernels import resolve_kernel

# SiLU(x) is near x / 2 for small x; the L2 norm (q, k) and the RMSNorm (v) take the scale out.
QK_TAP = 0.03
V_TAP = 0.05
GATE = 1.0  # the value that SiLU(W_g x) is fitted to
DECAY_TOKENS = (4.0, 256.0)  # e-folding times of the first and the last head


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension, in float32 at least."""
    h = x if x.dtype == torch.float64 else x.float()
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class GatedDeltaNet(nn.Module):
    """Takes the normed residual stream [B, T, d], returns the attention output [B, T, d]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, bias = config.hidden_size, config.linear_bias
        self.num_heads, self.num_value_heads = (
            config.linear_num_key_heads, config.linear_num_value_heads,
        )  # fmt: skip
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.rope, self.init_std = config.linear_rope, config.initializer_range
        self.kernel = "auto"
        keys, values = self.num_heads * self.key_dim, self.num_value_heads * self.value_dim
        self.q_proj = nn.Linear(d, keys, bias=bias)
        self.k_proj = nn.Linear(d, keys, bias=bias)
        self.v_proj = nn.Linear(d, values, bias=bias)
        self.a_proj = nn.Linear(d, self.num_value_heads, bias=False)
        self.b_proj = nn.Linear(d, self.num_value_heads, bias=False)
        self.g_proj = nn.Linear(d, values, bias=False)
        self.o_proj = nn.Linear(values, d, bias=False)
        self.q_conv1d = ShortConvolution(keys, config.linear_conv_kernel_dim)
        self.k_conv1d = ShortConvolution(keys, config.linear_conv_kernel_dim)
        self.v_conv1d = ShortConvolution(values, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads))
        self.o_norm = RMSNorm(self.value_dim, config.rms_norm_eps)

    def init_weights(self) -> None:
        """From scratch: fla's and mamba's ranges for A (1 to 16) and dt (1e-3 to 0.1)."""
        for m in (self.q_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj, self.g_proj,
                  self.o_proj):  # fmt: skip
            nn.init.normal_(m.weight, std=self.init_std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            conv.init_weights()
        self.o_norm.init_weights()
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.dt_bias.copy_(inverse_softplus(dt))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K] and v [B, T, J, V] right after projection (for the self-test)."""
        q = self.q_proj(x).unflatten(-1, (-1, self.key_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.key_dim))
        return q, k, self.v_proj(x).unflatten(-1, (-1, self.value_dim))

    def forward(self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None) -> Tensor:
        return self.o_proj(self.mix(x, seq, cache))

    def mix(self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None) -> Tensor:
        """Everything but o_proj: [B, T, J * V]."""
        held = cache.conv if cache is not None else {}
        # Positions cut the taps; a carried state already holds what came before.
        positions = seq.positions if seq.cu_seqlens is not None else None
        q, held_q = self.q_conv1d(self.q_proj(x), positions, held.get("q"))
        k, held_k = self.k_conv1d(self.k_proj(x), positions, held.get("k"))
        v, held_v = self.v_conv1d(self.v_proj(x), positions, held.get("v"))
        q = F.silu(q).unflatten(-1, (-1, self.key_dim))
        k = F.silu(k).unflatten(-1, (-1, self.key_dim))
        v = F.silu(v).unflatten(-1, (-1, self.value_dim))
        if self.rope:
            q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        q, k = l2norm(q), l2norm(k)
        groups = self.num_value_heads // self.num_heads
        if groups > 1:
            q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
        beta = self.b_proj(x).sigmoid()
        g = self.log_decay(x)
        kernel = self.kernel  # the trainer has resolved it; a compiled block cannot
        if kernel == "auto":
            kernel = resolve_kernel(kernel, x.device)
        if cache is not None and cache.state is not None and x.shape[1] == 1:
            o, state = step_gated_delta_rule(
                q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], initial_state=cache.state
            )
            o = o[:, None]
        else:
            rows = {"rows": seq.rows} if kernel == "chunk" else {}
            o, state = KERNELS[kernel](
                q, k, v, g, beta,
                initial_state=None if cache is None else cache.state,
                output_final_state=cache is not None, cu_seqlens=seq.cu_seqlens, **rows,
            )  # fmt: skip
        if cache is not None:
            cache.conv = {"q": held_q, "k": held_k, "v": held_v}
            cache.state = state
            cache.length += x.shape[1]
        gate = F.silu(self.g_proj(x)).unflatten(-1, (-1, self.value_dim))
        return (self.o_norm(o) * gate).flatten(-2)

    def log_decay(self, x: Tensor) -> Tensor:
        """g [B, T, J] <= 0, in float32 at least: bfloat16 has no digits left near a decay of 1."""
        a = self.a_proj(x)
        a = a if a.dtype == torch.float64 else a.float()
        return -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))

    # ---- transfer from softmax attention

    @torch.no_grad()
    def from_attention(self, attention: nn.Module) -> None:
        """Take over q, k, v, o of a softmax `model.Attention` with the same query heads and head
        size. KV heads are expanded head by head, q/k-norm weights folded into projection rows;
        the taps keep SiLU near its linear part; decays are spread; beta starts at one half.
        The gate and the output scale need data: `calibrate`.
        """
        heads, size = attention.num_heads, attention.head_dim
        if (heads, size, size) != (self.num_value_heads, self.key_dim, self.value_dim):
            raise ValueError(
                f"from_attention: linear heads {self.num_value_heads} x {self.key_dim} found, "
                f"the attention's {heads} x {size} expected"
            )
        groups = heads // attention.num_kv_heads

        def rows(linear: nn.Linear, repeat: int, norm: nn.Module | None) -> tuple:
            weight = linear.weight.float().unflatten(0, (-1, size))  # [heads, size, d]
            bias = None if linear.bias is None else linear.bias.float().unflatten(0, (-1, size))
            if norm is not None:
                weight = weight * norm.weight.float()[:, None]
                bias = None if bias is None else bias * norm.weight.float()
            weight = weight.repeat_interleave(repeat, 0).flatten(0, 1)
            bias = None if bias is None else bias.repeat_interleave(repeat, 0).flatten()
            return weight, bias

        for mine, theirs, repeat, norm in (
            (self.q_proj, attention.q_proj, 1, attention.q_norm),
            (self.k_proj, attention.k_proj, groups, attention.k_norm),
            (self.v_proj, attention.v_proj, groups, None),
        ):
            weight, bias = rows(theirs, repeat, norm)
            mine.weight.copy_(weight)
            if bias is not None:
                mine.bias.copy_(bias)
            elif mine.bias is not None:
                nn.init.zeros_(mine.bias)
        self.o_proj.weight.copy_(attention.o_proj.weight)
        for conv, tap in ((self.q_conv1d, QK_TAP), (self.k_conv1d, QK_TAP), (self.v_conv1d, V_TAP)):
            nn.init.zeros_(conv.weight)
            conv.weight[:, 0, -1] = tap
        nn.init.zeros_(self.b_proj.weight)
        nn.init.zeros_(self.a_proj.weight)
        nn.init.zeros_(self.g_proj.weight)
        self.o_norm.init_weights()
        times = torch.logspace(*(math.log10(t) for t in DECAY_TOKENS), self.num_value_heads)
        nn.init.zeros_(self.A_log)
        self.dt_bias.copy_(inverse_softplus(1.0 / times))

    @torch.no_grad()
    def calibrate(self, x: Tensor, target: Tensor, seq: SeqInfo) -> float:
        """Fit what needs data: `g_proj` to a constant gate by least squares, and one scale per
        head, folded into o_proj's columns, so that the output is nearest to `target`.

        x, target [B, T, d]: the teacher's input to this layer and its attention output. Returns
        the relative error ||target - out|| / ||target|| afterwards.
        """
        with torch.autocast(x.device.type, enabled=False):
            flat = x.flatten(0, 1).float()
            gram = flat.T @ flat
            gram.diagonal().add_(1e-3 * gram.diagonal().mean())
            row = torch.linalg.solve(gram, flat.sum(0) * inverse_silu(GATE))
            self.g_proj.weight.copy_(row.expand_as(self.g_proj.weight))

        mixed = self.mix(x, seq).flatten(0, 1).float().unflatten(-1, (-1, self.value_dim))
        with torch.autocast(x.device.type, enabled=False):
            columns = self.o_proj.weight.float().unflatten(1, (-1, self.value_dim))  # [d, J, V]
            parts = torch.einsum("njv,djv->njd", mixed, columns)  # what each head adds
            goal = target.flatten(0, 1).float()
            gram = torch.einsum("njd,nid->ji", parts, parts)
            gram.diagonal().add_(1e-3 * gram.diagonal().mean())
            scale = torch.linalg.solve(gram, torch.einsum("njd,nd->j", parts, goal))
            # A head whose fit is nil or negative still has to be able to learn.
            middle = scale.clamp(min=0).mean()
            scale = scale.clamp(0.1 * middle, 10 * middle)
            self.o_proj.weight.copy_((columns * scale[None, :, None]).flatten(1))
            error = goal - torch.einsum("njd,j->nd", parts, scale)
            return (error.norm() / goal.norm()).item()


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))


def inverse_silu(y: float) -> float:
    """x > 0 with x sigmoid(x) = y > 0, by Newton's method."""
    x = y + 0.5
    for _ in range(20):
        s = 1 / (1 + math.exp(-x))
        x -= (x * s - y) / (s * (1 + x * (1 - s)))
    return x
