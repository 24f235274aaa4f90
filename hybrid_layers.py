"""The registry of linear mixers, and the conversion of softmax layers into linear ones.

    MIXERS[name](config)                     a fresh mixer
    convert_layers(teacher, [10, 14, 20])    a student whose layers 10, 14, 20 are linear
    check_transfer(teacher, student, ids)    the transfer self-test, run before training

A new mixer is a class in mixers/, an op file in ops/ and one entry below.
Check: `pytest tests/test_hybrid_layers.py`.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from config import ModelConfig, Transfer, UserError
from layers import ShortConvolution
from lora import is_lora
from mixers.deltanet import DeltaNet
from mixers.gated_deltanet import GatedDeltaNet
from mixers.gla import GatedLinearAttention
from mixers.hedgehog_window import HedgehogWindow
from mixers.kda import KimiDeltaAttention
from mixers.linear_attention import LinearAttention
from mixers.mamba2 import Mamba2
from mixers.retention import Retention
from mixers.rwkv6 import RWKV6
from mixers.rwkv7 import RWKV7
from mixers.sliding_window import SlidingWindow
from ops.fla_kernels import check_head_size
from ops.kernels import PACKAGES, resolve_kernel
from ops.tuned import use_tuned

MIXERS: dict[str, type[nn.Module]] = {
    "gated_deltanet": GatedDeltaNet,
    "deltanet": DeltaNet,
    "kda": KimiDeltaAttention,
    "mamba2": Mamba2,
    "gla": GatedLinearAttention,
    "rwkv6": RWKV6,
    "linear_attention": LinearAttention,
    "retention": Retention,
    "hedgehog_window": HedgehogWindow,
    "rwkv7": RWKV7,
    "sliding_window": SlidingWindow,
}


def build_mixer(name: str, config: ModelConfig) -> nn.Module:
    """A mixer by name."""
    return mixer_class(name)(config)


def mixer_class(name: str) -> type[nn.Module]:
    """The class of a name; UserError lists the valid ones."""
    if name not in MIXERS:
        raise UserError(f"--mixer: '{name}' found, one of {', '.join(MIXERS)} expected")
    return MIXERS[name]


def mixer_names(spec: str, count: int) -> list[str]:
    """`spec` (one name, or one per linear layer) as a list of `count` names."""
    names = [n.strip() for n in spec.split(",")]
    names = names * count if len(names) == 1 else names
    if len(names) != count:
        raise UserError(f"--mixer: {len(names)} names found, 1 or {count} (linear layers) expected")
    for name in names:
        mixer_class(name)
    return names


def convert_config(
    config: ModelConfig, layers: list[int], mixer: str, *, linear_rope: bool = False,
    linear_feature_map: str = "", linear_window: int = 0, linear_gate: bool = True,
    linear_conv: int = 0,
) -> ModelConfig:  # fmt: skip
    """The teacher's config with `layers` made linear: one linear head per softmax query head.
    The mixer sliding_window makes them "sliding_attention" instead."""
    kinds = list(config.layer_types)
    window = linear_window or config.linear_window
    old, names = iter(config.mixer), []
    new = dict(zip(layers, mixer_names(mixer, len(layers)), strict=True))
    for i, kind in enumerate(config.layer_types):
        if kind == "linear_attention":
            names.append(next(old))
        if i not in new:
            continue
        if kind == "linear_attention":
            raise UserError(f"--layers: layer {i} of the teacher is linear already")
        if new[i] != "sliding_window":
            kinds[i] = "linear_attention"
            names.append(new[i])
            continue
        if "sliding_attention" in config.layer_types and config.sliding_window != window:
            raise UserError(
                f"--linear_window: {window} found, but there are sliding layers of "
                f"{config.sliding_window} already, and all must be alike"
            )
        kinds[i] = "sliding_attention"
    student = dataclasses.replace(
        config, layer_types=kinds, mixer=names, linear_window=window,
        linear_feature_map=linear_feature_map or config.linear_feature_map,
        sliding_window=window if "sliding_window" in new.values() else config.sliding_window,
        linear_num_key_heads=config.num_attention_heads,
        linear_num_value_heads=config.num_attention_heads,
        linear_key_head_dim=config.head_dim, linear_value_head_dim=config.head_dim,
        linear_bias=config.attention_bias, linear_rope=linear_rope, linear_gate=linear_gate,
        linear_conv_kernel_dim=linear_conv or config.linear_conv_kernel_dim,
    )  # fmt: skip
    for name, value in dataclasses.asdict(config).items():
        if config.mixer and name.startswith("linear_") and getattr(student, name) != value:
            raise UserError(
                f"--teacher: its linear layers have {name} {value}, new ones need "
                f"{getattr(student, name)}, and all must be alike"
            )
    return student


def convert_layers(
    teacher: nn.Module,
    layers: list[int],
    *,
    mixer: str = "gated_deltanet",
    share_trunk: bool = False,
    transfer: Transfer | None = None,
    **shape,
) -> nn.Module:
    """A student with the teacher's weights whose `layers` are linear, initialised from the
    softmax layers they replace (float32).

    share_trunk: the student's other parameters are the teacher's own tensors, frozen, so that a
    run that trains only mixers holds one copy of the trunk. Otherwise they are float32 copies.
    transfer: what mixers take over from the softmax layers; None = the defaults.
    shape: linear_rope, linear_gate, ..., as of `convert_config`.
    """
    config = convert_config(teacher.config, layers, mixer, **shape)
    names = mixer_names(mixer, len(layers))
    if config.attention_output_bias and any(name != "sliding_window" for name in names):
        raise UserError("--teacher: a bias on o_proj found; linear layers have none to carry it")
    memo = {id(p): p for p in teacher.parameters()} if share_trunk else {}
    student = copy.deepcopy(teacher, memo)
    if not share_trunk:
        student.float()
    student.config = config
    for i, name in zip(layers, names, strict=True):
        block = student.layers[i]
        device = next(teacher.parameters()).device
        mixer = build_mixer(name, config).to(device)
        # What is random is a layer's own, whichever others are converted beside it.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(torch.initial_seed() + teacher.first_layer + i)
            mixer.from_attention(teacher.layers[i].self_attn, transfer)
        if name == "sliding_window":  # a compiled model prepares the inputs of other kernels
            mixer.compiled = block.self_attn.compiled
        del block.self_attn
        block.kind = config.layer_types[i]
        setattr(block, "linear_attn" if block.kind == "linear_attention" else "self_attn", mixer)
    for p in student.parameters():
        p.requires_grad_(True)
    if share_trunk:
        for p in teacher.parameters():
            p.requires_grad_(False)
    return student


def restore_layers(student: nn.Module, teacher: nn.Module, layers: list[int]) -> None:
    """The inverse of `convert_layers` for some of its layers, in place: they are the teacher's
    softmax layers again (float32 copies, or its own tensors where the student shares the trunk)."""
    kinds, names = list(student.config.layer_types), []
    for i in layers:
        kinds[i] = teacher.config.layer_types[i]
    for i, kind in enumerate(kinds):
        if kind == "linear_attention":
            names.append(student.config.mixer_name(i))
    window = student.config.sliding_window
    if "sliding_attention" not in kinds:
        window = teacher.config.sliding_window
    student.config = dataclasses.replace(
        student.config, layer_types=kinds, mixer=names, sliding_window=window
    )
    shared = student.norm.weight is teacher.norm.weight
    memo = {id(p): p for p in teacher.parameters()} if shared else {}
    for i in layers:
        block = student.layers[i]
        softmax = copy.deepcopy(teacher.layers[i].self_attn, memo)
        delattr(block, "linear_attn" if block.kind == "linear_attention" else "self_attn")
        block.kind = kinds[i]
        block.self_attn = softmax if shared else softmax.float()


def copy_mixers(student: nn.Module, aligned: nn.Module, layers: list[int]) -> None:
    """Give the mixers of `layers` the weights that they have in `aligned`. UserError where it has
    other ones there."""
    found = mixer_parameters(aligned, layers)
    for name, p in mixer_parameters(student, layers).items():
        if name not in found or found[name].shape != p.shape:
            what = "nothing" if name not in found else f"{tuple(found[name].shape)}"
            raise UserError(f"--aligned: {what} found as {name}, {tuple(p.shape)} expected")
        with torch.no_grad():
            p.copy_(found[name])


def mixer_parameters(model: nn.Module, layers: list[int]) -> dict[str, nn.Parameter]:
    """name -> parameter of the attention, linear or sliding, of `layers`; no adapters."""
    kinds = ("self_attn", "linear_attn")
    wanted = tuple(f"layers.{i}.{kind}." for i in layers for kind in kinds)
    return {n: p for n, p in model.named_parameters() if n.startswith(wanted) and ".lora_" not in n}


def cast_trunk(model: nn.Module, layers: list[int], dtype: torch.dtype) -> None:
    """Store the matrices outside the attention of `layers`, adapters apart, in `dtype`, in place.
    Gradients and AdamW's state have a parameter's dtype, so bfloat16 is half the memory (see
    optimizer.AdamW)."""
    mixers = mixer_parameters(model, layers)
    for name, p in model.named_parameters():
        if name not in mixers and p.ndim > 1 and not is_lora(name):
            p.data = p.data.to(dtype)


def resolve_kernels(
    config: ModelConfig, kernel: str, device: torch.device, dtype: str = "auto"
) -> dict[str, str]:
    """mixer -> kernel of every linear mixer of a model. UserError, one line, for a kernel that
    cannot run a mixer, its head size or `dtype` here; under auto such a mixer runs our chunked
    form."""
    chosen = {}
    for name in dict.fromkeys(config.mixer):
        chosen[name] = resolve_kernel(kernel, device, MIXERS[name])
        if chosen[name] != "fla":
            continue
        op, key_dim = MIXERS[name].fla_op, MIXERS[name].state_key_dim(config)
        reason = check_head_size(op, key_dim, config.linear_value_head_dim)
        if dtype == "float32" and op == "delta_rule":
            reason = "fla's delta_rule kernel takes bfloat16, not float32 (--dtype)"
        if reason and kernel == "fla":
            raise UserError(f"--kernel: fla found, but {reason}; auto or chunk expected")
        if reason:
            chosen[name] = "chunk"
    return chosen


def set_kernels(model: nn.Module, kernels: dict[str, str]) -> None:
    """Every linear mixer's kernel, by mixer name (`resolve_kernels`); beside Triton's recurrences
    the short convolutions run in Triton too."""
    for i, block in enumerate(model.layers):
        if block.kind == "linear_attention":
            kernel = kernels[model.config.mixer_name(i)]
            block.linear_attn.kernel = kernel
            for m in block.linear_attn.modules():
                if isinstance(m, ShortConvolution):
                    m.kernel = "triton" if kernel in PACKAGES else "plain"


def use_kernels(model: nn.Module, kernels: dict[str, str], device: torch.device) -> str:
    """Set every linear mixer's kernel and switch on this GPU's tuned configurations; what to say
    about it on the console."""
    set_kernels(model, kernels)
    line = ", ".join(f"{mixer} {kernel}" for mixer, kernel in kernels.items())
    line = f"linear kernel: {line or 'none'}"
    if any(isinstance(m, ShortConvolution) and m.kernel == "triton" for m in model.modules()):
        line += ", short convolution triton"
    return f"{line}; {use_tuned(device)}" if "fla" in kernels.values() else line


@torch.no_grad()
def check_transfer(
    teacher: nn.Module, student: nn.Module, layers: list[int], input_ids: Tensor | None = None,
    most: float = 1e-3, hidden: Tensor | None = None,
) -> dict[int, float]:  # fmt: skip
    """Compare q, k, v of teacher and student per head right after projection, before conv, norm
    and RoPE, on input_ids [1, T] or from the first block's input, hidden [1, T, d]. Returns
    layer -> worst relative error; raises RuntimeError when a head is not the
    teacher's (above `most`) or a parameter of the mixer was left unset (not finite).
    """
    worst = {}
    for i, normed, _, _ in teacher.attention_taps(input_ids, layers=layers, hidden=hidden):
        soft, linear = teacher.layers[i].self_attn, student.layers[i].attention
        normed = normed.float()
        for name, p in linear.named_parameters():
            if not torch.isfinite(p).all():
                raise RuntimeError(f"transfer: {name} of layer {i} was left unset")
        soft = copy.deepcopy(soft).float()
        groups = soft.num_heads // soft.num_kv_heads
        expected = soft.project(normed)
        high = 0.0
        for what, t, s in zip("qkv", expected, linear.qkv(normed), strict=True):
            if t.shape[2] != s.shape[2]:
                t = t.repeat_interleave(groups, 2)
            norm = {"q": soft.q_norm, "k": soft.k_norm, "v": None}[what]
            if norm is not None:
                t = t * norm.weight
            for head in range(t.shape[2]):
                right, mine = t[:, :, head], s[:, :, head]
                size = right.norm().clamp(min=torch.finfo(right.dtype).tiny)  # 0 of a pruned head
                error = ((mine - right).norm() / size).item()
                high = max(high, error)
                if not error < most:
                    raise RuntimeError(
                        f"transfer: layer {i}, {what} of head {head}: relative error {error:.3f} "
                        f"to the teacher, below {most:g} expected"
                    )
        worst[i] = high
    return worst
