"""Two GPUs: DDP and FSDP2 over NCCL against one GPU, checkpoints across, a rank that is killed.

Where there is one GPU both ranks are on it and speak through gloo, which leaves out NCCL alone.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import metric_rows, run_python
from processes import driver, running
from test_fsdp import STEPS, TOLERANCE, assert_same_run
from test_ranks import KILL, faulty, rank_ends_alone
from test_runs import kd_flags, train_flags

from benchmarks.scaling import loss_off

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, better two"),
]
SHARED = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
os.environ["LOCAL_RANK"], init = "0", dist.init_process_group
dist.init_process_group = lambda backend, **how: init("gloo", **{**how, "device_id": None})

def full_tensor(self, **_):  # functional collectives end the process: gloo, CUDA, torch 2.11
    mine, pieces = self.to_local().detach().cpu(), [None] * dist.get_world_size()
    dist.all_gather_object(pieces, mine)
    return torch.cat(pieces, self.placements[0].dim).to(self.device)

DTensor.full_tensor = full_tensor
"""
TWO = torch.cuda.device_count() > 1
ONE, BOTH = {"gpus": "0"}, {"gpus": "0,1" if TWO else "0", "ranks": 2}
# Eager and in float32; the last test has compiled models in bfloat16.
ON_GPU = ("--device=cuda", "--matmul_precision=highest", "--torch_compile=False", "--kernel=chunk")
# Of bfloat16: micro-batches are the same, so ranks only add up in another order, but now and then
# that rounds a weight to its other neighbour, 1/256 away.
BFLOAT16 = 3e-3
EXACT = """
import torch, muon
init = muon.Muon.__init__
muon.Muon.__init__ = lambda self, *args, **how: init(
    self, *args, **{**how, "ns_dtype": torch.float32})
"""

optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def on_both(script: str, folder, first: str = "") -> str:
    """What starts `script` on each of two ranks, after the code `first`."""
    if TWO and not first:
        return script
    return driver(folder, first + ("" if TWO else SHARED), script.removesuffix(".py"))


def assert_same_losses(one, two, tolerance: float, steps: int) -> None:
    expected, found = metric_rows(one), metric_rows(two)
    assert list(expected) == list(found) == list(range(1, steps + 1))
    for step, loss in expected.items():  # abs: as in `assert_same_run`
        assert found[step] == pytest.approx(loss, rel=tolerance, abs=tolerance), step


def compare(script: str, flags, optimizer: str, folder, steps: int) -> None:
    """A run on one GPU, by DDP and by FSDP2, the last two on two; `flags` of a run's name."""
    run_python(driver(folder, EXACT, script.removesuffix(".py")), *flags("one"), *ON_GPU, **ONE)
    for parallel in ("ddp", "fsdp"):
        both, how = on_both(script, folder, EXACT), f"--parallel={parallel}"
        out = run_python(both, *flags(parallel), *ON_GPU, how, **BOTH).stdout
        assert "compute: 2 x cuda" in out
        assert_same_run(folder / "one", folder / parallel, TOLERANCE[optimizer], steps)


@optimizers
def test_pretraining_is_that_of_one_gpu(optimizer, tiny_data, tmp_path):
    more = ("--max_steps=20", f"--use_muon={optimizer == 'muon'}")
    flags = lambda run: train_flags(tiny_data, tmp_path, run, *more)  # noqa: E731
    compare("train.py", flags, optimizer, tmp_path, 20)


@optimizers
def test_distillation_is_that_of_one_gpu(optimizer, tiny_teacher, tiny_data, tmp_path):
    muon = optimizer == "muon"
    more = (*STEPS, f"--use_muon={muon}", f"--align_use_muon={muon}")
    more += ("--align_tokens=1280", "--align_micro_batch=1", "--distill_tokens=1280",
             "--distill_micro_batch=1")  # fmt: skip
    flags = lambda run: kd_flags(tiny_teacher, tiny_data, tmp_path, run, *more)  # noqa: E731
    compare("train_kd.py", flags, optimizer, tmp_path, 40)


def test_saved_by_two_resumed_by_one_and_back(tiny_data, tmp_path):
    more = (*ON_GPU, "--max_steps=20", "--save_every=10", "--parallel=fsdp", "--use_muon=True")
    flags = lambda run: train_flags(tiny_data, tmp_path, run, *more)  # noqa: E731
    one, both = ("train.py", ONE), (on_both("train.py", tmp_path), BOTH)
    for name, (script, first), (again, second) in (("back", one, both), ("forth", both, one)):
        run_python(script, *flags(name), **first)
        at = f"--resume={tmp_path / name / 'checkpoints' / 'step-10'}"
        run_python(again, *flags(f"{name}-again"), at, **second)
        whole, rest = metric_rows(tmp_path / name), metric_rows(tmp_path / f"{name}-again")
        assert list(rest) == list(range(11, 21))
        for step, loss in rest.items():
            assert loss == pytest.approx(whole[step], rel=TOLERANCE["muon"]), (name, step)


@pytest.mark.parametrize(("fault", "parallel"), [("raises", "fsdp"), ("exits", "ddp")])
def test_a_rank_ends_alone(fault, parallel, tiny_data, tmp_path):
    """torchrun gives a rank that waits in a collective 30 s, unless it was told (watchdog.py)."""
    flags = train_flags(tiny_data, tmp_path, "a", *ON_GPU, f"--parallel={parallel}")
    how = {"first": "" if TWO else SHARED, "gpus": BOTH["gpus"]}
    rank_ends_alone(fault, 1, flags, tmp_path / "a", seconds=120, **how)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_begins_again_after_a_rank_was_killed(parallel, tiny_data, tmp_path):
    more = (*ON_GPU, "--save_every=2", "--resume=auto", f"--parallel={parallel}")
    flags = lambda run: train_flags(tiny_data, tmp_path, run, *more)  # noqa: E731
    run_python(on_both("train.py", tmp_path), *flags("whole"), **BOTH)
    script = faulty(tmp_path, 1, KILL, str(tmp_path / "mark"), "" if TWO else SHARED)
    with running(script, *flags("killed"), restarts=1, **BOTH) as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("resuming at step 2") == 1 and err.count("failed (exitcode") == 1
    assert_same_losses(tmp_path / "whole", tmp_path / "killed", TOLERANCE["adamw"], 6)


# Per rank: rows, and their length. DDP of the large one is left out to save its time.
SIZES = {"smollm2-135m": (32, 2048, "ddp", "fsdp"), "qwen2.5-1.5b": (4, 4096, "fsdp")}


@pytest.mark.slow
@pytest.mark.skipif(not TWO, reason="needs two GPUs")
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_real_sizes_are_those_of_one_gpu(optimizer, shape, tmp_path):
    """20 steps of pretraining, align and distill in bfloat16, compiled."""
    found, (rows, length, *parallel) = tmp_path / "scaling.json", SIZES[shape]
    run_python(
        "benchmarks/scaling.py", f"--shape={shape}", f"--optimizers={optimizer}", "--parity",
        f"--rows={rows}", f"--length={length}", "--warmup=5", "--steps=15", "--tokens=4000000",
        "--parallel", *parallel, f"--json={found}", gpus="0,1",
    )  # fmt: skip
    rows = json.loads(found.read_text())["rows"]
    off = [loss_off(row, rows) for row in rows if row["ranks"] == 2]
    assert len(off) == 3 * len(parallel) and all(x is not None for x in off), rows
    assert max(off) < BFLOAT16, rows
