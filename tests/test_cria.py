"""Block-wise distillation: blocks chained are the model, saved inputs are the live ones, blocks
trained alone are the jointly aligned student, and whatever is stopped or damaged."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import call_script, metric_rows
from kit import assert_close_rms, some_slow
from safetensors.torch import load_file, save_file
from test_runs import kd_flags, weights

import cria
import cria_files
import cria_job
import trainer
from cli import load_config, parse_argv
from config import DistillConfig
from cria import collect, row_sets, shard
from cria_files import SavedRows
from cria_job import load_block, prepare
from evaluate import inputs
from hf import load_model
from hybrid_layers import MIXERS
from model import Transformer
from trainer import amp_context, stage_loader

COMMON = ("--layers=all", "--mixer=hedgehog_window", "--linear_window=8", "--align_tokens=2560",
          "--block_tokens=2560", "--block_seq_len=32", "--block_batch_tokens=64",
          "--block_lr=1e-3", "--block_warmup_steps=2", "--save_every=4",
          "--align_unique_tokens=0")  # fmt: skip


def flags_of(teacher, data, out, run, *more) -> list[str]:
    return kd_flags(teacher, data, out, run, *COMMON, *more)


def job_of(flags):
    preset, found = parse_argv(flags)
    cfg = load_config(DistillConfig, found, preset)
    return prepare(cfg, flags)


@pytest.fixture
def flags(tiny_teacher, tiny_data, tmp_path):
    return lambda run, *more: flags_of(tiny_teacher, tiny_data, tmp_path, run, *more)


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_blocks_one_after_the_other_are_the_model(flags, tiny_teacher, size):
    job = job_of(flags("a", f"--cria={size}"))
    assert [i for block in job.blocks for i in block] == [0, 1, 2, 3]
    shard(job)
    model = load_model(tiny_teacher)
    ids = torch.randint(0, 257, (2, 50))
    with torch.no_grad():
        h = model.embed(ids)
        for b in range(len(job.blocks)):
            h = load_block(job, b)(hidden=h)
        assert model.norm(h).equal(model(ids))


def live_inputs(model: Transformer, batch, layers) -> dict[int, torch.Tensor]:
    found, hooks = {}, []
    for i in layers:
        keep = lambda _, args, i=i: found.update({i: args[0].clone()})  # noqa: E731
        hooks.append(model.layers[i].register_forward_pre_hook(keep))
    model(**inputs(batch))
    for hook in hooks:
        hook.remove()
    return found


def test_a_block_is_gone_when_the_next_one_comes(flags, monkeypatch):
    """Also where it is in a cycle, as a compiled one is."""
    held = []
    load = cria.load_block

    def in_a_cycle(model):
        model.itself = [model]

    def alone(job, b):
        assert not any(block() for block in held), b
        model = load(job, b)
        held.append(weakref.ref(model))
        return model

    gc.disable()
    try:
        monkeypatch.setattr(cria, "compile_wanted", lambda cfg, world: True)
        monkeypatch.setattr(cria, "compile_blocks", in_a_cycle)
        monkeypatch.setattr(cria, "load_block", alone)
        job = job_of(flags("a", "--cria=1", "--cria_resident=1", "--align_tokens=640"))
        for step in (shard, collect, cria.train):
            step(job)
    finally:
        gc.enable()
    assert len(held) == 3 * 2 + 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("resident", [0, 1])
def test_what_is_saved_is_the_residual_stream_before_the_norm(flags, tiny_teacher, dtype, resident):
    """Bit for bit what goes into the block of the whole teacher, on the batches of align."""
    more = (f"--dtype={dtype}", f"--cria_resident={resident}")
    job = job_of(flags("a", "--cria=1", *more))
    shard(job)
    collect(job)
    model = load_model(tiny_teacher, dtype=job.dtype)
    for kind, loader, order in row_sets(job):
        saved = {b: SavedRows(job.inputs(kind, b)) for b in job.trained}
        assert len(order) > len(set(order)) / 2
        for at in range(0, len(order), loader.micro_batch):
            rows = order[at : at + loader.micro_batch]
            batch = loader.batch_of(rows)
            with torch.no_grad(), amp_context(job.world.device, job.dtype)():
                live = live_inputs(model, batch, range(4))
            for b, reader in saved.items():
                mine = reader(batch).hidden
                assert mine.dtype == job.dtype and mine.equal(live[b]), (kind, b)
                normed = model.layers[b].input_layernorm(live[b])
                assert (normed - mine).norm() > 0.1 * mine.norm()


def joint_and_blocks(flags, size, *more) -> tuple[dict, dict]:
    only = ("--stages=align", "--align_tokens=640", *more)
    joint = [flag for flag in only if not flag.startswith("--cria")]
    call_script("train_kd", *flags("joint", *joint))
    call_script("train_kd", *flags("blocks", *only, f"--cria={size}"))
    out = next(f for f in flags("x") if f.startswith("--save_model_dir="))
    out = Path(out.partition("=")[2])
    return weights(out / "joint" / "model"), weights(out / "blocks" / "cria" / "student")


QUICK = ("hedgehog_window", "gated_deltanet", "rwkv6")  # rwkv6 begins with random parts


@pytest.mark.parametrize(
    "mixer", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MIXERS]
)
def test_blocks_trained_alone_are_the_jointly_aligned_student(flags, mixer):
    joint, mine = joint_and_blocks(flags, 3, f"--mixer={mixer}")
    assert joint.keys() == mine.keys()
    for name, p in joint.items():
        assert_close_rms(mine[name], p, 1e-5, name)


CASES = {
    "all layers": (9, ()),
    "some": (2, ("--layers=0,3",)),
    "teacher's untouched block": (1, ("--layers=1,2",)),
    "LoLCATs": (3, ("--align_train=feature_maps", "--align_hidden_weight=0",
                    "--align_heads_weight=1000", "--align_maps_weight=1")),
    "kept rows": (3, ("--align_unique_tokens=1024",)),
    "more passes than one": (3, ("--align_tokens=13824", "--align_batch_tokens=256")),
    "repeated spans": (2, ("--align_repeat_rows=0.5",)),
    "one block in memory": (1, ("--cria_resident=1", "--calibrate_tokens=0")),
    "two blocks in memory, some layers": (1, ("--cria_resident=2", "--layers=0,3")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "more"),
    some_slow(CASES, "all layers", "some", "LoLCATs", "kept rows", "one block in memory"),
)
def test_blocks_of_any_size(flags, size, more):
    joint, mine = joint_and_blocks(flags, size, *more)
    for name, p in joint.items():
        assert_close_rms(mine[name], p, 1e-5, name)


def test_the_whole_pipeline(flags, tmp_path, tiny_teacher, capsys):
    """align, adapters against the block's output, stitched, adapters end to end: each helps."""
    more = ("--cria=3", "--stages=align,block,distill", "--distill_train=lora", "--lora_rank=4",
            "--distill_lr=1e-3")  # fmt: skip
    call_script("train_kd", *flags("a", *more))
    out = capsys.readouterr().out
    assert "LLLL in 2 blocks of 3, 2 to distil" in out and "student after distill" in out
    folder = tmp_path / "a" / "cria"
    for b in (0, 1):
        rows = metric_rows(folder / "blocks" / f"block-{b:03d}")
        loss = list(rows.values())
        assert len(loss) == 80
        assert sum(loss[30:40]) < 0.9 * sum(loss[:10])
    stitched = weights(folder / "student")
    teacher = weights(tiny_teacher)
    same = [n for n in stitched if n in teacher and stitched[n].equal(teacher[n])]
    assert set(same) == {n for n in teacher if "self_attn" not in n}
    rows = {r["model"]: r for r in json.loads((tmp_path / "a" / "table.json").read_text())}
    assert rows["student after distill"]["KL"] < rows["student at start"]["KL"]
    # The same command once more finds everything done.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors") if "student" not in
              p.parts}  # fmt: skip
    call_script("train_kd", *flags("a", *more))
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_block_adapters_bring_the_block_nearer(flags, tmp_path):
    """The residual stream behind the block, on the rows it was trained on."""
    errors = {}
    for run, stages in (("a", "align"), ("b", "align,block")):
        more = ("--cria=4", f"--stages={stages}", "--block_tokens=5120")
        call_script("train_kd", *flags(run, *more))
        job = job_of(flags(run, *more))
        student = load_model(tmp_path / run / "cria" / "student")
        teacher = load_block(job, 0)
        _, loader, order = list(row_sets(job))[1]
        batch = SavedRows(job.inputs("inputs", 0))(loader.batch_of(order[:4]))
        with torch.no_grad():
            want = teacher(**inputs(batch))
            student.norm = torch.nn.Identity()
            errors[run] = (student(**inputs(batch)) - want).norm() / want.norm()
    assert errors["b"] < 0.9 * errors["a"], errors


def test_step_by_step_in_any_number_of_processes(flags, tmp_path, capsys):
    """The same bytes as in one go; a block that another process is at is left to it."""
    more = ("--cria=2", "--stages=align,block")
    call_script("train_kd", *flags("one", *more))
    for step in ("shard", "collect"):
        call_script("train_kd", *flags("two", *more, f"--cria_step={step}"))
    folder = tmp_path / "two" / "cria"
    with cria.claimed(folder / "blocks" / "block-001.lock"):
        call_script("train_kd", *flags("two", *more, "--cria_step=train"))
    assert "block 1 is another process's" in capsys.readouterr().out
    assert not (folder / "blocks" / "block-001" / "trained.json").exists()
    call_script("train_kd", *flags("two", *more, "--cria_step=train", "--cria_block=1"))
    call_script("train_kd", *flags("two", *more, "--cria_step=stitch"))
    for b in (0, 1):
        name = Path("cria") / "blocks" / f"block-{b:03d}" / "trained.safetensors"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_student_is_stitched_once(flags, tmp_path, capsys):
    """A run that is taken up in distill does not write it again, unless a block is another one."""
    more = ("--cria=2", "--stages=align", "--align_tokens=320")
    call_script("train_kd", *flags("a", *more))
    student = tmp_path / "a" / "cria" / "student"
    before = student.stat().st_ino
    call_script("train_kd", *flags("a", *more))
    assert "already" in capsys.readouterr().out and student.stat().st_ino == before
    shutil.rmtree(tmp_path / "a" / "cria" / "blocks" / "block-001")
    call_script("train_kd", *flags("a", *more))
    assert "already" in capsys.readouterr().out  # trained again, to the same bytes
    block = tmp_path / "a" / "cria" / "blocks" / "block-001" / "trained"
    tensors = {n: 2 * t for n, t in cria_files.read_tensor_file(block).items()}
    cria_files.write_tensor_file(block, tensors)
    call_script("train_kd", *flags("a", *more))
    assert "stitch: student of 2" in capsys.readouterr().out
    assert all(weights(student)[n].equal(t) for n, t in tensors.items())


class Killed(BaseException):
    """What no handler takes, as a process that is gone."""


def die_at(monkeypatch, module, name: str, call: int) -> None:
    """The `call`-th call of module.name never returns."""
    real, calls = getattr(module, name), []

    def dying(*args, **how):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **how)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize("call", [1, 4, 7])
def test_collect_goes_on_where_it_was_killed(flags, tmp_path, monkeypatch, call):
    """The same files, whichever was the last."""
    monkeypatch.setattr(cria_files, "PART_BYTES", 3 * 32 * 48 * 4)  # parts of four rows
    more = ("--cria=2", "--stages=align", "--align_micro_batch=2")
    call_script("train_kd", *flags("whole", *more, "--cria_step=shard"))
    call_script("train_kd", *flags("whole", *more, "--cria_step=collect"))
    call_script("train_kd", *flags("killed", *more, "--cria_step=shard"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, cria_files, "write_tensors", call)
        call_script("train_kd", *flags("killed", *more, "--cria_step=collect"))
    (tmp_path / "killed" / "cria" / "inputs" / "block-000").mkdir(parents=True, exist_ok=True)
    (tmp_path / "killed" / "cria" / "inputs" / "block-000" / "part-00009.tmp").write_bytes(b"x")
    call_script("train_kd", *flags("killed", *more, "--cria_step=collect"))
    whole, killed = (
        {p.relative_to(tmp_path / run): p.read_bytes()
         for p in (tmp_path / run / "cria").rglob("part-*") if p.suffix != ".tmp"}
        for run in ("whole", "killed")
    )  # fmt: skip
    assert len(whole) > 20 and whole == killed


@pytest.mark.slow
@pytest.mark.parametrize("step", [50])
def test_a_killed_block_goes_on(flags, tmp_path, monkeypatch, step):
    """From its last checkpoint, to the same bytes."""
    more = ("--cria=3", "--stages=align,block")
    call_script("train_kd", *flags("whole", *more))
    for name in ("shard", "collect"):
        call_script("train_kd", *flags("killed", *more, f"--cria_step={name}"))
    train = flags("killed", *more, "--cria_step=train")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, trainer, "one_step", step)
        call_script("train_kd", *train)
    call_script("train_kd", *train)
    for b in (0, 1):
        name = Path("cria") / "blocks" / f"block-{b:03d}" / "trained.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_stopped_block_says_how_to_go_on(flags, monkeypatch, capsys):
    monkeypatch.setattr(trainer.StopSignals, "agreed", lambda *_: signal.SIGINT)
    with pytest.raises(SystemExit):
        call_script("train_kd", *flags("a", "--cria=3"))
    assert "block-000, --resume auto with --run a goes on" in capsys.readouterr().err


def test_a_tied_teacher_with_another_head_is_refused(flags, tiny_teacher, tmp_path, refused):
    shutil.copytree(tiny_teacher, tmp_path / "other")
    stored = load_file(tmp_path / "other/model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, tmp_path / "other/model.safetensors")
    more = ("--cria=2", f"--teacher={tmp_path / 'other'}")
    assert "lm_head.weight differs" in refused("train_kd", *flags("a", *more))


def test_damage_is_named(flags, tmp_path, refused, monkeypatch):
    """Every file that a step reads, missing, cut or with another byte."""
    monkeypatch.setattr(cria_files, "PART_BYTES", 1)
    more = ("--cria=2", "--stages=align", "--align_tokens=320")
    call_script("train_kd", *flags("good", *more))
    folder = tmp_path / "good" / "cria"
    for step, found in (
        ("train", ["weights/block-001", "inputs/block-001/part-00002",
                   "calibration/block-001/part-00000"]),
        ("stitch", ["weights/outer", "weights/block-000", "blocks/block-000/trained"]),
    ):  # fmt: skip
        for name in found:
            for harm in ("missing", "cut", "byte", "listing"):
                run = tmp_path / "bad"
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(tmp_path / "good", run)
                if step == "train":
                    shutil.rmtree(run / "cria" / "blocks")
                else:
                    (run / "cria" / "student.json").unlink()
                file = (run / "cria" / name).with_suffix(".safetensors")
                if harm == "listing":
                    file = file.with_suffix(".json")
                if harm == "missing":
                    file.unlink()
                else:
                    raw = bytearray(file.read_bytes())
                    raw[len(raw) // 2] ^= 1
                    file.write_bytes(raw[:-1] if harm == "cut" else raw)
                line = refused("train_kd", *flags("bad", *more, f"--cria_step={step}"))
                assert str(file) in line, (name, harm, line)
    assert (folder / "student").is_dir()


def test_rows_that_were_not_collected_are_missed(flags, tmp_path, refused):
    more = ("--cria=2", "--stages=align", "--cria_step=shard")
    call_script("train_kd", *flags("a", *more))
    line = refused("train_kd", *flags("a", "--cria=2", "--stages=align", "--cria_step=train"))
    assert "rows are missing" in line and "--cria_step collect" in line
    line = refused("train_kd", *flags("a", "--cria=2", "--stages=align", "--cria_step=stitch"))
    assert "block 0 is not trained yet" in line


REFUSED = {
    "--cria_step: train found without --run": ("--cria_step=train", "--run_name="),
    "--stages: distill found, align first": ("--stages=distill",),
    "--layers: auto:0.5 found": ("--layers=auto:0.5",),
    "--student: x found": ("--student=x",),
    "--aligned: x found": ("--aligned=x",),
    "--block_seq_len: 64 found": ("--block_seq_len=64", "--stages=align,block"),
    "--block_select_tokens: 0.5 found": ("--block_select_tokens=0.5",),
    "--cria_block: found without": ("--cria_block=1",),
    "--cria_block: 2 found, 0 to 1": ("--cria_block=2", "--cria_step=train"),
    "--save_model: False": ("--save_model=False",),
    "--resume: x found": ("--resume=x",),
    "--share_trunk: false found": ("--share_trunk=false",),
    "--trunk_dtype: bfloat16 found": (
        "--trunk_dtype=bfloat16",
        "--stages=align,block",
        "--block_train=all",
    ),
    "--cria_step shard makes it": ("--cria_step=collect",),
    "no layer of --layers": ("--layers=0", "--cria_step=train", "--cria_block=1"),
}


@pytest.mark.parametrize(("line", "more"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_is_refused(flags, refused, line, more, tmp_path):
    if "no layer" in line:
        call_script("train_kd", *flags("x", "--cria=2", "--layers=0", "--cria_step=shard"))
    assert line in refused("train_kd", *flags("x", "--cria=2", *more))
    assert "no layer" in line or not (tmp_path / "x").exists()


def test_runs_without_a_name(flags, refused, tmp_path, monkeypatch):
    """Begun in one second each has a folder; one that is refused leaves none."""
    monkeypatch.setattr("run_folder.time.strftime", lambda _: "now")
    refused("train_kd", *flags("", "--cria=2", "--layers=99"))
    assert not list(tmp_path.glob("train_kd-*"))
    found = [job_of(flags("", "--cria=2")).folder.parent.name for _ in range(2)]
    assert found == ["train_kd-now", "train_kd-now-2"]


def test_the_stage_block_sees_the_rows_that_were_saved(flags):
    """With their repeated spans, in another order."""
    job = job_of(flags("a", "--cria=2", "--stages=align,block", "--align_repeat_rows=0.5",
                       "--block_repeat_rows=0.5"))  # fmt: skip
    _, align, order = list(row_sets(job))[1]
    block = stage_loader(job.cfg, job.plans[1], job.data, job.world, sorted(set(order)))
    seen = [row for step in range(20) for row in block.step_rows(step * 2).flatten().tolist()]
    assert set(seen) <= set(order) and seen != order[: len(seen)]
    for row in seen:
        a, b = align.batch_of([row]), block.batch_of([row])
        assert a.input_ids.equal(b.input_ids) and a.cu_seqlens.equal(b.cu_seqlens)


def test_a_teacher_that_is_not_whole(flags, tiny_teacher, tmp_path, refused):
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, teacher / "model.safetensors")
    found = [f for f in flags("a", "--cria=2", "--stages=align") if "--teacher" not in f]
    line = refused("train_kd", *found, f"--teacher={teacher}")
    assert "weight layers.3.mlp.up_proj.weight is missing (1 in all)" in line
    (teacher / "config.json").write_text('{"model_type": "bamba"}')
    assert "--teacher: a bamba found" in refused("train_kd", *found, f"--teacher={teacher}")


def test_another_run_in_the_folder_is_refused(flags, refused):
    call_script("train_kd", *flags("a", "--cria=2", "--cria_step=shard"))
    for more in ("--cria=3", "--align_lr=1e-4", "--align_tokens=5120", "--mixer=gla", "--seed=3"):
        line = refused("train_kd", *flags("a", "--cria=2", "--cria_step=collect", more))
        assert "--run:" in line and "the same expected" in line


def test_an_ordinary_runs_folder_is_refused(flags, refused, tmp_path):
    log = tmp_path / "a" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text("{}\n")
    for more in ((), ("--resume=auto",)):
        assert "exists already" in refused("train_kd", *flags("a", "--cria=2", *more))
    assert [p.name for p in log.parent.iterdir()] == [log.name] and log.read_text() == "{}\n"


def test_the_stage_block_is_of_cria(flags, refused):
    assert "block is of --cria" in refused("train_kd", *flags("x", "--stages=align,block,distill"))


def test_groups_begin_where_inputs_are_saved(flags):
    for most, groups in ((0, [range(4)]), (1, [range(1), range(1, 3), range(3, 4)]),
                         (2, [range(3), range(3, 4)])):  # fmt: skip
        assert cria_job.resident_groups([1, 3], most) == groups
    assert [cria_job.saved_by(g, [1, 3]) for g in groups] == [[1, 3], []]
    assert cria_job.name_of(3) == "block-003"


def test_a_dry_run_leaves_nothing_behind(flags, tmp_path, capsys):
    call_script("train_kd", *flags("a", "--cria=3", "--stages=align,block,distill", "--dry_run"))
    said = capsys.readouterr().out
    assert "layers LLLL in 2 blocks of 3" in said and said.count(", in every block") == 2
    assert not (tmp_path / "a").exists()
