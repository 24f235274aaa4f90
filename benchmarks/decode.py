r"""Decoding a hybrid against its softmax teacher: tokens/s and memory over the context.

    python benchmarks/decode.py --json decode.json --plot decode.png
    python benchmarks/decode.py --teacher models/smollm2-135m --layers 3:1 --batch 16
    python benchmarks/decode.py --device cpu --shape tiny --contexts 256,1024 --batch 2 --steps 4

Teacher and hybrid hold the same context in every sequence (one prompt is read, then copied), and
take one token more for each, compiled and recorded as a CUDA graph on a GPU. Weights are random
unless --teacher names a folder: speed does not depend on them. Memory: what the caches hold, and
the process's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about
from benchmarks.mixers import label, plot
from config import ModelConfig
from distributed import compile_blocks
from generate import Decoder, for_decoding
from hf import load_model
from hybrid_layers import convert_layers, resolve_kernels, set_kernels
from layer_lists import parse_layers
from layers import sdpa_priority
from metrics import console_table
from model import Transformer
from ops.tuned import use_tuned

SHAPES = {
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, qk_norm=False,
    ),
    "qwen2.5-1.5b": dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, head_dim=128, qk_norm=False,
        attention_bias=True,
    ),
    "tiny": dict(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    ),
}  # fmt: skip


def models(args) -> dict[str, Transformer]:
    """The teacher and its hybrid, in the compute type, on the CPU."""
    if args.teacher:
        teacher = load_model(args.teacher, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        teacher = Transformer(ModelConfig(**SHAPES[args.shape], max_position_embeddings=65536))
        teacher.init_weights()
    layers = parse_layers(args.layers, len(teacher.layers))
    hybrid = convert_layers(teacher, layers, mixer=args.mixer)
    set_kernels(hybrid, resolve_kernels(hybrid.config, "auto", torch.device(args.device)))
    return {"teacher": teacher, f"hybrid {args.layers} {args.mixer}": hybrid}


@torch.inference_mode()
def measure(model: Transformer, context: int, args) -> dict:
    """Tokens/s, milliseconds a step, cache and peak bytes at one context."""
    cuda, device = args.device == "cuda", torch.device(args.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, context + args.steps + 8, graph=cuda, compiled=args.compile)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (context,), generator=generator).tolist()
    with torch.autocast(args.device, torch.bfloat16, enabled=cuda), sdpa_priority(device):
        start = time.perf_counter()
        decoder.prefill([prompt])
        if cuda:
            torch.cuda.synchronize()
        prefill = time.perf_counter() - start
        decoder.cache.repeat(args.batch)
        tokens = torch.zeros(args.batch, dtype=torch.long, device=device)
        decoder.step(tokens)
        times = []
        for _ in range(args.steps):
            start = time.perf_counter()
            decoder.step(tokens)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    held = decoder.cache.num_bytes(up_to=context)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "tok_s": args.batch / seconds, "ms": 1e3 * seconds, "cache_bytes": held,
        "peak_bytes": peak, "prefill_s": prefill,
    }  # fmt: skip


def run(args) -> dict:
    """Both models at every context; a model is on the device only while it is measured."""
    results = {"about": about(args, "decode"), "rows": []}
    for name, model in models(args).items():
        model.to(args.device)
        if args.device == "cuda":
            for_decoding(model)
        if args.compile:
            compile_blocks(model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        for context in args.contexts:
            row = {"model": name, "context": context, "weight_bytes": weights}
            try:
                row |= measure(model, context, args)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            if args.device == "cuda":
                torch.cuda.empty_cache()
            results["rows"].append(row)
            print(row, flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
        model.to("cpu")
    return results


def show(results: dict) -> None:
    """A row for each context; ratios are hybrid over teacher."""
    print(json.dumps(results["about"]))
    by = {(row["model"], row["context"]): row for row in results["rows"]}
    teacher, hybrid = dict.fromkeys(row["model"] for row in results["rows"])
    table = []
    for context in dict.fromkeys(row["context"] for row in results["rows"]):
        a, b = by[teacher, context], by[hybrid, context]
        line = {"context": label(context)}
        for what, key, unit, digits in (
            ("tok/s", "tok_s", 1, 0), ("cache GiB", "cache_bytes", 2**30, 3),
            ("peak GiB", "peak_bytes", 2**30, 2),
        ):  # fmt: skip
            for who, row in (("teacher", a), ("hybrid", b)):
                line[f"{what} {who}"] = f"{row[key] / unit:,.{digits}f}" if key in row else "-"
            if a.get(key) and b.get(key):
                line[f"{what} ratio"] = f"{b[key] / a[key]:.2f}"
        table.append(line)
    console_table(f"{hybrid} against {teacher}", table, width=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="", help="model folder; empty = --shape, random")
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--layers", default="3:1", help="layers that are linear in the hybrid")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--contexts", default="1024,8192,32768,65536", help="tokens")
    parser.add_argument("--batch", type=int, default=8, help="sequences decoded together")
    parser.add_argument("--steps", type=int, default=20, help="timed tokens; the median counts")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--json", default="", help="write the numbers here, row by row")
    parser.add_argument("--read", default="", help="show these numbers instead of measuring")
    parser.add_argument("--plot", default="", help="PNG to draw")
    args = parser.parse_args(argv)
    args.contexts = [int(c) for c in args.contexts.split(",")]
    if args.read:
        results = json.loads(Path(args.read).read_text())
    else:
        if args.device == "cuda":
            print(use_tuned(torch.device("cuda")))
        results = run(args)
    show(results)
    if args.plot:
        panels = {"tok_s": "decoding, tokens/s", "cache_bytes": "caches, bytes"}
        plot(results, args.plot, "model", panels, f"batch {results['about']['batch']}")


if __name__ == "__main__":
    main()
