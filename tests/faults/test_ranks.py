"""A rank that fails or dies, ranks that do not find each other, and torchrun's restarts."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metric_rows, run_python
from processes import driver, newest, running
from test_runs import train_flags, weights

import distributed
from config import UserError
from distributed import World, this_process

FAULT = """
import objectives
backward, calls = objectives.HeadObjective.backward, []
def faulty(self, *args):
    calls.append(0)
    if os.environ["RANK"] == {rank!r} and len(calls) == 4 and not os.path.exists({mark!r}):
        {fault}
    return backward(self, *args)
objectives.HeadObjective.backward = faulty
"""
RAISE = "raise KeyError('boom')"
KILL = "open({mark!r}, 'w'); os.kill(os.getpid(), 9)"


def faulty(folder: Path, rank: int, fault: str, mark: str = "", first: str = "") -> str:
    """A driver whose `rank` runs `fault` in step 4, unless there is a file `mark`; first: code that
    all run before."""
    patch = first + FAULT.format(rank=str(rank), fault=fault.format(mark=mark), mark=mark)
    return driver(folder, patch).removesuffix(".py")


def alive(folder: Path) -> list[str]:
    """The processes that have `folder` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_text().replace("\0", " ")
            if str(folder) in line and int(path.parent.name) != os.getpid():
                found.append(line)
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_ends_alone(
    fault: str, rank: int, flags: list[str], run: Path, *, seconds: float, first: str = "", **how
) -> None:  # fmt: skip
    """A run in which `rank` "raises" or "exits" in step 4: the others do not wait, torchrun's
    output names the rank, and the checkpoint is there to go on from. how: see `running`."""
    folder = run.parent
    script = faulty(folder, rank, RAISE if fault == "raises" else "os._exit(7)", first=first)
    begun = time.monotonic()
    with running(script, *flags, "--save_every=1", ranks=2, **how) as process:
        _, err = process.communicate(timeout=2 * seconds)
    assert time.monotonic() - begun < seconds
    assert process.returncode == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    root = err.split("Root Cause")[1]
    assert re.search(rf"rank +: {rank} ", root)
    if fault == "raises":
        assert errors == [f"error: rank {rank}: KeyError: 'boom'"]
        assert "exitcode  : 1 " in root and err.count("KeyError: 'boom'\n") >= 2
    else:
        assert "exitcode  : 7 " in root
    assert newest(run)[1]["step"] == 3 and not (run / "model").exists()
    assert sorted(metric_rows(run)) == [1, 2, 3]
    assert not alive(folder)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="looks for processes in /proc"
)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["raises", "exits"])
def test_a_rank_ends_alone(fault, rank, tiny_data, tmp_path):
    """Under DDP and FSDP2."""
    parallel = f"--parallel={('fsdp', 'ddp')[rank]}"
    flags = train_flags(tiny_data, tmp_path, "a", parallel)
    rank_ends_alone(fault, rank, flags, tmp_path / "a", seconds=60)


WAITING = """
import time
from datetime import timedelta
import torch, torch.distributed as dist
import distributed, watchdog
from distributed import World, start, stop
watchdog.GRACE = 1.0
world = World(int(os.environ["RANK"]), 2, torch.device("cpu"))
start(world)
try:
    with watchdog.Watchdog(world, 1000):
        if world.rank == 0:
            time.sleep(1000)  # as in a collective of NCCL, which does not feel that a rank is gone
        time.sleep(2)
        raise OSError("boom")
finally:
    stop()
    time.sleep(1000)  # rank 1 itself does not end either
"""


def test_a_rank_that_waits_for_ever_ends_too(tmp_path):
    """What a failing rank says reaches ranks whose main thread does not come back."""
    (tmp_path / "waiting.py").write_text(f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]{WAITING}")
    with by_hand([str(tmp_path / "waiting.py")], 2) as ranks:
        assert ranks[0].wait(timeout=60) == 1
        assert ranks[1].poll() is None


@contextlib.contextmanager
def by_hand(command: list[str], size: int, *, port: int = 0):
    """Ranks as a script without torchrun starts them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    env |= {"WORLD_SIZE": str(size)}
    how = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *command]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(r)}, **how) for r in range(size)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
def test_ranks_without_torchrun(tiny_data, tmp_path):
    flags = train_flags(tiny_data, tmp_path, "a", "--max_steps=2")
    with by_hand(["train.py", *flags], 2) as ranks:
        said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "compute: 2 x cpu" in said[0][0] and not said[1][0]
    assert sorted(metric_rows(tmp_path / "a")) == [1, 2]


@pytest.mark.slow
def test_a_port_in_use_is_named(tiny_data, tmp_path):
    """By rank 0; the others, whom nobody tells, give up by themselves."""
    flags = train_flags(tiny_data, tmp_path, "a")
    script = driver(tmp_path, "import distributed\ndistributed.JOIN = 2.0")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with by_hand([script, *flags], 2, port=port) as ranks:
            said = [rank.communicate(timeout=120)[1] for rank in ranks]
    where = f"MASTER_ADDR, MASTER_PORT: 127.0.0.1:{port} found"
    assert said == [
        f"error: {where} in use by another process, a free port expected\n",
        f"rank 1: error: {where} without an answer for 2 s, rank 0 expected there\n",
    ]
    assert [rank.returncode for rank in ranks] == [2, 2] and not (tmp_path / "a").exists()


@pytest.mark.parametrize("there", [0, 1])
def test_a_rank_that_nobody_joins(there, monkeypatch):
    monkeypatch.setattr(distributed, "JOIN", 0.5)
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    says = [
        f"WORLD_SIZE: 1 of 3 ranks found at 127.0.0.1:{port} after 0.5 s, all expected; missing: "
        "rank 1, 2",
        f"127.0.0.1:{port} found without an answer for 0.5 s, rank 0 expected there (Connection ",
    ][there]
    with pytest.raises(UserError, match=re.escape(says)):
        distributed._join(World(there, 3, torch.device("cpu")))


def test_a_rank_that_comes_twice(monkeypatch):
    monkeypatch.setattr(distributed, "JOIN", 20)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    host = torch.distributed.TCPStore("127.0.0.1", port, 3, True, wait_for_workers=False)
    host.add("come/1", 1)
    with pytest.raises(UserError, match=f"RANK: 1 found twice at 127.0.0.1:{port}, once expected"):
        distributed._join(World(1, 3, torch.device("cpu")))


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE: not set, though MASTER_ADDR, MASTER_PORT, RANK found"),
        ({"RANK": None}, "RANK: not set, though MASTER_ADDR, MASTER_PORT, WORLD_SIZE found"),
        ({"MASTER_PORT": None}, "MASTER_PORT: not set, though MASTER_ADDR, RANK, WORLD_SIZE found"),
        ({"RANK": "one"}, "RANK: 'one' found in the environment, 0 to 1 expected"),
        ({"RANK": "2"}, "RANK: '2' found in the environment, 0 to 1 expected"),
        ({"RANK": "-1"}, "RANK: '-1' found"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: 'many' found in the environment, the number of"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' found"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: '' found in the environment, 0 to 1 expected"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: '70000' found in the environment, 1 to 65535"),
    ],
)
def test_variables_that_do_not_fit_are_refused(changes, says, monkeypatch):
    for name, value in (WHOLE | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(says)):
        this_process("cpu")


def test_variables_of_one_process(monkeypatch):
    """None at all, one rank, and those of two."""
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    assert this_process("cpu") == World(0, 1, torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert this_process("cpu").size == 1
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert this_process("cpu") == World(1, 2, torch.device("cpu"))


@pytest.mark.slow
def test_torchrun_begins_again_after_a_rank_was_killed(tiny_data, tmp_path):
    """And after one that fails: the run ends as the one that was left alone."""
    flags = lambda run: train_flags(  # noqa: E731
        tiny_data, tmp_path, run, "--save_every=2", "--resume=auto"
    )
    run_python("train.py", *flags("whole"), ranks=2, timeout=120)
    expected = weights(tmp_path / "whole" / "model")
    for name, fault in (("killed", KILL), ("raises", "open({mark!r}, 'w'); " + RAISE)):
        script = faulty(tmp_path, 1, fault, str(tmp_path / f"{name}.mark"))
        with running(script, *flags(name), ranks=2, restarts=3) as process:
            out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        assert out.count("resuming at step 2") == 1 and err.count("failed (exitcode") == 1
        assert metric_rows(tmp_path / name) == metric_rows(tmp_path / "whole")
        found = weights(tmp_path / name / "model")
        assert all(found[n].equal(expected[n]) for n in expected)


@pytest.mark.slow
def test_torchrun_tries_what_is_refused_again(tiny_data, tmp_path):
    """It begins again whatever the exit code: each attempt says the same line, and none trains."""
    flags = train_flags(tiny_data, tmp_path, "a", "--resume=auto", "--layers=7")
    with running("train", *flags, ranks=2, restarts=1) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "exitcode  : 2 " in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and set(lines) == {"error: --layers: layer 7 found, 0 to 2 expected"}
    assert not (tmp_path / "a").exists()
