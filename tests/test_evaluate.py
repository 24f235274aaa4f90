"""Held-out scores against plain full logits, the teacher's own row, the floor, the command."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kit import random_ids, tiny_model
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

import evaluate as script
from cache import LayerCache
from config import UserError
from data import IGNORE, TokenDataset, eval_batches
from evaluate import Evaluator, completions, inputs, zeroed_attention
from hf import save_model
from hybrid_layers import convert_layers
from prompts import IN_RUN, PROMPTS
from recall import Question
from shard_writer import ShardWriter
from tokenizer import load_tokenizer

SHAPE = dict(vocab_size=257, eos_token_id=256)
SEQ_LEN = 33


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Documents of 1 to 60 random bytes, so that most rows hold several."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, "val", load_tokenizer("byte")) as writer:
        for _ in range(20):
            length = int(torch.randint(1, 60, (), generator=generator))
            writer.add(torch.randint(256, (length,), generator=generator).tolist())
    return folder


@pytest.fixture(params=[True, False], ids=["packed", "rows"])
def batches(shards, request):
    found = eval_batches(
        TokenDataset.open(shards, "val"), seq_len=SEQ_LEN, max_tokens=8 * SEQ_LEN,
        micro_batch=3, doc_mask=request.param,
    )  # fmt: skip
    assert [len(b.sample_ids) for b in found] == [3, 3, 2]
    return found


@pytest.fixture
def pair():
    """A teacher, and a student that is near it but not equal."""
    teacher = tiny_model("FFFF", dtype=torch.float32, **SHAPE)
    student = convert_layers(teacher, [2])
    for p in student.layers[2].linear_attn.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(3))
    return teacher, student


@torch.no_grad()
def plain(model, batches):
    """log-probabilities [N, V] at the labels that count, and those labels; rows one by one."""
    rows, labels = [], []
    for batch in batches:
        starts = (batch.position_ids == 0).flatten().nonzero().flatten().tolist()
        ids = batch.input_ids.flatten()
        for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
            rows.append((model(ids[None, a:b]) @ model.head_weight.T)[0])
        labels.append(batch.labels.flatten())
    labels = torch.cat(labels)
    logits = torch.cat(rows)[labels != IGNORE]
    return logits.double().log_softmax(-1), labels[labels != IGNORE]


def test_scores_equal_plain_logits(pair, batches):
    teacher, student = pair
    assert sum(b.num_valid for b in batches) < 8 * SEQ_LEN  # document ends do not count
    log_p, labels = plain(student, batches)
    log_q, _ = plain(teacher, batches)
    ce, teacher_ce = F.nll_loss(log_p, labels), F.nll_loss(log_q, labels)
    expected = {
        "ce": ce, "ppl": ce.exp(), "teacher_ppl": teacher_ce.exp(),
        "ratio": (ce - teacher_ce).exp(),
        "kl": F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
        "top1": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
    }  # fmt: skip
    found = Evaluator(batches, teacher)(student)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name
    assert found["kl"] > 0.01 and 0.05 < found["top1"] < 0.99
    alone = Evaluator(batches, None)(student)
    assert alone == pytest.approx({"ce": found["ce"], "ppl": found["ppl"]}, rel=1e-6)


def test_the_teacher_against_itself(pair, batches):
    teacher, _ = pair
    evaluator = Evaluator(batches, teacher)
    for model in (teacher, tiny_model("FFFF", dtype=torch.float32, **SHAPE)):  # itself, a copy
        scores = evaluator(model)
        assert scores["ratio"] == 1.0
        assert scores["kl"] == 0.0
        assert scores["top1"] == 1.0
        assert scores["ppl"] == scores["teacher_ppl"]


def test_repeated_and_shared_prefix_give_the_same_numbers(pair, batches):
    teacher, student = pair
    evaluator = Evaluator(batches, teacher)
    expected = evaluator(student)
    assert evaluator(student) == expected
    for first in (1, 2):  # block 2 is the first that differs
        assert Evaluator(batches, teacher, first=first)(student) == expected
    assert Evaluator(batches, teacher, first=2)(teacher)["kl"] == 0.0


def test_shares_of_the_ranks_add_up(pair, batches):
    """What the two ranks' parts say, weighted by their labels, is what one says."""
    teacher, student = pair
    whole = Evaluator(batches, teacher)(student)["ce"] * sum(b.num_valid for b in batches)
    parts = [batches[rank::2] for rank in (0, 1)]
    total = sum(Evaluator(p, teacher)(student)["ce"] * sum(b.num_valid for b in p) for p in parts)
    assert total == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_zeroed_attention_restores_bitwise(bias, pair, batches):
    teacher, student = pair
    if bias:
        student = tiny_model("FLFF", dtype=torch.float32, attention_output_bias=True, **SHAPE)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    ids = random_ids(student, 1, 9)
    with pytest.raises(RuntimeError, match="on purpose"), zeroed_attention(student, [0, 2]):
        taps = {i: out for i, _, out, _ in student.attention_taps(ids, layers=[0, 1, 2])}
        assert not taps[0].any() and not taps[2].any() and taps[1].any()
        inside = Evaluator(batches, teacher)(student)
        raise RuntimeError("on purpose")
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.requires_grad
    assert inside != Evaluator(batches, teacher)(student)


class Oracle(torch.nn.Module):
    """Predicts a permutation of its input: `shift` 0 copies the token it was given."""

    def __init__(self, table):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(257, 257)
        self.table = table
        self.head_weight = 20 * torch.eye(257)

    def forward(self, input_ids, **_):
        return F.one_hot(self.table[input_ids], 257).float()


def test_copying_the_input_scores_badly(tmp_path):
    """Labels are the next token: in 0, 1, 2, ... a model that says i + 1 is right, i wrong."""
    with ShardWriter(tmp_path, "val", load_tokenizer("byte")) as writer:
        for _ in range(4):
            writer.add(list(range(100)))
    batches = eval_batches(TokenDataset.open(tmp_path, "val"), seq_len=50, max_tokens=400)
    count = torch.arange(257)
    following = (count + 1) % 257
    following[99] = 256  # the end of a document
    assert Evaluator(batches, None)(Oracle(following))["ppl"] == pytest.approx(1, abs=1e-3)
    assert Evaluator(batches, None)(Oracle(count))["ce"] == pytest.approx(20, abs=0.1)


def test_no_rows_is_refused():
    with pytest.raises(UserError, match="--eval_tokens"):
        Evaluator([], None)


def test_inputs_of_a_batch(batches):
    for batch in batches:
        args = inputs(batch)
        assert args["input_ids"] is batch.input_ids
        assert (args["positions"] is None) == (batch.cu_seqlens is None)
        assert args["cu_seqlens"] is batch.cu_seqlens


def test_completions_are_greedy_texts():
    model = tiny_model("LF", dtype=torch.float32, **SHAPE)
    given = []

    def continuation(prompt, new):
        given.append(new)
        return str(len(new))

    tokenizer = SimpleNamespace(
        prompt=load_tokenizer("byte").prompt, continuation=continuation, stops=()
    )
    assert completions(model, tokenizer, 7) == ["7"] * IN_RUN
    assert completions(model, tokenizer, 7) and given[:3] == given[3:]
    tokenizer.stops = {given[0][1], 999}
    assert completions(model, tokenizer, 7)[0] == str(1 + given[0].index(given[0][1]))


@pytest.fixture(scope="module")
def text_shards(tmp_path_factory):
    """Two domains of byte-level text."""
    folders = {}
    for name, text in (("prose", "the naïve café "), ("code", "def f(x): return x\n")):
        folders[name] = tmp_path_factory.mktemp(name)
        for split in ("train", "val"):
            with ShardWriter(folders[name], split, load_tokenizer("byte")) as writer:
                for i in range(6):
                    writer.add(load_tokenizer("byte").encode(text * (5 + i)))
    return folders


def test_bits_per_byte_of_a_uniform_model(text_shards):
    """log2 of the vocabulary per byte, whatever the text."""
    uniform = Oracle(torch.arange(257))
    uniform.head_weight = torch.zeros(257, 257)
    args = SimpleNamespace(
        data=",".join(f"{n}={f}" for n, f in text_shards.items()), seq_len=64, eval_tokens=256,
        device="cpu",
    )  # fmt: skip
    found = script.score_domains(uniform, None, load_tokenizer("byte"), args)
    assert list(found) == ["prose", "code"]
    for row in found.values():
        assert row["student"]["ppl"] == pytest.approx(257, rel=1e-5)
        # An end of text has no bytes.
        bits = math.log2(257) * row["tokens"] / row["bytes"]
        assert row["student"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert 0.8 * row["tokens"] < row["bytes"] < row["tokens"]
        assert "teacher" not in row


def test_label_bytes_are_those_of_the_text(text_shards):
    tokenizer = load_tokenizer("byte")
    data = TokenDataset.open(text_shards["code"], "val")
    for doc_mask in (True, False):
        batches = eval_batches(
            data, seq_len=48, max_tokens=10_000, doc_mask=doc_mask, micro_batch=2
        )  # fmt: skip
        labels = torch.cat([b.labels.flatten() for b in batches])
        text = sum(1 for i in labels.tolist() if 0 <= i < 256)
        assert text < (labels >= 0).sum() and script.label_bytes(batches, tokenizer) == text
        whole = mock.Mock(eos_token_id=256, bos_token_id=None, continuation=tokenizer.continuation)
        whole.token_bytes.return_value = None  # one whose tokens are no bytes
        assert script.label_bytes(batches, whole) == text


def test_label_bytes_keep_the_first_space_of_sentencepiece(tmp_path):
    pieces = ["</s>", "\u2581a", "\u2581b", "c"]
    backend = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}))
    backend.pre_tokenizer, backend.decoder = Metaspace(), MetaspaceDecoder()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.token_bytes() is None and tokenizer.eos_token_id == 0
    rows = torch.tensor([[1, 2, 3, 1, 0, 1, 2], [3, 3, 2, 2, 3, 0, 2]])
    batch = mock.Mock(input_ids=rows[:, :-1], labels=rows[:, 1:].clone(), max_seqlen=6)
    # " bc a", "a b" of which no space is known; "c b bc", "b".
    assert script.label_bytes([batch], tokenizer) == 5 + 3 + 6 + 1
    batch.labels[0, 4] = batch.labels[1, 1] = IGNORE
    # " bc a", " b"; "c", " bc", "b".
    assert script.label_bytes([batch], tokenizer) == 5 + 2 + 1 + 3 + 1


def test_data_of_another_tokenizer_is_refused(tmp_path):
    np.array([5, 70, 50256] * 40, dtype=np.uint16).tofile(tmp_path / "val.bin")
    args = SimpleNamespace(data=f"nanogpt:{tmp_path}", seq_len=16, eval_tokens=64, device="cpu")
    with pytest.raises(UserError, match="documents end with token 50256"):
        script.score_domains(None, None, load_tokenizer("byte"), args)


def test_domains_by_name():
    assert script.parse_domains("a=x/y,b=z") == {"a": "x/y", "b": "z"}
    assert script.parse_domains("data/prose") == {"prose": "data/prose"}
    for wrong in ("a=x,a=y", "=x", "a=", "a=x,"):
        with pytest.raises(UserError, match="--data"):
            script.parse_domains(wrong)


def test_decoding_is_checked(monkeypatch):
    """A cache that forgets what it held is an error and no low score."""
    model = tiny_model("LF", dtype=torch.float32, **SHAPE)
    prompt = random_ids(model, 40).tolist()
    script.check_decoding(model, prompt)
    store = LayerCache.store

    def forget(self, conv, state):
        store(self, conv, torch.zeros_like(state))

    monkeypatch.setattr(LayerCache, "store", forget)
    with pytest.raises(RuntimeError, match="decoding with a cache differs"):
        script.check_decoding(model, prompt)


def test_weights_that_are_not_finite_are_no_fault_of_the_cache(tmp_path):
    model = tiny_model("LF", dtype=torch.float32, **SHAPE)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    save_model(model, tmp_path / "m", tokenizer_from="byte")
    with pytest.raises(UserError, match=r"m: logits are not finite$"):
        script.load_checked(str(tmp_path / "m"), torch.device("cpu"), "float32", [5, 6, 7])


def test_questions_are_asked_of_the_model():
    """A model that says 5 after anything, and one that says 6."""
    tokenizer = load_tokenizer("byte")
    asked = [
        Question("passkey", 64, 0.0, tokenizer.encode("What is it? "), "55555"),
        Question("passkey", 64, 0.0, tokenizer.encode("And what is it now, then? "), "66666"),
    ]
    for digit, expected in (("5", [True, False]), ("6", [False, True])):
        model = tiny_model("LF", dtype=torch.float32, **{**SHAPE, "tie_word_embeddings": False})
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.norm.weight.zero_()
            model.lm_head.weight[ord(digit)] = 1.0
            for p in model.layers.parameters():
                p.zero_()
            model.embed_tokens.weight.fill_(1.0)
            model.norm.weight.fill_(1.0)
        # Only five may be generated, or a sixth digit would make it another number.
        answer = script.ask(model, asked, SimpleNamespace(
            encode=lambda text: tokenizer.encode(text)[:3], decode=tokenizer.decode,
            stops=(),
        ))  # fmt: skip
        assert answer == expected


def test_command(tmp_path, text_shards, pair, capsys):
    for name, model in zip(("teacher", "student"), pair, strict=True):
        save_model(model, tmp_path / name, tokenizer_from="byte")
    domains = ",".join(f"{n}={f}" for n, f in text_shards.items())
    argv = [str(tmp_path / "student"), "--data", domains, "--seq_len", "33", "--device", "cpu"]
    both = [*argv, "--teacher", str(tmp_path / "teacher"), "--eval_tokens", "264"]
    recall = ["--recall_tasks", "copy,passkey", "--recall_lengths", "500", "--recall_samples", "1"]
    recall += ["--recall_depths", "0.5"]
    script.main([*both, *recall, "--sample_tokens", "4", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["domains"].keys() == text_shards.keys()
    for row in found["domains"].values():
        assert row["ratio"] == pytest.approx(
            row["student"]["ppl"] / row["teacher"]["ppl"], rel=1e-4
        )
        bits = [
            math.log(row[who]["ppl"]) / row[who]["bits_per_byte"] for who in ("student", "teacher")
        ]
        assert bits[0] == pytest.approx(bits[1], rel=1e-4)
    assert [(r["task"], r["depth"]) for r in found["recall"]] == [("copy", None), ("passkey", 0.5)]
    assert all(0 <= r["student"] <= 1 and 0 <= r["teacher"] <= 1 for r in found["recall"])
    assert [sample["prompt"] for sample in found["samples"]] == list(PROMPTS)
    report = (tmp_path / "eval.md").read_text()
    assert "prose" in printed and "| prose |" in report and PROMPTS[-1] in report
    assert "--sample_tokens 4" in found["command"]

    script.main([*argv, "--eval_tokens", "264"])
    assert "teacher" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        script.main([str(tmp_path / "nothing"), *argv[1:]])
    assert stop.value.code == 2
    assert "nothing: no config.json" in capsys.readouterr().err
    (tmp_path / "full" / "eval.json").mkdir(parents=True)
    narrow = tiny_model("F", vocab_size=200, eos_token_id=5)
    save_model(narrow, tmp_path / "narrow", tokenizer_from="byte")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "teacher", other)
    words = Tokenizer(WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(other / "tokenizer.json"))
    for wrong, name in (
        (["--teacher", str(tmp_path / "nowhere")], "nowhere"),
        (["--out", str(tmp_path / "eval.md")], "--out"),
        (["--out", str(tmp_path / "full")], "full/eval.json is a folder, a file expected"),
        (["--recall_tasks", "chess"], "--recall_tasks"),
        (["--branch", "window"], "--branch: window found, a model with hedgehog_window"),
        (["--teacher", str(other)], "--teacher: tokenizer "),
        (["--teacher", str(tmp_path / "narrow")], "narrow: vocab_size 200 found, at least the 257"),
        (["--device", "abacus"], "--device: 'abacus' found"),
        (["--device", "cuda:99"], "--device: cuda:99 found"),
        (["--seq_len", "0"], "--seq_len: 0 found"),
        (["--eval_tokens", "0"], "--eval_tokens: 0 found"),
        (["--recall_tasks", "copy", "--recall_samples", "-1"], "--recall_samples: -1 found"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main([*argv, *wrong])
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and name in err


def test_a_branch_alone_is_evaluated(tmp_path, text_shards, pair):
    """With a window as long as the rows the linear part has nothing to say, and alone says all
    that nothing else does."""
    from hybrid_layers import convert_layers

    how = {"mixer": "hedgehog_window", "linear_window": 33}
    student = convert_layers(pair[0], [0], **how)
    save_model(student, tmp_path / "m", tokenizer_from="byte")
    short = convert_layers(pair[0], [0], mixer="hedgehog_window", linear_window=4)
    save_model(short, tmp_path / "short", tokenizer_from="byte")
    found = {}
    for name in ("m", "short"):
        for branch in ("both", "window", "linear"):
            argv = [str(tmp_path / name), "--data", str(text_shards["prose"]), "--seq_len", "33",
                    "--device", "cpu", "--eval_tokens", "264", "--branch", branch]  # fmt: skip
            script.main([*argv, "--out", str(tmp_path / "out")])
            rows = json.loads((tmp_path / "out" / "eval.json").read_text())["domains"]
            found[name, branch] = next(iter(rows.values()))["student"]["ppl"]
    assert found["m", "both"] == found["m", "window"] == found["m", "linear"]
    assert len({found["short", b] for b in ("both", "window", "linear")}) == 3
