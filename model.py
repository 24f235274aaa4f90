"""The decoder: pre-norm blocks of softmax or linear attention and a SwiGLU MLP.

Llama, Qwen2, Qwen3 and hybrids of them are settings of one `ModelConfig`; parameter names are
Hugging Face's without the leading `model.`. Modules are shapes only (meta-device safe) until
`init_weights` or a checkpoint gives values.
Check: `pytest tests/test_model.py`.
Shapes: B batch, T time, d hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import Cache, LayerCache
from config import ModelConfig
from hybrid_layers import build_mixer
from layers import (
    Attention,
    RMSNorm,
    SeqInfo,
    attention_kernel,
    project,
    rope_frequencies,
)
from ops.block_ops import swiglu_mm
from recompute import RUN


class MLP(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.down_proj) is nn.Linear:
            joint = project(x, self.gate_proj, self.up_proj)
            if joint is not None:
                return swiglu_mm(joint, None, self.down_proj.weight)
            # Without a backward Inductor's one kernel is as good; with one, ours holds less for it.
            if torch.compiler.is_compiling() and torch.is_grad_enabled():
                return swiglu_mm(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 has cut it (fsdp.py)."""
    return hasattr(model, "unshard")


class Block(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)). The attention is `self_attn` (softmax) or
    `linear_attn` (a mixer), by `kind`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.kind = config.layer_types[layer]
        self.recompute = "none"  # see recompute.py
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
        self, h: Tensor, seq: SeqInfo, cache: LayerCache | None = None, tap: bool = False,
        heads: bool = False,
    ) -> Tensor | tuple:  # fmt: skip
        """h [B, T, d] -> h. With `tap` also the attention's input and output, both [B, T, d]; with
        `heads` for the output a pair, the second of which is what went into o_proj."""
        if self.recompute == "none" or cache is not None or tap or not torch.is_grad_enabled():
            return self.compute(h, seq, cache, tap, heads)
        return RUN[self.recompute](self.compute, h, seq)

    def compute(
        self, h: Tensor, seq: SeqInfo, cache: LayerCache | None = None, tap: bool = False,
        heads: bool = False,
    ) -> Tensor | tuple:  # fmt: skip
        """`forward` without activation checkpointing."""
        normed = self.input_layernorm(h)
        more = {"heads": True} if heads else {}  # what stands in for an attention need not know it
        found = self.attention(normed, seq, cache, **more)
        h = h + (found[0] if heads else found)
        h = h + self.mlp(self.post_attention_layernorm(h))
        return (h, normed, found) if tap else h


class Transformer(nn.Module):
    """The decoder. `forward` returns normed hidden states; logits are hidden @ head_weight.T,
    which the losses form in chunks of tokens."""

    first_layer = 0  # of a larger model, that block 0 is (cria.py)

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
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """[vocab, d], tied or not; gathered where FSDP2 has cut it."""
        if is_fsdp(self):
            self.unshard()
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def seq_info(
        self,
        length: int,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        rows: int = 1,
        cache: Cache | None = None,
        dtype: torch.dtype | None = None,
    ) -> SeqInfo:
        """Positions, rotations and document bounds of one forward; see `layers.SeqInfo`."""
        device = self.device
        past = None if cache is None else cache.lengths
        if past is not None:
            assert cu_seqlens is None, "packed prompts found, an empty cache expected"
            positions = past[:, None] + torch.arange(length, device=device)
        if positions is None and cu_seqlens is not None:
            time = torch.arange(length, device=device)
            starts = torch.searchsorted(cu_seqlens, time, right=True) - 1
            positions = (time - cu_seqlens[starts])[None].long()
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        angles = positions[..., None].float() * rope_frequencies(self.config, device)
        cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
        lengths, mask = None, None
        if cu_seqlens is not None:
            kernel = attention_kernel(
                device, dtype or next(self.parameters()).dtype, packed=True,
                sink=self.config.attention_sink, compiled=self.compiled,
            )  # fmt: skip
            if kernel == "segments":
                bounds = cu_seqlens.tolist()
                lengths = tuple(b - a for a, b in itertools.pairwise(bounds) if b > a)
            elif kernel in ("masked", "math"):
                time = torch.arange(length, device=device)
                doc = torch.searchsorted(cu_seqlens, time, right=True)
                mask = doc[:, None] == doc[None]
        held, even = 0, True
        if past is not None and not cache.static:  # a graph is the same for all lengths
            held, even = cache.longest, cache.even
        return SeqInfo(
            positions, cos, sin, cu_seqlens, max_seqlen or length, lengths, mask, rows, past, held,
            even,
        )  # fmt: skip

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
        cache: Cache | None = None,
        hidden: Tensor | None = None,
        first: int = 0,
        keep: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input_ids [B, T] int64 -> hidden states after the final norm [B, T, d].

        cu_seqlens [N + 1] int32 (B = 1): documents that must not see each other; positions [B, T]
        restart in each; rows: how many rows of equal length were packed, where each begins a
        document. cache: for generation; packed prompts become its rows, later calls add [B, T] to
        each. `hidden` with `first` starts at
        block `first` from its input instead of from tokens; `keep` = i also returns block i's
        input (for a student that shares the teacher's first i blocks).
        """
        h = self.embed(input_ids) if hidden is None else hidden
        seq = self.seq_info(
            h.shape[1], positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            rows=rows, cache=cache, dtype=h.dtype,
        )  # fmt: skip
        kept = None
        for i in range(first, len(self.layers)):
            if i == keep:
                kept = h
            h = self.layers[i](h, seq, None if cache is None else cache[i])
        if cache is not None:
            cache.advance(h.shape[0], h.shape[1], cu_seqlens, h.device)
        h = self.norm(h)
        return h if keep is None else (h, kept)

    def attention_taps(
        self,
        input_ids: Tensor | None = None,
        *,
        layers: list[int],
        hidden: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        rows: int = 1,
        heads: bool = False,
    ) -> Iterator[tuple[int, Tensor, Tensor | tuple[Tensor, Tensor], SeqInfo]]:
        """Run the blocks up to the last of `layers`, yielding (i, input, output, seq) of each one's
        attention, [B, T, d] both, as soon as they are known, so nothing need be kept. `heads`: for
        the output a pair, the second of which is what went into o_proj. `hidden`: the first
        block's input instead of tokens."""
        sharded = is_fsdp(self)
        if sharded:
            self.unshard()  # what it does by itself when a model or a block is called
        h = self.embed(input_ids) if hidden is None else hidden
        seq = self.seq_info(
            h.shape[1], positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            rows=rows, dtype=h.dtype,
        )  # fmt: skip
        last = max(layers)
        for i in range(last):
            h, normed, out = self.layers[i](h, seq, None, True, heads)  # one graph for all
            if i in layers:
                yield i, normed, out, seq
        block = self.layers[last]
        if sharded:
            _, normed, out = block(h, seq, None, True, heads)
            yield last, normed, out, seq
            return
        # Its MLP is not needed.
        normed = block.input_layernorm(h)
        yield last, normed, block.attention(normed, seq, None, heads), seq

    def new_cache(self, capacity: int = 0, *, static: bool = False) -> Cache:
        """An empty cache for generation; see `cache.Cache`."""
        return Cache(len(self.layers), capacity, static)

    def num_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())
