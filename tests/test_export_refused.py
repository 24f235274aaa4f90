"""What no format can hold, and hybrid folders that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from kit import tiny_model
from test_export import BAMBA, MAMBA2, QWEN3_5, transformers
from test_tokenizer import make_folder

import hf
from config import ModelConfig, UserError
from hf import load_model, read_config, save_model
from tokenizer import load_tokenizer

# ---- formats that do not hold a model

UNFIT = {
    "other mixer": ("LFLF", {"mixer": ["gated_deltanet", "mamba2"]}, "qwen3_5_text",
                    "layer 2's mixer is mamba2, only gated_deltanet"),
    "llama style": ("LF", {"qk_norm": False}, "qwen3_5_text", "without q/k-norm"),
    "linear biases": ("LF", {"linear_bias": True}, "qwen3_5_text", "linear_bias"),
    "linear rope": ("LF", {"linear_rope": True}, "qwen3_5_text", "linear_rope"),
    "no gate": ("LF", {"linear_gate": False}, "qwen3_5_text", "linear_gate"),
    "sliding": ("LSF", {}, "qwen3_5_text", "layer 1 has a sliding window"),
    "sink": ("LF", {"attention_sink": True}, "qwen3_5_text", "sinks"),
    "some biases": ("LF", {"attention_bias": True}, "qwen3_5_text", "all or none"),
    "all linear": ("LL", {}, "qwen3_5_text", "no softmax layer"),
    "bamba, q/k-norm": ("LF", {"mixer": ["mamba2"]}, "bamba", "with q/k-norm"),
    "bamba, other mixer": ("LF", {"qk_norm": False}, "bamba", "only mamba2"),
    "bamba, no linear layer": ("FF", {"qk_norm": False}, "bamba", "no linear layer"),
    "bamba, no softmax layer": ("LL", {**MAMBA2, "mixer": ["mamba2"] * 2}, "bamba",
                                "no softmax layer"),
    "bamba, inner size": ("LF", {**MAMBA2, "mixer": ["mamba2"], "linear_value_head_dim": 7},
                          "bamba", "inner size 42"),
    "llama, hybrid": ("LF", {"qk_norm": False}, "llama", "layer 0 is linear"),
    "llama, q/k-norm": ("F", {}, "llama", "with q/k-norm"),
    "llama, sliding": ("FS", {"qk_norm": False}, "llama", "layer 1 has a sliding window"),
    "qwen2, no bias": ("F", {"qk_norm": False}, "qwen2", "other biases"),
    "qwen2, head size": ("F", {"qk_norm": False, "attention_bias": True}, "qwen2", "head_dim 8"),
    "qwen3, no q/k-norm": ("F", {"qk_norm": False}, "qwen3", "without q/k-norm"),
    "fla": ("LF", {}, "fla", "flash-attn"),
}  # fmt: skip


@pytest.mark.parametrize(("kinds", "settings", "kind", "named"), UNFIT.values(), ids=UNFIT)
def test_unfit(kinds, settings, kind, named):
    config = tiny_model("F").config
    shape = {k: getattr(config, k) for k in ("vocab_size", "hidden_size", "intermediate_size",
             "num_attention_heads", "num_key_value_heads", "head_dim")}  # fmt: skip
    names = {"F": "full_attention", "S": "sliding_attention", "L": "linear_attention"}
    shape |= {"layer_types": [names[k] for k in kinds], "num_hidden_layers": len(kinds),
              "sliding_window": 5 if "S" in kinds else 0} | settings  # fmt: skip
    reason = hf.FORMATS[kind](ModelConfig(**shape))
    assert named in reason and "\n" not in reason


def test_save_model_refuses_before_it_writes(tmp_path):
    model = tiny_model("LF", qk_norm=False)
    for kind in ("qwen3_5_text", "gguf"):
        with pytest.raises(UserError, match=rf"^--format:? '?{kind}"):
            save_model(model, tmp_path / "m", tokenizer_from="byte", format=kind)
    assert not list(tmp_path.iterdir())


def test_tokenizer_json_by_path(tmp_path):
    folder = make_folder(tmp_path / "tok", tokenizer_class="GPT2Tokenizer", eos_token="<|im_end|>")
    model = tiny_model("LF", dtype=torch.float32)
    for kind, expected in (
        ("retort", "GPT2Tokenizer"),
        ("qwen3_5_text", "PreTrainedTokenizerFast"),
    ):
        save_model(model, tmp_path / kind, tokenizer_from=folder / "tokenizer.json", format=kind)
        raw = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert raw["tokenizer_class"] == expected
        assert load_tokenizer(hf.tokenizer_spec(tmp_path / kind)).eos_token_id == 2


# ---- config.json that is refused


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("qwen3_5_text", {"model_type": "qwen3_5", "text_config": {}}, "nested in text_config"),
        ("qwen3_5_text", {"rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor 0.25"),
        ("qwen3_5_text", {"layer_types": None}, "layer_types is None"),
        ("qwen3_5_text", {"linear_key_head_dim": None}, "linear_key_head_dim is None"),
        ("qwen3_5_text", {"rms_norm_eps": None}, "rms_norm_eps is None"),
        ("bamba", {"rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor 0.5"),
        ("bamba", {"rope_parameters": {}, "partial_rotary_factor": 1.0}, "partial_rotary_factor"),
        ("bamba", {"mamba_conv_bias": False}, "mamba_conv_bias False"),
        ("bamba", {"mamba_proj_bias": True}, "mamba_proj_bias True"),
        ("bamba", {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ("bamba", {"mamba_d_head": "auto"}, "mamba_d_head is auto"),
        ("bamba", {"mlp_bias": True}, "mlp_bias"),
        ("bamba", {"mamba_d_head": -4}, "linear_value_head_dim: -4 found, a positive number"),
        ("bamba", {"mamba_n_groups": True}, "mamba_n_groups is True, a whole number"),
        ("bamba", {"attn_layer_indices": "x"}, "attn_layer_indices is 'x', a list"),
        ("bamba", {"attn_layer_indices": -1}, "attn_layer_indices is -1, a list"),
        ("bamba", {"time_step_limit": 5}, "time_step_limit 5 is not supported"),
        ("qwen3_5_text", {"linear_num_key_heads": -2}, "linear_num_key_heads: -2 found"),
        ("qwen3_5_text", {"linear_key_head_dim": -8}, "linear_key_head_dim: -8 found"),
        ("qwen3_5_text", {"layer_types": [["full_attention"]] * 3}, "layer_types: '\\['full"),
    ],
)
def test_hybrid_config_that_is_refused(kind, change, named, tmp_path):
    settings = QWEN3_5 if kind == "qwen3_5_text" else BAMBA
    raw = transformers.AutoConfig.for_model(kind, **settings).to_json_string()
    (tmp_path / "config.json").write_text(raw)
    assert read_config(tmp_path).layer_map() == ("LFF" if kind == "qwen3_5_text" else "LFL")
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(raw), **change}))
    with pytest.raises(UserError, match=named):
        read_config(tmp_path)


def test_hybrid_weights_of_another_shape(tmp_path):
    model = tiny_model("LF", dtype=torch.float32)
    save_model(model, tmp_path / "m", tokenizer_from="byte", format="qwen3_5_text")
    path = tmp_path / "m/config.json"
    raw = json.loads(path.read_text())
    for change, named in (
        ({"linear_key_head_dim": 4}, r"layers.0.linear_attn.conv1d.weight has 96 rows, 64"),
        ({"head_dim": 16}, r"layers.1.self_attn.q_proj.weight has 64 rows, 128"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(UserError, match=named):
            load_model(tmp_path / "m")
