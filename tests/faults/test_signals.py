"""SIGTERM and SIGINT to runs in their own processes: one checkpoint, and on as if never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_script, metric_rows
from processes import children, newest, running, wait_for_step
from test_runs import kd_flags, train_flags, weights

from distributed import ONE_SIGNAL, StopSignals, World


@pytest.mark.slow
@pytest.mark.parametrize("script, number", [("train", "SIGTERM"), ("train_kd", "SIGINT")])
def test_a_run_stops_and_goes_on(script, number, tiny_teacher, tiny_data, tmp_path):
    if script == "train":
        flags = lambda run: train_flags(tiny_data, tmp_path, run, "--max_steps=60")  # noqa: E731
    else:
        more = ("--distill_train=all", "--distill_tokens=5120")
        flags = lambda run: kd_flags(tiny_teacher, tiny_data, tmp_path, run, *more)  # noqa: E731
    cut = tmp_path / "cut"
    with running(script, *flags("cut")) as process:
        wait_for_step(process, cut, 8)
        process.send_signal(getattr(signal, number))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, number)
    count, state = newest(cut)
    rows = metric_rows(cut)
    assert max(rows) == len(rows) == state["step"] < 85
    assert count == 1 + ("align" in state["done"])
    assert err.startswith(f"stopped by {number} after step {state['step']}: checkpoints in")
    assert err.count("\n") == 1 and not (cut / "model").exists()
    call_script(script, *flags("whole"))
    call_script(script, *flags("cut"), "--resume=auto")
    assert metric_rows(cut) == metric_rows(tmp_path / "whole")
    a, b = weights(tmp_path / "whole" / "model"), weights(cut / "model")
    assert all(a[n].equal(b[n]) for n in a)


def test_nothing_is_saved_where_that_was_asked(tiny_data, tmp_path):
    flags = train_flags(tiny_data, tmp_path, "cut", "--max_steps=4000", "--save_model=False")
    with running("train", *flags) as process:
        wait_for_step(process, tmp_path / "cut", 3)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "nothing is saved (--save_model=False)" in err
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_one_more_signal_ends_the_process():
    """At once, though no step ends; not one that comes together with the first."""
    code = (
        "import signal, time, torch\n"
        "from distributed import StopSignals, World\n"
        "with StopSignals(World(0, 1, torch.device('cpu'))) as signals:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01); signals.heard and print('heard', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == b"heard\n"
        assert process.poll() is None
        time.sleep(ONE_SIGNAL)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_signal_to_the_process_group_leaves_the_compiler_its_workers():
    """torch.compile waits for ever for workers that are gone."""
    code = (
        "import os, signal, time\n"
        "from distributed import start_compile_workers\n"
        "from torch._inductor import config\n"
        "from torch._inductor.async_compile import AsyncCompile\n"
        "config.compile_threads = 2\n"
        "start_compile_workers()\n"
        "heard = []\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(number, lambda n, _: heard.append(n))\n"
        "pool = AsyncCompile.process_pool()\n"
        "job = pool.submit(os.getpid)\n"
        "assert job.result(60) != os.getpid()\n"
        "job = pool.submit(time.sleep, 1)\n"
        "time.sleep(0.3)\n"
        "os.killpg(0, signal.SIGTERM); os.killpg(0, signal.SIGINT)\n"
        "job.result(20)\n"
        "assert set(heard) == {signal.SIGTERM, signal.SIGINT}, heard\n"
        "print('compiled', flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert (out.returncode, out.stdout) == (0, "compiled\n"), out.stderr


def test_handlers_are_put_back_and_ignored_signals_stay_so():
    world = World(0, 1, torch.device("cpu"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        term = signal.getsignal(signal.SIGTERM)
        with StopSignals(world) as signals:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.agreed() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == term
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for the ranks in /proc")
@pytest.mark.parametrize("whom", ["one rank", "torchrun", "everyone"])
def test_ranks_stop_together(whom, tiny_data, tmp_path):
    """Whoever hears it: all ranks end after the same step, with one checkpoint, which goes on on
    one rank."""
    flags = lambda run: train_flags(tiny_data, tmp_path, run, "--max_steps=60")  # noqa: E731
    cut = tmp_path / "cut"
    with running("train", *flags("cut"), ranks=2) as process:
        wait_for_step(process, cut, 10)
        workers = children(process.pid)
        assert len(workers) == 2
        heard = {"one rank": workers[1:], "torchrun": [process.pid]}
        for pid in heard.get(whom, [*workers, process.pid]):
            os.kill(pid, signal.SIGTERM)
        _, err = process.communicate(timeout=90)
    count, state = newest(cut)
    stopped = state["step"]
    assert process.returncode and count == 1
    assert err.count(f"stopped by SIGTERM after step {stopped}: checkpoints in") == 1
    assert max(metric_rows(cut)) == stopped < 60
    call_script("train", *flags("whole"))
    call_script("train", *flags("cut"), "--resume=auto")
    expected, found = metric_rows(tmp_path / "whole"), metric_rows(cut)
    assert found.keys() == expected.keys()
    near = range(1, stopped + 6)  # rounding grows with the steps
    assert all(found[step] == pytest.approx(expected[step], rel=1e-4) for step in near)
