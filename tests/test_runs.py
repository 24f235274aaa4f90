"""Whole runs on tiny models: stages, resume, ranks, kill -9. Real processes where they matter."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import call_script, metric_rows, run_python

from checkpoint import tensor_names
from config import DistillConfig
from hf import load_model, read_config
from mixture import open_corpora
from pace import quiet_gc
from student import calibration_loader
from tokenizer import load_tokenizer


def kd_flags(teacher, data, out, run, *more):
    return [
        f"--teacher={teacher}", f"--data={data}", f"--save_model_dir={out}", f"--run_name={run}",
        "--layers=1,2", "--device=cpu", "--dtype=float32", "--eval_tokens=512", "--sample_tokens=3",
        "--calibrate_tokens=256", "--config=tests/kd.yaml", *more,
    ]  # fmt: skip


def train_flags(data, out, run, *more):
    return [
        f"--data={data}", f"--save_model_dir={out}", f"--run_name={run}", "--device=cpu",
        "--dtype=float32", "--num_blocks=3", "--num_heads=2", "--embedding_dim=32", "--layers=1",
        "--context_len=32", "--batch_size=1", "--accumulation_steps=4", "--max_steps=6",
        "--lr=3e-3", "--warmup_steps=2", "--eval_tokens=256", "--sample_tokens=3", *more,
    ]  # fmt: skip


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).state_dict())


def test_distillation_end_to_end(tiny_teacher, tiny_data, tmp_path, capsys):
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a"))
    out, run = capsys.readouterr().out, tmp_path / "a"
    found = re.search(r"transfer self-test: .* within (\S+)", out)
    assert "FLLF" in out and float(found[1]) < 1e-5
    table = {r["model"]: r for r in json.loads((run / "table.json").read_text())}
    assert list(table) == [
        "teacher", "converted attention outputs zeroed", "student after transfer",
        "student after align", "student after distill",
    ]  # fmt: skip
    kl = {name: row["KL"] for name, row in table.items()}
    assert kl["teacher"] == 0 and table["teacher"]["top-1"] == 1
    assert kl["student after align"] < kl["student after transfer"]
    assert kl["student after distill"] < kl["student after align"]
    samples = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])["samples"]
    assert len(samples) == 3 and all({"prompt", "teacher", "student"} <= set(s) for s in samples)
    config = (run / "config.yaml").read_text()
    assert "layers: 1,2" in config and "commit:" in config and "command: train_kd.py" in config
    student = read_config(run / "model")
    assert student.layer_map() == "FLLF" and student.mixer == ["gated_deltanet"] * 2
    # Only the mixers were trained: everything else is the teacher's, bit for bit.
    theirs = weights(tiny_teacher)
    for name, tensor in weights(run / "model").items():
        if ".linear_attn." not in name:
            assert torch.equal(tensor, theirs[name]), name
    steps = metric_rows(run)
    assert sorted(steps) == list(range(1, 1 + len(steps)))


@pytest.mark.parametrize("train", ["mixers", "all"])
def test_distillation_in_bfloat16(tiny_teacher, tiny_data, tmp_path, train):
    """Autocast with a bfloat16 teacher: fp32 masters, decays and losses."""
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--dtype=bfloat16")
    call_script("train_kd", *flags, f"--distill_train={train}", "--distill_lr=5e-4")
    kl = {r["model"]: r["KL"] for r in json.loads((tmp_path / "a" / "table.json").read_text())}
    assert kl["student after distill"] < kl["student after align"] < kl["student after transfer"]
    saved = weights(tmp_path / "a" / "model")
    assert saved["layers.1.linear_attn.A_log"].dtype == torch.float32
    trunk = torch.bfloat16 if train == "mixers" else torch.float32
    assert saved["layers.0.mlp.up_proj.weight"].dtype == trunk


def test_a_native_student_is_taken_up_again(tiny_teacher, tiny_data, tmp_path, capsys):
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--stages=align"))
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "b", "--stages=distill")
    call_script("train_kd", *flags, f"--student={tmp_path / 'a' / 'model'}")
    out = capsys.readouterr().out
    assert "student after transfer" not in out.split("stage distill")[-1]
    rows = {r["model"]: r for r in json.loads((tmp_path / "b" / "table.json").read_text())}
    first = {r["model"]: r for r in json.loads((tmp_path / "a" / "table.json").read_text())}
    assert rows["student at start"]["KL"] == first["student after align"]["KL"]
    assert rows["student after distill"]["KL"] < rows["student at start"]["KL"]


def test_a_teacher_with_sinks_and_no_layer_to_convert(tiny_data, tmp_path, capsys):
    call_script("train", *train_flags(tiny_data, tmp_path, "t", "--attention_sink", "--layers="))
    flags = kd_flags(tmp_path / "t" / "model", tiny_data, tmp_path, "a", "--stages=distill")
    more = ("--layers=", "--distill_train=all", "--distill_mixer_lr=0.5", "--distill_lr=1e-3")
    call_script("train_kd", *flags, *more, "--distill_warmup_steps=0", "--max_steps=2")
    out = capsys.readouterr().out
    assert "softmax kernel math" in out.split("teacher: ")[1] and "mixers 0.5" not in out
    assert max(metric_rows(tmp_path / "a", "lr").values()) == 1e-3


def test_a_hybrid_teacher_is_converted_further(tiny_teacher, tiny_data, tmp_path, refused):
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--stages=align"))
    hybrid = tmp_path / "a" / "model"
    flags = kd_flags(hybrid, tiny_data, tmp_path, "b", "--mixer=gla")
    assert "layer 1 of the teacher is linear already" in refused("train_kd", *flags)
    call_script("train_kd", *flags, "--layers=0")
    config = read_config(tmp_path / "b" / "model")
    assert config.layer_map() == "LLLF" and config.mixer == ["gla", *["gated_deltanet"] * 2]
    theirs, mine = weights(hybrid), weights(tmp_path / "b" / "model")
    for name, tensor in mine.items():  # what it has already is trunk now
        if not name.startswith("layers.0.linear_attn."):
            assert tensor.equal(theirs[name]), name


@pytest.mark.parametrize("loss", ["reverse_kl", "js", "mse"])
def test_other_losses_train_all_parameters(tiny_teacher, tiny_data, tmp_path, loss):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--stages=distill")
    call_script(
        "train_kd", *flags, f"--distill_loss={loss}", "--distill_train=all",
        "--distill_ce_weight=0.1", "--distill_temperature=2", "--distill_use_muon=True",
    )  # fmt: skip
    losses = metric_rows(tmp_path / "a")
    values = [losses[s] for s in sorted(losses)]
    assert sum(values[-3:]) < sum(values[:3])
    before, after = weights(tiny_teacher), weights(tmp_path / "a" / "model")
    assert not torch.equal(before["embed_tokens.weight"], after["embed_tokens.weight"])


def test_long_stage_and_evaluations_on_the_way(tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--stages=distill,long")
    call_script(
        "train_kd", *flags, "--long_seq_len=64", "--long_batch_tokens=128", "--long_lr=1e-3",
        "--max_steps=6", "--eval_every=2",
    )  # fmt: skip
    assert len(metric_rows(tmp_path / "a", "kl")) == 6  # long is cross-entropy
    assert sorted(metric_rows(tmp_path / "a", "ce")) == list(range(7, 13))
    rows = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4, 8, 10, 12]


def test_calibration_sees_rows_as_the_run_does(tiny_data):
    data = open_corpora(tiny_data, load_tokenizer("byte"), "concatenate")[1]
    for mask in (True, False):
        (batch,) = calibration_loader(DistillConfig(doc_mask=mask), data).next_step()
        assert (batch.cu_seqlens is None) != mask


def test_repeated_rows_are_a_setting_of_a_stage(tiny_teacher, tiny_data, tmp_path):
    first = {}
    for name, more in (("a", []), ("b", ["--distill_repeat_rows=1"])):
        flags = kd_flags(tiny_teacher, tiny_data, tmp_path, name, "--max_steps=2")
        call_script("train_kd", *flags, *more)
        first[name] = metric_rows(tmp_path / name)
    assert [first["a"][s] == first["b"][s] for s in (1, 2, 3)] == [True, True, False]


def test_smoke_commands_in_small(tmp_path, capsys):
    """What `make smoke` runs, on the embedded corpus, for a few steps."""
    out = f"--save_model_dir={tmp_path}"
    small = ["--torch_compile=False", "--device=cpu", "--eval_tokens=1024", "--sample_tokens=4"]
    call_script("train", "--config", "configs/smoke.yaml", *small, "--max_steps=12", "--run=s", out)
    assert "x the unigram entropy" in capsys.readouterr().out
    call_script(
        "train_kd", "--config", "configs/smoke-kd.yaml", "--teacher", f"{tmp_path}/s/model",
        "--layers", "3:1", *small, "--max_steps=4", "--run=k", out,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "LLLF" in out and "student after distill" in out


def test_pretraining_end_to_end(tiny_data, tmp_path, capsys):
    call_script("train", *train_flags(tiny_data, tmp_path, "p", "--max_steps=120", "--lr=1e-2"))
    out = capsys.readouterr().out
    found = re.search(r"held-out loss ([\d.]+) nats/token = ([\d.]+) x the unigram", out)
    assert found and float(found[2]) < 1.0
    assert read_config(tmp_path / "p" / "model").layer_map() == "FLF"


def test_a_profile_is_one_trace(tiny_data, tmp_path):
    """Of steps 3 to 5, however long the stage is."""
    flags = ("--profile", "--max_steps=11", "--save_model=False")
    call_script("train", *train_flags(tiny_data, tmp_path, "p", *flags))
    (trace,) = (tmp_path / "p").glob("trace-*.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    steps = {name for name in names if str(name).startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_rests_while_training(enabled):
    was = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(KeyError), quiet_gc():
            assert not gc.isenabled() and gc.get_freeze_count() > 0
            raise KeyError
        assert gc.isenabled() == enabled and gc.get_freeze_count() == 0
    finally:
        gc.enable() if was else gc.disable()


def test_dry_run_trains_nothing(refused, tiny_teacher, tiny_data, tmp_path, capsys):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--max_steps=2")
    long = ("--stages=align,long", "--long_seq_len=8192", "--long_batch_tokens=8192")
    assert "(val): " in refused("train_kd", *flags, *long, "--dry_run")
    call_script("train_kd", *flags, *long, "--eval_seq_len=64", "--dry_run")
    out = capsys.readouterr().out
    assert "dry run" in out and "note: rows of 8,192 tokens" in out
    call_script("train", *train_flags(tiny_data, tmp_path, "b", "--dry_run"))
    assert "dry run" in capsys.readouterr().out and not list(tmp_path.iterdir())
    call_script("train_kd", *flags)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    call_script("train_kd", *flags, f"--resume={tmp_path / 'a'}", "--dry_run")
    assert "resuming at step" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_teacher_in_float8_needs_a_gpu(refused, tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--teacher_float8")
    assert "--teacher_float8: cpu in torch.float32 found" in refused("train_kd", *flags)


def test_a_trunk_in_bfloat16(refused, tiny_teacher, tiny_data, tmp_path, capsys):
    """It trains, resumes and is saved; mixers and norms stay in float32."""
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--trunk_dtype=bfloat16")
    assert "--trunk_dtype: bfloat16 found, float32" in refused("train_kd", *flags)
    flags += ["--dtype=bfloat16", "--distill_train=all", "--distill_lr=3e-4"]
    assert "uses Muon" in refused("train_kd", *flags, "--use_muon")
    call_script("train_kd", *flags)
    table = {r["model"]: r["KL"] for r in json.loads((tmp_path / "a" / "table.json").read_text())}
    assert table["student after distill"] < table["student after align"]
    newest = max((tmp_path / "a" / "checkpoints").iterdir(), key=lambda p: int(p.name[5:]))
    saved = {name: dtype for name, (_, dtype) in tensor_names(newest).items()}
    assert saved["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert saved["optim.layers.0.mlp.up_proj.weight.exp_avg"] == torch.bfloat16
    for name in ("layers.1.linear_attn.q_proj.weight", "layers.0.input_layernorm.weight"):
        assert saved[f"model.{name}"] == torch.float32
    again = [f for f in flags if not f.startswith("--trunk_dtype")]
    assert "trunk_dtype" in refused("train_kd", *again, "--resume=auto")


@pytest.mark.parametrize("train", ["lora", pytest.param("mixers", marks=pytest.mark.slow)])
def test_what_an_earlier_stage_trained_outlives_a_later_one(
    train, tiny_teacher, tiny_data, tmp_path
):
    """distill trains all, long only some: from any checkpoint the run goes on bit for bit."""
    more = ["--stages=align,distill,long", "--distill_train=all", f"--long_train={train}"]
    more += ["--long_seq_len=32", "--long_batch_tokens=64", "--max_steps=3", "--save_every=2"]
    more += ["--keep_checkpoints=99", *["--lora_dropout=0.1"] * (train == "lora")]
    flags = lambda run: kd_flags(tiny_teacher, tiny_data, tmp_path, run, *more)  # noqa: E731
    call_script("train_kd", *flags("whole"))
    a, expected = weights(tmp_path / "whole" / "model"), metric_rows(tmp_path / "whole")
    for step in (6, 8, 9):  # distill's last, one of long, long's last
        at, run = tmp_path / "whole" / "checkpoints" / f"step-{step}", f"from{step}"
        call_script("train_kd", *flags(run), f"--resume={at}")
        if step < 9:
            assert metric_rows(tmp_path / run) == {s: x for s, x in expected.items() if s > step}
        b = weights(tmp_path / run / "model")
        assert all(torch.equal(a[n], b[n]) for n in a)


def relative(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[k] - b[k]) / abs(a[k]) for k in a)


def largest_difference(a: Path, b: Path) -> float:
    a, b = weights(a / "model"), weights(b / "model")
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


@pytest.mark.parametrize(
    "muon", [pytest.param(False, marks=pytest.mark.slow), True], ids=["adamw", "muon"]
)
def test_two_ranks_equal_one_pretraining(muon, tiny_data, tmp_path):
    more = ["--use_muon=True", "--muon_lr=0.01"] if muon else []
    call_script("train", *train_flags(tiny_data, tmp_path, "one", *more))
    run_python("train.py", *train_flags(tiny_data, tmp_path, "two", *more), ranks=2)
    one, two = metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two")
    limit = 1e-4 if muon else 1e-6  # fp32 Newton-Schulz on CPU amplifies the sums' rounding
    assert relative(one, two) <= limit
    assert largest_difference(tmp_path / "one", tmp_path / "two") <= 100 * limit


def test_two_ranks_equal_one_distilling(tiny_teacher, tiny_data, tmp_path):
    more = ["--distill_train=all", "--max_steps=6"]
    flags = lambda run: kd_flags(tiny_teacher, tiny_data, tmp_path, run, *more)  # noqa: E731
    call_script("train_kd", *flags("one"), "--align_micro_batch=1", "--distill_micro_batch=1")
    run_python(
        "train_kd.py", *flags("two"), "--align_micro_batch=1", "--distill_micro_batch=1", ranks=2
    )
    one, two = metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two")
    assert len(one) == 12 and relative(one, two) <= 1e-6
    # Every mixer gets its gradient from both ranks, layer by layer.
    for layer in ("layer_1", "layer_2"):
        a, b = metric_rows(tmp_path / "one", layer), metric_rows(tmp_path / "two", layer)
        assert relative(a, b) <= 1e-6
    for key in ("eval/ppl", "eval/kl"):
        rows = [
            [json.loads(line)[key] for line in (tmp_path / run / "metrics.jsonl").open()
             if key in line]
            for run in ("one", "two")
        ]  # fmt: skip
        assert rows[0] == pytest.approx(rows[1], rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "train_kd"])
def test_selected_tokens_are_the_same_on_two_ranks(script, tiny_teacher, tiny_data, tmp_path):
    def flags(run, *more):
        if script == "train":
            known = ("--select_tokens=0.4", f"--reference={tiny_teacher}", "--batch_size=1")
            return train_flags(tiny_data, tmp_path, run, *known, *more)
        known = ("--select_tokens=0.4", "--max_steps=6", "--stages=distill")
        return kd_flags(tiny_teacher, tiny_data, tmp_path, run, *known, *more)

    call_script(script, *flags("one"))
    split = ["--distill_micro_batch=1"] if script == "train_kd" else []
    run_python(f"{script}.py", *flags("two", *split), ranks=2)
    one, two = metric_rows(tmp_path / "one"), metric_rows(tmp_path / "two")
    assert len(one) == 6 and relative(one, two) <= 1e-5
    off = ["--select_tokens=1"] + ["--reference="] * (script == "train")
    call_script(script, *flags("off", *off))
    off = metric_rows(tmp_path / "off")
    assert relative(one, off) > 1e-3
    assert 0.8 < one[1] / off[1] < 3  # a mean over the tokens kept


def test_selecting_all_tokens_is_the_same_as_not_selecting(tiny_teacher, tiny_data, tmp_path):
    for name, more in (("off", []), ("all", ["--select_tokens=1.0"])):
        flags = kd_flags(tiny_teacher, tiny_data, tmp_path, name, "--max_steps=4", *more)
        call_script("train_kd", *flags)
    assert metric_rows(tmp_path / "off") == metric_rows(tmp_path / "all")


def test_long_can_select_tokens_too(tiny_teacher, tiny_data, tmp_path):
    """By the teacher, from which it does not distil."""
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--stages=long", "--long_seq_len=64")
    more = ("--long_batch_tokens=128", "--long_lr=1e-3", "--max_steps=3", "--select_tokens=0.5")
    call_script("train_kd", *flags, *more)
    assert sorted(metric_rows(tmp_path / "a", "ce")) == [1, 2, 3]


def test_under_torchrun_one_rank_speaks(tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--layers=9")
    result = run_python("train_kd.py", *flags, ranks=2, check=False)
    assert result.returncode == 1
    assert result.stderr.count("error: --layers: layer 9 found") == 1
