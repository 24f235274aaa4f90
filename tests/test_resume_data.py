"""prepare_data.py killed, out of disk, started twice: what `scripts/unfinished.py` promises."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from conftest import own_session
from test_prepare_data import SCRIPT, failure, prepare_data, run, write_jsonl, write_parquet
from test_tokenizer import make_folder

from scripts import readers
from scripts.unfinished import Unfinished
from tokenizer import load_tokenizer


class Stop(BaseException):
    """What no code catches: as near to kill -9 as one process gets."""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Files of every kind, a bad line and a damaged file among them, in tasks of a few documents;
    progress is saved after each. Returns the flags."""
    monkeypatch.setattr(prepare_data, "TASK_BYTES", 700)
    monkeypatch.setattr(prepare_data, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(readers, "READ_BYTES", 90)
    monkeypatch.setattr(readers, "PARQUET_ROWS", 5)
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    rng = random.Random(3)
    texts = [
        f"{i} \u00e9" + " ".join(str(rng.random()) for _ in range(rng.randrange(20)))
        for i in range(120)
    ]
    write_jsonl(folder / "a.jsonl", texts[:50])
    with open(folder / "a.jsonl", "a") as file:
        file.write('not json\n\n{"text": 3}\n')
    packed = zstandard.compress(write_jsonl(folder / "b.jsonl", texts[50:90]).read_bytes())
    (folder / "b.jsonl").unlink()
    (folder / "deep" / "b.jsonl.zst").write_bytes(packed)
    (folder / "deep" / "c.jsonl.zst").write_bytes(packed[:-30])
    write_parquet(folder / "d.parquet", text=[*texts[90:110], None, *texts[110:]])
    (folder / "e.txt").write_text("\n\n\n".join(texts[:30]))
    return [folder, "--val_fraction", 0.2, "--shard_tokens", 2000, "--split_paragraph_breaks"]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def stops(monkeypatch) -> dict:
    """{"left": n}: the n-th from now of the calls that change the disk for good raises `Stop`,
    every other time only after it has done its work."""
    calls = {"left": 0, "count": 0}

    def watched(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls["left"] -= 2
            calls["count"] += 2
            if calls["left"] == 0:
                raise Stop
            done = real(*args, **kwargs)
            if calls["left"] == -1:
                raise Stop
            return done

        monkeypatch.setattr(os, name, call)

    for name in ("replace", "rename", "fsync", "rmdir"):
        watched(name)
    return calls


def test_stopped_before_and_after_each_change_of_the_disk(small, tmp_path, monkeypatch, capsys):
    """So also between the two files of a shard, in the last steps, while the files are brought
    back to what was recorded, and while an old data set makes room."""
    assert run(*small, "--out", tmp_path / "whole") == 0
    report, whole = capsys.readouterr().out.splitlines(), contents(tmp_path / "whole")
    assert sum(name.endswith(".bin") for name in whole) > 6
    out, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    old = {**whole, "train-00000.bin": b"old"}
    calls, kinds, point = stops(monkeypatch), set(), 0
    while calls["left"] <= 0:  # until a run is over before its stop
        point += 11
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", out)
        (out / "train-00000.bin").write_bytes(b"old")
        again = 0
        while True:
            calls["left"] = point if again == 0 else point % 7 + 2 if again == 1 else 0
            try:
                assert run(*small, "--out", out, "--overwrite") == 0
                break
            except Stop:
                again += 1
                assert (contents(out) if out.exists() else None) in (None, old, whole)
                done = len(list(unfinished.glob("data/*.bin")))
                kinds.add((done > 0, out.exists(), (unfinished / "old").exists()))
        assert contents(out) == whole and not unfinished.exists()
        assert capsys.readouterr().out.splitlines()[:3] == report[:3]
    assert point > 300 and len(kinds) >= 3


def test_another_command_is_refused_until_asked_to_start_over(small, tmp_path, monkeypatch, capsys):
    out, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    args = [*small, "--out", out]
    calls = stops(monkeypatch)
    calls["left"] = 100
    with pytest.raises(Stop):
        run(*args)
    before = contents(unfinished / "data")
    assert before
    tokenizer = make_folder(tmp_path / "tokenizer", texts=["a b"])
    for changed, message in (
        ([*args, "--seed", 1], "(--seed was 0, is 1)"),
        ([*args, "--shard_tokens", 3000], "(--shard_tokens was 2000, is 3000)"),
        ([*args, "--tokenizer", tokenizer], "(--tokenizer was ['byte', "),
        ([write_jsonl(tmp_path / "z.jsonl", "z"), *args], "z.jsonl was no input, is one)"),
        ([small[0] / "e.txt", *args[1:]], "a.jsonl was an input, is none)"),
    ):
        line, count = failure(capsys, *changed)
        assert message in line and "add --overwrite to start over" in line and count == 1
    text = (small[0] / "e.txt").read_text()
    (small[0] / "e.txt").write_text(text + "more")
    line, _ = failure(capsys, *args)
    assert (
        f"e.txt was changed since: {len(text.encode())} bytes, {len(text.encode()) + 4} now" in line
    )
    assert contents(unfinished / "data") == before
    assert run(*args, "--overwrite") == 0
    assert run(*small, "--out", tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole") and not unfinished.exists()


def test_nothing_that_is_not_ours_is_deleted(small, tmp_path, capsys):
    unfinished = tmp_path / ".out.unfinished"
    (unfinished / "data").mkdir(parents=True)
    (unfinished / "thesis.doc").touch()
    line, count = failure(capsys, *small, "--out", tmp_path / "out", "--overwrite")
    assert "holds thesis.doc, which is not ours" in line and count == 1
    assert (unfinished / "thesis.doc").exists()
    (unfinished / "thesis.doc").unlink()
    (unfinished / "command.json").write_text("{")
    line, count = failure(capsys, *small, "--out", tmp_path / "out")
    assert "command.json: damaged" in line and "to start over" in line and count == 1


def test_a_target_that_was_taken_away_is_made_again(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "discard", lambda self: None)  # stopped before it
        assert run(*small, "--out", out) == 0
    assert (tmp_path / ".out.unfinished" / "progress.json").exists()
    out.rename(tmp_path / "away")
    assert run(*small, "--out", out) == 0
    assert contents(out) == contents(tmp_path / "away")
    assert not (tmp_path / ".out.unfinished").exists()


def test_two_processes_do_not_write_one_data_set(small, tmp_path, capsys):
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    with open(unfinished / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line, count = failure(capsys, *small, "--out", tmp_path / "out")
    assert "another process is writing there" in line and count == 1
    assert run(*small, "--out", tmp_path / "out") == 0


def test_what_is_done_is_not_read_again(small, tmp_path, monkeypatch):
    """A file that is behind is not even opened, and no document is tokenised twice."""
    args = [*small, "--out", tmp_path / "out"]
    texts, plain = [], readers.plain_pieces
    encode = type(load_tokenizer("byte")).encode_arrays

    def watched(self, batch):
        texts.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(type(load_tokenizer("byte")), "encode_arrays", watched)
    calls = stops(monkeypatch)
    calls["left"] = 300
    with pytest.raises(Stop):
        run(*args)
    first, opened = len(texts), []
    monkeypatch.setattr(readers, "plain_pieces", lambda p: opened.append(p.name) or plain(p))
    assert run(*args) == 0
    assert first > 50 and opened and "a.jsonl" not in opened
    again = len(texts)
    assert run(*small, "--out", tmp_path / "whole") == 0
    assert again - (len(texts) - again) <= 45  # the task under way, a file of 40 here


def command(*args, workers=2):
    return [sys.executable, *map(str, (SCRIPT, *args, "--num_workers", workers))]


def members(session: int) -> list[int]:
    """The processes of a session, zombies aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def test_a_disk_that_fills_up(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * 30 for i in range(20000)])
    out = tmp_path / "out"
    words = command(path, "--out", out, "--val_fraction", 0.1, workers=1)
    with own_session(words, file_bytes=3_000_000) as process:
        printed, err = process.communicate(timeout=60)
    assert process.returncode == 2 and not printed and err.count("\n") == 1, err
    assert "File too large; when that is mended, the same command goes on" in err
    assert not out.exists()
    with own_session(words) as process:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert run(path, "--out", tmp_path / "whole", "--val_fraction", 0.1) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out", "whole"]


def test_workers_of_a_killed_process_end(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * 30 for i in range(200_000)])
    with own_session(command(path, "--out", tmp_path / "out")) as process:
        deadline = time.time() + 60
        while len(members(process.pid)) < 4:  # two workers and what Python starts beside them
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        process.kill()
        process.wait()
        while members(process.pid):
            assert time.time() < deadline
            time.sleep(0.01)


def test_ctrl_c_is_one_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * 30 for i in range(200_000)])
    with own_session(command(path, "--out", tmp_path / "out")) as process:
        while not list((tmp_path / ".out.unfinished" / "data").glob("*.tmp")):  # it tokenises
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        printed, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not printed
    assert err == "prepare_data.py: stopped; the same command goes on\n"


def test_a_worker_that_still_imports_does_not_hear_ctrl_c():
    code = (
        "import os, signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)"
    )
    for deaf in (True, False):
        with prepare_data._deaf_children() if deaf else contextlib.nullcontext():
            process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        err = process.communicate(timeout=60)[1]
        assert (process.returncode == 0) == deaf == (b"KeyboardInterrupt" not in err)
