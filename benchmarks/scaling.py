r"""How training scales over ranks: tokens/s per GPU against one GPU, memory, where the time goes.

    python benchmarks/scaling.py --teacher models/smollm2-135m --data data/mix --ranks 1 2 --parity
    python benchmarks/scaling.py --shape qwen2.5-1.5b --works align distill --rows 4 --length 4096
    python benchmarks/scaling.py --read one.json two.json
    python benchmarks/scaling.py --device cpu --shape tiny --ranks 1 2 --rows 2 --length 64 --parity

Whole runs of train.py and train_kd.py, started by torchrun on each number of ranks, loader and log
included, with the same rows per rank: `pretrain` (the teacher's shape from scratch), and `align`
and `distill` of a 3:1 student, in one run where both are asked for. One rank is the peer of each
row, on every GPU by itself and on all at once, since no two are equally fast: efficiency is
tokens/s per rank over the mean of theirs. Added ms is what a step takes longer than their mean;
Muon's less AdamW's is what Muon's exchange of matrices costs beyond the gradients' sum. With
--parity one rank also takes the batch of more, micro-batch by micro-batch: `loss off` is the
largest distance of a step's loss from that run's, as a share of the first step's. Without --teacher
its weights are random, and without --data so are the bytes; neither matters to speed, but a
vocabulary of bytes makes the head of `pretrain` small. Medians over the steps after `--warmup`;
memory is rank 0's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about, random_data
from benchmarks.decode import SHAPES
from config import ModelConfig
from hf import read_config, save_model
from metrics import console_table
from model import Transformer
from scripts.profile_table import read_events, summarise
from scripts.profile_table import show as show_profile
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SPEEDS = ("tok/s", "time_per_step", "useful_tflops")


def random_inputs(args, folder: Path) -> None:
    """A teacher and a data set in `folder` for those that were not given."""
    if not args.data:
        args.data = str(folder / "data")
        random_data(args.data, args.tokenizer, args.tokens)
    if not args.teacher:
        args.teacher = str(folder / "teacher")
        torch.manual_seed(0)
        with torch.device(args.device):
            eos = load_tokenizer(args.tokenizer).eos_token_id
            model = Transformer(ModelConfig(**SHAPES[args.shape], eos_token_id=eos))
        model.init_weights()
        with torch.no_grad():  # or it would predict next to nothing
            for p in model.parameters():
                p.mul_(2 if p.dim() == 2 else 1)
        save_model(model.to(torch.bfloat16), args.teacher, tokenizer_from=args.tokenizer)


def shape_flags(config: ModelConfig) -> list[str]:
    """train.py's flags for a model of the teacher's shape."""
    return [
        f"--num_blocks={config.num_hidden_layers}", f"--embedding_dim={config.hidden_size}",
        f"--num_heads={config.num_attention_heads}", f"--num_kv_heads={config.num_key_value_heads}",
        f"--head_dim={config.head_dim}", f"--mlp_dim={config.intermediate_size}",
        f"--tie_embeddings={config.tie_word_embeddings}",
    ]  # fmt: skip


def runs(works: list[str]) -> list[tuple[str, ...]]:
    """What is measured in one run: the stages of a distillation, or pretraining."""
    stages = tuple(work for work in works if work != "pretrain")
    return [group for group in (stages, ("pretrain",) * ("pretrain" in works)) if group]


def command(
    works: tuple[str, ...], optimizer: str, parallel: str, ranks: int, count: int, args,
    folder: Path,
) -> list[str]:  # fmt: skip
    """torchrun's words for one run of `count` micro-batches a step and rank."""
    muon = optimizer == "muon"
    flags = [
        f"--data={args.data}", f"--max_steps={args.warmup + args.steps}", "--run_name=run",
        f"--save_model_dir={folder}", "--save_model=False", "--sample_tokens=0",
        "--eval_tokens=8192", f"--parallel={parallel}", f"--device={args.device}",
        f"--profile={args.profile and ranks > 1}",
    ]  # fmt: skip
    if works == ("pretrain",):
        script = "train.py"
        flags += shape_flags(read_config(args.teacher))
        flags += [f"--batch_size={args.rows}", f"--context_len={args.length}"]
        flags += [f"--accumulation_steps={ranks * count}", f"--use_muon={muon}"]
        flags += [f"--warmup_steps={args.warmup}", "--lr=1e-4", f"--tokenizer={args.tokenizer}"]
    else:
        script = "train_kd.py"
        for work in works:
            rows = args.align_rows or args.rows if work == "align" else args.rows
            settings = {
                "seq_len": args.length, "micro_batch": rows, "tokens": 10**9, "use_muon": muon,
                "batch_tokens": rows * args.length * count * ranks, "unique_tokens": 0,
                "warmup_steps": args.warmup,
            }  # fmt: skip
            flags += [f"--{work}_{name}={value}" for name, value in settings.items()]
        flags += [f"--teacher={args.teacher}", "--layers=3:1", f"--stages={','.join(works)}"]
        flags += ["--calibrate_tokens=2048", "--distill_train=all", "--eval_every=0"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launch, script, *flags, *args.flags]


def measure(
    works: tuple[str, ...], optimizer: str, parallel: str, ranks: int, count: int, args,
    gpus: str = "",
) -> list[dict]:  # fmt: skip
    """The figures of one run, of each of its works. gpus: those it sees; empty = as this process"""
    row = {"optimizer": optimizer, "parallel": parallel, "ranks": ranks, "micro-batches": count}
    row |= {"gpu": gpus} if gpus else {}
    with tempfile.TemporaryDirectory() as folder:
        words = command(works, optimizer, parallel, ranks, count, args, Path(folder))
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        env |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        begun = time.monotonic()
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            error = next((line for line in lines if line.startswith("error: ")), lines[-1])
            return [
                row | {"work": w, "note": f"exit code {done.returncode}: {error}"} for w in works
            ]
        row["seconds"] = round(time.monotonic() - begun)
        run, found = Path(folder) / "run", []
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for work in works:
            steps = [r for r in lines if r["stage"] == work and "loss" in r]
            late = [r for r in steps[args.warmup :] if "time_per_step" in r]
            speed = {k: statistics.median(r[k] for r in late) for k in SPEEDS}
            found.append({**row, "work": work, **speed, "mem": late[-1]["mem"]})
            found[-1]["loss"] = [r["loss"] for r in steps]
        for trace in sorted(run.glob("trace-*.json")):
            print(f"profile of {optimizer}, {parallel}, {ranks} ranks: {trace.name}")
            show_profile(summarise(read_events(trace)), 12)
    return found


def measure_all(args) -> dict:
    results = {"about": about(args, "scaling"), "rows": []}
    whole = args.accumulate * max(args.ranks)  # what one rank takes to have the batch of the most
    names = [str(i) for i in range(torch.cuda.device_count())]
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(names)).split(",")
    names = names[: max(args.ranks)] if args.device == "cuda" else [""]
    alone = [args.accumulate] * len(names) * (1 in args.ranks) + [whole] * args.parity
    free = queue.Queue()
    for name in names:
        free.put(name)

    def on_one(works, optimizer, count) -> list[dict]:
        gpu = free.get()
        try:
            return measure(works, optimizer, "auto", 1, count, args, gpu)
        finally:
            free.put(gpu)

    def add(rows: list[dict]) -> None:
        results["rows"] += rows
        print(*map(json.dumps, rows), sep="\n", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        random_inputs(args, Path(folder))
        for works, optimizer in itertools.product(runs(args.works), args.optimizers):
            with ThreadPoolExecutor(len(names)) as pool:
                one = [pool.submit(on_one, works, optimizer, count) for count in alone]
            for rows in one:
                add(rows.result())
            for ranks, parallel in itertools.product(args.ranks, args.parallel):
                if ranks > 1:
                    add(measure(works, optimizer, parallel, ranks, args.accumulate, args))
    return results


def peers(row: dict, rows: list[dict], count: int) -> list[dict]:
    """Runs of the same work on one rank in `count` micro-batches."""
    wanted = {name: row[name] for name in ("work", "optimizer")}
    wanted |= {"ranks": 1, "micro-batches": count}
    return [r for r in rows if wanted.items() <= r.items() and "loss" in r]


def loss_off(row: dict, rows: list[dict]) -> float | None:
    """How far the losses are from those of one rank that has the same batch, as a share of the
    first; None where one of them is missing."""
    same = peers(row, rows, row["ranks"] * row["micro-batches"])
    if "loss" not in row or not same or row["ranks"] == 1:
        return None
    pairs = zip(row["loss"], same[0]["loss"], strict=True)
    return max(abs(a - b) for a, b in pairs) / same[0]["loss"][0]


def show(results: dict) -> None:
    """A row for each run, beside the same work on one rank where that was measured."""
    print(json.dumps(results["about"]))
    table = []
    for row in results["rows"]:
        names = ("work", "optimizer", "ranks", "parallel", "micro-batches")
        line = {name: str(row[name]) for name in names}
        alone = peers(row, results["rows"], row["micro-batches"])
        off = loss_off(row, results["rows"])
        if "tok/s" in row:
            ms = row["time_per_step"] * 1e3
            line |= {"tok/s": f"{row['tok/s']:,.0f}", "ms": f"{ms:,.1f}"}
            line["GiB"] = f"{row['mem']:.2f}"
            line["TFLOP/s"] = f"{row['useful_tflops']:,.0f}"
            if alone:
                speed, own = (statistics.mean(r[k] for r in alone) for k in SPEEDS[:2])
                line["efficiency"] = f"{row['tok/s'] / row['ranks'] / speed:.1%}"
                line["added ms"] = f"{ms - own * 1e3:,.1f}"
            line["loss off"] = "-" if off is None else f"{off:.1e}"
        table.append(line | {"note": row.get("note", "")})
    console_table("a step of each run; efficiency against one rank", table, width=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", default=["pretrain", "align", "distill"],
                        choices=["pretrain", "align", "distill"])  # fmt: skip
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"],
                        choices=["adamw", "muon"])  # fmt: skip
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--teacher", default="", help="a folder; empty = --shape, random weights")
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--data", default="", help="a folder of shards; empty = random bytes")
    parser.add_argument("--tokenizer", default="byte", help="of the random teacher and --data")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of random bytes")
    parser.add_argument("--rows", type=int, default=16, help="per rank at once")
    parser.add_argument("--align_rows", type=int, default=0, help="of align; 0 = --rows")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step and rank")
    parser.add_argument("--warmup", type=int, default=10, help="steps left out")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--flags", type=shlex.split, default=[],
                        help='more for each run: --flags="--kernel=chunk --seed=1"')  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parity", action="store_true", help="one rank with the batch of more")
    parser.add_argument("--profile", action="store_true", help="steps of runs of several")
    parser.add_argument("--json", default="", help="write the results here")
    parser.add_argument("--read", nargs="+", default=[], help="show these, measure nothing")
    args = parser.parse_args(argv)
    found = [json.loads(Path(path).read_text()) for path in args.read] or [measure_all(args)]
    about_all = found[0]["about"] if len(found) == 1 else [part["about"] for part in found]
    show({"about": about_all, "rows": [row for part in found for row in part["rows"]]})


if __name__ == "__main__":
    main()
