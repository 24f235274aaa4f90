"""FLOP counts, device peaks, MFU, and the memory of a token.

Counts are per token, one multiply-add = 2. Shape legend for the formulas:
    d hidden_size   H query heads   Q head_dim   T tokens per row
Only matmuls (and the recurrences and short convolutions, which replace one) are counted; norms,
activations, decays and the embedding lookup are not. Try it: pytest tests/test_flops.py
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from config import STAGES, ModelConfig, StageConfig
from hybrid_layers import build_mixer

# Dense (not 2:4 sparse) bf16/fp16 tensor-core peak, FLOP/s, from the vendors' data sheets. The
# first that is in the device's name as whole words counts, so the longer names come first.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "GH200": 989e12,
    "B200": 2.25e15,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
# GiB of memory by the same data sheets, for planning without the card (--plan_device), and the
# share of it that PyTorch sees (an H100: 79.2 GiB).
MEMORY_GIB = {
    "GB200": 186, "GH200": 96, "B200": 180, "H200 NVL": 141, "H200": 141, "H100 PCIe": 80,
    "H100 NVL": 94, "H100": 80, "H800": 80, "A100": 80, "A800": 80, "L40S": 48, "RTX 5090": 32,
    "RTX 4090": 24, "RTX 3090": 24, "MI300X": 192,
}  # fmt: skip
MEMORY_SEEN = 0.99


def peak_flops(
    device: torch.device | str, dtype: torch.dtype, override: float | None = None
) -> float | None:
    """Dense peak of one device in FLOP/s; None where it is unknown (CPU, unlisted cards).

    `override` (--peak_flops, 0 or None = off) wins, on any device. float32 means TF32, which is
    half the bf16 rate on every card listed.
    """
    if override:
        return override
    if torch.device(device).type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device), dtype)


def peak_of_name(name: str, dtype: torch.dtype) -> float | None:
    """The table look-up of peak_flops; `name` as torch.cuda.get_device_name gives it."""
    factor = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 0.5}.get(dtype)
    found = (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name))
    peak = next(found, None)
    return peak * factor if peak and factor else None


def mfu(tokens_per_sec: float, flops: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: tokens_per_sec * flops / (num_devices * peak). None without peak."""
    return tokens_per_sec * flops / (num_devices * peak) if peak else None


def _layer(config: ModelConfig, i: int, seq_len: int) -> tuple[int, int, float]:
    """(weights projecting into the mixer, those of o_proj and the convolutions, own FLOPs)."""
    if config.layer_types[i] == "linear_attention":
        mixer = _mixer(config, i)
        out = mixer.o_proj.weight.numel()
        weights = [p.numel() for n, p in mixer.named_parameters() if _is_matrix(n, p)]
        return sum(weights) - out, out + _taps(config, i), mixer.recurrence_flops()
    d, q_dim = config.hidden_size, config.num_attention_heads * config.head_dim
    inner = d * (q_dim + 2 * config.num_key_value_heads * config.head_dim)
    return inner, q_dim * d, 4 * q_dim * _mean_keys(config, i, seq_len)


def _mixer(config: ModelConfig, i: int) -> torch.nn.Module:
    """Linear layer i without storage."""
    with torch.device("meta"):
        return build_mixer(config.mixer_name(i), config)


def _is_matrix(name: str, p: torch.Tensor) -> bool:
    return name.endswith("weight") and p.ndim > 1 and "conv" not in name


def _taps(config: ModelConfig, i: int) -> int:
    """Weights of a linear layer's short convolutions, each used once a token."""
    if config.layer_types[i] != "linear_attention":
        return 0
    named = _mixer(config, i).named_parameters()
    return sum(p.numel() for n, p in named if "conv" in n and p.ndim > 1)


def _span(config: ModelConfig, i: int, seq_len: int) -> int:
    """Keys the last query of softmax layer i sees: T, or the window where that is less."""
    sliding = config.layer_types[i] == "sliding_attention" and config.sliding_window
    return min(seq_len, config.sliding_window) if sliding else seq_len


def _mean_keys(config: ModelConfig, i: int, seq_len: int) -> float:
    """Keys a query sees, averaged over a row: (1 + 2 + .. + w + w + ..) / T = w - w (w - 1) / 2T.

    For a full layer w = T, which gives (T + 1) / 2: the causal half.
    """
    w = _span(config, i, seq_len)
    return w - w * (w - 1) / (2 * seq_len)


def matmul_params(config: ModelConfig) -> int:
    """N: weights used in matmuls. Head d * vocab once, tied or not; no embedding lookup.

    Per layer: MLP 3 d f; softmax d (H + 2 H_kv) Q + H Q d; linear the matrices it has, short
    convolutions apart.
    """
    mlp = 3 * config.hidden_size * config.intermediate_size
    layers = range(config.num_hidden_layers)
    mixers = sum(sum(_layer(config, i, 1)[:2]) - _taps(config, i) for i in layers)
    return config.num_hidden_layers * mlp + mixers + config.hidden_size * config.vocab_size


def kept_parts(config: ModelConfig, i: int) -> tuple[int, int, int, int]:
    """About how many numbers block i holds of a token for the backward, compiled: the residual
    stream and its norms, attention, what its own products keep besides, the MLP."""
    c, heads = config, config.num_attention_heads + config.num_key_value_heads
    attention, more = 3 * heads * c.head_dim, 0
    if c.layer_types[i] == "linear_attention":
        mixer = _mixer(c, i)
        attention = mixer.kept * c.linear_num_value_heads * c.linear_value_head_dim
        more = mixer.kept_more()
    return 4 * c.hidden_size, attention, more, 2 * c.intermediate_size


def kept_bytes(config: ModelConfig, recompute: str = "none", first: int = 0) -> int:
    """About what the blocks from `first` on hold of a token for the backward, in bytes, compiled
    and in bfloat16.

    Measured on an H100: Qwen2.5-1.5B's shape 1.3 MB, with 3:1 gated_deltanet 2.0 MB (this: 1.6 and
    2.2); SmolLM2-135M's with 3:1 0.7 MB (this: 0.7).
    """
    total = 0
    for i in range(first, config.num_hidden_layers):
        residual, attention, more, wide = kept_parts(config, i)
        if recompute != "none":  # see recompute.py
            wide, more, attention = 0, 0, 0 if recompute == "full" else attention
        total += residual + attention + more + wide
    return 2 * total


def model_flops_per_token(config: ModelConfig, seq_len: int, *, num_matmul_params: int) -> int:
    """PaLM's training FLOPs of a token (arXiv 2204.02311, appendix B): 6 N + 12 L H Q T.

    L counts softmax layers only and T is min(T, window) layer by layer. Nothing is halved for
    causality and the recurrences of linear layers are left out: this is the comparable figure,
    flops_per_token the honest one.
    """
    softmax = [i for i, kind in enumerate(config.layer_types) if kind != "linear_attention"]
    spans = sum(_span(config, i, seq_len) for i in softmax)
    return 6 * num_matmul_params + 12 * config.num_attention_heads * config.head_dim * spans


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Useful FLOPs of one forward, per token: 2 N + sum of the mixers' own.

    A softmax layer adds 4 H Q keys (q k^T and p v; keys = average over causal queries, see
    _mean_keys), a linear one its `recurrence_flops` (the recurrence itself, not its chunked form,
    which spends more to run faster) + 2 for every weight of its short convolutions.
    """
    layers = range(config.num_hidden_layers)
    own = sum(2 * _taps(config, i) + _layer(config, i, seq_len)[2] for i in layers)
    return 2 * matmul_params(config) + own


class StageFlops(NamedTuple):
    """FLOPs that a token of a stage needs: of the teacher's forward, of the student's forward and
    of its backward."""

    teacher: float
    forward: float
    backward: float


def stage_flops(
    stage: str,
    student: ModelConfig,
    teacher: ModelConfig | None,
    seq_len: int,
    train: str = "all",
    shared: int = 0,
    guided: bool = True,
) -> StageFlops:
    """FLOPs that a token of this stage needs; recomputation is not counted, and of `shared`, the
    leading blocks that teacher and student have in common, one forward is. guided: whether the
    teacher runs; else it only tells which layers are converted.

    With F = forward_flops and, for one layer, P_in, P_o, P_mlp its weights (the taps of short
    convolutions are in P_o) and C the forward FLOPs of its attention or recurrence:

    pretrain, distill, long
                   3 F(student): a backward is twice its forward (input and weight gradients);
                   + F(teacher), where there is one (of pretrain: --reference).
      train=mixers F(student) + F(teacher) + the backward down to the first converted layer c:
                   2 d vocab (through the head) + for every layer i >= c: 2 P_mlp + 2 P_o + 2 C
                   + 2 P_in if i > c (input gradients) + 2 (P_in + P_o) if i is converted (weight
                   gradients; a frozen weight has none). Below c there is no backward.
      feature_maps, lora
                   the same without any weight gradient, lora with c = 0: what adapters and feature
                   maps take is left out.
    block          as distill; its models have a vocabulary of 1, which stands for none.
    align          teacher forward up to the attention output of the last converted layer l,
                   sum_{i<l} (2 P + C)_i + (2 P_in + 2 P_o + C)_l, without head and l's MLP; then
                   for each converted student layer, whose input needs no gradient,
                   (2 + 2) P_in + (2 + 2 + 2) P_o + 3 C. `train` changes nothing here.

    Converted layers are those whose type is not the teacher's (without a teacher of the same
    depth: the linear layers).
    """
    assert stage == "pretrain" or stage in STAGES, stage
    assert train in ("all", "mixers", "feature_maps", "lora"), train
    converted = _converted_layers(student, teacher)
    if stage == "align":
        assert teacher is not None and converted, "align needs a teacher and a converted layer"
        return _align_flops(student, teacher, converted, seq_len)
    forward = forward_flops(student, seq_len)
    backward = 0.0
    if train == "all":
        backward = 2 * forward
    elif converted or train == "lora":
        first = 0 if train == "lora" else converted[0]
        mlp = 3 * student.hidden_size * student.intermediate_size
        backward += 2 * student.hidden_size * student.vocab_size
        for i in range(first, student.num_hidden_layers):
            inner, out, core = _layer(student, i, seq_len)
            backward += 2 * mlp + 2 * out + 2 * core
            backward += 2 * inner if i > first else 0
            backward += 2 * (inner + out) if train == "mixers" and i in converted else 0
    if teacher is None or not guided:
        return StageFlops(0.0, forward, backward)
    forward -= _first_blocks(student, shared, seq_len)
    return StageFlops(forward_flops(teacher, seq_len), forward, backward)


def flops_per_token(
    stage: str,
    student: ModelConfig,
    teacher: ModelConfig | None,
    seq_len: int,
    train: str = "all",
) -> float:
    """All of `stage_flops`."""
    return sum(stage_flops(stage, student, teacher, seq_len, train))


def _first_blocks(config: ModelConfig, count: int, seq_len: int) -> float:
    """Forward FLOPs of a token in the first blocks."""
    total = count * 2 * 3 * config.hidden_size * config.intermediate_size
    for i in range(count):
        inner, out, core = _layer(config, i, seq_len)
        total += 2 * inner + 2 * out + core
    return total


def uses_teacher(stage: str, settings: StageConfig) -> bool:
    """Whether a stage runs the teacher, to learn from it or to choose tokens by it."""
    return stage == "align" or settings.kd_weight > 0 or settings.select_tokens < 1


def _align_flops(
    student: ModelConfig, teacher: ModelConfig, converted: list[int], seq_len: int
) -> StageFlops:
    guide = _first_blocks(teacher, converted[-1] + 1, seq_len)
    guide -= 2 * 3 * teacher.hidden_size * teacher.intermediate_size  # the last one's MLP
    forward = backward = 0.0
    for i in converted:
        inner, out, core = _layer(student, i, seq_len)
        forward += 2 * inner + 2 * out + core
        backward += 2 * inner + 4 * out + 2 * core
    return StageFlops(guide, forward, backward)


def _converted_layers(student: ModelConfig, teacher: ModelConfig | None) -> list[int]:
    layers = range(student.num_hidden_layers)
    if teacher is None or teacher.num_hidden_layers != student.num_hidden_layers:
        return [i for i in layers if student.layer_types[i] == "linear_attention"]
    return [i for i in layers if student.layer_types[i] != teacher.layer_types[i]]
