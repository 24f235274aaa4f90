"""Token files: written, read, damaged; the formats of other projects."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import xxhash
from documents import BYTE, EOS, flat, random_documents, write

import shards
from config import UserError
from data import (
    ShardWriter,
    TokenDataset,
)
from shards import HEADER
from tokenizer import load_tokenizer


class WideTokenizer:
    """Only what a writer reads; a vocabulary that needs uint32."""

    name, spec, portable_spec, hash = "wide", "wide", "wide", "00112233445566ff"
    vocab_size, eos_token_id, bos_token_id, starts = 200_000, 199_999, 7, []


@pytest.fixture
def dataset(tmp_path):
    return TokenDataset.open(write(tmp_path / "set", random_documents(150)), "train")


# --- shards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer, itemsize", [(BYTE, 2), (WideTokenizer(), 4)])
def test_write_and_read(tmp_path, tokenizer, itemsize):
    documents = random_documents(40, vocab=tokenizer.vocab_size - 1)
    write(tmp_path, [*documents, []], tokenizer=tokenizer, shard_tokens=300)
    data = TokenDataset.open(tmp_path, "train", verify=True)
    expected = flat(documents, tokenizer.eos_token_id)
    files = sorted(tmp_path.glob("train-*.bin"))
    assert len(files) > 2
    assert sum(f.stat().st_size for f in files) == 1024 * len(files) + itemsize * len(expected)
    assert data.num_tokens == len(expected)
    assert np.array_equal(data.read(0, data.num_tokens), expected)
    for start, n in ((0, 1), (290, 40), (250, 700), (len(expected) - 1, 1)):  # across shards
        assert np.array_equal(data.read(start, n), expected[start : start + n])
    assert np.array_equal(data.doc_ends, np.flatnonzero(expected == tokenizer.eos_token_id) + 1)
    assert data.vocab_size == tokenizer.vocab_size and data.eos == tokenizer.eos_token_id
    assert data.bos == tokenizer.bos_token_id and data.tokenizer_hash == tokenizer.hash
    assert not list(tmp_path.glob("*.tmp"))


def test_fingerprint_follows_content(tmp_path):
    documents = random_documents(20)
    prints = [TokenDataset.open(write(tmp_path / "a", documents), "train").fingerprint]
    prints += [TokenDataset.open(write(tmp_path / "b", documents), "train").fingerprint]
    documents[3][0] ^= 1
    prints += [TokenDataset.open(write(tmp_path / "c", documents), "train").fingerprint]
    first, second = documents[0][:1], documents[0][1:]  # same tokens, other borders: eos moves
    moved = [first, second, *documents[1:]]
    prints += [TokenDataset.open(write(tmp_path / "d", moved), "train").fingerprint]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def edit(path, offset, value):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= value
    path.write_bytes(raw)


def cut(path, change):
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))


def forge(path, field, value):
    """A header that says something else, with the right checksum."""
    raw = bytearray(path.read_bytes())
    fields = list(HEADER.unpack_from(raw))
    fields[field] = value
    head = HEADER.pack(*fields)
    raw[: len(head) + 8] = head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little")
    path.write_bytes(raw)


DAMAGE = {
    "truncated": (lambda shard, docs: cut(shard, -2), r"train-00000.bin: \d+ bytes, expected"),
    "over-long": (lambda shard, docs: cut(shard, 2), r"train-00000.bin: \d+ bytes, expected"),
    "no header": (lambda shard, docs: shard.write_bytes(b"short"), "shorter than the 1024-byte"),
    "magic": (lambda shard, docs: edit(shard, 0, 1), "train-00000.bin: magic number"),
    "version": (
        lambda shard, docs: edit(shard, 4, 2),
        "train-00000.bin: format version 3, expected 1",
    ),
    "eos in header": (
        lambda shard, docs: edit(shard, 28, 1),
        "train-00000.bin: the header is damaged",
    ),
    "tokens": (
        lambda shard, docs: forge(shard, 2, 10**6),
        r"train-00000.bin: \d+ bytes, expected 2001024 for 1000000 tokens",
    ),
    "another dtype": (lambda shard, docs: forge(shard, 3, 4), r"train-00000.bin: \d+ bytes, exp"),
    "no dtype": (lambda shard, docs: forge(shard, 3, 3), "train-00000.bin: the header is damaged"),
    "documents": (lambda shard, docs: forge(shard, 9, 3), "train-00000.docs.npy: damaged"),
    "vocabulary": (lambda shard, docs: forge(shard, 4, 99), r"vocab_size 257, .* have 99"),
    "missing": (lambda shard, docs: shard.unlink(), "train-00000.bin: missing"),
    "no sidecar": (lambda shard, docs: docs.unlink(), "train-00000.docs.npy: missing"),
    "sidecar bit": (lambda shard, docs: edit(docs, -8, 1), "train-00000.docs.npy: damaged"),
    "sidecar cut": (lambda shard, docs: cut(docs, -4), "train-00000.docs.npy: not a readable"),
    "sidecar folder": (
        lambda shard, docs: (docs.unlink(), docs.mkdir()),
        "train-00000.docs.npy: not a readable",
    ),
    "sidecar pickle": (
        lambda shard, docs: np.save(docs, np.array([{}], dtype=object), allow_pickle=True),
        "train-00000.docs.npy: not a readable",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(tmp_path, kind):
    write(tmp_path, random_documents(20))
    damage, message = DAMAGE[kind]
    damage(tmp_path / "train-00000.bin", tmp_path / "train-00000.docs.npy")
    with pytest.raises(UserError, match=message) as error:
        TokenDataset.open(tmp_path, "train")
    assert "\n" not in str(error.value)


def test_flipped_token_bit_is_found_by_verify(tmp_path):
    write(tmp_path, random_documents(20))
    edit(tmp_path / "train-00000.bin", -30, 4)
    TokenDataset.open(tmp_path, "train")  # sizes and header are right
    with pytest.raises(UserError, match=r"train-00000.bin: the tokens do not match"):
        TokenDataset.open(tmp_path, "train", verify=True)


def test_damage_that_comes_later_is_refused_when_it_is_read(tmp_path, monkeypatch):
    """Neither an id that no embedding has nor a file that became shorter gets through."""
    write(tmp_path, random_documents(40), shard_tokens=300)
    data = TokenDataset.open(tmp_path, "train")
    whole = data.read(0, data.num_tokens)
    path = tmp_path / "train-00001.bin"
    first = int(data._starts[1])
    with open(path, "r+b") as file:
        file.seek(shards.HEADER_BYTES + 2 * 5)
        file.write(b"\xff\xff")
    data.read(0, first + 5)
    with pytest.raises(UserError, match=r"train-00001\.bin: token 65535 .* below 257 expected"):
        data.read(first - 3, 10)
    assert (data.read(first + 6, 20) == whole[first + 6 : first + 26]).all()
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(
        UserError, match=r"train-00001\.bin: \d+ bytes found, \d+ expected"
    ) as error:
        data.read(first + 6, 20)
    assert "\n" not in str(error.value)
    with monkeypatch.context() as patch:  # cut off between the look at its size and the read
        patch.setattr(shards.os, "fstat", lambda _: os.stat_result([0] * 6 + [10**6] + [0] * 3))
        size = path.stat().st_size
        assert (data.read(first + 6, 20) == whole[first + 6 : first + 26]).all()
        with pytest.raises(UserError, match=rf"train-00001\.bin: {size} bytes found"):
            data.read(int(data._starts[2]) - 20, 20)
    (tmp_path / "train-00000.bin").unlink()
    assert (data.read(0, first) == whole[:first]).all()  # an open file outlives its name


def test_more_shards_than_a_process_may_open(tmp_path, monkeypatch):
    documents = random_documents(120)
    write(tmp_path, documents, shard_tokens=40)
    monkeypatch.setattr(shards, "MAX_OPEN", 8)
    files = len(list(tmp_path.glob("train-*.bin")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/dev/fd")) + 20
    assert files > limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        data = TokenDataset.open(tmp_path, "train", verify=True)
        found = data.read(0, data.num_tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(found, flat(documents, EOS))
    (tmp_path / "train-00000.bin").unlink()  # closed again since then
    with pytest.raises(UserError, match=r"train-00000\.bin: No such file"):
        data.read(0, 1)


def test_shards_of_two_vocabularies_are_refused(tmp_path):
    write(tmp_path / "a", random_documents(30), shard_tokens=400)
    write(tmp_path / "b", random_documents(30), tokenizer=WideTokenizer(), shard_tokens=400)
    for end in ("bin", "docs.npy"):
        shutil.copy(tmp_path / f"b/train-00001.{end}", tmp_path / f"a/train-00001.{end}")
    with pytest.raises(UserError, match=r"train-00001.bin: itemsize is 4, expected 2"):
        TokenDataset.open(tmp_path / "a", "train")


def test_unfinished_and_unknown_sets(tmp_path):
    with pytest.raises(UserError, match=r"no meta.json"):
        TokenDataset.open(tmp_path, "train")
    with (
        pytest.raises(RuntimeError),
        ShardWriter(tmp_path, "train", BYTE, shard_tokens=5) as writer,
    ):
        for _ in range(3):
            writer.add([1, 2, 3])
        raise RuntimeError("a crash in the middle")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, [[1, 2]])
    with pytest.raises(UserError, match=r"no split 'val'; it has \['train'\]"):
        TokenDataset.open(tmp_path, "val")
    (tmp_path / "meta.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match=r"meta.json: "):
        TokenDataset.open(tmp_path, "train")


def test_writer_overwrites_only_when_asked(tmp_path):
    write(tmp_path, random_documents(30), shard_tokens=300)
    write(tmp_path, [[5, 6]], split="val")
    with pytest.raises(UserError, match=r"already holds a 'train' split"):
        ShardWriter(tmp_path, "train", BYTE)
    with pytest.raises(UserError, match=r"meta.json: written with tokenizer 'byte'"):
        ShardWriter(tmp_path, "train", WideTokenizer(), overwrite=True)
    write(tmp_path, [[1, 2]], overwrite=True)
    assert TokenDataset.open(tmp_path, "train").read(0, 3).tolist() == [1, 2, EOS]
    assert TokenDataset.open(tmp_path, "val").num_tokens == 3
    assert sorted(p.name for p in tmp_path.glob("train-*")) == [
        "train-00000.bin",
        "train-00000.docs.npy",
    ]


def test_writer_refuses_foreign_ids(tmp_path):
    writer = ShardWriter(tmp_path, "train", BYTE)
    for ids in ([1, 257], [-1]):
        with pytest.raises(ValueError, match=r"outside 0\.\.256"):
            writer.add(ids)


def test_meta_names_no_absolute_path(tmp_path):
    tok = load_tokenizer("byte")
    tok.spec = str(tmp_path / "tokenizer.json")
    write(tmp_path / "set", [[1]], tokenizer=tok)
    meta = json.loads((tmp_path / "set/meta.json").read_text())
    assert meta["tokenizer"] == {"name": "byte", "spec": None, "hash": tok.hash}
    assert str(tmp_path) not in json.dumps(meta)


def test_check_tokenizer(dataset):
    dataset.check_tokenizer(BYTE)
    with pytest.raises(UserError, match=r"written with tokenizer hash"):
        dataset.check_tokenizer(WideTokenizer())
    other = load_tokenizer("byte")
    other.eos_token_id = 0
    with pytest.raises(UserError, match=r"documents end with token 256, expected 0"):
        dataset.check_tokenizer(other)


# --- files of other projects ----------------------------------------------------------------


def write_gpt2(path, tokens, magic=False, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240520, 1, len(tokens) if count is None else count)
    body = np.asarray(tokens, dtype="<u2").tobytes()
    path.write_bytes((header.tobytes() if magic else b"") + body)


@pytest.mark.parametrize("magic", [False, True])
def test_nanogpt_formats(tmp_path, magic):
    tokens = np.random.default_rng(1).integers(0, 50256, 500)
    tokens[[99, 100, 350]] = 50256
    write_gpt2(tmp_path / "val.bin", tokens[:50], magic)
    if magic:  # several shards, named as llm.c and modded-nanogpt do
        write_gpt2(tmp_path / "fineweb_train_000001.bin", tokens[:200], magic)
        write_gpt2(tmp_path / "fineweb_train_000002.bin", tokens[200:], magic)
    else:
        write_gpt2(tmp_path / "train.bin", tokens)
    data = TokenDataset.open(f"nanogpt:{tmp_path}", "train")
    assert np.array_equal(data.read(0, 500), tokens)
    assert data.doc_ends.tolist() == [100, 101, 351, 500]
    assert (data.eos, data.vocab_size, data.tokenizer_hash) == (50256, 50257, None)
    assert np.array_equal(TokenDataset.open(f"nanogpt:{tmp_path}", "val").read(0, 50), tokens[:50])
    with pytest.raises(UserError, match=r"documents end with token 50256, expected 256"):
        data.check_tokenizer(BYTE)
    before = data.fingerprint
    tokens[400] ^= 1
    name = "fineweb_train_000002.bin" if magic else "train.bin"
    write_gpt2(tmp_path / name, tokens[200:] if magic else tokens, magic)
    assert TokenDataset.open(f"nanogpt:{tmp_path}", "train").fingerprint != before


@pytest.mark.parametrize("end", [[], [50256]])
def test_nanogpt_files_are_of_gpt2_alone(end, tmp_path):
    """Also where no end of text, nor any large id, says so."""
    write_gpt2(tmp_path / "train.bin", [*range(10), *end])
    data = TokenDataset.open(f"nanogpt:{tmp_path}", "train")
    for eos, vocab_size, named in (
        (256, 257, "documents end with token 50256, expected 256"),
        (50256, 50295, "tokens of a vocabulary of 50257, expected 50295"),
        (50256, 50257, ""),
    ):
        tokenizer = load_tokenizer("byte")
        tokenizer.eos_token_id, tokenizer.vocab_size = eos, vocab_size
        with pytest.raises(UserError, match=named) if named else nullcontext():
            data.check_tokenizer(tokenizer)
    write_gpt2(tmp_path / "train.bin", [50257])
    with pytest.raises(UserError, match=r"train.bin: token 50257, GPT-2's 0 to 50256 expected"):
        TokenDataset.open(f"nanogpt:{tmp_path}", "train")


def test_nanogpt_mistakes(tmp_path):
    spec = f"nanogpt:{tmp_path}"
    with pytest.raises(UserError, match=r"no train.bin"):
        TokenDataset.open(spec, "train")
    path = tmp_path / "train.bin"
    with pytest.raises(UserError, match=r"no such file"):
        TokenDataset.open(f"nanogpt:{path}", "train")
    for count in (11, 9):
        write_gpt2(path, range(10), magic=True, count=count)
        with pytest.raises(UserError, match=r"train.bin: 1044 bytes, expected 1024 \+ 2 for each"):
            TokenDataset.open(spec, "train")
    for raw in (b"", b"odd"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"train.bin: . bytes, expected"):
            TokenDataset.open(spec, "train")
    write_gpt2(path, range(10), magic=True)
    edit(path, 4, 2)
    with pytest.raises(UserError, match=r"train.bin: format version 3, expected 1"):
        TokenDataset.open(spec, "train")
    np.array([20240801, 7, 10, *[0] * 253, *range(10)], dtype="<u4").tofile(path)
    with pytest.raises(UserError, match=r"train.bin: format 20240801 .* 20240520 expected"):
        TokenDataset.open(spec, "train")
    write_gpt2(path, range(10))
    assert TokenDataset.open(f"nanogpt:{path}", "train").doc_ends.tolist() == [10]
    with pytest.raises(UserError, match=r"without a 'val' split"):  # never evaluate on train.bin
        TokenDataset.open(f"nanogpt:{path}", "val")


def test_shards_module_does_not_import_torch():
    code = "import shards, tokenizer, sys; assert 'torch' not in sys.modules"
    folder = os.path.dirname(shards.__file__)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
