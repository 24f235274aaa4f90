"""What the model and the mixers share: RMSNorm, RoPE, short convolution, softmax attention.

Check: `pytest tests/test_layers.py`.
Shapes: B batch, T time, S keys, H query heads, G key/value heads, D head size, W taps.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import LayerCache
from config import ModelConfig
from ops.block_ops import qk_rope
from ops.cudnn_varlen import cudnn_varlen, has_cudnn_frontend
from ops.short_conv import KERNELS as SHORT_CONVOLUTIONS

PROJECTIONS = {what: f"{what}_proj" for what in "qkvo"}  # the Linear that makes it, in attention


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32, over the last dimension (Zhang 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = x.double() if x.dtype == torch.float64 else x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight.to(h.dtype)).to(x.dtype)


def project(x: Tensor, *linears: nn.Linear) -> Tensor | None:
    """x [..., d] through several Linears at once, their outputs joined; None where they should run
    one by one. Only in a compiled graph that casts weights for autocast: there the casts can fill
    one matrix instead of several, and joining costs nothing."""
    device, weights = x.device.type, [linear.weight for linear in linears]
    plain = all(type(linear) is nn.Linear for linear in linears)
    if not plain or not torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if any(w.dtype == dtype for w in weights) or len(biases) not in (0, len(linears)):
        return None
    bias = torch.cat([b.to(dtype) for b in biases]) if biases else None
    rows = sum(len(w) for w in weights)
    parts = [w.to(dtype) for w in weights]
    if rows % 8 and bias is None:  # rows of 16 bytes, without which a matmul takes the slowest way
        parts.append(weights[0].new_zeros(-rows % 64, x.shape[-1], dtype=dtype))
    return F.linear(x, torch.cat(parts), bias)[..., :rows]


def project_apart(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """x through each Linear, by `project` where that can."""
    joint = project(x, *linears)
    if joint is None:
        return tuple(linear(x) for linear in linears)
    return joint.split([len(linear.weight) for linear in linears], -1)


# ---- positions


class SeqInfo(NamedTuple):
    """Where every token stands; made once per forward, read by every block."""

    positions: Tensor  # [B, T] int64, restarting in every document
    cos: Tensor  # [B, T, 1, D / 2]
    sin: Tensor
    cu_seqlens: Tensor | None = None  # [N + 1] int32 document bounds when B = 1 is packed
    max_seqlen: int = 0  # an upper bound of the document length
    lengths: tuple[int, ...] | None = None  # document lengths on the host (eager CPU only)
    mask: Tensor | None = None  # [T, T] bool, same document, where a kernel needs it
    rows: int = 1  # packed rows of equal length, each of which begins a document
    past: Tensor | None = None  # [B] tokens already in the cache; None: it is empty
    held: int = 0  # an upper bound of `past`, known on the host
    even: bool = True  # all of `past` are equal


def rope_frequencies(config: ModelConfig, device=None) -> Tensor:
    """Angular frequencies [D / 2] float32, with llama3 scaling (Llama 3.1's `apply_scaling`)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / config.rope_theta ** (half / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type", "default") == "llama3":
        factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = old * freqs / (2 * math.pi)  # rotations within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = freqs / factor * (1 - smooth) + freqs * smooth
    return freqs


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, D], halves paired as in Hugging Face's Llama."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# ---- short convolution


def last_tokens(x: Tensor, count: int, seq: SeqInfo, held: Tensor | None) -> Tensor:
    """The last `count` inputs [B, count, C] of every sequence, zeros before its first: of the N
    documents where x [1, T, C] is packed, else of [held, x]. A copy: a view would hold on to the
    whole of a long prompt."""
    if seq.cu_seqlens is None:
        if held is None:
            held = x.new_zeros(x.shape[0], count, x.shape[2])
        return torch.cat([held.to(x.dtype), x], 1)[:, x.shape[1] :].clone()
    ends = seq.cu_seqlens[1:, None].long()
    index = ends + torch.arange(-count, 0, device=x.device)  # [N, count]
    inside = index >= seq.cu_seqlens[:-1, None]
    return x[0, index.clamp(min=0)] * inside.unsqueeze(-1)


def token_shift(x: Tensor, seq: SeqInfo, held: Tensor | None = None) -> Tensor:
    """x [B, T, C] moved by one token: zero at the start of every document, `held` [B, 1, C] (the
    last input so far) before a continued one."""
    if held is None:
        held = x.new_zeros(x.shape[0], 1, x.shape[2])
    moved = torch.cat([held.to(x.dtype), x[:, :-1]], 1)
    return moved if seq.cu_seqlens is None else moved * (seq.positions > 0).unsqueeze(-1)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU (ops/short_conv.py): [B, T, C] -> [B, T, C]."""

    def __init__(self, channels: int, taps: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.kernel = "plain"  # `hybrid_layers.set_kernels` sets triton

    def init_weights(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, seq: SeqInfo, held: Tensor | None = None) -> Tensor:
        """held [B, W - 1, C]: the inputs before x (see `last_tokens`)."""
        positions = None if seq.cu_seqlens is None else seq.positions
        return SHORT_CONVOLUTIONS[self.kernel](x, self.weight, self.bias, positions, held)


# ---- softmax attention


@functools.cache
def _probe() -> tuple[bool, tuple[str, ...]]:
    """Whether flash-attn is installed, and the parameters of this PyTorch's varlen_attn, which
    changed between 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    installed = importlib.util.find_spec("flash_attn") is not None
    return installed, tuple(inspect.signature(varlen_attn).parameters)


# Compiled blocks take the answers as constants; tracing through a cache warns.
@torch.compiler.assume_constant_result
def has_flash_attn() -> bool:
    """Whether the flash-attn package is installed."""
    return _probe()[0]


@torch.compiler.assume_constant_result
def prefers_cudnn() -> bool:
    """Whether packed rows go to cuDNN: it is the fastest from Hopper on."""
    return has_cudnn_frontend() and torch.cuda.get_device_capability() >= (9, 0)


@torch.compiler.assume_constant_result
def before_ampere() -> bool:
    """Whether this GPU is too old for the flash kernels, and for bfloat16 in hardware."""
    return torch.cuda.get_device_capability() < (8, 0)


@torch.compiler.assume_constant_result
def varlen_takes(parameter: str) -> bool:
    """Whether varlen_attn has this parameter."""
    return parameter in _probe()[1]


def attention_kernel(device: torch.device, dtype: torch.dtype, *, packed: bool, sink: bool,
                     compiled: bool = False) -> str:  # fmt: skip
    """Name of the softmax-attention kernel for these conditions; the trainer prints it.

    math: explicit scores (the sink needs their gradient); segments: SDPA per document (CPU);
    masked: SDPA under a [T, T] mask; varlen: PyTorch's varlen_attn; flash: flash-attn's varlen;
    cudnn: ops/cudnn_varlen.py (Hopper and later); sdpa: unpacked rows, cuDNN first on Hopper.
    """
    if sink:
        return "math"
    if not packed:
        return "sdpa"
    if device.type == "cpu" and not compiled:
        return "segments"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not before_ampere():
        if prefers_cudnn():
            return "cudnn"
        return "flash" if has_flash_attn() else "varlen"
    return "masked"


def sdpa_priority(device: torch.device):
    """Context in which SDPA tries cuDNN first: on Hopper 1.7x the default flash kernel."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # fmt: skip
    return sdpa_kernel(order, set_priority=True)


def causal_mask(queries: int, keys: int, window: int, device) -> Tensor:
    """[queries, keys] bool for queries that are the last of `keys` tokens. The window counts the
    token itself, as Hugging Face's does."""
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    col = torch.arange(keys, device=device)[None]
    mask = col <= row
    return mask & (col > row - window) if window else mask


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq: SeqInfo,
    *,
    window: int = 0,
    sink: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Causal attention of a sequence, or of packed ones, to itself, with scale D^-0.5.
    q [B, T, H, D], k and v [B, T, G, D]; window 0 = full; sink [H] logits. Returns [B, T, H, D]."""
    packed = seq.cu_seqlens is not None
    kernel = attention_kernel(
        q.device, q.dtype, packed=packed, sink=sink is not None, compiled=compiled
    )
    if kernel == "cudnn":
        return cudnn_varlen(q[0], k[0], v[0], seq.cu_seqlens, seq.max_seqlen, window)[None]
    if kernel in ("flash", "varlen"):
        return _varlen(kernel, q, k, v, seq, window)
    length = q.shape[1]
    if kernel == "math":
        mask = causal_mask(length, length, window, q.device)
        return explicit_attention(q, k, v, mask & seq.mask if packed else mask, sink)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
    if kernel == "segments":
        parts = [
            _sdpa(a, b, c, window)
            for a, b, c in zip(*(x.split(seq.lengths, 2) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(parts, 2).transpose(1, 2)
    if kernel == "sdpa":
        return _sdpa(q, k, v, window).transpose(1, 2)
    mask = causal_mask(length, length, window, q.device) & seq.mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None = None
) -> Tensor:
    """Attention through explicit scores: for decoding (each key and value is read once, for all
    query heads of its group) and for sinks, whose logit needs a gradient. q [B, T, H, D], k and v
    [B, S, G, D], mask [T, S] or [B, T, S], sink [H] -> [B, T, H, D]."""
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R T, D]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, G, S, D]
    scores = q @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * size**-0.5
    scores = scores.unflatten(2, (-1, length))  # [B, G, R, T, S]
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[None]
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    if sink is None:
        weights = scores.softmax(-1)
    else:
        column = sink.to(scores.dtype).view(1, groups, -1, 1, 1)
        column = column.expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]  # the sink has no value
    out = weights.flatten(2, 3).to(v.dtype) @ v  # [B, G, R T, D]
    out = out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, size)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None
) -> Tensor:
    """Attention to a cache's keys and values, as `LayerCache.append` returns them."""
    if q.shape[1] == 1 or sink is not None:
        return explicit_attention(q, k, v, mask, sink)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None],
        enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [B, H, T, D], k and v [B, G, T, D]."""
    length = q.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if window and length > window:
        mask = causal_mask(length, length, window, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=gqa)


def _varlen(kernel: str, q: Tensor, k: Tensor, v: Tensor, seq: SeqInfo, window: int) -> Tensor:
    bounds, longest = seq.cu_seqlens, seq.max_seqlen
    left = window - 1 if window else -1
    q, k, v = q[0], k[0], v[0]
    if kernel == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, causal=True, window_size=(left, 0)
        )[None]
    from torch.nn.attention.varlen import varlen_attn

    extra = {}
    if varlen_takes("enable_gqa"):
        extra["enable_gqa"] = True
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if varlen_takes("window_size"):
        extra["window_size"] = (left, 0)
    elif window:
        raise RuntimeError("sliding_attention on packed rows needs torch >= 2.11 or flash-attn")
    else:
        extra["is_causal"] = True
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **extra)[None]


class Attention(nn.Module):
    """Causal softmax attention with GQA; optional q/k-norm, biases, window and sink."""

    projections = PROJECTIONS

    def __init__(self, config: ModelConfig, window: int):
        super().__init__()
        d, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window, self.compiled = size, window, False
        self.q_proj = nn.Linear(d, self.num_heads * size, bias=bias)
        self.k_proj = nn.Linear(d, self.num_kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(d, self.num_kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * size, d, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        sink = config.attention_sink
        self.sink = nn.Parameter(torch.empty(self.num_heads)) if sink else None

    def rotated(self, x: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D] and k [B, T, G, D], normed and rotated, and v [B, T, G, D]."""
        joint = project(x, self.q_proj, self.k_proj, self.v_proj)
        if joint is not None:
            weights, eps = (None, None), 0.0
            if self.q_norm is not None:
                weights, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
            return qk_rope(
                joint, seq.cos, seq.sin, *weights, self.num_heads, self.num_kv_heads, eps
            )
        q, k, v = self.project(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin), v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k and v [B, T, G, D] right after projection."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))

    @torch.no_grad()
    def distances(self, x: Tensor, seq: SeqInfo) -> Tensor:
        """How far back each head looks [H], in tokens: the e-folding time of the exponential whose
        median is that of the head's attention over distance. A document's first token, on which
        heads rest that look at nothing, does not count. x [B, T, d]; no cache."""
        q, k, _ = self.rotated(x, seq)
        length, device = x.shape[1], x.device
        mask = causal_mask(length, length, self.window, device)
        start = torch.arange(length, device=device) - seq.positions  # [B, T]: of its document
        mask = mask & (start[:, :, None] == start[:, None, :])
        back = (seq.positions[:, :, None] - seq.positions[:, None, :]).clamp(min=0)  # [B, T, T]
        counted = mask & (seq.positions[:, None, :] > 0)
        found = []
        for h in range(self.num_heads):
            key = k[:, :, h * self.num_kv_heads // self.num_heads].float()
            with torch.autocast(device.type, enabled=False):
                scores = q[:, :, h].float() @ key.mT * self.head_dim**-0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1) * counted
            shares = torch.zeros(length, device=device)
            shares.scatter_add_(0, back.expand_as(weights).flatten(), weights.flatten())
            total = shares.cumsum(0)
            half = 0.5 * total[-1]
            at = (total < half).sum().clamp(max=length - 1)  # where the median lies
            inside = 1 - (total[at] - half) / shares[at].clamp(min=1e-9)
            found.append((at + inside) / math.log(2))
        return torch.stack(found)

    def forward(
        self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None, heads: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, T, d] -> [B, T, d]; with `heads` also what went into o_proj, [B, T, H * D]."""
        q, k, v = self.rotated(x, seq)
        if cache is not None and seq.past is not None:
            out = cached_attention(q, *cache.append(k, v, seq, self.window), self.sink)
        else:
            if cache is not None:
                cache.fill(k, v, seq, self.window)
            out = softmax_attention(
                q, k, v, seq, window=self.window, sink=self.sink, compiled=self.compiled
            )
        mixed = out.flatten(-2)
        return (self.o_proj(mixed), mixed) if heads else self.o_proj(mixed)
