"""The plan of a block-wise distillation: published figures, and what real runs left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import call_script
from kit import some_slow
from test_cria import flags, flags_of, job_of  # noqa: F401, a fixture

import cria_job
import cria_plan
from cli import load_config, parse_argv
from config import DistillConfig
from cria_plan import cria_budget

LETTERS = {"linear_attention": "L", "full_attention": "F"}

LARGE = ("--teacher=configs/shapes/llama-3.1-405b", "--layers=all", "--mixer=hedgehog_window",
         "--device=cpu", "--dtype=bfloat16", "--plan_device=8xH100", "--plan", "--stages=align",
         "--config=configs/smollm2.yaml", "--align_tokens=40009728")  # fmt: skip


def budget_of(flags):  # noqa: F811
    preset, found = parse_argv(list(flags))
    return cria_budget(load_config(DistillConfig, found, preset))


def test_published_figures():
    """405B in blocks of nine layers: 14 x 16,384 x T x 2 bytes, 57.4 GB of weights a block."""
    budget = budget_of([*LARGE, "--cria=9"])
    tokens = budget.stages[1].plan.steps * budget.stages[1].plan.stage.batch_tokens
    assert tokens == 814 * 49_152
    assert dict(budget.disk)["inputs of blocks"] == 14 * 16_384 * tokens * 2
    align = budget.stages[1].memory
    assert align["teacher"] / 1e9 == pytest.approx(57.4, abs=0.05)
    assert budget.stages[0].memory["teacher"] > 700e9
    one = budget_of([*LARGE, "--cria=9", "--cria_resident=1"])
    assert one.stages[0].memory["teacher"] < 62e9


def test_blocks_between_that_are_not_distilled_are_in_memory_too():
    some = [*LARGE, "--cria=9", "--cria_resident=1", "--layers=0,60"]
    held = [budget_of(f).stages[0].memory["teacher"] for f in ([*LARGE, "--cria=9"], some)]
    assert held[1] == pytest.approx(held[0] * 6 / 13, rel=0.02)


def test_how_the_whole_student_is_cut_over_ranks_is_not_the_blocks_matter():
    more = ("--stages=align,distill", "--distill_train=lora", "--parallel=fsdp", "--shard_ranks=4")
    budget = budget_of([*LARGE, "--cria=9", *more, "--align_unique_tokens=49152"])
    assert [s.name for s in budget.stages] == ["collect", "align", "distill"]


def test_fewer_layers_at_once_and_less_that_trains_take_less():
    whole = budget_of([*LARGE, "--cria=9"])
    small = budget_of([*LARGE, "--cria=4"])
    maps = budget_of([*LARGE, "--cria=4", "--align_train=feature_maps"])
    totals = [sum(b.stages[1].memory.values()) for b in (whole, small, maps)]
    assert totals[0] > 2 * totals[1] > 4 * totals[2] / 1.5
    assert dict(small.disk)["inputs of blocks"] > 2 * dict(whole.disk)["inputs of blocks"]
    assert maps.stages[1].trained < small.stages[1].trained / 200


def bytes_under(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


CASES = {
    "align": (("--stages=align",),),
    "adapters": (("--stages=align,block",),),
    "all": (("--stages=align,block", "--block_train=all"),),
    "remainder": (("--stages=align", "--cria=3"),),
    "some": (("--stages=align", "--layers=0,3", "--cria=1"),),
    "unique": (("--stages=align", "--align_unique_tokens=1024"),),
    "bfloat16": (("--stages=align", "--dtype=bfloat16"),),
}


@pytest.mark.parametrize("more", some_slow(CASES, "adapters", "some", "bfloat16"))
def test_disk_within_five_percent(flags, tmp_path, more, monkeypatch):  # noqa: F811
    """Of what a run leaves behind, and of what a block holds before its checkpoints go."""
    import cria

    held, most = [], []
    real = cria.shutil.rmtree

    def measure(path, **how):
        held.append(bytes_under(Path(path)))
        most.append(bytes_under(tmp_path / "a"))
        real(path, **how)

    found = flags("a", "--cria=2", *more)
    budget = budget_of(found)
    plan, last = dict(budget.disk), budget.stages[-1].saves.size
    monkeypatch.setattr(cria.shutil, "rmtree", measure)
    call_script("train_kd", *found)
    folder = tmp_path / "a" / "cria"

    def size(pattern):
        return sum(p.stat().st_size for p in folder.glob(pattern) if p.is_file())

    for part, pattern in (
        ("weights, a file per block", "weights/*"), ("inputs of blocks", "inputs/*/*"),
        ("calibration", "calibration/*/*"), ("distilled blocks", "blocks/*/trained.*"),
        ("the stitched student", "student/*"),
    ):  # fmt: skip
        assert plan[part] == pytest.approx(size(pattern), rel=0.05, abs=6000), part
    # Of three checkpoints at most, two of the last stage are left when the block is done.
    assert max(held) == pytest.approx(2 * last, rel=0.05)
    assert plan["checkpoints of blocks in training"] >= 3 * last
    # All in all: a block's result comes when its checkpoints go, and the plan has both.
    planned, most = sum(plan.values()), max(*most, bytes_under(tmp_path / "a"))
    assert 0.95 * (planned - plan["distilled blocks"]) < most < 1.05 * planned


@pytest.mark.parametrize("layers, kinds", [("2,3", "LL"), ("1,2,3", "LL"), ("0", "LF")])
def test_rows_at_once_are_those_of_the_block_with_most_to_train(flags, layers, kinds, monkeypatch):  # noqa: F811
    """What one block can take all take, and the plan has the sizes of the run."""
    asked = []
    for module in (cria_job, cria_plan):
        real = module.plan_stage
        monkeypatch.setattr(
            module, "plan_stage", lambda *a, real=real: asked.append(a[-1]) or real(*a)
        )
    found = flags("a", "--cria=2", f"--layers={layers}", "--stages=align,block")
    job_of(found)
    run, asked[:] = asked[:], []
    budget_of(found)
    assert asked == run and len(run) == 2
    assert [LETTERS[k] for k in run[0].layer_types] == list(kinds)


def test_the_command(flags, tmp_path, capsys):  # noqa: F811
    """One table for all that comes, and nothing is made."""
    call_script("train_kd", *flags("a", "--cria=2", "--stages=align,block,distill", "--plan"))
    out = capsys.readouterr().out
    for word in ("collect", "align", "block", "distill", "inputs of blocks", "(after the blocks)"):
        assert word in out, out
    assert not (tmp_path / "a").exists()


def test_inputs_may_go_when_all_blocks_are_done(flags, tmp_path, monkeypatch):  # noqa: F811
    """They are not asked for again, neither of the disk nor of the teacher."""
    import shutil
    from collections import namedtuple

    found = flags("a", "--cria=2", "--stages=align")
    call_script("train_kd", *found)
    inputs = tmp_path / "a" / "cria" / "inputs"
    size = sum(p.stat().st_size for p in inputs.rglob("*.safetensors"))
    budget = budget_of(found)
    assert sum(n for _, n in budget.disk) - budget.there > -size / 2  # they make no room
    shutil.rmtree(inputs)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, size // 2))
    for step in ("stitch", "all"):
        call_script("train_kd", *found, f"--cria_step={step}")
    assert not inputs.exists()


def test_checkpoints_of_what_comes_after_are_there_already(flags, tmp_path):  # noqa: F811
    found = flags("a", "--cria=2", "--stages=align,distill", "--align_tokens=320", "--max_steps=2")
    call_script("train_kd", *found)
    saved, folder = tmp_path / "a" / "checkpoints", tmp_path / "a" / "cria"
    kept = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())
    blocks = sum(
        p.stat().st_size for p in folder.rglob("*.safetensors")
        if p.relative_to(folder).parts[0] not in ("inputs", "calibration")
    )  # fmt: skip
    assert kept and budget_of(found).there == blocks + kept


def test_a_disk_without_room_is_refused(flags, tmp_path, refused, monkeypatch):  # noqa: F811
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 100_000))
    line = refused("train_kd", *flags("a", "--cria=2", "--stages=align"))
    assert line.startswith("error: --save_model_dir: 100,000 bytes free")
    assert not (tmp_path / "a").exists()
