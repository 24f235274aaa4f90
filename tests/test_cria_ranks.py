"""Block-wise distillation on torchrun's ranks: they share the blocks, and end together."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
from conftest import call_script, metric_rows, run_python
from kit import assert_close_rms
from processes import driver
from test_cria import flags  # noqa: F401, a fixture
from test_runs import weights

import cria
import distributed
from config import DIVERGED, Stopped


@pytest.mark.slow
def test_under_torchrun(flags, tmp_path):  # noqa: F811
    """Two ranks share the blocks, and then distil the stitched student together, of which neither
    reads all: the same student as by one process."""
    stages = ("--stages=align,block,distill", "--cria=1", "--distill_train=lora", "--lora_rank=2",
              "--distill_tokens=640")  # fmt: skip
    call_script("train_kd", *flags("one", *stages))
    two = flags("two", *stages, "--parallel=fsdp")
    said = run_python("train_kd.py", *two, ranks=2).stdout
    assert said.count("cria: layers LLLL in 4 blocks") == said.count("shard: 4 blocks") == 1
    assert "2 x cpu (fsdp over 2)" in said and said.count("stitch: student of 4") == 1
    for b in range(4):
        mine, theirs = (
            metric_rows(tmp_path / run / "cria" / "blocks" / f"block-{b:03d}")
            for run in ("one", "two")
        )
        assert mine.keys() == theirs.keys() and len(mine) == 80
        assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    one, two = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    for name, p in one.items():
        assert_close_rms(two[name], p, 1e-3, name)
    assert max(metric_rows(tmp_path / "two")) == 10
    # What the last stage cannot do on two ranks is said before the first begins; so is no name.
    for more, line in (
        (["--distill_batch_tokens=32"], "error: --distill_batch_tokens: "),
        (["--parallel=fsdp", "--trunk_dtype=bfloat16"], "error: --parallel: fsdp found with"),
        (["--run_name="], "error: --run: none found; --cria under torchrun needs --run_name NAME"),
    ):
        result = run_python("train_kd.py", *flags("x", *stages, *more), ranks=2, check=False)
        assert line in result.stderr and not (tmp_path / "x").exists()


def test_a_rank_that_fails_does_not_leave_the_others_waiting(flags, tmp_path):  # noqa: F811
    patch = """
import cria
def fail(*_):
    raise KeyError("boom")
if os.environ["RANK"] == "1":
    cria.train_block = fail
"""
    more = ("--stages=align", "--cria=1", "--cria_step=all")
    begun = time.monotonic()
    result = run_python(
        driver(tmp_path, patch, "train_kd"), *flags("a", *more), ranks=2, check=False, timeout=120
    )
    assert result.returncode and "error: rank 1: KeyError: 'boom'" in result.stderr
    assert time.monotonic() - begun < 60 and not (tmp_path / "a" / "cria" / "student").exists()


def test_a_block_that_diverges_is_a_failure_to_the_others(monkeypatch):
    """Who stops it, a signal say, stops the others too; that it diverged they do not know."""
    store, job = torch.distributed.HashStore(), mock.Mock()
    job.ranks = distributed.World(1, 2, torch.device("cpu"))
    monkeypatch.setattr(distributed, "_store", store)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for code, told in ((143, False), (DIVERGED, True)):
        monkeypatch.setattr(cria, "train", mock.Mock(side_effect=Stopped(code, "given up")))
        with pytest.raises(Stopped, match="given up"):
            cria.train_as_one_of_many(job)
        assert store.check([distributed.FAILURE]) == told
    assert store.get(distributed.FAILURE) == b"rank 1: Stopped: given up"


def test_what_ranks_do_alone_ends_together(monkeypatch):
    """A rank waits for the others' word, and gives up where one has failed."""
    store, world = torch.distributed.HashStore(), distributed.World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(distributed, "shared_store", lambda: store)
    store.set("shard 1", "")
    distributed.all_have_done("shard", world)
    assert store.check(["shard 0"])
    store.set(distributed.FAILURE, "rank 1: boom")
    with pytest.raises(Stopped, match="another rank failed: rank 1: boom"):
        distributed.all_have_done("train", world)
