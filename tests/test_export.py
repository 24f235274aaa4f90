"""Hybrids to stock transformers classes and back; scripts/export.py; what is refused.

The classes are imported without fla, whose Triton kernels a CPU cannot run.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT, TEXT, call_script
from kit import logits, random_ids, randomise, tiny_model
from safetensors.torch import load_file
from test_tokenizer import make_folder

import hf
import hf_hybrids
from config import ModelConfig, UserError
from generate import generate
from hf import load_model, read_config, save_model
from shard_writer import ShardWriter
from tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

_SPEC = importlib.util.spec_from_file_location("export", ROOT / "scripts" / "export.py")
export = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(export)
for _kind in hf.HYBRIDS:
    export._import_transformers(_kind)

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
HYBRIDS = {
    "three to one": ("LLLF", {"eos_token_id": 7, "bos_token_id": 3}),
    "untied, llama 3, more value heads": (
        "FLF",
        {"tie_word_embeddings": False, "rope_scaling": LLAMA3, "rope_theta": 5e5,
         "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16,
         "linear_value_head_dim": 10, "linear_conv_kernel_dim": 3},
    ),
    "biases, large eps": (
        "LF", {"attention_bias": True, "attention_output_bias": True, "rms_norm_eps": 1e-2},
    ),
    "no linear layer": ("FF", {"num_key_value_heads": 1}),
}  # fmt: skip
every_hybrid = pytest.mark.parametrize(("kinds", "settings"), HYBRIDS.values(), ids=HYBRIDS)
MAMBA2 = dict(
    qk_norm=False, linear_num_value_heads=6, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_key_head_dim=12,
)  # fmt: skip
SHAPE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
QWEN3_5 = dict(
    **SHAPE, layer_types=["linear_attention", "full_attention", "full_attention"], head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=8,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
)  # fmt: skip
BAMBA = dict(
    **SHAPE, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_expand=2,
    mamba_n_groups=2, mamba_d_state=12, pad_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
)  # fmt: skip


def load_stock(folder):
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return peer.eval()


def stock(kind, **settings):
    """A random model of transformers, every bias and norm weight included."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    peer = transformers.AutoModelForCausalLM.from_config(config)
    randomise(peer, seed=4)
    if kind == "qwen3_5_text":  # those that hold w - 1
        for name, p in peer.named_parameters():
            if name.endswith("norm.weight") and ".linear_attn." not in name:
                p.data -= 1
    return peer.eval()


def greedy(peer, prompt, count=64):
    peer.generation_config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False)
    ids = torch.tensor([prompt])
    return peer.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()


@torch.no_grad()
def assert_same(ours, peer, ids, limit=1e-4):
    """Logits of a few hundred tokens, and 64 tokens chosen greedily from a prompt."""
    expected = logits(ours, ids)
    assert expected.std() > 0.5, "logits too flat to tell anything"
    assert (peer(ids).logits - expected).abs().max() <= limit
    prompt = ids[0, :13].tolist()
    mine = generate(ours, prompt, 64)
    assert len(set(mine)) > 1 and greedy(peer, prompt) == mine


def run(*argv):
    """scripts/export.py in this process."""
    export.main([str(a) for a in argv])


@pytest.fixture
def refused(capsys):
    """refused(*argv) -> the one line on stderr of an export that must exit with 2."""

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return call


# ---- qwen3_5_text


@every_hybrid
def test_hybrid_equals_transformers_and_comes_back(kinds, settings, tmp_path):
    model = tiny_model(kinds, dtype=torch.float32, hidden_size=48, head_dim=16, **settings)
    kind = "qwen3_5_text"
    assert save_model(model, tmp_path / "m", tokenizer_from="byte", format=kind) == kind
    assert not list((tmp_path / "m").glob("*.py"))
    peer = load_stock(tmp_path / "m")
    assert type(peer).__name__ == "Qwen3_5ForCausalLM"
    ids = random_ids(model, 1, 301)
    assert_same(model, peer, ids)
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    with torch.no_grad():
        assert (logits(back, ids) - logits(model, ids)).abs().max() <= 1e-4
    # Bitwise, but for weights below 1/2 of norms that are stored as w - 1.
    for name, tensor in model.state_dict().items():
        again = back.state_dict()[name]
        same = again == tensor
        if name.endswith("norm.weight") and ".linear_attn." not in name:
            assert (again - tensor).abs().max() <= 2**-24
            same |= tensor < 0.5
        assert same.all(), name


def test_bfloat16_keeps_norms_and_decays(tmp_path):
    model = tiny_model("LF", dtype=torch.float32)
    save_model(model, tmp_path / "m", tokenizer_from="byte", dtype=torch.bfloat16,
               format="qwen3_5_text")  # fmt: skip
    raw = json.loads((tmp_path / "m/config.json").read_text())
    assert raw["dtype"] == "bfloat16"
    for key, tensor in load_file(tmp_path / "m/model.safetensors").items():
        wide = key.endswith(("norm.weight", "A_log", "dt_bias"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), key
    back = load_model(tmp_path / "m", dtype=torch.float32)
    for name, tensor in hf.stored_state(model, "qwen3_5_text", torch.bfloat16).items():
        assert torch.allclose(back.get_parameter(name), tensor.float(), rtol=0, atol=2**-24), name
    mixed = load_model(tmp_path / "m")
    ids = random_ids(model, 1, 33)
    with torch.no_grad():
        exact, rounded = logits(back, ids), logits(mixed, ids)
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).abs().mean() < 0.1


def test_ungated_qwen3_5_is_read_and_a_gated_one_refused(tmp_path):
    peer = stock("qwen3_5_text", **QWEN3_5)
    peer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"layer 1's attention has an output gate"):
        load_model(tmp_path / "m")
    for layer in peer.model.layers[1:]:
        rows = layer.self_attn.q_proj.weight.data.view(4, 2, 16, 32)
        rows[:, 1] = 0
    peer.save_pretrained(tmp_path / "m")
    ours = load_model(tmp_path / "m")
    assert ours.config.layer_map() == "LFF"
    assert_same(ours, peer, random_ids(ours, 1, 301))
    peer.model.layers[2].self_attn.q_proj.weight.data[16, 3] = 1e-3
    peer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"layer 2's attention has an output gate"):
        load_model(tmp_path / "m")


# ---- bamba


def test_bamba_config_and_names():
    """The map alone, on transformers' own keys."""
    peer = stock("bamba", **BAMBA)
    raw = json.loads(peer.config.to_json_string())
    config = ModelConfig(**{**SHAPE, "head_dim": 8}, **hf_hybrids.from_config(raw, "m"))
    assert config.layer_map() == "LFL" and config.mixer == ["mamba2", "mamba2"]
    again = hf_hybrids.to_config(config, "bamba")
    assert {k: raw[k] for k in again if k != "architectures"} == {
        k: v for k, v in again.items() if k != "architectures"
    }
    theirs = {k.removeprefix("model."): v for k, v in peer.state_dict().items()}
    mine = hf_hybrids.from_weights(theirs, config, "bamba", "m")
    assert "layers.0.linear_attn.in_proj.weight" in mine and "norm.weight" in mine
    assert mine["layers.1.mlp.up_proj.weight"].shape == (48, 32)
    back = hf_hybrids.to_weights(mine, config, "bamba")
    assert back.keys() == theirs.keys() and all(back[k] is theirs[k] for k in theirs)


def test_bamba_is_read(tmp_path):
    peer = stock("bamba", **BAMBA, head_dim=16)
    peer.save_pretrained(tmp_path / "m")
    ours = load_model(tmp_path / "m")
    assert ours.config.layer_map() == "LFL"
    assert_same(ours, peer, random_ids(ours, 1, 301))


@pytest.mark.parametrize(
    ("kinds", "settings"),
    [
        ("LLF", {}),
        ("FL", {"rope_scaling": LLAMA3, "tie_word_embeddings": False, "head_dim": 16,
                "rms_norm_eps": 1e-2, "linear_conv_kernel_dim": 3, "linear_num_key_heads": 1}),
    ],
)  # fmt: skip
def test_bamba_equals_transformers_and_comes_back(kinds, settings, tmp_path):
    mixer = ["mamba2"] * kinds.count("L")
    shape = {**MAMBA2, "hidden_size": 48, **settings}
    model = tiny_model(kinds, dtype=torch.float32, mixer=mixer, **shape)
    save_model(model, tmp_path / "m", tokenizer_from="byte", format="bamba")
    peer = load_stock(tmp_path / "m")
    assert type(peer).__name__ == "BambaForCausalLM"
    assert_same(model, peer, random_ids(model, 1, 301))
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


# ---- the script, on a model distilled here


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """(run folder, tokenizer folder) of a Qwen3-shaped hybrid: pretrained, then distilled."""
    root = tmp_path_factory.mktemp("distilled")
    text = [TEXT.format(i, j) for i in range(40) for j in range(4)]
    folder = make_folder(
        root / "tok", texts=text, vocab_size=320, tokenizer_class="GPT2Tokenizer",
        eos_token="<|endoftext|>", chat_template="{{ messages }}",
    )  # fmt: skip
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tokenizer = load_tokenizer(str(folder))
    for split, part in (("train", text[:120]), ("val", text[120:])):
        with ShardWriter(root / "data", split, tokenizer) as writer:
            for line in part:
                writer.add(tokenizer.encode(line))
    common = [
        f"--data={root / 'data'}", f"--tokenizer={folder}", f"--save_model_dir={root}",
        "--device=cpu", "--eval_tokens=256", "--sample_tokens=0",
    ]  # fmt: skip
    call_script(
        "train", *common, "--run=teacher", "--num_blocks=3", "--num_heads=4", "--num_kv_heads=2",
        "--embedding_dim=48", "--head_dim=16", "--context_len=32", "--batch_size=2",
        "--accumulation_steps=2", "--max_steps=40", "--lr=1e-2", "--warmup_steps=4",
    )  # fmt: skip
    call_script(
        "train_kd", *common, "--run=student", f"--teacher={root / 'teacher/model'}", "--layers=0,1",
        "--calibrate_tokens=256", "--config=tests/kd.yaml",
    )  # fmt: skip
    return root / "student", folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distilled_hybrid_is_exported(distilled, dtype, tmp_path, capsys):
    source, tokenizer_folder = distilled
    assert json.loads((source / "model/config.json").read_text())["model_type"] == "retort"
    run(source, "--out", tmp_path / "m", "--dtype", dtype)
    out = capsys.readouterr().out
    assert "--format auto: qwen3_5_text" in out and "LLF" in out
    assert "Qwen3_5ForCausalLM: greedy continuation, 64 tokens: identical" in out
    assert "tokenizer: ids of 6 texts in AutoTokenizer: identical" in out
    assert "read back: greedy" in out and out.rstrip().endswith(f"{tmp_path / 'm'} as qwen3_5_text")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    if dtype == "float32":
        ours = load_model(source / "model", dtype=torch.float32)
        peer = load_stock(tmp_path / "m")
        assert_same(ours, peer, random_ids(ours, 1, 301))
        prompt = load_tokenizer(str(tokenizer_folder)).encode(TEXT.format(3, 1))
        assert greedy(peer, prompt) == generate(ours, prompt, 64)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    mine = load_tokenizer(str(tokenizer_folder))
    for text in ("Caf\u00e9 \u4f60\u597d 0123", "  def f():\n\treturn 1\n", TEXT):
        assert auto.encode(text, add_special_tokens=False) == mine.encode(text)
    raw = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    assert raw["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert raw["chat_template"] == "{{ messages }}" and raw["eos_token"] == "<|endoftext|>"
    assert (tmp_path / "m/generation_config.json").is_file()
    assert auto.chat_template == "{{ messages }}"


BREAKS = {
    "w - 1 forgotten": lambda m: m.setattr(hf_hybrids, "_shift", lambda t, by: t),
    "gate and beta swapped": lambda m: m.setattr(
        hf_hybrids, "QWEN3_5",
        {**hf_hybrids.QWEN3_5, "a_proj.weight": "in_proj_b.weight",
         "b_proj.weight": "in_proj_a.weight"},
    ),
    "whole heads not rotated": lambda m: m.setattr(
        hf_hybrids, "to_config", drop_share(hf_hybrids.to_config)
    ),
}  # fmt: skip


def drop_share(to_config):
    def broken(*args):
        raw = to_config(*args)
        del raw["rope_parameters"]["partial_rotary_factor"]
        return raw

    return broken


@pytest.mark.parametrize("break_it", BREAKS.values(), ids=BREAKS)
def test_a_wrong_map_is_noticed_and_leaves_nothing(
    break_it, distilled, tmp_path, monkeypatch, refused
):
    break_it(monkeypatch)
    err = refused(distilled[0], "--out", tmp_path / "m")
    assert "logits of 321 random tokens in transformers" in err and "nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_a_wrong_tokenizer_is_noticed(distilled, tmp_path, monkeypatch, refused):
    """Without tokenizer_class, AutoTokenizer splits text by Qwen's rules."""
    monkeypatch.setattr(hf, "_set_tokenizer_class", lambda path: path.unlink())
    assert "gives other ids" in refused(distilled[0], "--out", tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small(tmp_path):
    """A folder with a byte-level Llama-shaped hybrid, which no stock class holds."""
    model = tiny_model("LF", dtype=torch.float32, vocab_size=257, qk_norm=False)
    save_model(model, tmp_path / "run/model", tokenizer_from="byte")
    return tmp_path / "run"


def test_auto_falls_back_to_retort_and_says_so(small, capsys):
    run(small)
    out = capsys.readouterr().out
    assert "--format auto: retort" in out and "not qwen3_5_text: softmax layers without q/k" in out
    assert "not llama: layer 0 is linear (gated_deltanet)" in out
    assert "Stock libraries cannot load the retort format" in out
    a, b = (load_model(small / name).state_dict() for name in ("model", "model-retort"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_retort_in_bfloat16_keeps_decays(small, capsys):
    """The script's own check passes, and A_log is the model's to the bit."""
    run(small, "--format", "retort", "--dtype", "bfloat16")
    assert "read back: greedy continuation, 64 tokens: identical" in capsys.readouterr().out
    mine, back = (load_model(small / name).layers[0] for name in ("model", "model-retort"))
    assert back.linear_attn.q_proj.weight.dtype == torch.bfloat16
    for name in ("A_log", "dt_bias", "o_norm.weight"):
        p = back.linear_attn.get_parameter(name)
        assert p.dtype == torch.float32 and p.equal(mine.linear_attn.get_parameter(name)), name


def test_plain_models_go_through_the_script_too(tmp_path, capsys):
    model = tiny_model("FF", dtype=torch.float32, vocab_size=257)
    save_model(model, tmp_path / "m", tokenizer_from="byte")
    run(tmp_path / "m")
    out = capsys.readouterr().out
    assert "--format auto: qwen3" in out and "Qwen3ForCausalLM" in out
    assert "byte has no tokenizer.json" in out
    run(tmp_path / "m", "--overwrite", "--dtype", "bfloat16")
    assert read_config(tmp_path / "m-qwen3") == model.config


def test_what_the_script_refuses(small, tmp_path, monkeypatch, refused):
    assert "--format: 'gguf' found, auto, llama" in refused(small, "--format", "gguf")
    assert "--dtype: 'int8'" in refused(small, "--dtype", "int8")
    assert "a run expected" in refused(tmp_path / "nowhere")
    assert "layer 0's mixer is gated_deltanet, only mamba2" in refused(small, "--format", "bamba")
    assert "flash-attn" in refused(small, "--format", "fla")
    for out in (small, small / "model"):
        assert "holds the model" in refused(small, "--out", out, "--overwrite")
    (tmp_path / "other").mkdir()
    assert "exists; --overwrite" in refused(small, "--out", tmp_path / "other")
    assert "no model folder" in refused(small, "--out", tmp_path / "other", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"]
    plain = tmp_path / "plain"
    save_model(tiny_model("F", dtype=torch.float32), plain, tokenizer_from="byte")
    monkeypatch.setitem(sys.modules, "transformers", None)
    err = refused(plain)
    assert "transformers, which cannot be imported" in err and "pip install -e '.[hf]'" in err
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {})
    assert "has no such class, 5.2 or newer" in refused(plain)
