"""The decoder: pre-norm blocks of softmax or linear attention and a SwiGLU MLP.

Llama, Qwen2, Qwen3 and hybrids of them are settings of one `ModelConfig`; parameter names are
Hugging Face's without the leading `model.`. Modules are shapes only (meta-device safe) until
`init_weights` or a checkpoint gives values.
Check: `pytest tests/test_model.py`.
Shapes: B batch, T time, d hidden size, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from hybrid_layers import build_mixer
from layers import (
    LayerCache,
    RMSNorm,
    SeqInfo,
    apply_rope,
    attention_kernel,
    rope_frequencies,
    softmax_attention,
)


class Attention(nn.Module):
    """Causal softmax attention with GQA; optional q/k-norm, biases, window and sink."""

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

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k and v [B, T, G, D] right after projection."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))

    def forward(self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.project(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        if cache is not None:
            k, v = cache.append(k, v, self.window)
        out = softmax_attention(
            q, k, v, seq, window=self.window, sink=self.sink, cached=cache is not None,
            compiled=self.compiled,
        )  # fmt: skip
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)). The attention is `self_attn` (softmax) or
    `linear_attn` (a mixer), by `kind`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.kind = config.layer_types[layer]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        if self.kind == "linear_attention":
            self.linear_attn = build_mixer(config.mixer_name(layer), config)
        else:
            window = config.sliding_window if self.kind == "sliding_attention" else 0
            self.self_attn = Attention(config, window)

    @property
    def attention(self) -> nn.Module:
        """The softmax or linear attention of this block."""
        return self.linear_attn if self.kind == "linear_attention" else self.self_attn

    def forward(
        self, h: Tensor, seq: SeqInfo, cache: LayerCache | None = None, tap: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """h [B, T, d] -> h. With `tap` also the attention's input and output, both [B, T, d]."""
        normed = self.input_layernorm(h)
        out = self.attention(normed, seq, cache)
        h = h + out
        h = h + self.mlp(self.post_attention_layernorm(h))
        return (h, normed, out) if tap else h


class Transformer(nn.Module):
    """The decoder. `forward` returns normed hidden states; logits are hidden @ head_weight.T,
    which the losses form in chunks of tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compiled = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def init_weights(self) -> None:
        """N(0, initializer_range), with projections into the residual stream scaled down by
        sqrt(2 x blocks) (GPT-2); norms one, biases zero."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Attention) and module.sink is not None:
                nn.init.zeros_(module.sink)
            elif isinstance(module, RMSNorm):
                module.init_weights()
        small = std / (2 * self.config.num_hidden_layers) ** 0.5
        for block in self.layers:
            if block.kind == "linear_attention":
                block.linear_attn.init_weights()
            nn.init.normal_(block.attention.o_proj.weight, std=small)
            nn.init.normal_(block.mlp.down_proj.weight, std=small)

    @property
    def head_weight(self) -> Tensor:
        """[vocab, d], tied or not."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def seq_info(
        self,
        length: int,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        rows: int = 1,
        past: int = 0,
        dtype: torch.dtype | None = None,
    ) -> SeqInfo:
        """Positions, rotations and document bounds of one forward; see `layers.SeqInfo`."""
        device = self.embed_tokens.weight.device
        if positions is None and cu_seqlens is not None:
            time = torch.arange(length, device=device)
            starts = torch.searchsorted(cu_seqlens, time, right=True) - 1
            positions = (time - cu_seqlens[starts])[None].long()
        if positions is None:
            positions = torch.arange(past, past + length, device=device)[None]
        angles = positions[..., None].float() * rope_frequencies(self.config, device)
        cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
        lengths, mask = None, None
        if cu_seqlens is not None:
            kernel = attention_kernel(
                device, dtype or self.embed_tokens.weight.dtype, packed=True,
                sink=self.config.attention_sink, compiled=self.compiled,
            )  # fmt: skip
            if kernel == "segments":
                bounds = cu_seqlens.tolist()
                lengths = tuple(b - a for a, b in itertools.pairwise(bounds) if b > a)
            elif kernel in ("masked", "math"):
                time = torch.arange(length, device=device)
                doc = torch.searchsorted(cu_seqlens, time, right=True)
                mask = doc[:, None] == doc[None]
        return SeqInfo(positions, cos, sin, cu_seqlens, max_seqlen or length, lengths, mask, rows)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, d], in the compute type, so that the residual stream is too."""
        h = self.embed_tokens(input_ids)
        device = h.device.type
        if torch.is_autocast_enabled(device):
            h = h.to(torch.get_autocast_dtype(device))
        return h

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        rows: int = 1,
        cache: list[LayerCache] | None = None,
        hidden: Tensor | None = None,
        first: int = 0,
        keep: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input_ids [B, T] int64 -> hidden states after the final norm [B, T, d].

        cu_seqlens [N + 1] int32 (B = 1): documents that must not see each other; positions [B, T]
        restart in each; rows: how many rows of equal length were packed, where each begins a
        document. cache: one LayerCache per block, for generation. `hidden` with `first` starts at
        block `first` from its input instead of from tokens; `keep` = i also returns block i's
        input (for a student that shares the teacher's first i blocks).
        """
        h = self.embed(input_ids) if hidden is None else hidden
        past = cache[0].length if cache is not None else 0
        seq = self.seq_info(
            h.shape[1], positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            rows=rows, past=past, dtype=h.dtype,
        )  # fmt: skip
        kept = None
        for i in range(first, len(self.layers)):
            if i == keep:
                kept = h
            h = self.layers[i](h, seq, None if cache is None else cache[i])
        h = self.norm(h)
        return h if keep is None else (h, kept)

    def attention_taps(
        self,
        input_ids: Tensor,
        *,
        layers: list[int],
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        rows: int = 1,
    ) -> Iterator[tuple[int, Tensor, Tensor, SeqInfo]]:
        """Run the blocks up to the last of `layers`, yielding (i, input, output, seq) of each one's
        attention, [B, T, d] both, as soon as they are known, so nothing need be kept."""
        h = self.embed(input_ids)
        seq = self.seq_info(
            h.shape[1], positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            rows=rows, dtype=h.dtype,
        )  # fmt: skip
        last = max(layers)
        for i in range(last):
            if i in layers:
                h, normed, out = self.layers[i](h, seq, None, True)
                yield i, normed, out, seq
            else:
                h = self.layers[i](h, seq)
        block = self.layers[last]  # its MLP is not needed
        normed = block.input_layernorm(h)
        yield last, normed, block.attention(normed, seq), seq

    def new_cache(self) -> list[LayerCache]:
        """An empty cache for generation."""
        return [LayerCache() for _ in self.layers]

    def num_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())
