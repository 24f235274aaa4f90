"""benchmarks/: every script on tiny shapes on a CPU, and every call from there into our modules.

Speeds are not looked at, but what was measured must have been the right thing: losses are those of
a peer, or of random tokens. quality.py has test_quality.py, runs of scaling.py tests/faults.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config
from kit import stock

from cli import load_config, parse_argv
from config import DistillConfig, PretrainConfig

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
CPU = ("--device=cpu", "--repeats=1")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows(script, *argv) -> what main() measures, or None from a script without --json."""

    def call(script: str, *argv: str, saves: bool = True) -> list[dict] | None:
        found = tmp_path / "found.json"
        argv = [*argv, f"--json={found}"] if saves else [*argv]
        monkeypatch.setattr(sys, "argv", [script, *argv])
        importlib.import_module(f"benchmarks.{script}").main()
        return json.loads(found.read_text())["rows"] if saves else None

    yield call
    torch.compiler.set_stance("default")


def is_ours(found) -> bool:
    """Whether it is a function or a class of this repository."""
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        return False
    file = getattr(sys.modules.get(found.__module__), "__file__", None) or ""
    return Path(file).is_relative_to(ROOT) and "site-packages" not in file


@pytest.mark.parametrize("script", SCRIPTS)
def test_calls_fit_what_they_call(script):
    """Also those that only a GPU comes to. What is not global in the script is left out."""
    module, wrong = importlib.import_module(f"benchmarks.{script}"), []
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if not isinstance(node, ast.Call):
            continue
        try:
            called = eval(ast.unparse(node.func), vars(module).copy())
        except NameError:
            continue
        except AttributeError as error:
            wrong.append(f"line {node.lineno}: {error}")
            continue
        starred = any(isinstance(arg, ast.Starred) for arg in node.args)
        if starred or None in [k.arg for k in node.keywords] or not is_ours(called):
            continue
        if inspect.isclass(called) and issubclass(called, Exception):
            continue
        try:
            inspect.signature(called).bind(*node.args, **{k.arg: k for k in node.keywords})
        except TypeError as error:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_align(rows):
    """A layer learns the same in one pass and alone."""
    found = rows("align", *CPU, "--shape=tiny", "--batch=2", "--length=33", "--probe=1,3")
    assert [row["layers"] for row in found] == [[0, 1, 2, 3], *[[1], [3]] * 2]
    losses = [row["losses"] for row in found]
    assert losses[1:] == [[losses[0][1]], [losses[0][3]]] * 2
    assert min(losses[0]) > 0 and all(row["ms"] > 0 for row in found)


def test_kd_step(rows):
    """All variants that are softmax throughout have transformers' loss."""
    stock("transformers")
    peer = "transformers, full logits"
    ours = ["ours", "ours, documents", "ours 3:1"]
    shape = ("--shape=tiny", "--batch=2", "--length=33")
    found = rows("kd_step", *CPU, *shape, "--variants", *ours, peer)
    loss = {row["variant"]: row["loss"] for row in found}
    for name in ours[:2]:
        assert loss[name] == pytest.approx(loss[peer], rel=1e-4), name
    assert 0 < loss["ours 3:1"] != loss["ours"]


@pytest.mark.parametrize("documents", [False, True])
def test_batches_of_align_and_kd_step(documents):
    """Each row is one document, all of whose labels count."""
    from benchmarks.align import random_batches, set_up

    run, plan = set_up(Namespace(device="cpu", length=9, batch=6, shape="tiny"), "distill")
    run = replace(run, cfg=replace(run.cfg, doc_mask=documents))
    batches = random_batches(run, replace(plan, micro_batch=3), 257)
    assert [batch.num_valid for batch in batches] == [27, 27]
    x, y = (torch.cat([getattr(b, n).flatten() for b in batches]) for n in ("input_ids", "labels"))
    assert torch.equal(x[1:], y[:-1]) and x.unique().numel() > 9
    for batch in batches:
        assert batch.row_valid == batch.row_text == [9, 9, 9]
        assert batch.position_ids.flatten().tolist() == [*range(9)] * 3
        if documents:
            assert batch.cu_seqlens[:4].tolist() == [0, 9, 18, 27]
        else:
            assert batch.cu_seqlens is None and batch.input_ids.shape == (3, 9)


def test_pretrain(rows):
    """The loss is a mean over tokens; of one batch it falls from that of a guess."""
    found = rows("pretrain", *CPU, "--tiny", "--settings", "nanochat-d12")
    assert [row["model"] for row in found] == ["ours, muon", "ours, adamw"]
    for row in found:
        assert 1 < row["loss"] < math.log(32768), row


@pytest.mark.parametrize("alone", [[], ["--alone"]])
def test_loader(rows, alone):
    shape = ("--shape=tiny", "--seq_len=33", "--batch=2", "--steps=1", "--tokens=5000")
    found = rows("loader", *CPU, *shape, *alone)
    ways = ["rows", "documents", "best fit", "mixture", "mixture, best fit"]
    assert [row["batch"] for row in found] == (ways if alone else ["on device", *ways[:2]])


def test_loader_gives_a_batch_that_is_there_already(tiny_data):
    """As it is, fields that `to` would move among them."""
    from benchmarks.loader import DeviceLoader
    from data import TokenDataset, pack_rows

    data = TokenDataset.open(tiny_data, "train")
    batches = [pack_rows(data, [row], 33, True) for row in range(2)]
    loader = DeviceLoader(batches)
    for batch in [*batches, *batches]:
        (given,) = loader.next_step()
        assert given.to("cpu") is given and vars(given) == vars(batch)


SHORT = {
    "decode": ("--shape=tiny", "--contexts=33", "--batch=2", "--steps=2"),
    "kd_head": ("--tokens=33", "--hidden_size=16", "--vocab_size=99", "--repeats=1"),
    "kernels": ("--tokens=65", "--channels=16", "--heads=2", "--repeats=1"),
    "mixers": ("--contexts=33", "--tokens=66", "--hidden_size=64", "--heads=2", "--head_dim=32",
               "--batch=2", "--repeats=1"),
    "muon": ("--sizes", "tiny", "--repeats=1", "--warmup=1"),
}  # fmt: skip


@pytest.mark.parametrize("script", SHORT)
def test_others_that_save(rows, script):
    found = rows(script, "--device=cpu", *SHORT[script])
    assert found and not any("note" in row for row in found)
    for row in found:
        assert row.get("error", 0) < 1e-4 and row.get("rms_error", 0) < 5e-2, row


def test_others_that_print(rows, tiny_data, capsys):
    rows("gated_delta_rule", "--lengths=33", "--repeats=1", "--heads=2", saves=False)
    rows("retokenize", "--tokenizer=byte", "--other=byte", "--repeats=1", saves=False)
    shape = ("--shape=tiny", "--cria=2", "--tokens=256", "--seq_len=32", "--batch_tokens=64")
    words = ("--teacher=byte", f"--data={tiny_data}", "--repeats=1", *shape)
    rows("cria", *words, saves=False)
    out = capsys.readouterr().out
    assert "1.000 of these for each of those; 100.00% have a loss" in out
    assert "ratio" in out and "tokens per second, median of the turns" in out


def test_muon_adamw(tiny_data):
    from benchmarks.muon_adamw import train_once
    from data import TokenDataset, eval_batches

    train, held_out = (TokenDataset.open(tiny_data, split) for split in ("train", "val"))
    cfg = PretrainConfig(context_len=32, batch_size=2)
    batches = eval_batches(held_out, seq_len=32, max_tokens=64)
    for use_muon in (False, True):
        run = train_once(cfg, tiny_config(), train, batches, use_muon=use_muon, lr=1e-3, steps=15)
        assert run["losses"][-1] < run["losses"][0] and run["held_out"] < math.log(257)


def test_ingest(tmp_path, monkeypatch):
    """What prepare_data.py writes of the two layouts is what the benchmark expects."""
    pytest.importorskip("zstandard")
    pytest.importorskip("pyarrow")
    from benchmarks import ingest
    from tokenizer import load_tokenizer

    monkeypatch.setattr(ingest, "FILE_CHARS", 50_000)
    pool, tokenizer = [f"def f{i}(): return {i:040}" for i in range(99)], load_tokenizer("byte")
    assert ingest.encode_alone(tokenizer)("a") == tokenizer.encode("a")
    ingest.make_tree(tmp_path / "in", pool, 2)
    ingest.prepare([tmp_path / "in"], tmp_path / "out", "byte", 1)
    assert ingest.found_tokens(tmp_path / "out") == ingest.expected_tokens(tokenizer, pool, 2)


@pytest.mark.parametrize("works", [("pretrain",), ("align", "distill")])
def test_scaling_hands_flags_on(works, tiny_teacher, tiny_data, tmp_path, monkeypatch):
    """As its --help says it; the scripts take these and all others."""
    from benchmarks import scaling

    seen = []

    def measure_all(args) -> dict:
        seen.append(args)
        return {"about": {}, "rows": []}

    monkeypatch.setattr(scaling, "measure_all", measure_all)
    inputs = ("--device=cpu", f"--teacher={tiny_teacher}", f"--data={tiny_data}")
    scaling.main([*inputs, "--flags=--kernel=chunk --seed=7", "--ranks", "1"])
    scaling.main([*inputs, "--flags=--torch_compile=False"])
    assert seen[1].flags == ["--torch_compile=False"]
    words = scaling.command(works, "muon", "ddp", 1, 1, seen[0], tmp_path)
    assert words[-2:] == ["--kernel=chunk", "--seed=7"]
    script = "train.py" if works == ("pretrain",) else "train_kd.py"
    kind = PretrainConfig if works == ("pretrain",) else DistillConfig
    flags = parse_argv(words[words.index(script) + 1 :])[1]
    cfg = load_config(kind, flags, None)
    assert (cfg.kernel, cfg.seed) == ("chunk", 7)
