"""The two stock classes that hold hybrids: what fits them, their config.json, their weight names.

    qwen3_5_text  Qwen3_5ForCausalLM: gated_deltanet beside softmax layers with q/k-norm
    bamba         BambaForCausalLM: mamba2 beside softmax layers without q/k-norm

Used by `hf.py` only; the two are the only files that know Hugging Face's key names. Every map here
is exact but for one rounding: qwen3_5_text stores norm weights w as w - 1.
Check: `pytest tests/test_export.py`.
Shapes: d hidden size, H query heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import ModelConfig, UserError

# The share of a head that is rotated when config.json does not say. Ours is always 1.
ROTARY_SHARE = {"qwen3_5_text": 0.25, "bamba": 0.5}

# Kept in float32 at least when matrices are stored narrower: w - 1 of a small w has few digits
# left in bfloat16, and so has a decay near one.
WIDE = ("norm.weight", ".A_log", ".dt_bias", ".D")

# fields of config.json that are named as ours
QWEN3_5_SHAPE = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip
# native name below `linear_attn.` -> Qwen3.5's
QWEN3_5 = {
    "g_proj.weight": "in_proj_z.weight",
    "b_proj.weight": "in_proj_b.weight",
    "a_proj.weight": "in_proj_a.weight",
    "o_norm.weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
}
# Qwen3.5's name -> the native ones that are its rows, in order
QWEN3_5_ROWS = {
    "in_proj_qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "conv1d.weight": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
}
# part of a native name -> Bamba's
BAMBA = {
    ".mlp.": ".feed_forward.",
    ".post_attention_layernorm.": ".pre_ff_layernorm.",
    ".linear_attn.": ".mamba.",
}


# ---- which models fit


def _unfit(config: ModelConfig, mixer: str) -> str | None:
    """What neither class holds."""
    kinds = config.layer_types
    for i, kind in enumerate(kinds):
        if kind == "sliding_attention":
            return f"layer {i} has a sliding window, full attention expected"
        if kind == "linear_attention" and config.mixer_name(i) != mixer:
            return f"layer {i}'s mixer is {config.mixer_name(i)}, only {mixer} expected"
    if config.attention_sink:
        return "attention sinks found, none expected"
    if config.attention_bias != config.attention_output_bias:
        return "biases on only some of q, k, v, o found, all or none expected"
    if "linear_attention" in kinds and config.linear_bias:
        return "q, k, v biases in linear layers (linear_bias) found, none expected"
    if "linear_attention" in kinds and config.linear_rope:
        return "rotated linear layers (linear_rope) found, none expected"
    if "linear_attention" in kinds and not config.linear_gate:
        return "linear layers without a gate (linear_gate) found, with one expected"
    return None


def unfit_qwen3_5_text(config: ModelConfig) -> str | None:
    """Why Qwen3_5ForCausalLM cannot hold the model, or None."""
    if reason := _unfit(config, "gated_deltanet"):
        return reason
    if "full_attention" not in config.layer_types:
        return "no softmax layer found, at least one expected (transformers' cache needs it)"
    if not config.qk_norm:
        return "softmax layers without q/k-norm (Llama, Qwen2) found, Qwen3's q/k-norm expected"
    return None


def unfit_bamba(config: ModelConfig) -> str | None:
    """Why BambaForCausalLM cannot hold the model, or None."""
    if "linear_attention" not in config.layer_types:
        return "no linear layer found, at least one of mamba2 expected"
    if reason := _unfit(config, "mamba2"):
        return reason
    if "full_attention" not in config.layer_types:
        return "no softmax layer found, at least one expected (transformers' cache needs it)"
    if config.qk_norm:
        return "softmax layers with q/k-norm (Qwen3) found, none expected"
    inner = config.linear_num_value_heads * config.linear_value_head_dim
    if inner % config.hidden_size:
        return (
            f"mamba2's inner size {inner} found, a multiple of hidden_size "
            f"{config.hidden_size} expected"
        )
    return None


# ---- config.json


def to_config(config: ModelConfig, kind: str) -> dict:
    """The fields of config.json beside those that every class has."""
    rope = config.rope_scaling or {"rope_type": "default"}
    rope = {**rope, "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    if kind == "qwen3_5_text":
        names = ("layer_types", *QWEN3_5_SHAPE)
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "rope_parameters": rope,
            **{name: getattr(config, name) for name in names},
        }
    heads, size = config.linear_num_value_heads, config.linear_value_head_dim
    return {
        "architectures": ["BambaForCausalLM"],
        "rope_parameters": rope,
        "attn_layer_indices": [
            i for i, t in enumerate(config.layer_types) if t == "full_attention"
        ],
        "mamba_n_heads": heads,
        "mamba_d_head": size,
        "mamba_n_groups": config.linear_num_key_heads,
        "mamba_d_state": config.linear_key_head_dim,
        "mamba_d_conv": config.linear_conv_kernel_dim,
        "mamba_expand": heads * size // config.hidden_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "pad_token_id": None,  # Bamba's defaults name tokens
    }


def from_config(raw: dict, path) -> dict:
    """ModelConfig fields of a hybrid's config.json. UserError for what ours cannot represent."""

    def number(key: str) -> int:
        if type(raw.get(key)) is not int:  # True is an int to isinstance
            raise UserError(f"{path}: {key} is {raw.get(key)}, a whole number expected")
        return raw[key]

    if not isinstance(raw.get("rms_norm_eps"), float):
        raise UserError(f"{path}: rms_norm_eps is {raw.get('rms_norm_eps')}, a number expected")
    number("num_key_value_heads")
    layers = raw["num_hidden_layers"]
    if raw["model_type"] == "qwen3_5_text":
        kinds = raw.get("layer_types")
        if not isinstance(kinds, list):
            raise UserError(f"{path}: layer_types is {kinds}, a list expected")
        number("head_dim")
        shape = {name: number(name) for name in QWEN3_5_SHAPE}
        mixer = "gated_deltanet"
    else:
        softmax = raw.get("attn_layer_indices") or []
        if not isinstance(softmax, list):
            raise UserError(f"{path}: attn_layer_indices is {softmax!r}, a list expected")
        kinds = ["full_attention" if i in softmax else "linear_attention" for i in range(layers)]
        for key, plain in (("mamba_conv_bias", True), ("mamba_proj_bias", False)):
            if raw.get(key, plain) != plain:
                raise UserError(f"{path}: {key} {raw[key]} is not supported, {plain} expected")
        free = [[0, float("inf")], [0, {"__float__": "Infinity"}]]
        if (limit := raw.get("time_step_limit") or free[0]) not in free:
            raise UserError(f"{path}: time_step_limit {limit} is not supported, none expected")
        shape = {
            "linear_num_value_heads": number("mamba_n_heads"),
            "linear_value_head_dim": number("mamba_d_head"),
            "linear_num_key_heads": number("mamba_n_groups"),
            "linear_key_head_dim": number("mamba_d_state"),
            "linear_conv_kernel_dim": number("mamba_d_conv"),
        }
        mixer = "mamba2"
    return {"layer_types": kinds, "mixer": [mixer] * kinds.count("linear_attention"), **shape}


# ---- weights: name without the leading `model.` <-> native name


def to_weights(state: dict[str, Tensor], config: ModelConfig, kind: str) -> dict[str, Tensor]:
    """A native state dict under the names, and in the form, of class `kind`."""
    return _to_qwen3_5(state, config) if kind == "qwen3_5_text" else _to_bamba(state)


def from_weights(
    tensors: dict[str, Tensor], config: ModelConfig, kind: str, folder
) -> dict[str, Tensor]:
    """The inverse. What has no place keeps its name, for the caller to refuse."""
    return (
        _from_qwen3_5(tensors, config, folder) if kind == "qwen3_5_text" else _from_bamba(tensors)
    )


def _is_offset(name: str) -> bool:
    """Norms stored as w - 1: of blocks, of q and k, the last one; not those of linear layers."""
    return name.endswith("norm.weight") and ".linear_attn." not in name


def _shift(tensor: Tensor, by: int) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + by


def _to_qwen3_5(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    out = {}
    joined = {leaf for leaves in QWEN3_5_ROWS.values() for leaf in leaves}
    for name, tensor in state.items():
        layer, inside, leaf = name.partition(".linear_attn.")
        if inside and leaf in joined:
            for theirs, mine in QWEN3_5_ROWS.items():
                if leaf == mine[0]:
                    parts = [state[layer + inside + m] for m in mine]
                    out[layer + inside + theirs] = torch.cat(parts)
        elif inside:
            out[layer + inside + QWEN3_5.get(leaf, leaf)] = tensor
        elif ".self_attn.q_proj." in name:  # per head: D query rows, then D gate rows
            rows = tensor.unflatten(0, (config.num_attention_heads, -1))  # [H, D, d] or [H, D]
            out[name] = torch.cat([rows, torch.zeros_like(rows)], 1).flatten(0, 1)
        elif name.endswith(".self_attn.o_proj.weight"):
            out[name] = tensor * 2  # a gate of zero lets sigmoid(0) = 1/2 through
        else:
            out[name] = _shift(tensor, -1) if _is_offset(name) else tensor
    return out


def _from_qwen3_5(tensors: dict[str, Tensor], config: ModelConfig, folder) -> dict[str, Tensor]:
    out, gated = {}, []
    native = {theirs: mine for mine, theirs in QWEN3_5.items()}
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    rows = [keys, keys, config.linear_num_value_heads * config.linear_value_head_dim]
    queries = config.num_attention_heads * config.head_dim

    def check(name: str, expected: int) -> None:
        if tensors[name].shape[0] != expected:
            raise UserError(
                f"{folder}: weight {name} has {tensors[name].shape[0]} rows, {expected} expected"
            )

    for name, tensor in tensors.items():
        layer, inside, leaf = name.partition(".linear_attn.")
        if inside and leaf in QWEN3_5_ROWS:
            check(name, sum(rows))
            for mine, part in zip(QWEN3_5_ROWS[leaf], tensor.split(rows), strict=True):
                out[layer + inside + mine] = part.contiguous()
        elif inside:
            out[layer + inside + native.get(leaf, leaf)] = tensor
        elif ".self_attn.q_proj." in name:
            check(name, 2 * queries)
            query, gate = tensor.unflatten(0, (config.num_attention_heads, 2, -1)).unbind(1)
            if gate.any():
                gated.append(int(name.split(".")[1]))
            out[name] = query.flatten(0, 1).contiguous()
        elif name.endswith(".self_attn.o_proj.weight"):
            out[name] = tensor / 2
        else:
            out[name] = _shift(tensor, 1) if _is_offset(name) else tensor
    if gated:
        raise UserError(
            f"{folder}: layer {min(gated)}'s attention has an output gate, which ours lacks; "
            "gate rows that are all zero, as in an export of ours, expected"
        )
    return out


def _to_bamba(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        for mine, theirs in BAMBA.items():
            name = name.replace(mine, theirs)
        out["final_layernorm.weight" if name == "norm.weight" else name] = tensor
    return out


def _from_bamba(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        for mine, theirs in BAMBA.items():
            name = name.replace(theirs, mine)
        out["norm.weight" if name == "final_layernorm.weight" else name] = tensor
    return out
