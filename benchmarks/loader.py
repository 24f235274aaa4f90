r"""What the data loader and document masks cost: milliseconds of one pretraining step.

    python benchmarks/loader.py --json loader.json
    python benchmarks/loader.py --read loader.json
    python benchmarks/loader.py --device cpu --shape tiny --seq_len 128 --batch 4 --repeats 3
    python benchmarks/loader.py --alone --tokens 1000000

The same model takes the same number of tokens three ways: `on device`, unpacked batches that are
there already, each taken once; `rows`, from shards through `PackedLoader` with doc_mask=False,
which runs the same compiled code; `documents`, with doc_mask=True. The loader costs rows / on
device - 1, and the masks documents / rows - 1, which falls below 0 where shorter attention saves
more than packing costs. Shards are temporary: documents of random tokens with Zipf-like
frequencies, lengths log-normal with a median of 400. The ways take turns, `--steps` consecutive
steps each, so that prefetching works as in a run and a drift of the clock hits all three; medians
over the turns.

--alone: no model; how fast one process makes steps of `rows`, `documents`, `best fit` (documents
packed whole) and of mixtures of three data sets (here the same one), without prefetching.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about, clock
from benchmarks.decode import SHAPES
from config import ModelConfig, PretrainConfig
from data import Batch, PackedLoader, ShardWriter, TokenDataset
from distributed import compile_blocks, this_process
from metrics import console_table
from mixture import Mixture
from model import Transformer
from objectives import HeadObjective
from optimizer import StepGuard
from stage_plan import plan_stage
from tokenizer import Tokenizer
from trainer import Run, one_step, set_up_torch, stage_optimizer


class OnDevice(Batch):
    """A batch that stays where it is: bringing it to the device is left out."""

    def to(self, device) -> Batch:
        return self


class DeviceLoader:
    """Gives micro-batches that are on the device in turn, one a step. With a single one the model
    would learn it by heart, and numbers near 0 let a GPU clock higher."""

    def __init__(self, batches: list[Batch]):
        self.batches = itertools.cycle([[OnDevice(**vars(batch))] for batch in batches])

    def next_step(self) -> list[Batch]:
        return next(self.batches)


def pretraining(config: ModelConfig, cfg: PretrainConfig, args) -> tuple[Transformer, Callable]:
    """A run's model and its step: one optimizer step from a loader, which returns the loss."""
    world = this_process(args.device)
    dtype = set_up_torch(cfg, world)
    model = Transformer(config)
    model.init_weights()
    model.to(world.device)
    if args.compile:
        compile_blocks(model)
    stage = cfg.stage(cfg.batch_size)
    plan = plan_stage(cfg, "pretrain", stage, world)
    objective = HeadObjective(model, None, stage, world, [])
    optimizer = stage_optimizer(plan, objective, world)
    run, count = Run(cfg, world, Path(), None, dtype, {}), itertools.count()
    guard = StepGuard(0.0, world.device)

    def step(loader) -> Tensor:
        return one_step(run, plan, next(count), objective, optimizer, loader, guard)["loss"]

    return model, step


def write_shards(folder: str, vocab: int, tokens: int) -> None:
    """At least `tokens` tokens of random documents; id 0 ends each."""
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer(  # ShardWriter asks for one; no text is involved
        spec="random", name="random", vocab_size=vocab, eos_token_id=0, bos_token_id=None,
        digest="00" * 8, chat_template=None,
    )  # fmt: skip
    with ShardWriter(folder, "train", tokenizer) as writer:
        written = 0
        while written < tokens:
            length = max(1, int(rng.lognormal(np.log(400), 1.0)))
            writer.add(vocab ** rng.random(length))  # density 1 / id over 1 .. vocab - 1
            written += length + 1


def measure(args) -> dict:
    """Milliseconds of a step, each way in turn."""
    results = {"about": about(args, "loader"), "rows": []}
    config = ModelConfig(**SHAPES[args.shape], max_position_embeddings=args.seq_len)
    cfg = PretrainConfig(
        context_len=args.seq_len, batch_size=args.batch, accumulation_steps=1, max_steps=10**6
    )
    _, step = pretraining(config, cfg, args)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, config.vocab_size, args.tokens)
        data = TokenDataset.open(folder, "train")
        rows, documents = (
            PackedLoader(data, seq_len=args.seq_len, rows_per_step=args.batch,
                         micro_batch=args.batch, doc_mask=mask) for mask in (False, True)
        )  # fmt: skip
        count = args.warmup + args.steps * args.repeats
        there = [rows.next_step()[0].to(args.device) for _ in range(count)]
        loaders = {"on device": DeviceLoader(there), "rows": rows, "documents": documents}
        for loader in loaders.values():
            for _ in range(args.warmup):
                step(loader).item()
        for turn in range(args.repeats):
            for name, loader in loaders.items():

                def steps(loader=loader):
                    for _ in range(args.steps):
                        step(loader)

                ms = 1e3 * clock(steps, args.device, 1) / args.steps
                results["rows"].append({"turn": turn, "batch": name, "ms": ms})
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
        rows.close()
        documents.close()
    return results


def alone(args) -> dict:
    """Milliseconds of making a step, each way in turn."""
    results = {"about": about(args, "loader"), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, SHAPES[args.shape]["vocab_size"], args.tokens)
        data, weights = TokenDataset.open(folder, "train"), [7, 2, 1]
        three = dict.fromkeys("abc", data)
        ways = {
            "rows": (data, False), "documents": (data, True),
            "best fit": (Mixture({"a": data}, [1], "best_fit"), True),
            "mixture": (Mixture(three, weights), True),
            "mixture, best fit": (Mixture(three, weights, "best_fit"), True),
        }  # fmt: skip
        loaders = {
            name: PackedLoader(source, seq_len=args.seq_len, rows_per_step=args.batch,
                               micro_batch=args.batch, doc_mask=mask, prefetch=0)
            for name, (source, mask) in ways.items()
        }  # fmt: skip
        for turn in range(-1, args.repeats):
            for name, loader in loaders.items():
                for _ in range(args.steps):
                    ms = 1e3 * clock(loader.next_step, "cpu", 1)
                    if turn >= 0:
                        results["rows"].append({"turn": turn, "batch": name, "ms": ms})
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results


def show(results: dict) -> None:
    """Medians, and what each way costs over the one before it."""
    settings = results["about"]
    print(json.dumps(settings))
    tokens, table, before = settings["batch"] * settings["seq_len"], [], None
    for name in dict.fromkeys(row["batch"] for row in results["rows"]):
        times = [row["ms"] for row in results["rows"] if row["batch"] == name]
        ms = float(np.median(times))
        cost = f"{100 * (ms / before - 1):+.1f}%" if before else "-"
        low, high = np.quantile(times, (0.25, 0.75))
        table.append({
            "batch": name, "ms": f"{ms:.2f}", "quartiles": f"{low:.2f} - {high:.2f}",
            "tok/s": f"{1e3 * tokens / ms:,.0f}", "over the row above": cost,
        })  # fmt: skip
        before = ms
    console_table(f"one step of {settings['shape']}, {tokens:,} tokens", table)


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=0, help="of the shards; 0 = 20M, CPU 100k")
    parser.add_argument("--warmup", type=int, default=10 if cuda else 1, help="steps not timed")
    parser.add_argument("--steps", type=int, default=20 if cuda else 5, help="of a turn")
    parser.add_argument("--repeats", type=int, default=4, help="turns of each")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--alone", action="store_true", help="time the loader without a model")
    parser.add_argument("--json", default="", help="write the numbers here, turn by turn")
    parser.add_argument("--read", default="", help="show these numbers instead of measuring")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (20_000_000 if args.device == "cuda" else 100_000)
    if args.read:
        results = json.loads(Path(args.read).read_text())
    else:
        results = alone(args) if args.alone else measure(args)
    show(results)


if __name__ == "__main__":
    main()
