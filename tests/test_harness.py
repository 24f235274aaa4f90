"""The adapter to lm-evaluation-harness: its numbers against plain forwards.

pytest tests/test_harness.py        # the command is tested where lm-eval is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kit import random_ids, tiny_model

from config import UserError
from hf import save_model
from scripts.harness import Scorer, build_scorer, harness_model
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(vocab_size=257, eos_token_id=256)


@pytest.fixture(scope="module")
def model():
    return tiny_model("LFSL", dtype=torch.float32, **SHAPE)


def scorer(model, **changes) -> Scorer:
    settings = dict(max_length=64, batch_tokens=100) | changes
    return Scorer(model, load_tokenizer("byte"), **settings)


@torch.no_grad()
def plain(model, context, answer):
    """log p(answer | context), and whether it is the greedy one, from one forward."""
    ids = torch.tensor([context + answer])
    log_p = (model(ids[:, :-1])[0] @ model.head_weight.T).log_softmax(-1)[len(context) - 1 :]
    nats = log_p.gather(-1, torch.tensor(answer)[:, None]).sum().item()
    return nats, log_p.argmax(-1).tolist() == answer


def test_log_likelihoods_are_those_of_each_alone(model):
    ids = random_ids(model, 400).tolist()
    pairs, at = [], 0
    for context, answer in ((5, 3), (1, 1), (30, 12), (2, 40), (9, 1), (17, 4)):
        pairs.append((ids[at : at + context], ids[at + context : at + context + answer]))
        at += context + answer
    with torch.no_grad():  # one that is greedy
        first = (model(torch.tensor([ids[:8]]))[0, -1] @ model.head_weight.T).argmax().item()
    pairs.append((ids[:8], [first]))
    found = scorer(model).log_likelihoods(pairs)
    for (context, answer), (nats, greedy) in zip(pairs, found, strict=True):
        wanted, is_greedy = plain(model, context, answer)
        assert nats == pytest.approx(wanted, rel=1e-4)
        assert greedy == is_greedy
    assert found[-1][1] and not all(greedy for _, greedy in found)


def test_what_is_too_long_loses_its_beginning(model):
    ids = random_ids(model, 200).tolist()
    ((nats, _),) = scorer(model, max_length=50).log_likelihoods([(ids[:150], ids[150:160])])
    assert nats == pytest.approx(plain(model, ids[109:150], ids[150:160])[0], rel=1e-4)


def test_windows_take_every_token_once(model):
    s = scorer(model, max_length=16)
    for length in (1, 15, 16, 17, 40):
        ids = random_ids(model, length).tolist()
        pairs = s.windows(ids)
        assert [t for _, answer in pairs for t in answer] == ids
        assert pairs[0][0] == [256]
        lengths = [len(context) + len(answer) for context, answer in pairs]
        assert lengths == ([17] * len(pairs) if length > 16 else [length + 1])
        whole, end = [256, *ids], 1
        for context, answer in pairs:
            end += len(answer)
            assert context + answer == whole[end - len(context) - len(answer) : end]


def test_generation_stops_before_the_stop(model):
    s = scorer(model)
    whole = s.generate_until("abc", [], 12)
    assert len(s.tokenizer.encode(whole)) >= 3
    stop = whole[2]
    assert s.generate_until("abc", [stop], 12) == whole[: whole.index(stop)]
    assert len(s.generate_until("abc", [], 4)) <= 4 < len(whole)
    s.tokenizer.stops = {*s.tokenizer.stops, ord(stop)}
    assert s.generate_until("abc", [], 12) == whole[: whole.index(stop)]
    with pytest.raises(UserError, match="16 tokens to generate found"):
        scorer(model, max_length=16).generate_until("abc", [], 16)


def test_texts_begin_with_the_beginning_of_text(model, monkeypatch):
    """As lm-eval's own model of transformers has it: once, and not within a text."""
    bos = 7
    tokenizer = load_tokenizer("byte")
    tokenizer.starts, tokenizer.bos_token_id = [bos], bos
    s = Scorer(model, tokenizer, max_length=16, batch_tokens=100)
    text = tokenizer.encode("abc")
    assert s.encode("abc") == s.encode("\x07abc") == [bos, *text]
    assert s.windows(text) == [([bos], text)]
    asked = []
    monkeypatch.setattr("generate.generate", lambda model, ids, *_, **__: asked.append(ids) or [])
    for prompt in ("abc", "\x07abc", "0123456789abc"):
        s.generate_until(prompt, [], 12)
    assert asked == [[bos, *text]] * 3
    with pytest.raises(UserError, match="15 tokens to generate found"):
        s.generate_until("abc", [], 15)
    stub = SimpleNamespace(TemplateLM=object)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, stub)
    theirs = harness_model(s)
    assert theirs.tok_encode("abc") == theirs.tok_encode("abc", True) == [bos, *text]
    assert theirs.tok_encode("abc", add_special_tokens=False) == text
    assert (theirs.prefix_token_id, theirs.eot_token_id) == (bos, 256)


@pytest.mark.parametrize(
    "flag", ["max_length=-1", "batch_tokens=0", f"out={__file__}/r.json", f"out={ROOT}"]
)
def test_flags_are_refused_before_the_model_is_read(flag):
    name, value = flag.split("=")
    args = argparse.Namespace(model="nowhere", device="cpu", max_length=0, batch_tokens=1, out="")
    setattr(args, name, value if name == "out" else int(value))
    with pytest.raises(UserError, match=f"^--{name}: "):
        build_scorer(args)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    save_model(tiny_model("F", vocab_size=200), tmp_path / "m", tokenizer_from="byte")
    args = argparse.Namespace(
        model=str(tmp_path / "m"), device="cpu", max_length=0, batch_tokens=1, out=""
    )
    with pytest.raises(UserError, match="m: vocab_size 200 found, at least the 257"):
        build_scorer(args)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval not installed")
def test_command(model, tmp_path):
    """A task of our own through the harness: the choice that the model finds likelier."""
    save_model(model, tmp_path / "model", tokenizer_from="byte")
    rows = [{"q": f"number {i} is", "a": " one", "b": " two and more"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        "task: own_choice\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{[a, b]}}"\ndoc_to_target: 0\n'
        "metric_list:\n  - metric: acc\n"
    )
    command = [sys.executable, str(ROOT / "scripts/harness.py"), str(tmp_path / "model"), "--tasks",
               "own_choice", "--include_path", str(tmp_path), "--out", str(tmp_path / "r.json"),
               "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    encode = load_tokenizer("byte").encode
    right = [
        plain(model, encode(r["q"]), encode(r["a"]))[0]
        > plain(model, encode(r["q"]), encode(r["b"]))[0]
        for r in rows
    ]
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["own_choice"]["acc,none"] == pytest.approx(sum(right) / 3)


def test_without_the_harness_one_line(tmp_path):
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    command = [sys.executable, str(ROOT / "scripts/harness.py"), "nowhere", "--tasks", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: lm-eval not found") and done.stderr.count("\n") == 1
