"""Every command in README and docs: its flags parse (fast), and it runs as written (slow)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import cli
from config import DistillConfig, PretrainConfig
from shards import TokenDataset

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
STARTS = ("python ", "torchrun ", "make ", "uv ", "pip ")


def commands(page: str) -> list[str]:
    """The indented lines of a page that are commands."""
    lines = (ROOT / page).read_text().splitlines()
    return [s.strip() for s in lines if s.startswith("    ") and s.strip().startswith(STARTS)]


EVERY = [(page, command) for page in PAGES for command in commands(page)]


def test_there_are_commands():
    assert len(EVERY) >= 15 and any("train_kd.py" in c for _, c in EVERY)


@pytest.mark.parametrize(("page", "command"), EVERY)
def test_flags_parse(page, command):
    words = shlex.split(command)
    if words[0] == "make":
        result = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True)
        assert result.returncode == 0, result.stderr
        return
    scripts = [w for w in words if w.endswith(".py")]
    for script in scripts[:1]:
        assert (ROOT / script).is_file(), script
        if script in ("train.py", "train_kd.py"):
            cls = PretrainConfig if script == "train.py" else DistillConfig
            argv = words[words.index(script) + 1 :]
            if argv != ["--help"]:
                preset, flags = cli.parse_argv(argv)
                cli.load_config(cls, flags, preset)


def test_examples_of_data_hold_something_out(tmp_path):
    """Documents are chosen by their hash: of a few that are edited often it may be none."""
    found = [shlex.split(c) for _, c in EVERY if "prepare_data.py" in c]
    assert len(found) > 1
    for i, words in enumerate(found):
        words[words.index("--tokenizer") + 1] = "byte"
        words[words.index("--out") + 1] = str(tmp_path / str(i))
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)
        assert TokenDataset.open(tmp_path / str(i), "val").num_tokens > 512, words


def test_links_and_files_exist():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
    for name in re.findall(r"`([a-z_]+\.py)`", (ROOT / "README.md").read_text()):
        assert (ROOT / name).is_file(), name


def test_promises_name_tests_that_exist():
    """The last column of the tables of promises: `[file.py::]test_name`."""
    named = 0
    for page, default in (("docs/data.md", "test_prepare_data.py"),
                          ("docs/checkpoints.md", "test_checkpoint.py")):  # fmt: skip
        for file, name in re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", (ROOT / page).read_text()):
            named += 1
            text = (ROOT / "tests" / (file or default)).read_text()
            assert f"def {name}(" in text, f"{page}: {file or default}::{name}"
    assert named > 25


def test_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in text, path.name


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tracked files with the model beside them, to run commands in."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "models").mkdir()
    (folder / "models" / "smollm2-135m").symlink_to(ROOT / "models" / "smollm2-135m")
    (folder / "data").mkdir()
    for path in (ROOT / "data").glob("stdlib-*"):
        (folder / "data" / path.name).symlink_to(path)
    return folder


def as_here(command: str) -> list[str]:
    """The command for this machine: this Python, no GPU, `--dry_run` where it wants eight."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        words[words.index("8")] = "2"
        words += ["--dry_run", "--device", "cpu"]
    elif words[0] == "python":
        words[0] = sys.executable
    if "cuda" in words:
        words[words.index("cuda")] = "cpu"
        words.append("--dry_run")
    return words


def first_seen(page: str) -> list[str]:
    """The page's commands that no page before it has; make's recipes are among these."""
    before = {c for p, c in EVERY if PAGES.index(p) < PAGES.index(page)}
    found = dict.fromkeys(c for p, c in EVERY if p == page and c not in before)
    return [c for c in found if not c.startswith(("make", "uv", "pip"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if first_seen(page)])
def test_every_command_runs(page, checkout):
    if not (ROOT / "models" / "smollm2-135m" / "config.json").is_file():
        pytest.fail("models/smollm2-135m is missing: make test-slow fetches it")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for command in first_seen(page):
        words = as_here(command)
        result = subprocess.run(
            words, cwd=checkout, env=env, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, f"{page}: {command}\n{result.stdout}\n{result.stderr}"
        if command == "python train_kd.py --layers 10,14,20":
            check_demo(result.stdout)


def check_demo(out: str) -> None:
    """The demo's table: every stage better than the one before, the last within 10 %."""
    rows = dict(re.findall(r"│ ([a-z ]+?) +│ [\d.]+ +│ ([\d.]+) ", out))
    names = ("converted attention outputs zeroed", "student after transfer",
             "student after align", "student after distill")  # fmt: skip
    ratios = [float(rows[name]) for name in names]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] <= 1.10, rows
    assert "FFFFFFFFFFLFFFLFFFFFLFFFFFFFFF" in out


@pytest.mark.slow
def test_two_ranks_with_the_default_preset(checkout):
    """torchrun --nproc_per_node 2 train_kd.py --layers 10,14,20 --max_steps 4"""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["train_kd.py", "--layers", "10,14,20", "--max_steps", "4", "--device", "cpu"]
    result = subprocess.run(words, cwd=checkout, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "student after distill" in result.stdout


@pytest.mark.slow
def test_smoke(checkout):
    """make smoke's two commands: below 0.75 x the unigram entropy, then a 3:1 student."""
    for words in (
        ["train.py", "--config", "configs/smoke.yaml", "--run", "smoke"],
        ["train_kd.py", "--config", "configs/smoke-kd.yaml", "--teacher", "runs/smoke/model",
         "--layers", "3:1", "--run", "smoke-kd"],
    ):  # fmt: skip
        command = [sys.executable, *words, "--torch_compile=False", "--device=cpu"]
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        if words[0] == "train.py":
            found = re.search(r"= ([\d.]+) x the unigram entropy", result.stdout)
            assert float(found[1]) <= 0.75
    assert "LLLF" in result.stdout and "completions" in result.stdout
