"""Saves in the background: the same bytes as other saves, and their failures are not lost."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import call_script, leave, metric_rows
from safetensors.torch import load_file, save
from test_checkpoint import sharded, some_tensors
from test_runs import kd_flags, train_flags, weights
from torch.distributed.device_mesh import init_device_mesh

import async_save
import checkpoint as ckpt
import tensor_files
from async_save import Saver
from config import UserError
from distributed import SAVE_FAILED, StopSignals, World, start

ALONE = World(0, 1, torch.device("cpu"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def no_room(*_) -> dict:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before it is set."""
    opened, write = threading.Event(), ckpt.write_tensors
    monkeypatch.setattr(ckpt, "write_tensors", lambda *a: opened.wait(20) and write(*a))
    return opened


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_what_was_there_when_it_was_called(block, tmp_path, monkeypatch, gate):
    """Byte for byte, manifest included, though every tensor changes before anything is written."""
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block)
    monkeypatch.setattr(ckpt, "MAX_FILE_BYTES", 200)
    saver = Saver(ALONE, background=True)
    for step in (1, 2):
        gate.set()
        ckpt.save_checkpoint(tmp_path / "sync", step, some_tensors(step), {"step": step})
        saver.wait()
        gate.clear()
        tensors, state = some_tensors(step), {"step": step}
        saver.save(tmp_path / "async", step, tensors, state, keep=2)
        for tensor in tensors.values():
            tensor.zero_()
        state["step"] = -1
        assert not (tmp_path / "async" / "checkpoints" / f"step-{step}").exists()
    blocks = len(saver.snapshot.blocks)
    gate.set()
    saver.wait()
    assert blocks == -(
        -sum(len(tensor_files.as_bytes(t)) for t in some_tensors().values()) // block
    )
    for step in (1, 2):
        mine, theirs = (tmp_path / n / "checkpoints" / f"step-{step}" for n in ("async", "sync"))
        assert len(files(mine)) > 4 and files(mine) == files(theirs)
        assert ckpt.verify_checkpoint(mine) is None


def test_a_file_is_what_the_library_would_write(tmp_path):
    """Its loader finds the same tensors, and its own file of them has as many bytes."""
    tensors = {n: t.contiguous() for n, t in some_tensors().items()}
    pieces = [tensor_files.Piece(n, [0] * t.dim(), t) for n, t in tensors.items()]
    entry = tensor_files.write_tensors(tmp_path / "x", pieces)
    found = load_file(tmp_path / "x")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    assert all(
        tensor_files.as_bytes(found[n]).equal(tensor_files.as_bytes(t)) for n, t in tensors.items()
    )
    raw = (tmp_path / "x").read_bytes()
    theirs = save(tensors)
    data = [b[8 + int.from_bytes(b[:8], "little") :] for b in (raw, theirs)]
    assert data[0] == data[1] and entry["size"] == len(raw)
    assert entry == ckpt.file_entry(tmp_path / "x")


def test_a_failure_is_known_and_raised_once(tmp_path, monkeypatch):
    saver = Saver(ALONE, background=True)
    saver.save(tmp_path, 1, some_tensors(1), {}, keep=2)
    saver.wait()
    before = files(tmp_path / "checkpoints" / "step-1")
    for victim in ("write_tensors", "_write_text", "file_entry", "_manifest_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(ckpt, victim, no_room)
            saver.save(tmp_path, 2, some_tensors(2), {}, keep=2)
            saver.thread.join()
        with StopSignals(ALONE) as signals:
            assert saver.failed and signals.agreed(failed=saver.failed) == SAVE_FAILED
            with pytest.raises(OSError, match="No space left"):
                saver.wait()
            assert not saver.failed and signals.agreed(failed=saver.failed) == 0
        saver.wait()
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"], victim
        assert files(tmp_path / "checkpoints" / "step-1") == before
    saver.save(tmp_path, 2, some_tensors(2), {}, keep=2)
    saver.wait()
    assert ckpt.find_checkpoint(tmp_path, explicit=True).name == "step-2"


def test_the_next_save_raises_what_the_last_one_met(tmp_path, monkeypatch):
    saver = Saver(ALONE, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "write_tensors", no_room)
        saver.save(tmp_path, 1, some_tensors(1), {}, keep=2)
        with pytest.raises(OSError, match="No space left"):
            saver.save(tmp_path, 2, some_tensors(2), {}, keep=2)
    assert ckpt.list_checkpoints(tmp_path) == []


def test_no_memory_for_the_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 1 << 60)
    saver = Saver(ALONE, background=True)
    with pytest.raises(UserError, match=r"--async_save: True found, but 0\.0 GiB"):
        saver.save(tmp_path, 1, some_tensors(1), {}, keep=2)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_write_that_hangs_is_an_error(tmp_path, monkeypatch, gate):
    monkeypatch.setattr(async_save, "PATIENCE", 0.2)
    saver = Saver(ALONE, background=True)
    saver.save(tmp_path, 1, some_tensors(1), {}, keep=2)
    with pytest.raises(OSError, match="not written after"):
        saver.wait()
    gate.set()


def two_ranks(rank: int, port: int, run: Path) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    world = World(rank, 2, torch.device("cpu"))
    start(world)
    mesh = init_device_mesh("cpu", (2,))
    saver = Saver(world, background=True)
    ckpt.save_checkpoint(run / "sync", 8, sharded(mesh), {"a": 1}, rank=rank, world_size=2)
    write = ckpt.write_tensors
    for step in (7, 8, 9):  # rank 1 is late; the main threads go on, and speak of other things
        ckpt.write_tensors = lambda *a: time.sleep(0.5 * rank) or write(*a)
        tensors = sharded(mesh)
        saver.save(run / "async", step, tensors, {"a": 1}, keep=2)
        for tensor in tensors.values():
            tensor_files.local(tensor).zero_()
        assert not (run / "async" / "checkpoints" / f"step-{step}").exists()
        dist.all_reduce(torch.ones(3))
    saver.wait()
    dist.barrier()

    if rank == 1:
        ckpt.write_tensors = no_room
    saver.save(run / "async", 10, sharded(mesh), {}, keep=2)
    with StopSignals(world) as signals:
        for _ in range(100):
            if number := signals.agreed(failed=saver.failed):
                break
            time.sleep(0.1)
        assert number == SAVE_FAILED
        with pytest.raises(OSError, match="No space left" if rank else "rank 1 failed: .*No space"):
            saver.wait()
        signals.agreed(last=True)
    names = sorted(p.name for p in (run / "async" / "checkpoints").iterdir())
    assert names == ["step-8", "step-9"]
    leave()


def test_two_ranks(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(two_ranks, args=(port, tmp_path), nprocs=2)
    mine, theirs = (tmp_path / n / "checkpoints" / "step-8" for n in ("async", "sync"))
    assert len(files(mine)) == 4 and files(mine) == files(theirs)


@pytest.mark.parametrize("script", ["train", "train_kd"])
def test_a_run_is_the_same_and_resumes_bitwise(script, tiny_teacher, tiny_data, tmp_path):
    more = ("--save_every=2", "--keep_checkpoints=99")
    if script == "train":
        flags = lambda run: train_flags(tiny_data, tmp_path, run, *more)  # noqa: E731
    else:
        flags = lambda run: kd_flags(  # noqa: E731
            tiny_teacher, tiny_data, tmp_path, run, "--distill_train=all", "--max_steps=3", *more
        )
    call_script(script, *flags("sync"))
    call_script(script, *flags("async"), "--async_save=True")
    steps = [[p.name for p in ckpt.list_checkpoints(tmp_path / n)] for n in ("sync", "async")]
    assert steps[0] == steps[1] and len(steps[0]) >= 3
    for name in steps[0]:
        mine, theirs = (tmp_path / n / "checkpoints" / name for n in ("async", "sync"))
        shards = [{n: b for n, b in files(f).items() if "shard" in n} for f in (mine, theirs)]
        states = [ckpt.read_state(f) for f in (mine, theirs)]
        for state in states:
            del state["rng"]["python"]  # nobody seeds it
        assert shards[0] == shards[1] and states[0] == states[1]
    at = tmp_path / "async" / "checkpoints" / steps[0][0]
    call_script(script, *flags("rest"), "--async_save=True", f"--resume={at}")
    rest, whole = metric_rows(tmp_path / "rest"), metric_rows(tmp_path / "sync")
    done = json.loads((at / "state.json").read_text())["step"]
    assert rest == {step: loss for step, loss in whole.items() if step > done}
    a, b = weights(tmp_path / "sync" / "model"), weights(tmp_path / "rest" / "model")
    assert all(a[n].equal(b[n]) for n in a)
