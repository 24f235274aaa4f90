"""A batch in another tokenizer's tokens: by hand, against a loop over bytes, through whole runs."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import call_script, metric_rows, run_python, tiny_config
from test_objectives import ONE, selected
from test_runs import relative, train_flags
from test_tokenizer import make_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from config import StageConfig, UserError
from data import Batch, PackedLoader, TokenDataset, pack_rows
from evaluate import inputs
from fast_tokenizer import byte_characters
from hf import load_model, save_model
from losses import num_selected, spread_over_bytes
from mixture import Mixture
from model import Transformer
from objectives import HeadObjective
from retokenize import Retokenizer, whole_characters
from shard_writer import ShardWriter
from tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")
WORDS = ["the cat", " sat", "  on\n", "na\u00efve", "\u4f60\u597d\u4e16\u754c", " caf\u00e9s",
         "\U0001f600\U0001f468", "\ud55c\uad6d", "x = 3.14", " \u2014 "]  # fmt: skip


def bpe(folder, merges, **normalizer):
    """A byte-level tokenizer.json with these merges, in their order."""
    characters = [*byte_characters(), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    for name, value in normalizer.items():
        setattr(backend, name, value)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def documents(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(count)]


def write(folder, texts, tokenizer, splits=("train",)):
    for split in splits:
        with ShardWriter(folder, split, tokenizer) as writer:
            for text in texts:
                writer.add(tokenizer.encode(text))
    return TokenDataset.open(folder, splits[0])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A tokenizer with merges of two bytes of a character, and of whole words."""
    folder = tmp_path_factory.mktemp("learned")
    make_folder(folder, texts=documents(40), vocab_size=310)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return bpe(tmp_path_factory.mktemp("other"), [("t", "h"), ("\u00e4", "\u00bd")])


def test_by_hand(tmp_path):
    # t|h|e| |ca|t|end by one tokenizer, the| c|at|end by the other.
    own = bpe(tmp_path / "own", [("c", "a")])
    other = bpe(tmp_path / "other", [("t", "h"), ("th", "e"), ("\u0120", "c"), ("a", "t")])
    assert [len(own.encode("the cat")), len(other.encode("the cat"))] == [6, 3]
    data = write(tmp_path / "data", ["the cat", "at", "the cat"], own)
    batch = Retokenizer(own, other, 100)(pack_rows(data, [0], 13, True))
    found = batch.retokenized
    # 7 tokens, a|t|end, t|h|e and the space, which is the last target.
    assert batch.labels[0, -1] == own.encode(" ")[0] and batch.num_valid == 6 + 2 + 3
    the, c, at, end = [other.encode(t)[0] for t in ("the", " c", "at")] + [other.eos_token_id]
    space = other.encode(" ")[0]
    assert found.batch.input_ids[0, :5].tolist() == [the, c, at, at, the]
    assert found.batch.labels[0, :5].tolist() == [c, at, end, end, space]
    assert found.batch.cu_seqlens[:4].tolist() == [0, 3, 4, 5]
    losses = torch.zeros(found.batch.input_ids.numel(), dtype=torch.float64)
    losses[:5] = torch.tensor([4.0, 6.0, 1.0, 8.0, 16.0])
    spread = spread_over_bytes(losses, found.source, found.target, found.share, 13)
    # h e: the first of the other's. Space: half of c. ca: half of c, half of at. end: as it is.
    known = [0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1]
    assert found.known.tolist() == [bool(k) for k in known]
    assert spread.tolist() == [0, 0, 2, 2 + 3, 3, 1, 0, 0, 8, 0, 0, 0, 16]


def naive(own, other, batch, loss_of, context):
    """{label position: loss} of all labels that have one, byte by byte."""
    table, rows = own.token_bytes(), len(batch.sample_ids)
    theirs = other.token_bytes()
    found = {}
    ids, labels = (x.reshape(rows, -1) for x in (batch.input_ids, batch.labels))
    for r in range(rows):
        seen = []
        starts = [0, *((labels[r] < 0).nonzero().flatten() + 1).tolist()]
        for a, b in pairwise([*starts, ids.shape[1] + 1]):
            row = [*ids[r].tolist(), int(labels[r, -1])][a:b]
            row = [i for i in row if i >= 0]
            raw = [bytes([255]) if not table[i] else table[i] for i in row]  # 255: in no text
            text, other_ids, places, at = b"".join(raw), [], [], 0
            while at < len(text):
                end = at
                while end < len(text) and text[end] != 255:
                    end += 1
                piece = text[at:end]
                stray = next(i for i in range(5) if decodes(piece[i:], cut=True))
                piece = piece[stray:]
                piece = next(piece[: len(piece) - i] for i in range(5)
                             if decodes(piece[: len(piece) - i]))  # fmt: skip
                place = at + stray
                for i in other.encode(piece.decode()):
                    other_ids.append(i)
                    places.append((place, place + len(theirs[i])))
                    place += len(theirs[i])
                if end < len(text):
                    other_ids.append(other.eos_token_id)
                    places.append((end, end + 1))
                at = end + 1
            before = 0 if batch.cu_seqlens is not None else len(seen)
            seen = seen[:before] + other_ids
            per_byte = {}
            for k in range(1, len(other_ids)):
                at = before + k
                for byte in range(*places[k]):
                    loss = loss_of(tuple(seen[(at - 1) // context * context : at]), seen[at])
                    per_byte[byte] = loss / (places[k][1] - places[k][0])
            place = len(raw[0]) if raw else 0
            for j in range(1, len(row)):
                mine = range(place, place + len(raw[j]))
                place += len(raw[j])
                if all(byte in per_byte for byte in mine):
                    position = r * ids.shape[1] + a + j - 1
                    found[position] = sum(per_byte[byte] for byte in mine)
    return found


def decodes(raw, cut=False):
    """Whether it is text; cut: but for an unfinished character at its end."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return cut and error.reason == "unexpected end of data"
    return True


def made_up(context, target):
    """A loss that depends on all that a model would see."""
    return hash((context, target)) % 1009 / 100


def made_up_losses(batch):
    """[M] as `made_up` of a packed batch."""
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    losses = torch.zeros(len(ids), dtype=torch.float64)
    for a, b in pairwise(batch.cu_seqlens.tolist()):
        for k in range(a, b):
            if labels[k] >= 0:
                losses[k] = made_up(tuple(ids[a : k + 1]), labels[k])
    return losses


@pytest.mark.parametrize("doc_mask", [True, False])
@pytest.mark.parametrize("context", [1000, 7])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("pair", ["byte>learned", "learned>byte", "learned>other", "other>learned"])
def test_every_loss_against_a_loop_over_bytes(
    pair, packing, context, doc_mask, learned, other, tmp_path
):
    """Rows that begin and end within characters and words, documents, padding, cut contexts."""
    tokenizers = {"byte": BYTE, "learned": learned, "other": other}
    a, b = (tokenizers[name] for name in pair.split(">"))
    data = Mixture({"d": write(tmp_path / "d", documents(60), a)}, [1], packing)
    retokenize = Retokenizer(a, b, context)
    seen = cut = 0
    for first in range(0, min(12, sum(data.rows(29).sizes) - 3), 3):
        batch = retokenize(pack_rows(data, range(first, first + 3), 29, doc_mask))
        found = batch.retokenized
        spread = spread_over_bytes(
            made_up_losses(found.batch), found.source, found.target, found.share, 87
        )
        expected = naive(a, b, batch, made_up, context)
        assert found.known.nonzero().flatten().tolist() == sorted(expected)
        for position, loss in expected.items():
            assert spread[position].item() == pytest.approx(loss, rel=1e-5), position
        assert (batch.labels.flatten()[found.known] >= 0).all()
        assert found.batch.position_ids.max() < min(context, found.batch.max_seqlen)
        seen, cut = seen + len(expected), cut + batch.num_valid - len(expected)
    assert seen > 100 and (cut > 0 or pair.startswith("learned"))


def test_text_that_does_not_decode():
    raw = "\u4f60\u597d, \U0001f600".encode()
    assert list(whole_characters(raw)) == [(0, "\u4f60\u597d, \U0001f600")]
    assert list(whole_characters(raw[1:-1])) == [(2, "\u597d, ")]
    assert list(whole_characters(raw[2:4] + b"a\xffb")) == [(2, "a"), (4, "b")]
    assert list(whole_characters(b"\xc3\xa9\xffb")) == [(0, "\u00e9"), (3, "b")]
    assert list(whole_characters(raw[1:3])) == list(whole_characters(b"")) == []


def test_a_text_that_the_other_tokenizer_changes_has_losses_up_to_there(tmp_path):
    other = bpe(tmp_path / "nfc", [], normalizer=normalizers.NFC())
    texts = ["cafe\u0301 au lait", "caf\u00e9 au lait", "the cat"]
    data = write(tmp_path / "data", texts, BYTE)
    batch = Retokenizer(BYTE, other, 100)(pack_rows(data, [0], 32, True))
    size = len(texts[0].encode())
    known = batch.retokenized.known.tolist()
    assert known[: size + 1] == [True] * 2 + [False] * (size - 3) + [True, False]  # caf ... end
    assert known[size + 1 :][:14] == [True] * 13 + [False]


def test_a_row_without_text_has_no_losses(learned):
    ids = torch.tensor([[0xBD, 0x80, 0xE4, 0xBD]])  # parts of characters only
    bounds = torch.tensor([0, *[4] * 15], dtype=torch.int32)
    labels = torch.tensor([[0x80, 0xE4, 0xBD, -100]])
    batch = Batch(ids, labels, torch.arange(4)[None], bounds, 4, 3, [0], [3])
    found = Retokenizer(BYTE, learned, 100)(batch).retokenized
    assert not found.known.any() and found.batch.num_valid == 0
    assert len(found.source) == 0 and found.batch.input_ids.numel() == 16


def random_model(tokenizer, seed=3, **changes):
    torch.manual_seed(seed)
    config = tiny_config(
        vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id, **changes
    )
    model = Transformer(config)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model


@pytest.mark.parametrize("doc_mask", [True, False])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("name", ["byte", "learned"])
def test_the_same_tokenizer_gives_the_same_losses(name, packing, doc_mask, learned, tmp_path):
    """Through bytes and back: which tokens have one, their losses, and which are selected."""
    tokenizer, texts, seq_len = {"byte": BYTE, "learned": learned}[name], documents(60), 160
    if packing == "concatenate":  # rows cut documents, but here no characters
        texts = [text.encode("ascii", "ignore").decode() + " the cat sat" for text in texts]
        seq_len = 40
    data = Mixture({"d": write(tmp_path / "d", texts, tokenizer)}, [1], packing)
    student = random_model(tokenizer, 3).double()
    teacher = random_model(tokenizer, 4).double().requires_grad_(False)
    stage = StageConfig(kd_weight=0.0, select_tokens=0.4)
    objective = HeadObjective(student, teacher, stage, ONE, [])
    batch = pack_rows(data, [0, 1, 2], seq_len, doc_mask)
    again = Retokenizer(tokenizer, tokenizer, 1000)(batch)
    valid = batch.labels.flatten() >= 0
    assert torch.equal(again.retokenized.known, valid) and not valid.all()
    with torch.no_grad():
        logits = (teacher(**inputs(batch)) @ teacher.head_weight.T).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    spread = objective.module._losses_of_another_tokenizer(again)
    assert (spread - plain).abs().max() < 1e-6 < plain.max()
    assert torch.equal(selected(objective, batch), selected(objective, again))
    sums = [objective.backward([b], torch.tensor(9.0)) for b in (batch, again)]
    assert sums[0]["loss"] == pytest.approx(sums[1]["loss"].item(), rel=1e-9)


def test_what_has_no_reference_loss_comes_last(learned, tmp_path):
    """And counts: a row keeps as many tokens as it would."""
    data = write(tmp_path / "d", documents(60), BYTE)
    student, teacher = random_model(BYTE), random_model(learned, 4).requires_grad_(False)
    batch = Retokenizer(BYTE, learned, 1000)(pack_rows(data, [0, 1], 60, True))
    known, valid = batch.retokenized.known, batch.labels.flatten() >= 0
    unknown = valid & ~known
    assert unknown.sum() > 5
    share = 1 - 0.5 * unknown.sum().item() / valid.sum().item()
    for select_tokens, some in ((0.3, False), (share, True)):
        stage = StageConfig(kd_weight=0.0, select_tokens=select_tokens)
        at = selected(HeadObjective(student, teacher, stage, ONE, []), batch)
        assert len(at) == num_selected(batch.row_valid, select_tokens)
        assert valid[at].all() and bool(unknown[at].any()) == some


def test_selection_does_not_depend_on_micro_batches(learned, tmp_path):
    data = write(tmp_path / "d", documents(60), BYTE)
    student = random_model(BYTE).double()
    teacher = random_model(learned, 4).double().requires_grad_(False)
    stage = StageConfig(kd_weight=0.0, select_tokens=0.5)
    objective = HeadObjective(student, teacher, stage, ONE, [])
    retokenize = Retokenizer(BYTE, learned, 1000)
    found = []
    for micro in (4, 2, 1):
        at = []
        for i in range(0, 4, micro):
            batch = retokenize(pack_rows(data, range(i, i + micro), 50, True))
            at += (selected(objective, batch) + 50 * i).tolist()
        found.append(at)
    assert found[0] == found[1] == found[2] and len(found[0]) > 80


def test_the_loader_hands_out_both(learned, tmp_path):
    """From its thread as without, and after a resume."""
    data = write(tmp_path / "d", documents(80), BYTE)
    data.attach = Retokenizer(BYTE, learned, 1000)

    def loader(prefetch):
        return PackedLoader(data, seq_len=32, rows_per_step=4, micro_batch=2, prefetch=prefetch)

    plain, ahead = loader(0), loader(2)
    for _ in range(5):
        for a, b in zip(plain.next_step(), ahead.next_step(), strict=True):
            check_equal(a.retokenized, b.retokenized)
            check_equal(a.to("cpu").retokenized, b.retokenized)
            assert a.to("meta").retokenized.batch.labels.device.type == "meta"
    again = loader(2)
    again.load_state_dict(ahead.state_dict())
    check_equal(plain.next_step()[1].retokenized, again.next_step()[1].retokenized)
    ahead.close()
    again.close()


def check_equal(a, b):
    for name in ("known", "source", "target", "share"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(a.batch, name), getattr(b.batch, name)), name


@pytest.fixture(scope="module")
def reference(learned, tmp_path_factory):
    """A folder with a random model of the tokenizer `learned`."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    save_model(random_model(learned), folder, tokenizer_from=learned.spec)
    return str(folder)


@pytest.fixture(scope="module")
def unicode_data(learned, tmp_path_factory):
    """Name of a tokenizer -> a data set of it."""
    folders = {}
    for name, tokenizer in (("byte", BYTE), ("learned", learned)):
        folders[name] = tmp_path_factory.mktemp("unicode") / name
        write(folders[name], documents(120), tokenizer, ("train", "val"))
    return folders


@pytest.mark.slow
def test_a_run_resumes_and_splits_over_ranks(reference, unicode_data, tmp_path, capsys, refused):
    """A byte-level student by a reference with a tokenizer.json."""
    more = ["--select_tokens=0.5", f"--reference={reference}", "--doc_mask=True"]
    flags = lambda run, *m: train_flags(  # noqa: E731
        unicode_data["byte"], tmp_path, run, *more, *m
    )
    call_script("train", *flags("whole"))
    out = capsys.readouterr().out
    assert "its losses spread over bytes" in out and "loss is over 0.5" in out
    expected = metric_rows(tmp_path / "whole")
    assert len(expected) == 6
    call_script("train", *flags("cut", "--save_every=2"))
    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        if folder.name != "step-4":
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "cut" / "model")
    call_script("train", *flags("cut", "--save_every=2", "--resume=auto"))
    assert "resuming at step 4" in capsys.readouterr().out
    assert metric_rows(tmp_path / "cut") == expected
    a, b = (dict(load_model(tmp_path / run / "model").state_dict()) for run in ("whole", "cut"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["use_regex"] = False
    (other / "tokenizer.json").write_text(json.dumps(raw))
    again = flags("cut", "--resume=auto", f"--reference={other}")
    assert "reference_tokenizer" in refused("train", *again)
    run_python("train.py", *flags("two"), ranks=2)
    assert relative(expected, metric_rows(tmp_path / "two")) <= 1e-5
    call_script("train", *flags("off", "--select_tokens=1", "--reference="))
    assert relative(expected, metric_rows(tmp_path / "off")) > 1e-3


@pytest.mark.parametrize("doc_mask", [True, False])
def test_a_run_by_a_reference_over_bytes(doc_mask, learned, tiny_teacher, unicode_data, tmp_path):
    call_script("train", *train_flags(
        unicode_data["learned"], tmp_path, "a", f"--tokenizer={learned.spec}", "--batch_size=2",
        "--select_tokens=0.5", f"--reference={tiny_teacher}", "--packing=best_fit",
        f"--doc_mask={doc_mask}",
    ))  # fmt: skip
    losses = metric_rows(tmp_path / "a")
    assert len(losses) == 6 and np.isfinite(list(losses.values())).all()


def test_refused(refused, reference, tiny_teacher, tiny_data, tmp_path):
    def line(folder, *more):
        flags = train_flags(tiny_data, tmp_path, "a", "--select_tokens=0.5", *more)
        return refused("train", *flags, f"--reference={folder}")

    words = tmp_path / "words"
    shutil.copytree(tiny_teacher, words)
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a")).save(
        str(words / "tokenizer.json")
    )
    expected = "--reference: tokenizer words found, whose tokens are not the bytes of the text"
    assert expected in line(words)
    lower = tmp_path / "lower"
    shutil.copytree(reference, lower)
    raw = json.loads((lower / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Lowercase"}
    (lower / "tokenizer.json").write_text(json.dumps(raw))
    assert "--reference: tokenizer lower found" in line(lower)
    small = tmp_path / "small"
    shutil.copytree(reference, small)
    config = json.loads((small / "config.json").read_text())
    config["vocab_size"] = 300
    (small / "config.json").write_text(json.dumps(config))
    assert "--reference: vocabulary of 300 in" in line(small)
    (small / "config.json").unlink()
    (small / "tokenizer.json").unlink()
    assert "small" in line(small)
    with pytest.raises(UserError, match="--tokenizer: tokenizer words found"):
        Retokenizer(load_tokenizer(str(words)), BYTE, 100)


def test_tokens_that_are_no_text(tmp_path):
    """Control tokens have no bytes, others that were added have theirs."""
    own = bpe(tmp_path / "own", [("a", "b")])
    backend = Tokenizer.from_file(str(tmp_path / "own" / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>"])
    backend.add_tokens([AddedToken("<think>")])
    backend.save(str(tmp_path / "own" / "tokenizer.json"))
    own = load_tokenizer(str(tmp_path / "own"))
    ids = [*own.encode("x<think>"), own.vocab_size - 2, *own.encode("ab<|im_start|>")]
    table = own.token_bytes()
    assert b"".join(table[i] for i in ids).decode() == "x<think>ab<|im_start|>"
    assert own.encode("<|im_start|>", special_tokens=True) == [own.vocab_size - 2]
    with ShardWriter(tmp_path / "d", "train", own) as writer:
        writer.add(ids)
    data = TokenDataset.open(tmp_path / "d", "train")
    batch = Retokenizer(own, BYTE, 100)(pack_rows(data, [0], len(ids), True))
    known = batch.retokenized.known
    assert known.tolist() == [i != own.vocab_size - 2 for i in batch.labels[0].tolist()]
    ids = batch.retokenized.batch.input_ids[0, : batch.retokenized.batch.num_valid].tolist()
    assert bytes(ids) == b"x<think>ab<|im_start|>"
