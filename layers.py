"""What the model and the mixers share: RMSNorm, RoPE, short convolution, softmax attention, caches.

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

from config import ModelConfig


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


# ---- caches


class LayerCache:
    """What one layer remembers between calls of generate: keys and values, or conv + state."""

    def __init__(self):
        self.length = 0  # tokens seen
        self.k: Tensor | None = None  # [B, capacity, G, D]
        self.v: Tensor | None = None
        self.conv: dict[str, Tensor] = {}  # name -> last W - 1 inputs [B, W - 1, C]
        self.state: Tensor | None = None  # [B, H, K, V] float32

    def append(self, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
        """Add [B, T, G, D]; returns the keys and values to attend to. With a window only the
        last `window` are kept, so memory does not grow with the context."""
        new = k.shape[1]
        if window:
            if self.k is not None:
                k, v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
            # Copies: views would hold on to the keys and values of a whole long prompt.
            self.k, self.v = k[:, -window:].clone(), v[:, -window:].clone()
            self.length += new
            return k, v
        end = self.length + new
        if self.k is None or end > self.k.shape[1]:
            capacity = max(64, 1 << (end - 1).bit_length())
            grown = []
            for old, fresh in ((self.k, k), (self.v, v)):
                buffer = fresh.new_empty(fresh.shape[0], capacity, *fresh.shape[2:])
                if old is not None:
                    buffer[:, : self.length] = old[:, : self.length]
                grown.append(buffer)
            self.k, self.v = grown
        self.k[:, self.length : end], self.v[:, self.length : end] = k, v
        self.length = end
        return self.k[:, :end], self.v[:, :end]

    def num_bytes(self) -> int:
        """Bytes held."""
        held = [self.k, self.v, self.state, *self.conv.values()]
        return sum(t.numel() * t.element_size() for t in held if t is not None)


# ---- short convolution


class ShortConvolution(nn.Module):
    """Causal depthwise convolution: y_t = sum_j weight[:, 0, W - 1 - j] x_{t-j}, per document."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))

    def init_weights(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, positions: Tensor | None, state: Tensor | None = None):
        """x [B, T, C]; positions [B, T] cut the taps at document starts (None: one document);
        state [B, W - 1, C], the inputs before x. Returns y [B, T, C] and the new state."""
        taps, length = self.weight.shape[-1], x.shape[1]
        if state is None:
            state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
        padded = torch.cat([state.to(x.dtype), x], 1)
        weight = self.weight[:, 0].to(x.dtype)
        y = x * weight[:, -1]
        for j in range(1, taps):
            past = padded[:, taps - 1 - j : taps - 1 - j + length] * weight[:, -1 - j]
            y = y + (past if positions is None else past * (positions >= j).unsqueeze(-1))
        return y, padded[:, length:].clone()  # a view would hold on to a whole long prompt


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
def varlen_takes(parameter: str) -> bool:
    """Whether varlen_attn has this parameter."""
    return parameter in _probe()[1]


def attention_kernel(device: torch.device, dtype: torch.dtype, *, packed: bool, sink: bool,
                     compiled: bool = False) -> str:  # fmt: skip
    """Name of the softmax-attention kernel for these conditions; the trainer prints it.

    math: explicit scores (the sink needs their gradient); segments: SDPA per document (CPU);
    masked: SDPA under a [T, T] mask; varlen: PyTorch's varlen_attn; flash: flash-attn's varlen;
    sdpa: unpacked rows, cuDNN first on Hopper.
    """
    if sink:
        return "math"
    if not packed:
        return "sdpa"
    if device.type == "cpu" and not compiled:
        return "segments"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
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
    cached: bool = False,
    compiled: bool = False,
) -> Tensor:
    """Causal attention with scale D^-0.5. q [B, T, H, D], k and v [B, S, G, D], S > T only with
    a cache (`cached`); window 0 = full; sink [H] logits. Returns [B, T, H, D]."""
    packed = seq.cu_seqlens is not None
    kernel = attention_kernel(
        q.device, q.dtype, packed=packed, sink=sink is not None, compiled=compiled
    )
    if kernel in ("flash", "varlen"):
        return _varlen(kernel, q, k, v, seq, window)
    length, keys = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
    if kernel == "segments":
        parts = [
            _sdpa(a, b, c, window)
            for a, b, c in zip(*(x.split(seq.lengths, 2) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(parts, 2).transpose(1, 2)
    if kernel == "sdpa" and not (cached and length > 1 and keys > length):
        return _sdpa(q, k, v, window).transpose(1, 2)
    mask = causal_mask(length, keys, window, q.device)
    if packed:
        mask = mask & seq.mask
    if sink is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]  # the sink has no value
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [B, H, T, D] are the last T of k, v [B, G, S, D]; T = S or T = 1."""
    length, keys = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if window and keys > window:
        mask = causal_mask(length, keys, window, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    causal = length == keys and length > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


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
