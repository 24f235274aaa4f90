"""The rank that the others wait for is named, and what it is slow in."""

from __future__ import annotations

import platform
import re

import pytest
from conftest import run_python
from processes import driver
from test_runs import train_flags

from pace import slowest

EVEN = [(0.001, 0.100, 0.3)] * 4


@pytest.mark.parametrize("rank", range(4))
def test_who_is_slow_and_in_what(rank):
    assert slowest(EVEN) is None
    ranks = EVEN.copy()
    ranks[rank] = (0.001, 0.119, 0.3)
    assert slowest(ranks) is None
    ranks[rank] = (0.001, 0.125, 0.3)
    found, line = slowest(ranks)
    assert found == rank and "in computing: 125 ms a step" in line and "ranks is 100 ms" in line
    ranks[rank] = (0.080, 0.100, 0.3)
    found, line = slowest(ranks)
    assert found == rank and "in loading data: 80 ms" in line and "a step takes 300" in line


def test_what_costs_little_of_a_step_is_not_said():
    """As under FSDP2, where nothing is known of computing."""
    assert slowest([(0.0001, 0.0, 0.3), (0.014, 0.0, 0.3)]) is None
    assert slowest([(0.0001, 0.0, 0.3), (0.020, 0.0, 0.3)])[0] == 1
    assert slowest([(0.0001, 0.003, 0.01), (0.0001, 0.009, 0.01)]) is None


SHORT = "import os, time, pace\npace.EVERY = 10\n"
SLOW = {
    "loading data": SHORT + """
import data
build = data.PackedLoader._build
def slow(self, first):
    if os.environ["RANK"] == "1": time.sleep(0.3)
    return build(self, first)
data.PackedLoader._build = slow
""",
    "computing": SHORT + """
import objectives
forward = objectives.HeadLoss.forward
def slow(self, *args):
    if os.environ["RANK"] == "1": time.sleep(0.04)
    return forward(self, *args)
objectives.HeadLoss.forward = slow
""",
    "nothing": SHORT,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("cause", SLOW)
def test_a_slow_rank_is_named_once(cause, parallel, tiny_data, tmp_path):
    """Two micro-batches a step; under FSDP2 a slow forward of one is a slow forward of all."""
    flags = train_flags(tiny_data, tmp_path, "a", "--max_steps=36", "--log_every=9")
    path = driver(tmp_path, SLOW[cause])
    out = run_python(path, *flags, f"--parallel={parallel}", ranks=2, timeout=120).stdout
    said = re.findall(r"rank \d+ .*holds up.*", out)
    if cause == "nothing" or (cause, parallel) == ("computing", "fsdp"):
        assert said == []
        return
    (line,) = said
    assert line.startswith(f"rank 1 ({platform.node()}) holds up the others, in {cause}: ")
    assert 50 < float(re.search(r": ([\d.]+) ms", line)[1]) < 300
