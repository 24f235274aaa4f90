"""Held-out scores against plain full logits, the teacher's own row, the floor, the command."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kit import random_ids, tiny_model

import evaluate as script
from config import UserError
from data import IGNORE, TokenDataset, eval_batches
from evaluate import PROMPTS, Evaluator, completions, inputs, zeroed_attention
from hf import save_model
from hybrid_layers import convert_layers
from shards import ShardWriter
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


def test_zeroed_attention_restores_bitwise(pair, batches):
    teacher, student = pair
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

    def decode(ids):
        given.append(ids)
        return str(len(ids))

    tokenizer = SimpleNamespace(
        encode=load_tokenizer("byte").encode, decode=decode, eos_token_id=None
    )
    assert completions(model, tokenizer, 7) == ["7"] * len(PROMPTS)
    assert completions(model, tokenizer, 7) and given[:3] == given[3:]


def test_command(tmp_path, tiny_data, pair, capsys):
    for name, model in zip(("teacher", "student"), pair, strict=True):
        save_model(model, tmp_path / name, tokenizer_from="byte")
    argv = [str(tmp_path / "student"), "--data", tiny_data, "--seq_len", "33", "--device", "cpu"]
    script.main([*argv, "--teacher", str(tmp_path / "teacher"), "--eval_tokens", "264"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == {"ce", "ppl", "teacher_ppl", "ratio", "kl", "top1"}
    assert float(printed["ppl"]) == pytest.approx(math.exp(float(printed["ce"])), rel=1e-2)
    with pytest.raises(SystemExit) as stop:
        script.main([*argv, "--teacher", str(tmp_path / "nowhere")])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
