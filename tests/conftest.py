"""Fixtures that many files use: a tiny teacher, a tiny data set, a way to call the scripts."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the quick brown fox jumps over the lazy dog while {} red hens count {} eggs again. "


def _cores() -> int:
    known = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """`-n auto`: a core each; with a GPU no more than fit on it."""
    return min(_cores(), 4 if torch.cuda.is_available() else 16)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs) -> None:
    """Workers, and what they start, share the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // len(specs))))


def tiny_config(**changes):
    """A 4-layer Llama-shaped config over bytes with grouped heads."""
    from config import ModelConfig

    fields = dict(
        vocab_size=257, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, qk_norm=False,
        eos_token_id=256, tie_word_embeddings=True,
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """A folder of byte-level shards: 60 training and 12 held-out documents."""
    from shard_writer import ShardWriter
    from tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("data") / "tiny"
    tokenizer = load_tokenizer("byte")
    for split, count, offset in (("train", 60, 0), ("val", 12, 1000)):
        with ShardWriter(folder, split, tokenizer) as writer:
            for i in range(count):
                text = "".join(TEXT.format(i * 7 + j + offset, j) for j in range(1 + i % 4))
                writer.add(tokenizer.encode(text))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> str:
    """A folder with a randomly initialised teacher over bytes."""
    from hf import save_model
    from model import Transformer

    torch.manual_seed(11)
    model = Transformer(tiny_config())
    model.init_weights()
    with torch.no_grad():  # larger weights: attention and logits far from uniform
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder, tokenizer_from="byte")
    return str(folder)


@pytest.fixture(autouse=True)
def matmul_precision():
    """The scripts switch TF32 on; the next test must not inherit it."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def refused(capsys):
    """refused(script, *argv) -> the one line on stderr of a call that must exit with 2."""

    def call(script: str, *argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            call_script(script, *argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return call


def call_script(script: str, *argv: str) -> None:
    """Run train.py or train_kd.py in this process."""
    import cli
    import config
    import train
    import train_kd

    if script == "train":
        cli.run_main(config.PretrainConfig, train.main, list(argv))
    else:
        cli.run_main(
            config.DistillConfig, train_kd.main, list(argv), default_preset=train_kd.default_preset
        )


def run_python(*argv: str, ranks: int = 0, check: bool = True, gpus: str = "", **kwargs):
    """A script as a user runs it: `python` or torchrun on `ranks` ranks, which see `gpus` ("0,1")
    alone."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks else []), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **kwargs)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def leave() -> None:
    """The end of a rank that mp.spawn started. Where DTensors were made, gloo's threads outlive the
    process group (torch 2.13), and can end an interpreter on its way out with "terminate called
    without an active exception"; by then all is checked, so nothing is finalised."""
    import torch.distributed as dist

    from distributed import stop

    dist.barrier()
    stop()
    os._exit(0)


@contextlib.contextmanager
def own_session(words: list[str], file_bytes: int = 0, **how):
    """A process in a session of its own, which is killed at the end with its group. It can write
    files of `file_bytes` (0: any)."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
        if file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    process = subprocess.Popen(
        words, cwd=ROOT, text=True, start_new_session=True, preexec_fn=prepare,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def metric_rows(run: str | Path, key: str = "loss") -> dict[int, float]:
    """step -> value of `key` in a run's metrics.jsonl."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(r["step"], r[key]) for r in rows if key in r]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


@pytest.fixture
def untimed_kernels(monkeypatch):
    """Tuned configurations where there are some; else the first of each kernel, untimed."""
    from triton.runtime.autotuner import Autotuner

    from ops.tuned import use_tuned

    use_tuned(torch.device("cuda"))
    prune = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, k: prune(self, k)[:1])
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, **kwargs: [0.0] * 3)
