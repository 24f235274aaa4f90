"""Ablations: which runs a series needs, how they are run, and the numbers of its tables.

pytest tests/test_quality.py            # pytest -m slow tests/test_quality.py: two real rows
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

from benchmarks import quality
from benchmarks.quality_tables import MIXERS, TABLES, align_share, slug
from config import DistillConfig, UserError

BASE = str(ROOT / "configs" / "ablation.yaml")
# A process that writes what a run and its evaluation leave behind.
FAKE = r"""
import json, pathlib, sys
folder, step, seed, ratio = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
folder.mkdir(exist_ok=True)
if step == "train":
    stages = {"align": {"batch_tokens": 100}, "distill": {"batch_tokens": 300}}
    about = {"device": "chip", "commit": "c0ffee", "command": "train_kd.py"}
    (folder / "config.yaml").write_text(json.dumps({**stages, "seed": seed, "_run": about}))
    rows = [{"step": 0, "stage": "teacher", "eval/kl": 0.0}]
    for i, speed in enumerate((1.0, 40.0, 30.0), 1):
        rows.append({"step": i, "stage": "align", "loss": 1.0, "tok/s": speed})
    for i, speed in enumerate((500.0, 900.0), 4):
        rows.append({"step": i, "stage": "distill", "loss": 1.0, "tok/s": speed + 1000 * seed})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
else:
    scores = {"ratio": float(ratio) + 0.1 * seed, "kl": 0.25, "top1": 0.75}
    domains = {"prose": scores, "code": {"ratio": 2.0, "kl": 0.75, "top1": 0.25}}
    recall = [
        {"task": "passkey", "length": n, "depth": d, "student": s, "teacher": 1.0}
        for n, d, s in ((512, 0.0, 0.5), (512, 1.0, 1.0), (1024, 0.0, 0.0), (1024, 1.0, 0.5))
    ] + [{"task": "copy", "length": 512, "depth": None, "student": 0.125, "teacher": 0.875}]
    (folder / "eval.json").write_text(json.dumps({"domains": domains, "recall": recall}))
"""


def arguments(**changes) -> SimpleNamespace:
    """Parsed flags, as far as the names of rows depend on them."""
    found = dict(base=BASE, train="", teacher="models/t", data="stdlib", row=[])
    return SimpleNamespace(**found | changes)


@pytest.fixture
def series(tiny_teacher, tiny_data, tmp_path, monkeypatch):
    """series(*flags) -> the exit code of a series in tmp_path/out, whose processes are FAKE ones;
    series.steps are those begun, series.code replaces the code of a (slug, step)."""
    call = SimpleNamespace(steps=[], code={}, out=tmp_path / "out")

    def command(job, args):
        call.steps.append((job.slug, job.step))
        code = call.code.get((job.slug, job.step), FAKE)
        ratio = "1.5" if job.slug.startswith("base") else "1.25"
        folder = str(Path(args.out) / job.slug)
        return [sys.executable, "-c", code, folder, job.step, str(job.seed), ratio]

    def run(*flags) -> int:
        where = [f"--out={call.out}", f"--base={BASE}", "--recall_lengths=1024"]
        try:
            quality.main([*flags, *where, f"--teacher={tiny_teacher}", f"--data={tiny_data}"])
        except SystemExit as stop:
            return stop.code
        return 0

    monkeypatch.setattr(quality, "command", command)
    call.run = run
    return call


def test_slugs():
    assert slug({}) == "base" and slug({}, 1) == "base-s1"
    assert slug({"transfer_decay": "True"}) == "transfer_decay-true"
    assert slug({"layers": "auto:0.75", "search_scorer": "greedy"}, 2) == (
        "layers-auto-0.75+search_scorer-greedy-s2"
    )
    assert slug({"b": "x/y", "a": "1e-4"}) == slug({"a": "1e-4", "b": "x/y"}) == "a-1e-4+b-x-y"


def test_a_row_is_known_by_what_differs_from_the_base():
    def name(*flags, **changes):
        return slug(quality.changes(arguments(**changes), list(flags)))

    assert name() == name("--layers=3:1") == name("--distill_lr=0.0003") == "base"
    assert name("--distill_loss=forward_kl") == name("--mixer=gated_deltanet") == "base"
    assert name("--distill_lr=1e-4") == "distill_lr-1e-4"
    assert name("--distill_lr=1e-4", train="--distill_lr 1e-4") == "base"
    assert name("--distill_lr=3e-4", train="--distill_lr 1e-4") == "distill_lr-3e-4"
    assert name("--distill_kd_weight=0", "--distill_ce_weight=1", "--distill_top_k=0") == (
        "distill_ce_weight-1+distill_kd_weight-0"
    )


def test_every_table_begins_with_its_base():
    args = arguments()
    tables = quality.all_tables(args)
    assert set(tables) == {
        "lr", "transfer", "structure", "align_share", "loss", "repeat", "layers", "share", "mixers",
    }  # fmt: skip
    for table, rows in tables.items():
        names = [slug(quality.changes(args, flags)) for flags in rows.values()]
        assert table == "share" or names[0] == "base"
        assert len(set(names)) == len(names), (table, names)
    assert list(TABLES["mixers"]) == list(MIXERS)
    assert list(TABLES["transfer"]["all-off"]) == [
        f"--transfer_{part}=False" for part in ("conv", "beta", "decay", "gate", "scale")
    ]


def test_align_share_keeps_the_total():
    cfg = DistillConfig()
    cfg.align.tokens = cfg.distill.tokens = 2_500_000
    both = "--stages=align,distill"
    assert align_share(cfg) == {
        "50%": [],
        "0%": ["--stages=distill", "--distill_tokens=5000000"],
        "25%": [both, "--align_tokens=1250000", "--distill_tokens=3750000"],
        "75%": [both, "--align_tokens=3750000", "--distill_tokens=1250000"],
    }
    cfg.align.tokens = 500_001
    assert list(align_share(cfg)) == ["16.6667%", "0%", "25%", "50%", "75%"]
    assert align_share(cfg)["50%"][1:] == ["--align_tokens=1500000", "--distill_tokens=1500001"]
    cfg.stages = "distill"
    assert next(iter(align_share(cfg).items())) == ("0%", [])
    assert align_share(cfg)["50%"] == [both, "--align_tokens=1250000", "--distill_tokens=1250000"]
    named = quality.all_tables(arguments(train="--distill_tokens 1500000"))["align_share"]
    assert list(named) == ["62.5%", "0%", "25%", "50%", "75%"]
    assert named["25%"][1:] == ["--align_tokens=1000000", "--distill_tokens=3000000"]


def test_tables_share_runs_and_finished_rows_are_not_run_again(series, capsys):
    asked = ("loss", "transfer", "--rows", "forward_kl", "js", "base", "conv=off", "--jobs=2")
    assert series.run(*asked) == 0
    slugs = ["base", "distill_loss-js", "transfer_conv-false"]
    assert sorted(series.steps) == sorted(
        (s, step) for s in slugs for step in ("train", "evaluate")
    )
    out = capsys.readouterr().out
    assert "3 runs, 0 of them finished before" in out
    assert "loss/forward_kl: 0.0 min, prose x1.5000, code x2.0000, KL 0.5000, passkey 0.50" in out
    assert out.count(" min, ") == 3

    series.steps.clear()
    (series.out / "distill_loss-js" / "eval.json").unlink()  # trained, not evaluated
    assert series.run(*asked) == 0
    assert series.steps == [("distill_loss-js", "evaluate")]
    assert (series.out / "distill_loss-js.log").read_text().count("$ ") == 3
    assert series.run(*asked) == 0 and len(series.steps) == 1


def test_numbers_of_the_tables(series, capsys):
    assert series.run("transfer", "--rows", "base", "conv=off", "beta=off") == 0
    assert series.run("transfer", "--rows", "base", "--seeds", "1", "--jobs=3") == 0
    for name, minutes in (("base", 1.25), ("base-s1", 2.25), ("transfer_conv-false", 3.0)):
        times = {"train": minutes, "evaluate": 0.25, "jobs": 1 + 2 * name.endswith("s1")}
        (series.out / name / "timing.json").write_text(json.dumps(times))
    (series.out / "transfer_beta-false" / "eval.json").unlink()
    capsys.readouterr()
    quality.main(["--read", str(series.out)])
    assert "1.5500 \u00b1 0.0500" in capsys.readouterr().out
    rows = json.loads((series.out / "quality.json").read_text())
    assert [(r["table"], r["name"], r["seed"], r["run"]) for r in rows] == [
        ("transfer", "base", 0, "base"), ("transfer", "base", 1, "base-s1"),
        ("transfer", "conv=off", 0, "transfer_conv-false"),
    ]  # fmt: skip
    assert rows[2] == {
        "table": "transfer", "name": "conv=off", "flags": {"transfer_conv": "False"},
        "run": "transfer_conv-false", "seed": 0, "tokens": {"align": 300, "distill": 600},
        "tok_s": {"align": 30.0, "distill": 700.0}, "minutes": {"train": 3.0, "evaluate": 0.25},
        "jobs": 1, "device": "chip", "commit": "c0ffee", "command": "train_kd.py",
        "domains": {
            "prose": {"ratio": 1.25, "kl": 0.25, "top1": 0.75},
            "code": {"ratio": 2.0, "kl": 0.75, "top1": 0.25},
        },
        "recall": {
            "passkey": {"student": 0.5, "teacher": 1.0},
            "copy": {"student": 0.125, "teacher": 0.875},
        },
    }  # fmt: skip
    lines = (series.out / "quality.md").read_text().splitlines()
    assert lines[2:] == [
        "## transfer", "",
        "| row | x teacher, prose | x teacher, code | mean KL | top-1 | passkey (teacher 1.000) "
        "| copy (teacher 0.875) | tok/s | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| base | 1.5500 \u00b1 0.0500 | 2.0000 \u00b1 0.0000 | 0.5000 \u00b1 0.0000 "
        "| 0.5000 \u00b1 0.0000 | 0.500 \u00b1 0.000 | 0.125 \u00b1 0.000 | 1,200 \u00b1 500 "
        "| 2.0 \u00b1 0.5 |",
        "| conv=off | 1.2500 | 2.0000 | 0.5000 | 0.5000 | 0.500 | 0.125 | 700 | 3.2 |",
        "", "chip, commit c0ffee, up to 3 rows side by side. tok/s: median of the last stage.",
        "", "Not run: beta=off.",
    ]  # fmt: skip


def test_a_failing_row_is_one_line_and_the_others_go_on(series, capsys):
    series.code["transfer_conv-false", "train"] = "import sys; print('why'); sys.exit(3)"
    series.code["transfer_beta-false", "evaluate"] = "import time; time.sleep(60)"
    rows = ("base", "conv=off", "beta=off", "gate=off")
    assert series.run("transfer", "--rows", *rows, "--jobs=2", "--timeout=4") == 1
    err = sorted(capsys.readouterr().err.splitlines())
    assert err == [
        f"failed: transfer/beta=off: time-out of 4 s, see {series.out}/transfer_beta-false.log",
        f"failed: transfer/conv=off: exit code 3, see {series.out}/transfer_conv-false.log",
    ]
    assert ("transfer_conv-false", "evaluate") not in series.steps
    times = json.loads((series.out / "transfer_beta-false" / "timing.json").read_text())
    assert times["trained"] and 4 <= 60 * (times["train"] + times["evaluate"]) < 20
    assert "why" in (series.out / "transfer_conv-false.log").read_text()
    names = [row["name"] for row in json.loads((series.out / "quality.json").read_text())]
    assert names == ["base", "gate=off"]


def test_no_row_begins_after_the_last_minute(series, capsys):
    series.code["base", "train"] = FAKE + "import time; time.sleep(1)"
    assert series.run("transfer", "--rows", "base", "conv=off", "--minutes=0.01") == 0
    assert "0.01 minutes are over, not started: transfer/conv=off" in capsys.readouterr().out
    assert [s for s, _ in series.steps] == ["base", "base"]


def test_rows_are_divided_over_gpus(series, monkeypatch):
    """Two of three at once on the first, since the second has one; nothing set without any."""
    code = (
        FAKE
        + """
import os, time
with open(os.path.join(sys.argv[1], "..", "gpus"), "a") as f:
    f.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + "\\n")
time.sleep(2)
"""
    )
    rows = ("base", "conv=off", "beta=off")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for step in ("base", "transfer_conv-false", "transfer_beta-false"):
        series.code[step, "train"] = code
    assert series.run("transfer", "--rows", *rows, "--jobs=3") == 0
    assert sorted((series.out / "gpus").read_text().split()) == ["4", "4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(quality.torch.cuda, "device_count", lambda: 2)
    assert quality.devices() == ["0", "1"]


def test_rows_of_ones_own(series, capsys):
    deep = ["--row", "deep=--layers 12-29 --distill_loss js"]
    assert series.run("loss", "--rows", "js", "--row", "plain=", *deep) == 0
    assert {s for s, _ in series.steps} == {
        "base", "distill_loss-js", "distill_loss-js+layers-12-29",
    }  # fmt: skip
    assert series.run("--row", "shallow=--layers=0-3") == 0
    tables = json.loads((series.out / "series.json").read_text())["tables"]
    assert list(tables["own"]) == ["plain", "deep", "shallow"]
    assert "own/shallow" in capsys.readouterr().out


def test_rows_of_other_settings_are_not_mixed(series, capsys):
    assert series.run("transfer", "--rows", "base") == 0
    capsys.readouterr()
    assert series.run("loss", "--train=--distill_lr=1e-4") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --out: ") and "distill_lr 0.0003, not 0.0001" in err
    assert err.count("\n") == 1


def test_bad_input_is_one_line(series, capsys, tmp_path):
    for wrong, text in (
        ([], "no table"), (["chess"], "chess"), (["loss", "--rows", "chess"], "--rows: 'chess'"),
        (["loss", "--train=--chess=1"], "--chess"), (["loss", "--train=x.yaml"], "--train"),
        (["loss", "--jobs=0"], "--jobs"), (["loss", "--seeds", "-1"], "--seed"),
        (["loss", "--domains", "a=nowhere"], "nowhere"),
        (["--row", "deep=--run 'a"], "--row"), (["loss", "--train=--run 'a"], "--train"),
        (["--row", "deep"], "--row"), (["--row", "deep=--chess 1"], "--chess"),
        (["--row", "deep=x.yaml"], "--row"), (["--row", "a=", "--row", "a=--seed 1"], "--row"),
        (["loss", "--recall_tasks=chess"], "chess"), (["--read", str(tmp_path)], "series.json"),
    ):  # fmt: skip
        assert series.run(*wrong) == 2, wrong
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and text in err, err
    assert not series.steps and not series.out.exists()
    with pytest.raises(UserError, match="--base: no file nowhere"):
        quality.base_config(arguments(base="nowhere"))


def test_commands(tmp_path):
    args = arguments(
        out=str(tmp_path), domains="", eval_tokens=512, recall_tasks="copy", recall_lengths=[64],
        recall_samples=2, train="--device=cpu",
    )  # fmt: skip
    job = quality.Job("loss/js", {"distill_loss": "js"}, 1)
    words = quality.command(job, args)[2:]
    assert words == [
        f"--config={BASE}", "--teacher=models/t", "--data=stdlib", "--device=cpu",
        "--distill_loss=js", "--seed=1", f"--save_model_dir={tmp_path}", "--run=distill_loss-js-s1",
    ]  # fmt: skip
    (tmp_path / job.slug).mkdir()
    assert quality.command(job, args)[2:] == [*words, "--resume=auto"]
    job.step = "evaluate"
    words = " ".join(quality.command(job, args)[2:])
    assert words == (
        f"{tmp_path}/distill_loss-js-s1/model --out {tmp_path}/distill_loss-js-s1 --data stdlib "
        "--teacher models/t --eval_tokens 512 --seq_len 2048 --dtype auto --device cpu "
        "--recall_tasks copy --recall_lengths 64 --recall_samples 2"
    )


DRIVER = r"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path[:0] = [{root!r}]
from benchmarks import quality
child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', " \
    "'import time; time.sleep(60)']); print('pid', p.pid, flush=True); time.sleep(60)"
quality.command = lambda job, args: [sys.executable, "-c", child]
quality.main({argv!r})
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_children(tiny_teacher, tiny_data, tmp_path, number):
    argv = ["loss", "--rows", "js", f"--out={tmp_path}", f"--base={BASE}", "--recall_tasks="]
    argv += [f"--teacher={tiny_teacher}", f"--data={tiny_data}"]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER.format(root=str(ROOT), argv=argv)])
    log, text = tmp_path / "distill_loss-js.log", ""
    for _ in range(600):
        text = log.read_text() if log.is_file() else ""
        if "\npid " in text and text.endswith("\n"):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"no child after a minute: {text}")
    driver.send_signal(number)
    assert driver.wait(30) == 128 + number
    child = int(text.split("\npid ")[1])
    for _ in range(50):  # an orphan is reaped by init
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("a child of a row lives on")


@pytest.mark.slow
def test_two_real_rows(tiny_teacher, tiny_data, tmp_path):
    small = "--torch_compile=False --device=cpu --layers=1,2 --eval_tokens=512 "
    small += "--calibrate_tokens=256 --distill_tokens 2048"
    command = [
        sys.executable, "benchmarks/quality.py", "loss", "--rows", "forward_kl", "cross-entropy",
        "--base=tests/kd.yaml", "--jobs=2", f"--train={small}", f"--out={tmp_path}",
        f"--teacher={tiny_teacher}", f"--data={tiny_data}", "--eval_tokens=512",
        f"--domains=a={tiny_data}", "--recall_tasks=copy", "--recall_lengths=512",
        "--recall_samples=1",
    ]  # fmt: skip
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert first.returncode == 0, first.stdout + first.stderr + logs
    rows = json.loads((tmp_path / "quality.json").read_text())
    assert [row["run"] for row in rows] == ["base", "distill_ce_weight-1+distill_kd_weight-0"]
    for row in rows:
        folder = tmp_path / row["run"]
        found = json.loads((folder / "eval.json").read_text())
        assert row["tokens"] == {"align": 1920, "distill": 2048}
        assert row["domains"]["a"]["kl"] == found["domains"]["a"]["kl"] > 0
        assert row["recall"]["copy"]["student"] == found["recall"][0]["student"]
        assert all(value > 0 for value in (*row["minutes"].values(), *row["tok_s"].values()))
        assert row["device"] == "cpu" and row["jobs"] == 2
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["distill"]["ce_weight"] == float("kd_weight-0" in row["run"])
    kl = [row["domains"]["a"]["kl"] for row in rows]
    assert kl[0] < kl[1]  # whoever minimises KL has less of it
    for name in ("eval.json", "timing.json"):  # as if killed before it ended
        (tmp_path / "base" / name).unlink()
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "2 runs, 1 of them finished before" in again.stdout
    assert json.loads((tmp_path / "quality.json").read_text())[0]["domains"] == rows[0]["domains"]
