r"""How training scales over ranks: tokens/s per GPU against one GPU, memory, where the time goes.

    python benchmarks/scaling.py --teacher models/smollm2-135m --data data/mix --ranks 1 2
    python benchmarks/scaling.py --shape qwen2.5-1.5b --works distill --parallel fsdp --ranks 1 2
    python benchmarks/scaling.py --read scaling.json
    python benchmarks/scaling.py --device cpu --shape tiny --ranks 1 2 --rows 2 --length 64

Whole runs of train.py and train_kd.py, started by torchrun on each number of ranks, loader and log
included, with the same rows per rank: `pretrain` (the teacher's shape from scratch), `align` and
`distill` (a 3:1 student). One rank is the peer of each row: efficiency is tokens/s per rank over
its own. Added ms is what a step takes longer than on one rank; Muon's row less AdamW's is what
Muon's exchange of matrices costs beyond the gradients' sum. Without --teacher its weights are
random, and without --data so are the bytes; neither matters to speed, but a vocabulary of bytes
makes the head small. Medians over the steps after `--warmup`; memory is rank 0's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about
from benchmarks.decode import SHAPES
from config import ModelConfig
from hf import read_config, save_model
from metrics import console_table
from model import Transformer
from scripts.profile_table import newest_trace, read_events, summarise
from scripts.profile_table import show as show_profile
from shard_writer import ShardWriter
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def random_inputs(args, folder: Path) -> None:
    """A teacher and a data set in `folder` for those that were not given."""
    if not args.data:
        args.data, rng = str(folder / "data"), np.random.default_rng(0)
        for split, tokens in (("train", args.tokens), ("val", 100_000)):
            with ShardWriter(args.data, split, load_tokenizer("byte")) as writer:
                for length in rng.lognormal(np.log(400), 1.0, tokens // 600).astype(int) + 1:
                    writer.add(rng.integers(0, 256, length))
    if not args.teacher:
        args.teacher = str(folder / "teacher")
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**SHAPES[args.shape], eos_token_id=256))
        model.init_weights()
        save_model(model.to(torch.bfloat16), args.teacher, tokenizer_from=args.tokenizer)


def shape_flags(config: ModelConfig) -> list[str]:
    """train.py's flags for a model of the teacher's shape."""
    return [
        f"--num_blocks={config.num_hidden_layers}", f"--embedding_dim={config.hidden_size}",
        f"--num_heads={config.num_attention_heads}", f"--num_kv_heads={config.num_key_value_heads}",
        f"--head_dim={config.head_dim}", f"--mlp_dim={config.intermediate_size}",
        f"--tie_embeddings={config.tie_word_embeddings}",
    ]  # fmt: skip


def command(work: str, optimizer: str, parallel: str, ranks: int, folder: Path, args) -> list[str]:
    """torchrun's words for one run."""
    micro, muon = args.rows * args.length, optimizer == "muon"
    flags = [
        f"--data={args.data}", f"--max_steps={args.warmup + args.steps}", "--run_name=run",
        f"--save_model_dir={folder}", "--save_model=False", "--sample_tokens=0",
        "--eval_tokens=8192", "--log_every=10", f"--parallel={parallel}", f"--device={args.device}",
        f"--profile={args.profile}",
    ]  # fmt: skip
    if work == "pretrain":
        flags += shape_flags(read_config(args.teacher))
        flags += [f"--batch_size={args.rows}", f"--context_len={args.length}"]
        flags += [f"--accumulation_steps={ranks * args.accumulate}", f"--use_muon={muon}"]
    else:
        settings = {
            "seq_len": args.length, "micro_batch": args.rows, "tokens": 10**9, "use_muon": muon,
            "batch_tokens": micro * args.accumulate * ranks,
        }  # fmt: skip
        flags += [f"--{work}_{name}={value}" for name, value in settings.items()]
        flags += [f"--teacher={args.teacher}", "--layers=3:1", f"--stages={work}"]
        flags += ["--calibrate_tokens=2048", "--distill_train=all"]
    script = "train.py" if work == "pretrain" else "train_kd.py"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launch, script, *flags, *args.flags]


def measure(work: str, optimizer: str, parallel: str, ranks: int, args) -> dict:
    """One run's figures."""
    row = {"work": work, "optimizer": optimizer, "parallel": parallel, "ranks": ranks}
    with tempfile.TemporaryDirectory() as folder:
        words = command(work, optimizer, parallel, ranks, Path(folder), args)
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            error = next((line for line in lines if line.startswith("error: ")), lines[-1])
            return row | {"note": f"exit code {done.returncode}: {error}"}
        run = Path(folder) / "run"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [r for r in rows if "time_per_step" in r and r["step"] > args.warmup]
        if args.profile:
            print(f"profile of {work}, {optimizer}, {parallel}, {ranks} ranks")
            show_profile(summarise(read_events(newest_trace(str(run)))), 12)
    row |= {key: statistics.median(r[key] for r in rows) for key in ("tok/s", "time_per_step")}
    return row | {"loss": rows[-1]["loss"], "mem": rows[-1]["mem"], "mfu": rows[-1]["mfu"]}


def measure_all(args) -> dict:
    results = {"about": about(args, "scaling"), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        random_inputs(args, Path(folder))
        for work in args.works:
            for optimizer in args.optimizers:
                for ranks in args.ranks:
                    for parallel in args.parallel if ranks > 1 else ["auto"]:
                        results["rows"].append(measure(work, optimizer, parallel, ranks, args))
                        print(json.dumps(results["rows"][-1]), flush=True)
                        if args.json:
                            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results


def show(results: dict) -> None:
    """A row for each run, beside the same work on one rank where that was measured."""
    print(json.dumps(results["about"]))
    alone = {(r["work"], r["optimizer"]): r for r in results["rows"] if r["ranks"] == 1}
    table = []
    for row in results["rows"]:
        line = {name: str(row[name]) for name in ("work", "optimizer", "ranks", "parallel")}
        peer = alone.get((row["work"], row["optimizer"]), {})
        if "tok/s" in row:
            ms = row["time_per_step"] * 1e3
            line |= {"tok/s": f"{row['tok/s']:,.0f}", "ms": f"{ms:,.1f}"}
            line["GiB"] = f"{row['mem']:.2f}"
            line["MFU"] = f"{row['mfu']:.1%}" if row["mfu"] else "-"
            if "tok/s" in peer:
                share = row["tok/s"] / row["ranks"] / peer["tok/s"]
                line["efficiency"] = f"{share:.1%}"
                line["added ms"] = f"{ms - peer['time_per_step'] * 1e3:,.1f}"
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
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step and rank")
    parser.add_argument("--warmup", type=int, default=10, help="steps left out")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--flags", nargs="+", default=[], help="more for each run: --kernel=chunk")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="print where steps 3 to 5 went")
    parser.add_argument("--json", default="", help="write the results here")
    parser.add_argument("--read", default="", help="show these results, measure nothing")
    args = parser.parse_args(argv)
    show(json.loads(Path(args.read).read_text()) if args.read else measure_all(args))


if __name__ == "__main__":
    main()
