"""scripts/prepare_data.py: inputs, held-out documents, workers, mistakes."""

import gzip
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import zstandard
from test_tokenizer import TEXTS, make_folder

from config import UserError
from scripts import readers
from shards import TokenDataset
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "prepare_data.py"
BYTE = load_tokenizer("byte")


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_data = load_script()


def run(*args):
    return prepare_data.main([*map(str, args), "--num_workers", "1"])


def texts(folder, split):
    data = TokenDataset.open(folder, split, verify=True)
    starts = [0, *data.doc_ends[:-1]]
    spans = zip(starts, data.doc_ends, strict=True)
    return [BYTE.decode(data.read(int(a), int(b - a) - 1).tolist()) for a, b in spans]


def write_jsonl(path, documents, field="text"):
    path.write_text("".join(json.dumps({field: d, "id": 1}) + "\n" for d in documents))
    return path


def test_every_document_once_and_copies_never_on_both_sides(tmp_path, capsys):
    documents = [f"document {i} \u00e9" for i in range(300)]
    write_jsonl(tmp_path / "a.jsonl", documents[:200])
    write_jsonl(tmp_path / "b.jsonl", documents[150:])  # 50 documents are there twice
    assert run(tmp_path, "--out", tmp_path / "out", "--val_fraction", 0.2) == 0
    train, val = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "val")
    assert len(train) + len(val) == 350 and set(train) | set(val) == set(documents)
    assert not set(train) & set(val)
    assert 30 < len(val) < 110
    out = capsys.readouterr().out
    assert f"train: {len(train)} documents" in out and "2 files" in out


def test_as_a_command_with_workers_equals_one_process(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(5000)])
    settings = [tmp_path / "a.jsonl", "--val_fraction", "0.1", "--shard_tokens", "20000"]
    command = [sys.executable, SCRIPT, *settings, "--out", tmp_path / "two", "--num_workers", "2"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert run(*settings, "--out", tmp_path / "one") == 0
    for split in ("train", "val"):
        one, two = (TokenDataset.open(tmp_path / name, split) for name in ("one", "two"))
        assert one.fingerprint == two.fingerprint
    assert len(list((tmp_path / "two").glob("train-*.bin"))) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "one", "two"]


def test_another_seed_holds_out_others(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(200)])
    for seed in (0, 1):
        run(path, "--out", tmp_path / str(seed), "--val_fraction", 0.3, "--seed", seed)
    assert texts(tmp_path / "0", "val") != texts(tmp_path / "1", "val")


def test_text_files_globs_and_paragraph_breaks(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text("one\n\nstill one\n\n\n\ntwo\n \n\nthree\n")
    (tmp_path / "sub/b.md").write_bytes(b"\xef\xbb\xbffour\r\n")  # as Windows writes them
    (tmp_path / "sub/c.txt").write_text("  \n")  # blank: no document
    folder = tmp_path / "sub"
    assert run(folder, folder / "*.txt", "--out", tmp_path / "o", "--val_fraction", 0) == 0
    assert texts(tmp_path / "o", "train") == [(folder / "a.txt").read_text(), "four\n"]
    assert capsys.readouterr().err == ""  # no warning: nothing was to be held out
    split = ["--split_paragraph_breaks", "--val_fraction", 0, "--out", tmp_path / "s"]
    assert run(folder / "a.txt", *split) == 0
    found = [text.strip() for text in texts(tmp_path / "s", "train")]
    assert found == ["one\n\nstill one", "two", "three"]
    options = SimpleNamespace(split_paragraph_breaks=False)
    (rows,) = readers.read_text(folder / "b.md", options, 0)
    assert rows == (1, 9, ["four\n"])  # its bytes with the mark


def test_what_is_not_read_is_said(tmp_path, monkeypatch, capsys):
    """Counted by ending, in one line; hidden files are nobody's input. Case does not matter."""
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    for name in ("1.json", "2.json", "v1.2.JSON", "b.txt.gz", "c.rst", "Makefile", ".git/config"):
        (folder / name).write_text('{"text": "x"}\n')
    line, count = failure(capsys, folder, "--out", tmp_path / "o")
    assert "the folder holds no .txt" in line and count == 1
    write_jsonl(folder / "X.JSONL", ["one"])
    data = json.dumps({"text": "two"}).encode()
    (folder / "Y.jsonl.GZ").write_bytes(gzip.compress(data))
    (folder / "Z.Jsonl.Zst").write_bytes(zstandard.compress(data))
    args = [folder, folder, "--val_fraction", 0, "--out", tmp_path / "o"]
    assert run(*args) == 0
    assert texts(tmp_path / "o", "train") == ["one", "two", "two"]
    said = "not read: 3 .json, 1 without ending, 1 .txt.gz, 1 .rst (such as "
    assert capsys.readouterr().err == f"{said}{folder / '1.json'})\n"
    monkeypatch.setattr(readers, "ENDINGS_SHOWN", 1)
    assert run(*args, "--overwrite") == 0
    assert "not read: 3 .json, 3 others (" in capsys.readouterr().err


def test_links_are_followed_and_hidden_folders_are_not_read(tmp_path, capsys):
    """Each folder once, also where a link leads back to one above it."""
    folder, other = tmp_path / "in", tmp_path / "other"
    for new in (folder / ".ipynb_checkpoints", folder / "sub", other):
        new.mkdir(parents=True)
    write_jsonl(folder / ".ipynb_checkpoints" / "a.jsonl", ["hidden"])
    write_jsonl(folder / ".a.jsonl", ["hidden too"])
    write_jsonl(folder / "a.jsonl", ["one"])
    write_jsonl(folder / "sub" / "b.jsonl", ["two"])
    write_jsonl(other / "c.jsonl", ["three"])
    (folder / "linked").symlink_to(other)
    (other / "back").symlink_to(folder)
    (folder / "sub" / "again").symlink_to(other)
    (folder / "z.jsonl").symlink_to(other / "c.jsonl")
    args = ["--val_fraction", 0, "--out", tmp_path / "o"]
    assert run(folder, *args) == 0
    assert texts(tmp_path / "o", "train") == ["one", "three", "two"]
    assert run(folder / ".ipynb_checkpoints", *args, "--overwrite") == 0
    assert texts(tmp_path / "o", "train") == ["hidden"]
    (folder / "x.txt").symlink_to("gone.txt")
    for given in (folder, folder / "x.txt", folder / "x.*"):
        line, count = failure(capsys, given, *args, "--overwrite")
        assert "x.txt: no such file; it is a link to gone.txt" in line and count == 1


def test_bad_lines_are_named_and_counted(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"body": "good"})
    path.write_bytes(
        f'{good}\n{{"body": \n\n{{"text": "x"}}\n{{"body": 3}}\n[1]\n'.encode()
        + b'{"body": "\xff"}\n'
    )
    args = [path, "--text_field", "body", "--val_fraction", 0, "--out", tmp_path / "o"]
    assert run(*args) == 0
    captured = capsys.readouterr()
    for line in (2, 4, 5, 6, 7):
        assert f"a.jsonl:{line}: " in captured.err
    assert "5 left out" in captured.out and texts(tmp_path / "o", "train") == ["good"]


def compressed(path, data: bytes) -> bytes:
    """As the file's name says, in several frames or members."""
    third = len(data) // 3
    parts = data[:third], data[third : 2 * third], data[2 * third :]
    compress = gzip.compress if path.suffix == ".gz" else zstandard.compress
    return b"".join(map(compress, parts))


COMPRESSED = ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.jsonl.zstd"]


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_lines(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "READ_BYTES", 50)  # lines and frames end anywhere in a piece
    documents = [f"document {i} \u00e9 " * (i % 7) for i in range(1, 90)]
    lines = "".join(json.dumps({"text": d, "url": "u" * 30}) + "\n" for d in documents).encode()
    path = tmp_path / "shard" / name
    path.parent.mkdir()
    path.write_bytes(compressed(path, lines[:-1]))  # the last line does not end in one
    assert run(tmp_path / "shard", "--out", tmp_path / "o", "--val_fraction", 0) == 0
    wanted = [d for d in documents if d.strip()]
    assert texts(tmp_path / "o", "train") == wanted and "0 left out" in capsys.readouterr().out


def test_zero_bytes_after_gzip_and_long_windows_of_zstd(tmp_path, monkeypatch, capsys):
    """Padding as on tapes, over several pieces; the window of `zstd --long=31`."""
    monkeypatch.setattr(readers, "READ_BYTES", 50)
    first, second = (json.dumps({"text": text}).encode() + b"\n" for text in "ab")
    padded = gzip.compress(first) + bytes(7) + gzip.compress(second) + bytes(130)
    (tmp_path / "a.jsonl.gz").write_bytes(padded)
    (tmp_path / "b.jsonl.gz").write_bytes(bytes(9))  # nothing but zeros is no gzip file
    compressor = zstandard.ZstdCompressor().compressobj()  # of unknown size: with a window
    long = bytearray(compressor.compress(first) + compressor.flush())
    long[5] = (31 - 10) << 3  # RFC 8878, 3.1.1.1.2
    assert zstandard.get_frame_parameters(bytes(long)).window_size == 2**31
    (tmp_path / "c.jsonl.zst").write_bytes(long)
    assert run(tmp_path, "--out", tmp_path / "o", "--val_fraction", 0) == 0
    captured = capsys.readouterr()
    assert texts(tmp_path / "o", "train") == ["a", "b", "a"]
    assert "b.jsonl.gz: damaged" in captured.err and "1 left out" in captured.out


@pytest.mark.parametrize("name", COMPRESSED[1:3])
@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_damaged_compressed_files_are_named(name, harm, tmp_path, capsys):
    """With the place; what comes before is used, and the files after it."""
    documents = [f"{i} {random.Random(i).getrandbits(400):x}" for i in range(3000)]
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()
    path = tmp_path / "in" / name
    path.parent.mkdir()
    data = bytearray(compressed(path, lines))
    at = len(data) * 2 // 3
    if harm == "cut":
        del data[at:]
    else:
        data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    write_jsonl(path.parent / "b.jsonl", ["after it"])
    assert run(path.parent, "--out", tmp_path / "o", "--val_fraction", 0) == 0
    captured, found = capsys.readouterr(), texts(tmp_path / "o", "train")
    *before, last = found
    assert last == "after it" and 200 < len(before) < 3000 and before == documents[: len(before)]
    what = f"cut off at byte {at}, inside a frame" if harm == "cut" else "damaged ("
    assert f"{name}: {what}" in captured.err


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_parquet(tmp_path, monkeypatch, capsys):
    """The text column of every row, in FineWeb's layout; rows without text are named."""
    monkeypatch.setattr(readers, "PARQUET_ROWS", 5)
    rows = [f"row {i} \u00e9" for i in range(40)]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "000.parquet", id=range(40), text=rows, score=[0.5] * 40)
    write_parquet(tmp_path / "in" / "001.parquet", text=["x", None, "z"])
    args = ["--out", tmp_path / "o", "--val_fraction", 0]
    assert run(tmp_path / "in", *args) == 0
    captured = capsys.readouterr()
    assert texts(tmp_path / "o", "train") == [*rows, "x", "z"]
    assert "001.parquet: row 2 has no text" in captured.err and "1 left out" in captured.out

    write_parquet(tmp_path / "in" / "001.parquet", text=[1, 2])
    write_parquet(tmp_path / "in" / "002.parquet", content=["a"])
    write_parquet(tmp_path / "in" / "005.parquet", text=[["a"]])
    whole = (tmp_path / "in" / "000.parquet").read_bytes()
    (tmp_path / "in" / "003.parquet").write_bytes(whole[:-9])
    broken = bytearray(whole)
    broken[len(whole) // 4 : len(whole) // 3] = bytes(len(whole) // 3 - len(whole) // 4)
    (tmp_path / "in" / "004.parquet").write_bytes(broken)
    assert run(tmp_path / "in", *args, "--overwrite") == 0
    err = capsys.readouterr().err
    assert "001.parquet: no text column 'text' among text (int64)" in err
    assert "002.parquet: no text column 'text' among content (string)" in err
    assert "005.parquet: no text column 'text' among text (list<" in err
    assert "003.parquet: damaged after row 0 (" in err and "004.parquet: damaged after row" in err
    assert texts(tmp_path / "o", "train")[:40] == rows


def test_any_error_of_pyarrow_is_damage(tmp_path, monkeypatch, capsys):
    """Some are neither OSError nor ValueError, some have several lines."""

    def iter_batches(*args, **kwargs):
        raise pyarrow.ArrowNotImplementedError("not\nimplemented")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    write_parquet(tmp_path / "a.parquet", text=["x"])
    good = write_jsonl(tmp_path / "b.jsonl", ["good"])
    args = [tmp_path / "a.parquet", good, "--out", tmp_path / "o", "--val_fraction", 0]
    assert run(*args) == 0
    captured = capsys.readouterr()
    assert captured.err.endswith("a.parquet: damaged after row 0 (not implemented)\n")
    assert "1 left out (1 damaged)" in captured.out and texts(tmp_path / "o", "train") == ["good"]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_text_columns_of_parquet(kind, tmp_path):
    """pandas writes a category as a dictionary."""
    column = pyarrow.array(["x", "y", "x"] * 5)
    make = {"dictionary": column.dictionary_encode}
    column = make.get(kind, lambda: column.cast(getattr(pyarrow, kind)()))()
    path = write_parquet(tmp_path / "a.parquet", text=column)
    assert run(path, "--out", tmp_path / "o", "--val_fraction", 0) == 0
    assert texts(tmp_path / "o", "train") == ["x", "y", "x"] * 5


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", ["first"])
    (tmp_path / "b.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    line, count = failure(capsys, tmp_path, "--out", tmp_path / "o")
    assert count == 1 and "b.jsonl.zst: zstandard is not installed; pip install" in line
    assert not (tmp_path / "o").exists()


def failure(capsys, *args):
    assert run(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1], len(lines)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "only_bad.jsonl").write_text("{\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").touch()
    for args, message in (
        ([tmp_path / "missing.txt"], "missing.txt: no such file"),
        ([tmp_path / "*.nothing"], "no such file, folder or pattern"),
        ([""], "INPUT: '' found, a file, folder or pattern expected"),
        ([tmp_path / "empty"], "the folder holds no .txt"),
        ([tmp_path / "data.csv"], "data.csv: cannot read this type"),
        ([path, "--val_fraction", 1], "--val_fraction 1.0: expected"),
        ([path, "--val_fraction", "some"], "--val_fraction: invalid float value"),
        ([path, "--shard_tokens", 0], "--shard_tokens 0: expected"),
        ([path, "--tokenizer", "nonsense"], "--tokenizer 'nonsense': expected"),
        ([path, "--text", "x"], "unrecognized arguments: --text"),
    ):
        line, count = failure(capsys, *args, "--out", out)
        assert message in line and count == 1
    line, count = failure(capsys, tmp_path / "only_bad.jsonl", "--out", out)
    assert "no training document in 1 files (1 left out as bad" in line and count == 2
    names = {"a.jsonl", "only_bad.jsonl", "empty", "data.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_overwrite(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["old"])
    out = tmp_path / "out"
    args = [path, "--out", out, "--val_fraction", 0]
    assert run(*args) == 0
    write_jsonl(path, ["new"])
    assert "exists and is not empty" in failure(capsys, *args)[0]
    assert texts(out, "train") == ["old"]
    assert run(*args, "--overwrite") == 0
    assert texts(out, "train") == ["new"]
    (tmp_path / "firmware").mkdir()
    (tmp_path / "firmware/a.bin").touch()
    foreign = [path, "--out", tmp_path / "firmware", "--overwrite"]
    assert "would delete other files" in failure(capsys, *foreign)[0]
    (out / "thesis.doc").touch()
    assert "would delete other files" in failure(capsys, *args, "--overwrite")[0]
    assert texts(out, "train") == ["new"]


def test_faults_in_the_inputs_are_one_line_each(tmp_path, capsys):
    """What is no zstd, gzip or parquet file, empty ones, documents without text, JSON that is too
    deep: named, and all the others are there."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl.zst", "b.jsonl.gz", "c.parquet"):
        (folder / f"bad_{name}").write_bytes(b"neither of them" * 9)
        (folder / f"empty_{name}").touch()
    (folder / "d.jsonl").touch()
    (folder / "e.txt").touch()
    write_jsonl(folder / "f.jsonl", ["", " \n", "good"])
    (folder / "g.jsonl").write_text("[" * 200_000 + "\n" + json.dumps({"text": "last"}))
    (folder / "h.md").write_bytes(b"\xff\xfe")
    assert run(folder, "--out", tmp_path / "o", "--val_fraction", 0) == 0
    captured = capsys.readouterr()
    assert texts(tmp_path / "o", "train") == ["good", "last"]
    lines = captured.err.splitlines()
    assert len(lines) == 8 and all(line.startswith("left out: ") for line in lines)
    for name, message in (
        ("bad_a.jsonl.zst", "damaged ("),
        ("bad_b.jsonl.gz", "damaged ("),
        ("bad_c.parquet", "damaged after row 0 ("),
        ("empty_a.jsonl.zst", "empty; at least one compressed frame expected"),
        ("empty_b.jsonl.gz", "empty; at least one compressed frame expected"),
        ("empty_c.parquet", "damaged after row 0 ("),
        ("g.jsonl:1", "not JSON ("),
        ("h.md", "not UTF-8 (invalid start byte at byte 0)"),
    ):
        assert sum(f"{name}: {message}" in line for line in lines) == 1, name
    assert "8 left out (6 damaged, 1 not JSON, 1 not UTF-8)" in captured.out
    nothing = [folder / "d.jsonl", folder / "e.txt", folder / "empty_a.jsonl.zst"]
    line, _ = failure(capsys, *nothing, "--out", tmp_path / "n")
    assert "no training document in 3 files (1 left out as bad, 0 held out)" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "o"]


def test_a_huge_line_takes_time_in_proportion(tmp_path, monkeypatch):
    """40,000 pieces, which copied one after another would be 400 GB."""
    monkeypatch.setattr(readers, "READ_BYTES", 500)
    huge = "word " * 4_000_000
    path = write_jsonl(tmp_path / "a.jsonl", ["before", huge, "after"])
    start = time.process_time()
    assert run(path, "--out", tmp_path / "o", "--val_fraction", 0) == 0
    assert time.process_time() - start < 20
    data = TokenDataset.open(tmp_path / "o", "train", verify=True)
    ends = [7, 7 + len(huge) + 1, 7 + len(huge) + 1 + 6]
    assert data.doc_ends.tolist() == ends


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(tmp_path, monkeypatch, capsys):
    """Plain lines where nobody looks, one line that is rewritten on a terminal."""
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * 50 for i in range(4000)])
    with open(path, "a") as file:
        file.write("not json\n")
    monkeypatch.setattr(prepare_data, "LINE_SECONDS", 0.0)
    assert run(path, "--out", tmp_path / "a") == 0
    lines = capsys.readouterr().err.splitlines()
    pattern = (
        r"([\d.]+) of 2\.0 MB, ([\d.]+) MB/s, ([\d,]+) tokens, [\d,]+ tokens/s, 0:00:\d\d left"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    shown = [float(match[1]) for match in found if match]
    assert len(shown) >= 2 and shown == sorted(shown) and shown[-1] == 2.0
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(prepare_data, "TERMINAL_SECONDS", 0.0)
    assert run(path, "--out", tmp_path / "b") == 0
    first, *rest = terminal.getvalue().split("\r\x1b[K")
    assert not first and re.match(pattern, rest[0]) and re.match(pattern, rest[-2])
    assert sum("left out: " in line for line in rest) == 1 and rest[-1] == ""
    assert {p.read_bytes() for p in (tmp_path / "a").glob("*.bin")} == {
        p.read_bytes() for p in (tmp_path / "b").glob("*.bin")
    }


def test_fast_tokenizer_flag(tmp_path, monkeypatch, capsys):
    """The same files either way, and the report says which way; `on` refuses what cannot be."""
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "some more text " * 40])
    make_folder(tmp_path / "good")
    make_folder(tmp_path / "odd")
    spec = json.loads((tmp_path / "odd" / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "NFKC"}
    (tmp_path / "odd" / "tokenizer.json").write_text(json.dumps(spec))
    made, reports = {}, {}

    def prepared(name, flag):
        args = [path, "--tokenizer", tmp_path / name, "--out", tmp_path / "o", "--overwrite"]
        assert run(*args, "--val_fraction", 0, "--fast_tokenizer", flag) == 0
        reports[name, flag] = capsys.readouterr().out
        made[name, flag] = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}

    for name, flag in (("good", "off"), ("good", "auto"), ("good", "on"), ("odd", "off")):
        prepared(name, flag)
    monkeypatch.setattr(prepare_data, "FAST_BYTES", 0)
    prepared("good", "auto")
    prepared("odd", "auto")
    assert "tokens/s by tokenizers ->" in reports["good", "off"]
    assert "tokens/s by tiktoken ->" in reports["good", "on"]
    assert "tokens/s by tiktoken ->" in reports["good", "auto"]
    assert "which cannot: its normalizer is NFKC)" in reports["odd", "auto"]
    assert made["good", "off"] == made["good", "on"] == made["good", "auto"]
    assert made["odd", "off"] == made["odd", "auto"]
    line, _ = failure(
        capsys, path, "--tokenizer", tmp_path / "odd", "--out", tmp_path / "x",
        "--fast_tokenizer", "on",
    )  # fmt: skip
    assert "--fast_tokenizer on: impossible with this one; its normalizer is NFKC" in line
    assert not (tmp_path / "x").exists()


def test_nothing_held_out_is_said(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert run(path, "--out", tmp_path / "o", "--val_fraction", 1e-9) == 0
    assert "warning: no document was held out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"its 'val' split holds no documents"):
        TokenDataset.open(tmp_path / "o", "val")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag, capsys):
    with pytest.raises(SystemExit) as leave:
        prepare_data.main([flag])
    assert leave.value.code == 0 and "--val_fraction" in capsys.readouterr().out
