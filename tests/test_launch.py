"""The Slurm example and the Dockerfile, as far as they can be tried without either."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
import tomllib

import pytest
from conftest import ROOT

import cli
from config import DistillConfig

SBATCH = ROOT / "scripts" / "slurm.sbatch"


def test_the_slurm_example_is_bash_with_known_flags():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    (command,) = [line for line in lines if line.startswith("srun ")]
    words = shlex.split(command.replace('"$@" &', "").replace('"$run"', "name"))
    preset, flags = cli.parse_argv(words[words.index("train_kd.py") + 1 :])
    cfg = cli.load_config(DistillConfig, flags, preset)
    assert (cfg.run, cfg.resume) == ("name", "auto") and cfg.save_every
    (example,) = re.findall(r"sbatch scripts/slurm.sbatch (.*)", text)
    cli.load_config(DistillConfig, cli.parse_argv(shlex.split(example))[1], None)
    launch = words[words.index("torchrun") + 1 : words.index("train_kd.py")]
    from torch.distributed.run import get_args_parser

    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert {w for w in launch if w.startswith("--")} <= known
    # What Slurm reads stands before the first command.
    first = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


# A stand-in for srun: it runs until scancel signals its step, or ends at once with CODE. SIGTERM to
# srun itself ends the step with SIGKILL.
SRUN = """#!/bin/bash
echo "$@" > "$FOLDER/srun"
[ -n "$CODE" ] && exit "$CODE"
trap 'kill $!; exit 137' TERM
trap 'kill $!; sleep 0.3; exit 1' USR1
echo $$ > "$FOLDER/pid" && touch "$FOLDER/ready"
sleep 100 &
wait
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 77" ] && kill -USR1 "$(cat "$FOLDER/pid")"
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo one; echo two;; *) echo "$@" > "$FOLDER/scontrol";; esac
"""


@pytest.mark.parametrize("code", ["", "0", "1"])
def test_only_a_stopped_job_is_requeued(code, tmp_path):
    """With stand-ins for srun, scancel and scontrol."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "FOLDER": str(tmp_path),
        "CODE": code, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2",
    }  # fmt: skip
    process = subprocess.Popen(["bash", str(SBATCH), "--layers", "3:1"], env=env, cwd=tmp_path)
    try:
        if not code:
            deadline = time.monotonic() + 60
            while not (tmp_path / "ready").exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == int(code or 1)
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "srun").read_text()
    assert said.endswith("--resume auto --save_every 200 --layers 3:1\n")
    assert "--rdzv_endpoint one:20077 " in said and "--run_name slurm-77 " in said
    asked = tmp_path / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("" if code else "requeue 77\n")


def test_what_the_dockerfile_names_exists():
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    (command,) = re.findall(r"^RUN pip install (.*)$", text, re.M)
    words = shlex.split(command)
    assert (ROOT / words[words.index("-c") + 1]).is_file()
    (extras,) = re.findall(r"\.\[(.*)\]", command)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= known["optional-dependencies"].keys()
    assert (ROOT / known["readme"]).name in text  # pip reads it
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"data", "models", "runs", ".venv", ".git"} <= set(ignored)
