"""What the linear mixers share: projections to heads, the call of the recurrence with its cache,
the transfer of a softmax layer's weights, and the calibration of what needs data.

A mixer says what goes into its recurrence (`inputs`), what happens to the result (`finish`), and
where its transfer starts (`init_transfer`).
Check: `pytest tests/test_mixers.py`.
Shapes: B batch, T time, d hidden size, H query/key heads, J value heads, K key size, V value size.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import LayerCache
from config import ModelConfig, Transfer, UserError
from layers import PROJECTIONS, RMSNorm, SeqInfo, ShortConvolution, last_tokens

# SiLU(x) is near x / 2 for small x. The L2 norm takes the scale of q and k out; that of v and o is
# left to `calibrate`, as an output far below the RMSNorm's eps of 1e-5 is only scaled by it.
QK_TAP = 0.03
V_TAP = 0.05
DECAY_TOKENS = (4.0, 256.0)  # e-folding times of the first and the last head
FITTED_TOKENS = (2.0, 512.0)  # the shortest and longest of those taken from a teacher


class LinearMixer(nn.Module, ABC):
    """Takes the normed residual stream [B, T, d], returns the attention output [B, T, d]."""

    name: ClassVar[str]  # as in `hybrid_layers.MIXERS`
    kernels: ClassVar[dict[str, Callable]]  # the op file's KERNELS: naive, chunk, fla where it has
    fla_op: ClassVar[str] = ""  # the function of ops/fla_kernels.py behind "fla"
    step: ClassVar[Callable]  # its step_*, as a staticmethod
    passes: ClassVar[int] = 2  # K x V products of a token: write k v^T and read S^T q; delta 3
    kept: ClassVar[int] = 12  # numbers kept of a token for the backward, over J V, on an H100
    grouped: ClassVar[bool] = False  # whether there may be more value heads than key heads
    keeps_norms: ClassVar[bool] = False  # whether it has the teacher's q/k-norms, not folded
    gate_optional: ClassVar[bool] = False  # whether it can be without its output gate
    scales_o_proj: ClassVar[bool] = True  # whether `calibrate` does
    has_maps: ClassVar[bool] = False  # whether its weights are an attention map: `log_maps`
    projections: ClassVar[dict[str, str]] = PROJECTIONS  # where another Linear makes q, k, v, o

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.hidden_size, self.eps = config.hidden_size, config.rms_norm_eps
        self.num_heads, self.num_value_heads = (
            config.linear_num_key_heads, config.linear_num_value_heads,
        )  # fmt: skip
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        if self.num_heads != self.num_value_heads and not self.grouped:
            raise UserError(
                f"linear_num_value_heads: {self.num_value_heads} found, {self.name} expects "
                f"linear_num_key_heads {self.num_heads}"
            )
        if not (config.linear_gate or self.gate_optional):
            raise UserError(f"linear_gate: False found, which {self.name} has no form for")
        self.rope, self.init_std = config.linear_rope, config.initializer_range
        self.kernel = "chunk"  # `hybrid_layers.use_kernels` sets a faster one

    def add_heads(self, config: ModelConfig) -> None:
        """q_proj, k_proj, v_proj and o_proj."""
        d, bias = config.hidden_size, config.linear_bias
        keys, values = self.num_heads * self.key_dim, self.num_value_heads * self.value_dim
        self.q_proj = nn.Linear(d, keys, bias=bias)
        self.k_proj = nn.Linear(d, keys, bias=bias)
        self.v_proj = nn.Linear(d, values, bias=bias)
        self.o_proj = nn.Linear(values, d, bias=False)

    def add_convolutions(self, config: ModelConfig) -> None:
        """Short convolutions of q, k and v."""
        keys, values = self.num_heads * self.key_dim, self.num_value_heads * self.value_dim
        self.q_conv1d = ShortConvolution(keys, config.linear_conv_kernel_dim)
        self.k_conv1d = ShortConvolution(keys, config.linear_conv_kernel_dim)
        self.v_conv1d = ShortConvolution(values, config.linear_conv_kernel_dim)

    def init_weights(self) -> None:
        """From scratch: matrices N(0, initializer_range), biases zero, norms one, convolutions
        uniform. A mixer with parameters of other kinds sets those after this."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=self.init_std)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, RMSNorm | ShortConvolution):
                m.init_weights()

    @torch.no_grad()
    def init_decay(self, low: float = 1.0) -> None:
        """fla's and mamba's ranges: A_log for A in `low` to 16, dt_bias for dt in 1e-3 to 0.1."""
        self.A_log.uniform_(low, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.copy_(inverse_softplus(dt))

    # ---- forward

    @abstractmethod
    def inputs(
        self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool
    ) -> tuple[dict[str, Tensor], object, dict[str, Tensor]]:
        """What the recurrence takes token by token, by its argument names ([B, T, ...] each),
        what `finish` needs besides x, and, if `keep`, the last inputs of convolutions and token
        shifts by name (`last_tokens`). `held` is what was kept by the call before."""

    @abstractmethod
    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        """Norm and gate of the recurrence's output o [B, T, J, V] -> [B, T, J * V]."""

    def options(self) -> dict:
        """Arguments of the recurrence that are no tokens' (scale, a fixed decay, ...)."""
        return {}

    @classmethod
    def state_key_dim(cls, config: ModelConfig) -> int:
        """K of the state, where a feature map makes it another one."""
        return config.linear_key_head_dim

    def recurrence_flops(self) -> int:
        """FLOPs of the recurrence of one token, over all heads."""
        return 2 * self.passes * self.num_value_heads * self.key_dim * self.value_dim

    def kept_more(self) -> int:
        """About how many numbers of 2 bytes the backward needs of a token, compiled, beyond the
        `kept` J V that projections and fla's kernels leave (`flops.kept_parts`)."""
        return 0

    def forward(
        self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None, heads: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output [B, T, d]; with `heads` also what went into o_proj, [B, T, J * V]."""
        mixed = self.mix(x, seq, cache)
        return (self.o_proj(mixed), mixed) if heads else self.o_proj(mixed)

    def mix(self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None) -> Tensor:
        """Everything but o_proj: [B, T, J * V]."""
        keep = cache is not None
        args, aux, conv = self.inputs(x, seq, cache.conv if keep else {}, keep)
        state = cache.state if keep else None
        if state is not None and x.shape[1] == 1:
            token = {what: a[:, 0] for what, a in args.items()}
            o, state = self.step(**token, initial_state=state, **self.options())
            o = o[:, None]
        else:
            rows = {"rows": seq.rows} if self.kernel == "chunk" else {}
            o, state = self.kernels[self.kernel](
                **args, initial_state=state, output_final_state=keep, cu_seqlens=seq.cu_seqlens,
                **self.options(), **rows,
            )  # fmt: skip
        if keep:
            cache.store(conv, state)
        return self.finish(o, x, aux)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H * K] -> [B, T, H, K]."""
        return x.unflatten(-1, (-1, self.key_dim))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K] and v [B, T, J, V] by q_proj, k_proj and v_proj."""
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        return self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), v

    def convolved(
        self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k [B, T, H, K] and v [B, T, J, V], projected and convolved, and the inputs kept."""
        out, kept = [], {}
        for what, size in (("q", self.key_dim), ("k", self.key_dim), ("v", self.value_dim)):
            conv, y = getattr(self, f"{what}_conv1d"), getattr(self, f"{what}_proj")(x)
            if keep:
                kept[what] = last_tokens(y, conv.weight.shape[-1] - 1, seq, held.get(what))
            out.append(conv(y, seq, held.get(what)).unflatten(-1, (-1, size)))
        return *out, kept

    # ---- transfer from softmax attention

    def qkv_weights(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """q, k, v -> (weight [H * K, d], bias or None), as views that can be written to."""
        layers = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}
        return {what: (layer.weight, layer.bias) for what, layer in layers.items()}

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K] and v [B, T, J, V] right after projection, for the self-test: by the
        weights, without adapters."""
        sizes = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
        return tuple(
            F.linear(x, weight, bias).unflatten(-1, (-1, sizes[what]))
            for what, (weight, bias) in self.qkv_weights().items()
        )

    @abstractmethod
    def init_transfer(self) -> None:
        """Values of everything that softmax attention has no counterpart of."""

    def decay_rates(self, device=None) -> Tensor:
        """1 / e-folding time in tokens of each value head, spread over DECAY_TOKENS: [J]."""
        return 1.0 / torch.logspace(
            *(math.log10(t) for t in DECAY_TOKENS), self.num_value_heads, device=device
        )

    def start_decays(self, rates: Tensor) -> None:
        """Decay by these rates per token [J] at first, where there is a decay to set."""

    @torch.no_grad()
    def from_attention(self, attention: nn.Module, parts: Transfer | None = None) -> None:
        """Take over q, k, v, o of a softmax `layers.Attention` with the same query heads and head
        size. KV heads are expanded head by head, q/k-norm weights folded into projection rows
        (a mixer that `keeps_norms` takes them over itself); the rest is `init_transfer`, but for
        what `parts` leaves out. What needs data is `calibrate`'s."""
        parts = parts or Transfer()
        heads, size = attention.num_heads, attention.head_dim
        mine = (self.num_heads, self.num_value_heads, self.key_dim, self.value_dim)
        if mine != (heads, heads, size, size):
            raise ValueError(
                f"from_attention: linear heads {mine[:2]} x {mine[2:]} found, the attention's "
                f"{heads} x {size} expected"
            )
        groups = heads // attention.num_kv_heads
        sources = {
            "q": (attention.q_proj, 1, attention.q_norm),
            "k": (attention.k_proj, groups, attention.k_norm),
            "v": (attention.v_proj, groups, None),
        }
        self.init_transfer()
        self.start_decays(self.decay_rates(self.o_proj.weight.device))
        self._leave_out(parts)
        for what, (mine, my_bias) in self.qkv_weights().items():
            linear, repeat, norm = sources[what]
            rows = [linear.weight.float().unflatten(0, (-1, size))]  # [heads, size, d]
            if linear.bias is not None:
                rows.append(linear.bias.float().unflatten(0, (-1, size)).unsqueeze(-1))
            if norm is not None and not self.keeps_norms:
                rows = [p * norm.weight.float()[:, None] for p in rows]
            if parts.kv == "heads":
                rows = [p.repeat_interleave(repeat, 0).flatten(0, 1) for p in rows]
            else:  # as published pipelines get it wrong
                rows = [p.flatten(0, 1).repeat_interleave(repeat, 0) for p in rows]
            mine.copy_(rows[0])
            if my_bias is not None:
                my_bias.copy_(rows[1][:, 0]) if len(rows) > 1 else my_bias.zero_()
        self.o_proj.weight.copy_(attention.o_proj.weight)

    def can_leave_out(self) -> dict[str, list[Callable[[], object]]]:
        """Of a `Transfer`'s conv, gate and beta those that this mixer has, with what makes each
        random."""
        gate, beta = self.gate_to_fit(), getattr(self, "b_proj", None)
        normal = functools.partial(nn.init.normal_, std=self.init_std)
        found = {
            "conv": [m.init_weights for m in self.modules() if isinstance(m, ShortConvolution)],
            "gate": [] if gate is None else [functools.partial(normal, gate[0])],
            "beta": [] if beta is None else [functools.partial(normal, beta.weight)],
        }
        return {part: resets for part, resets in found.items() if resets}

    def _leave_out(self, parts: Transfer) -> None:
        """Make random what `parts` does not want set."""
        for part, resets in self.can_leave_out().items():
            for reset in resets if not getattr(parts, part) else ():
                reset()

    def small_taps(self) -> None:
        """Convolutions that pass on the present token alone, small (see QK_TAP)."""
        for conv, tap in ((self.q_conv1d, QK_TAP), (self.k_conv1d, QK_TAP), (self.v_conv1d, V_TAP)):
            nn.init.zeros_(conv.weight)
            conv.weight[:, 0, -1] = tap

    def gate_to_fit(self) -> tuple[Tensor, float] | None:
        """(weight [J * V, d], value that its product with x should have everywhere), where the
        output gate has no bias to be open with; else None."""
        return None

    @torch.no_grad()
    def calibrate(
        self, x: Tensor, target: Tensor, seq: SeqInfo, parts: Transfer | None = None,
        distances: Tensor | None = None,
    ) -> float:  # fmt: skip
        """Fit what needs data and `parts` wants: decays to the teacher's `Attention.distances` [J],
        the gate to a constant by least squares, and one scale per head, folded into o_proj's
        columns, so that the output is nearest to `target`.

        x, target [B, T, d]: the teacher's input to this layer and its attention output. Returns
        the relative error ||target - out|| / ||target|| afterwards.
        """
        parts = parts or Transfer()
        if parts.decay and distances is not None:
            self.start_decays(1 / distances.clamp(*FITTED_TOKENS))
        fit = self.gate_to_fit() if parts.gate else None
        with torch.autocast(x.device.type, enabled=False):
            if fit is not None:
                flat = x.flatten(0, 1).float()
                gram = flat.T @ flat
                gram.diagonal().add_(1e-3 * gram.diagonal().mean())
                row = torch.linalg.solve(gram, flat.sum(0) * fit[1])
                fit[0].copy_(row.expand_as(fit[0]))

        mixed = self.mix(x, seq).flatten(0, 1).float().unflatten(-1, (-1, self.value_dim))
        with torch.autocast(x.device.type, enabled=False):
            columns = self.o_proj.weight.float().unflatten(1, (-1, self.value_dim))  # [d, J, V]
            added = torch.einsum("njv,djv->njd", mixed, columns)  # by each head
            goal = target.flatten(0, 1).float()
            gram = torch.einsum("njd,nid->ji", added, added)
            gram.diagonal().add_(1e-3 * gram.diagonal().mean())
            scale = torch.linalg.solve(gram, torch.einsum("njd,nd->j", added, goal))
            # A head whose fit is nil or negative still has to be able to learn, as all may be.
            middle = scale.clamp(min=0).mean()
            middle = torch.where(middle > 0, middle, 1.0)
            scale = scale.clamp(0.1 * middle, 10 * middle)
            if not parts.scale:
                scale = torch.ones_like(scale)
            self.o_proj.weight.copy_((columns * scale[None, :, None]).flatten(1))
            error = goal - torch.einsum("njd,j->nd", added, scale)
            return (error.norm() / goal.norm()).item()


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension, in float32 at least."""
    h = x if x.dtype == torch.float64 else x.float()
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64. bfloat16 has no digits left near a decay of 1."""
    return x if x.dtype == torch.float64 else x.float()


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
