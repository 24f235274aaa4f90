"""benchmarks/scaling.py on CPU ranks: every kind of run, its peers, and the table."""

from __future__ import annotations

import json
import re

import pytest
from conftest import run_python

from benchmarks.scaling import loss_off


@pytest.mark.slow
def test_every_work_on_two_ranks(tmp_path):
    found = tmp_path / "scaling.json"
    out = run_python(
        "benchmarks/scaling.py", "--device=cpu", "--shape=tiny", "--rows=2", "--align_rows=4",
        "--length=64", "--optimizers", "adamw", "--parallel", "fsdp", "--parity", "--profile",
        "--warmup=2", "--steps=5", "--tokens=100000",
        "--flags=--torch_compile=False --dtype=float32",  # bfloat16 where a CPU has it: 1e-3
        f"--json={found}",
    ).stdout  # fmt: skip
    rows = json.loads(found.read_text())["rows"]
    assert [row["note"] for row in rows if "note" in row] == []
    count = lambda ranks: sum(row["ranks"] == ranks for row in rows)  # noqa: E731
    assert (count(1), count(2)) == (3 * 2, 3)  # alone: with its batch and with both
    assert all(row["tok/s"] > 0 and len(row["loss"]) == 7 for row in rows)
    off = [loss_off(row, rows) for row in rows if row["ranks"] == 2]
    assert max(off) < 1e-5
    # Of two ranks only, each work by itself; the last steps, as there are fewer than 13.
    assert re.findall(r"profile of .*: (.*)", out) == [
        "trace-14.json",
        "trace-7.json",
        "trace-7.json",
    ]
    again = run_python("benchmarks/scaling.py", "--read", str(found)).stdout
    assert again.splitlines()[-1] == out.splitlines()[-1]
    for name in ("align", "distill", "pretrain"):
        assert sum(line.startswith(f"│ {name} ") for line in again.splitlines()) == 3
