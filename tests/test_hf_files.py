"""Folders that are odd or damaged: what is read all the same, and the UserError that names what is
not."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from kit import logits, tiny_model
from safetensors.torch import load_file, save_file
from test_hf import FAMILIES, IDS, LLAMA3, edit_config, stock

from config import UserError
from hf import load_model, load_shape, read_config, save_model, tokenizer_spec


def test_an_empty_list_of_ends_is_none(folder):
    edit_config(folder, lambda raw: raw.update(eos_token_id=[], bos_token_id=[]))
    config = read_config(folder)
    assert config.eos_token_id is config.bos_token_id is None


CONFIG_FAULTS = {
    "unknown type": (lambda c: c.update(model_type="mamba"), "mamba"),
    "no type": (lambda c: c.pop("model_type"), "model_type"),
    "activation": (lambda c: c.update(hidden_act="gelu"), "hidden_act gelu"),
    "mlp bias": (lambda c: c.update(mlp_bias=True), "mlp_bias"),
    "quantised": (lambda c: c.update(quantization_config={"bits": 4}), "quantization_config"),
    "partial rotary": (lambda c: c.update(partial_rotary_factor=0.25), "partial_rotary_factor"),
    "partial rotary, version 5": (
        lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5), "partial_rotary_factor",
    ),
    "yarn": (lambda c: c["rope_parameters"].update(rope_type="yarn", factor=4.0), "yarn"),
    "llama3 without its factors": (
        lambda c: c["rope_parameters"].update(rope_type="llama3", factor=4.0), "low_freq_factor",
    ),
    "scaling beside plain parameters": (
        lambda c: c.update(rope_scaling=LLAMA3), "rope_scaling .*llama3.* and rope_parameters",
    ),
    "other scaling beside parameters": (
        lambda c: c.update(rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "factor": 4.0}),
        "rope_scaling .* and rope_parameters",
    ),
    "parameters beside plain scaling": (
        lambda c: c.update(rope_scaling={"type": "default"}, rope_parameters=LLAMA3),
        "rope_scaling .* and rope_parameters",
    ),
    "no vocab": (lambda c: c.pop("vocab_size"), "vocab_size"),
    "text for a number": (lambda c: c.update(hidden_size="32"), "hidden_size"),
    "text for kv heads": (lambda c: c.update(num_key_value_heads="2"), "num_key_value_heads: '2'"),
    "fraction": (lambda c: c.update(head_dim=12.0), r"head_dim: 12\.0"),
    "text for epsilon": (lambda c: c.update(rms_norm_eps="1e-6"), "rms_norm_eps: '1e-6'"),
    "no context": (lambda c: c.update(max_position_embeddings=None), "max_position_emb.*: None"),
    "no heads": (lambda c: c.update(num_attention_heads=0, head_dim=None), "attention_heads: 0"),
    "text for theta": (
        lambda c: c.update(rope_theta="x", rope_parameters=None), "rope_theta is 'x'",
    ),
    "text for scaling": (lambda c: c.update(rope_scaling="linear"), "rope_scaling is 'linear'"),
    "llama3 with no factor": (
        lambda c: c["rope_parameters"].update(LLAMA3, factor=None), "rope_scaling: factor None",
    ),
    "text for windows": (
        lambda c: c.update(model_type="qwen2", use_sliding_window=True, max_window_layers="1"),
        "max_window_layers is '1'",
    ),
    "number for types": (
        lambda c: c.update(model_type="qwen2", use_sliding_window=True, layer_types=-1),
        "layer_types: -1 found",
    ),
    "true for a size": (lambda c: c.update(hidden_size=True), "hidden_size is True"),
    "true for kv heads": (lambda c: c.update(num_key_value_heads=True), "_heads: True found, int"),
    "true for epsilon": (lambda c: c.update(rms_norm_eps=True), "rms_norm_eps: True found, float"),
    "true for theta": (
        lambda c: c.update(rope_theta=True, rope_parameters=None), "rope_theta is True",
    ),
    "true for a factor": (
        lambda c: c["rope_parameters"].update(LLAMA3, factor=True), "rope_scaling: factor True",
    ),
    "true for windows": (
        lambda c: c.update(model_type="qwen2", use_sliding_window=True, max_window_layers=True),
        "max_window_layers is True",
    ),
    "heads do not divide": (lambda c: c.update(num_key_value_heads=3), "num_key_value_heads"),
    "odd head": (lambda c: c.update(head_dim=7), "head_dim"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "m"
    stock(FAMILIES["llama biases"]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "m")


@pytest.mark.parametrize(("change", "named"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_config_that_is_refused(change, named, folder):
    edit_config(folder, change)
    with pytest.raises(UserError, match=rf"m/config\.json: .*{named}"):
        load_model(folder)


RETORT_FAULTS = [
    ("layer_types", -1), ("layer_types", "x"), ("mixer", -1), ("mixer", "x"),
    ("rope_scaling", "x"), ("linear_value_head_dim", -1), ("vocab_size", True),
    ("tie_word_embeddings", "x"), ("linear_feature_map", -1), ("eos_token_id", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"model_type": "retort"}', "field 'retort'"),
        ('{"model_type": "retort", "retort": {"new_field": 1}}', "new_field"),
        (
            '{"model_type": "retort", "retort": {"num_hidden_layers": "2"}}',
            "num_hidden_layers: '2'",
        ),
        (
            '{"model_type": "retort", "retort": {"num_hidden_layers": 1, '
            '"layer_types": ["linear_attention"], "mixer": [["gla"]]}}',
            r"mixer: \[\['gla'\]\] found, 1 names expected",
        ),
        *(
            (json.dumps({"model_type": "retort", "retort": {name: value}}), f"{name}: {value!r}")
            for name, value in RETORT_FAULTS
        ),
    ],
)
def test_config_file_that_is_refused(text, named, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"m/config\.json: .*{named}"):
        load_model(folder)


def test_a_tokenizer_that_is_no_name_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"retort_tokenizer": 5}')
    with pytest.raises(UserError, match=r"no tokenizer\.json; --tokenizer has to name one"):
        tokenizer_spec(tmp_path)


def test_one_file_goes_before_an_index(folder):
    """As in transformers: an index may be what an earlier model left."""
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(folder)


# With its weights, and as FSDP2's ranks begin: shapes alone, but of weights that are there.
READERS = {"whole": load_model, "shape": lambda folder: load_shape(folder, torch.bfloat16)}


every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@every_reader
def test_missing_files_are_named(read, folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*config\.json"):
        read(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        read(folder)
    for found in ({}, *({"weight_map": m} for m in ({}, [1], "x", {"model.norm.weight": 1}))):
        (folder / "model.safetensors.index.json").write_text(json.dumps(found))
        with pytest.raises(UserError, match=r"index\.json: no weight_map from names to files"):
            read(folder)


@every_reader
@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "header", "tensors", "last byte"])
def test_truncated_weights(read, keep, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole"):
        read(folder)


Q = "model.layers.1.self_attn.q_proj"
WEIGHT_FAULTS = {
    "missing weight": (lambda w: w.pop(f"{Q}.weight"), "layers.1.self_attn.q_proj.weight.*missing"),
    "missing bias": (lambda w: w.pop(f"{Q}.bias"), "layers.1.self_attn.q_proj.bias.*missing"),
    "missing head": (lambda w: w.pop("lm_head.weight"), "lm_head.weight.*missing"),
    "extra": (lambda w: w.update({f"{Q}.lora_A": torch.ones(2)}), "q_proj.lora_A"),
    "extra layer": (
        lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32)}), "layers.3",
    ),
    "shape": (lambda w: w.update({f"{Q}.weight": torch.ones(32, 31)}), r"q_proj.*\(32, 31\)"),
}  # fmt: skip


@every_reader
@pytest.mark.parametrize(("change", "named"), WEIGHT_FAULTS.values(), ids=WEIGHT_FAULTS)
def test_weights_that_do_not_fit(read, change, named, folder):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=named):
        read(folder)


def test_what_old_files_carry_besides_is_ignored(folder):
    weights = load_file(folder / "model.safetensors")
    expected = logits(load_model(folder), IDS)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    assert torch.equal(logits(load_model(folder), IDS), expected)


@every_reader
def test_tied_model_with_a_stored_head(read, tmp_path):
    """Some published tied checkpoints repeat the embedding as lm_head.weight; another one is that
    of a model that is not tied."""
    model = tiny_model("F", dtype=torch.float32)
    save_model(model, tmp_path / "m", tokenizer_from="byte")
    weights = load_file(tmp_path / "m/model.safetensors")
    weights["lm_head.weight"] = copy.deepcopy(weights["model.embed_tokens.weight"])
    save_file(weights, tmp_path / "m/model.safetensors")
    read(tmp_path / "m")
    assert torch.equal(logits(load_model(tmp_path / "m"), IDS), logits(model, IDS))
    weights["lm_head.weight"][-1] += 1
    save_file(weights, tmp_path / "m/model.safetensors")
    with pytest.raises(UserError, match=r"m: lm_head.* differs from embed_tokens"):
        read(tmp_path / "m")
