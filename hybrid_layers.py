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

from config import ModelConfig, UserError
from mixers.gated_deltanet import GatedDeltaNet

MIXERS: dict[str, type[nn.Module]] = {
    "gated_deltanet": GatedDeltaNet,
}


def build_mixer(name: str, config: ModelConfig) -> nn.Module:
    """A mixer by name; UserError lists the valid ones."""
    if name not in MIXERS:
        raise UserError(f"--mixer: '{name}' found, one of {', '.join(MIXERS)} expected")
    return MIXERS[name](config)


def mixer_names(spec: str, count: int) -> list[str]:
    """`spec` (one name, or one per linear layer) as a list of `count` names."""
    names = [n.strip() for n in spec.split(",")]
    names = names * count if len(names) == 1 else names
    if len(names) != count:
        raise UserError(f"--mixer: {len(names)} names found, 1 or {count} (linear layers) expected")
    for name in names:
        if name not in MIXERS:
            raise UserError(f"--mixer: '{name}' found, one of {', '.join(MIXERS)} expected")
    return names


def convert_config(
    config: ModelConfig, layers: list[int], mixer: str, *, linear_rope: bool = False
) -> ModelConfig:
    """The teacher's config with `layers` made linear: one linear head per softmax query head."""
    kinds = list(config.layer_types)
    for i in layers:
        if kinds[i] == "linear_attention":
            raise UserError(f"--layers: layer {i} of the teacher is linear already")
        kinds[i] = "linear_attention"
    old = iter(config.mixer)
    new = iter(mixer_names(mixer, len(layers)))
    names = []
    for i, kind in enumerate(kinds):
        if kind == "linear_attention":
            names.append(next(new) if i in layers else next(old))
    student = dataclasses.replace(
        config, layer_types=kinds, mixer=names,
        linear_num_key_heads=config.num_attention_heads,
        linear_num_value_heads=config.num_attention_heads,
        linear_key_head_dim=config.head_dim, linear_value_head_dim=config.head_dim,
        linear_bias=config.attention_bias, linear_rope=linear_rope,
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
    linear_rope: bool = False,
    share_trunk: bool = False,
) -> nn.Module:
    """A student with the teacher's weights whose `layers` are linear, initialised from the
    softmax layers they replace (float32).

    share_trunk: the student's other parameters are the teacher's own tensors, frozen, so that a
    run that trains only mixers holds one copy of the trunk. Otherwise they are float32 copies.
    """
    config = convert_config(teacher.config, layers, mixer, linear_rope=linear_rope)
    if config.attention_output_bias:
        raise UserError("--teacher: a bias on o_proj found; linear layers have none to carry it")
    memo = {id(p): p for p in teacher.parameters()} if share_trunk else {}
    student = copy.deepcopy(teacher, memo)
    if not share_trunk:
        student.float()
    student.config = config
    for i in layers:
        block = student.layers[i]
        linear = build_mixer(config.mixer_name(i), config)
        linear.from_attention(teacher.layers[i].self_attn)
        block.linear_attn = linear.to(next(teacher.parameters()).device)
        block.kind = "linear_attention"
        del block.self_attn
    for p in student.parameters():
        p.requires_grad_(True)
    if share_trunk:
        for p in teacher.parameters():
            p.requires_grad_(False)
    return student


def mixer_parameters(model: nn.Module, layers: list[int] | None = None) -> dict[str, nn.Parameter]:
    """name -> parameter of the linear mixers (of `layers` only, if given)."""
    wanted = None if layers is None else tuple(f"layers.{i}.linear_attn." for i in layers)
    return {
        n: p
        for n, p in model.named_parameters()
        if (".linear_attn." in n if wanted is None else n.startswith(wanted))
    }


@torch.no_grad()
def check_transfer(
    teacher: nn.Module, student: nn.Module, layers: list[int], input_ids: Tensor
) -> dict[int, float]:
    """Compare q, k, v of teacher and student per head right after projection, before conv, norm
    and RoPE. Returns layer -> worst relative error; raises RuntimeError when a head is not the
    teacher's (above 1e-3) or a parameter of the mixer was left unset (not finite).
    """
    worst = {}
    for i, normed, _, _ in teacher.attention_taps(input_ids, layers=layers):
        soft, linear = teacher.layers[i].self_attn, student.layers[i].linear_attn
        normed = normed.float()
        for name, p in linear.named_parameters():
            if not torch.isfinite(p).all():
                raise RuntimeError(f"transfer: layers.{i}.linear_attn.{name} was left unset")
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
                error = ((mine - right).norm() / right.norm()).item()
                high = max(high, error)
                if not error < 1e-3:
                    raise RuntimeError(
                        f"transfer: layer {i}, {what} of head {head}: relative error {error:.3f} "
                        "to the teacher, below 1e-3 expected"
                    )
        worst[i] = high
    return worst
