"""Import and export against stock transformers; our own format."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from kit import assert_close_rms, logits, random_ids, randomise, tiny_model
from safetensors.torch import load_file, save_file

import hf_files
from config import UserError
from hf import load_model, load_shape, read_config, save_model, stock_type, tokenizer_spec
from hf_files import fingerprint
from hybrid_layers import MIXERS
from optimizer import param_role

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHAPE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
)  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FAMILIES = {
    "llama": ("llama", {}),
    "llama mha": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "llama biases": ("llama", {"attention_bias": True}),
    "smollm2": (
        "llama",
        {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 sliding": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 untied biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3 sliding": ("qwen3", {"head_dim": 8, **WINDOW}),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
IDS = torch.randint(61, (2, 41), generator=torch.Generator().manual_seed(0))


def stock(family):
    """A random model of transformers, every bias and norm weight included."""
    kind, settings = family
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomise(model, seed=4).eval()


@torch.no_grad()
def stock_logits(model):
    return model(IDS).logits


def load_stock(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def assert_same_logits(actual, expected):
    assert expected.std() > 0.5, "logits too flat to tell anything"
    assert (actual - expected).abs().max() <= 1e-4


def edit_config(folder, change):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def spelled_as_in_version_4(raw):
    """rope_theta and rope_scaling at the top, torch_dtype."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    raw["torch_dtype"] = raw.pop("dtype")
    raw.pop("layer_types", None)


@every_family
def test_import_equals_transformers(family, tmp_path):
    peer = stock(family)
    peer.save_pretrained(tmp_path / "m")
    expected = stock_logits(peer)
    raw = json.loads((tmp_path / "m/config.json").read_text())
    assert "rope_parameters" in raw and "dtype" in raw  # version 5's spelling, as written
    config = read_config(tmp_path / "m")
    with torch.no_grad():
        assert_same_logits(logits(load_model(tmp_path / "m"), IDS), expected)
        edit_config(tmp_path / "m", spelled_as_in_version_4)
        assert_same_logits(logits(load_model(tmp_path / "m"), IDS), expected)
    assert read_config(tmp_path / "m") == config


@every_family
def test_export_equals_transformers_and_comes_back(family, tmp_path):
    peer = stock(family)
    peer.save_pretrained(tmp_path / "m")
    ours = load_model(tmp_path / "m")
    assert save_model(ours, tmp_path / "out", tokenizer_from="byte") == family[0]
    again = load_stock(tmp_path / "out")
    assert type(again) is type(peer)
    assert_same_logits(stock_logits(again), stock_logits(peer))
    back = load_model(tmp_path / "out")
    assert back.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_old_rope_type_spelling(tmp_path):
    peer = stock(FAMILIES["llama 3"])
    peer.save_pretrained(tmp_path / "m")

    def change(raw):
        spelled_as_in_version_4(raw)
        raw["rope_scaling"]["type"] = raw["rope_scaling"].pop("rope_type")

    both = json.loads((tmp_path / "m/config.json").read_text())["rope_parameters"]
    edit_config(tmp_path / "m", change)
    expected = stock_logits(peer)
    with torch.no_grad():
        assert_same_logits(logits(load_model(tmp_path / "m"), IDS), expected)
        edit_config(tmp_path / "m", lambda raw: raw.update(rope_parameters=both))
        assert_same_logits(logits(load_model(tmp_path / "m"), IDS), expected)


def test_indexed_shards(tmp_path):
    peer = stock(FAMILIES["qwen3"])
    peer.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert_same_logits(logits(load_model(tmp_path / "m"), IDS), stock_logits(peer))
    next((tmp_path / "m").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"no model-0000\d-of"):
        load_model(tmp_path / "m")


def test_our_shards_load_in_transformers_too(tmp_path, monkeypatch):
    peer = stock(FAMILIES["qwen2"])
    peer.save_pretrained(tmp_path / "m")
    ours = load_model(tmp_path / "m")
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 20_000)
    save_model(ours, tmp_path / "out", tokenizer_from="byte")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    held = {f.name: load_file(f) for f in files}
    assert len(files) > 2
    assert {k: n for n, tensors in held.items() for k in tensors} == index["weight_map"]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= 20_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert_same_logits(stock_logits(load_stock(tmp_path / "out")), stock_logits(peer))
    with torch.no_grad():
        assert_same_logits(logits(load_model(tmp_path / "out"), IDS), stock_logits(peer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hybrid_round_trip_is_bitwise(dtype, tmp_path):
    model = tiny_model(
        "SLFL", dtype=dtype, linear_bias=True, linear_rope=True, attention_sink=True,
        rope_scaling=LLAMA3, eos_token_id=2, linear_num_value_heads=8,
    )  # fmt: skip
    for parameter in (model.layers[1].linear_attn.A_log, model.layers[3].linear_attn.dt_bias):
        parameter.data = parameter.data.float()  # kept in float32 when the rest is not
    assert save_model(model, tmp_path / "m", tokenizer_from="byte") == "retort"
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    if dtype == torch.float32:  # mixed types only run under autocast
        ids = random_ids(model, 1, 33)
        assert torch.equal(logits(back, ids), logits(model, ids))


def test_dtypes_on_load_and_save(tmp_path):
    model = tiny_model("F", dtype=torch.float32)
    save_model(model, tmp_path / "m", tokenizer_from="byte", dtype=torch.bfloat16)
    raw = json.loads((tmp_path / "m/config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert model.norm.weight.dtype == torch.float32
    stored, wide = load_model(tmp_path / "m"), load_model(tmp_path / "m", dtype=torch.float32)
    for name, p in model.named_parameters():
        assert stored.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(wide.get_parameter(name), p.bfloat16().float())


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_hybrid_is_no_other_in_bfloat16(mixer, tmp_path):
    """As a teacher, whole or in FSDP2's pieces: matrices are rounded, decays, norms and
    convolutions are not."""
    kinds = "FS" if mixer == "sliding_window" else "FL"
    model = tiny_model(kinds, dtype=torch.float32, mixer=[mixer] * kinds.count("L"))
    save_model(model, tmp_path / "m", tokenizer_from="byte")
    back = load_model(tmp_path / "m", dtype=torch.bfloat16)
    types = {n: p.dtype for n, p in load_shape(tmp_path / "m", torch.bfloat16).named_parameters()}
    for name, p in model.named_parameters():
        kept = ".linear_attn." in name and param_role(name, p) == "no_decay"
        want = p if kept else p.bfloat16()
        assert back.get_parameter(name).dtype == types[name] == want.dtype, name
        assert torch.equal(back.get_parameter(name), want), name
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_rms(back(random_ids(model, 1, 33)), model(random_ids(model, 1, 33)), 0.05)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_bfloat16_folder_holds_what_is_loaded_in_bfloat16(mixer, tmp_path):
    """Of our own format: decays and norms of linear layers are not rounded on the way there."""
    kinds = "FS" if mixer == "sliding_window" else "FL"
    model = tiny_model(kinds, dtype=torch.float32, mixer=[mixer] * kinds.count("L"))
    save_model(model, tmp_path / "wide", tokenizer_from="byte")
    save_model(model, tmp_path / "m", tokenizer_from="byte", dtype=torch.bfloat16)
    stored = load_model(tmp_path / "m").state_dict()
    for name, tensor in load_model(tmp_path / "wide", dtype=torch.bfloat16).state_dict().items():
        assert stored[name].dtype == tensor.dtype, name
        assert torch.equal(stored[name], tensor), name


def test_saving_replaces_the_folder_and_leaves_nothing_else(tmp_path):
    save_model(tiny_model("F"), tmp_path / "m", tokenizer_from="byte")
    (tmp_path / "m/stray").touch()
    new = tiny_model("F", seed=1)
    save_model(new, tmp_path / "m", tokenizer_from="byte")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    assert torch.equal(load_model(tmp_path / "m").norm.weight, new.norm.weight)


def test_tokenizer_files_travel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "generation_config.json", "merges.txt")  # fmt: skip
    for name in files:
        (source / name).write_text(f"{{}} {name}")
    (source / "optimizer.pt").touch()
    save_model(tiny_model("F"), tmp_path / "a", tokenizer_from=source)
    save_model(tiny_model("L"), tmp_path / "b", tokenizer_from=tmp_path / "a")
    save_model(tiny_model("L"), tmp_path / "d", tokenizer_from=source / "tokenizer.json")
    for folder in (tmp_path / n for n in "abd"):
        for name in files:
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert not (folder / "optimizer.pt").exists()
        assert tokenizer_spec(folder) == str(folder)
    save_model(tiny_model("L"), tmp_path / "c", tokenizer_from="gpt2")
    assert tokenizer_spec(tmp_path / "c") == "gpt2"
    edit_config(tmp_path / "c", lambda raw: raw.pop("retort_tokenizer"))
    with pytest.raises(UserError, match="--tokenizer"):
        tokenizer_spec(tmp_path / "c")


@pytest.mark.parametrize("kinds", ["F", "L"])
def test_a_list_of_ends_is_kept(kinds, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    model = tiny_model(kinds, eos_token_id=5)
    for listed, written in (([7, 5, 9], [5, 7, 9]), ([7, 9], None), ([], None), (5, None)):
        (source / "config.json").write_text(json.dumps({"eos_token_id": listed}))
        for given in (source, source / "tokenizer.json"):
            save_model(model, tmp_path / "m", tokenizer_from=given)
            raw = json.loads((tmp_path / "m/config.json").read_text())
            assert raw.get("eos_token_id") == (written or (5 if kinds == "F" else None))
            assert read_config(tmp_path / "m").eos_token_id == 5


@pytest.mark.parametrize(
    ("kinds", "settings", "expected"),
    [
        ("F", {"qk_norm": False}, "llama"),
        ("F", {"qk_norm": False, "attention_bias": True, "attention_output_bias": True}, "llama"),
        ("F", {"qk_norm": False, "attention_bias": True, "hidden_size": 32}, "qwen2"),
        ("F", {"qk_norm": False, "attention_bias": True}, None),  # head_dim x heads is not hidden
        ("F", {"qk_norm": False, "attention_output_bias": True}, None),
        ("FS", {"qk_norm": False}, None),
        ("FS", {}, "qwen3"),
        ("F", {"attention_bias": True}, None),
        ("F", {"attention_sink": True}, None),
        ("FL", {}, None),
    ],
)
def test_stock_type_is_one_that_holds_every_weight(kinds, settings, expected, tmp_path):
    model = tiny_model(kinds, dtype=torch.float32, **settings)
    assert stock_type(model.config) == expected
    assert save_model(model, tmp_path / "m", tokenizer_from="byte") == (expected or "retort")
    ids = random_ids(model, 1, 33)
    with torch.no_grad():
        wanted = logits(model, ids)
        assert torch.equal(logits(load_model(tmp_path / "m"), ids), wanted)
        if expected:
            assert_same_logits(load_stock(tmp_path / "m")(ids).logits, wanted)


def test_fingerprint_sees_config_and_weights(tmp_path):
    save_model(tiny_model("F"), tmp_path / "a", tokenizer_from="byte")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == same
    edit_config(tmp_path / "b", lambda raw: raw.update(rope_theta=7.0))
    assert fingerprint(tmp_path / "b") != same
    save_model(tiny_model("F", seed=1), tmp_path / "a", tokenizer_from="byte")
    assert fingerprint(tmp_path / "a") != same


def test_fingerprint_sees_every_tensor(tmp_path):
    """Also one in the middle of a file that is much larger than a MiB at either end."""
    model = tiny_model("FLF", dtype=torch.float32, intermediate_size=12_000)
    save_model(model, tmp_path / "a", tokenizer_from="byte")
    path = tmp_path / "a" / "model.safetensors"
    weights, found = load_file(path), {fingerprint(tmp_path / "a")}
    mine = [key for key in weights if ".layers.1.linear_attn." in key]
    for key in mine:
        one = weights | {key: weights[key] + 1}
        save_file(one, path, metadata={"format": "pt"})
        found.add(fingerprint(tmp_path / "a"))
    assert len(found) == 1 + len(mine) > 5
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        fingerprint(tmp_path / "a")


def test_all_files_have_the_same_mode(tmp_path):
    save_model(tiny_model("FL", dtype=torch.float32), tmp_path / "m", tokenizer_from="byte")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert len(modes) >= 2 and len(set(modes.values())) == 1, modes
