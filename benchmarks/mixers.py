r"""Every linear mixer and softmax attention: training and decoding speed, state, memory.

    python benchmarks/mixers.py --json mixers.json           # on a GPU: the table
    python benchmarks/mixers.py --read mixers.json --plot mixers.png
    python benchmarks/mixers.py --device cpu --contexts 256,1024 --tokens 2048 --hidden_size 64 \
        --heads 2 --head_dim 32 --batch 2 --repeats 2

One attention layer, projections and convolutions included. Training: forward and backward of
`--tokens` tokens in bfloat16, packed documents of the context's length, compiled as in a run.
Decoding: one token for each of `--batch` sequences that hold the context, compiled and recorded as
a CUDA graph. The state is what the layer keeps of one sequence. Peak memory is that of forward and
backward beyond weights and input. All in one process, softmax first; nothing is asserted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about, clock
from config import ModelConfig
from generate import for_decoding
from hybrid_layers import MIXERS, resolve_kernels, set_kernels
from layers import attention_kernel, sdpa_priority
from metrics import console_table
from model import Transformer
from ops.tuned import use_tuned


def layer_of(name: str, args) -> Transformer:
    """A model of one block whose attention is `name` ("softmax" or a mixer)."""
    kinds = {"softmax": "full_attention", "sliding_window": "sliding_attention"}
    kind = kinds.get(name, "linear_attention")
    config = ModelConfig(
        vocab_size=256, hidden_size=args.hidden_size, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads or args.heads,
        head_dim=args.head_dim, layer_types=[kind], qk_norm=False,
        mixer=[name] if kind == "linear_attention" else [],
        sliding_window=args.window if name == "sliding_window" else 0, linear_window=args.window,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    model.init_weights()
    model.to(args.device)
    set_kernels(model, resolve_kernels(config, args.kernel, torch.device(args.device)))
    return model


def amp(args):
    """bfloat16 autocast on CUDA."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def train_speed(model: Transformer, context: int, args) -> dict:
    """Tokens/s and extra peak memory of forward and backward."""
    block = model.layers[0]
    documents = args.tokens // context
    bounds = [min(i, documents) * context for i in range(args.tokens // min(args.contexts) + 1)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model.compiled = args.compile
    seq = model.seq_info(
        args.tokens, cu_seqlens=cu_seqlens, max_seqlen=context, rows=documents, dtype=dtype
    )
    x = torch.randn(1, args.tokens, args.hidden_size, device=args.device, dtype=dtype)
    x.requires_grad_()

    def step():
        with amp(args), sdpa_priority(torch.device(args.device)):
            out = block.attention(x, seq)
        out.backward(out.detach())

    start = time.perf_counter()
    step()
    if args.device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    step()
    model.zero_grad(set_to_none=False)
    before = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(step, args.device, args.repeats)
    peak = torch.cuda.max_memory_allocated() - before if args.device == "cuda" else 0
    return {"train_tok_s": args.tokens / seconds, "peak_bytes": peak, "first_step_s": first}


@torch.inference_mode()
def decode_speed(model: Transformer, context: int, args) -> dict:
    """Tokens/s of decoding onto `context` tokens, and the bytes kept of one sequence."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    block, cuda = for_decoding(copy.deepcopy(model), dtype).layers[0], args.device == "cuda"
    cache = model.new_cache(context + 8, static=True)
    x = torch.randn(1, context, args.hidden_size, device=args.device, dtype=dtype)
    if args.compile:
        block.attention.compile()
    where = torch.device(args.device)
    with amp(args), sdpa_priority(where), torch.compiler.set_stance("force_eager"):
        block.attention(x, model.seq_info(context, cache=cache, dtype=dtype), cache[0])
    cache.advance(1, context, None, args.device)
    held = cache.num_bytes(up_to=context)
    cache.repeat(args.batch)
    token = torch.randn(args.batch, 1, args.hidden_size, device=args.device, dtype=dtype)

    def step():
        with amp(args):
            return block.attention(token, model.seq_info(1, cache=cache, dtype=dtype), cache[0])

    step()
    if cuda:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
    seconds = clock(graph.replay if cuda else step, args.device, args.repeats)
    return {"decode_tok_s": args.batch / seconds, "state_bytes": held}


def softmax_kernel(args) -> str:
    """Of packed documents, as training runs them."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    device = torch.device(args.device)
    return attention_kernel(device, dtype, packed=True, sink=False, compiled=args.compile)


def measure(args) -> dict:
    """Every mixer at every context."""
    names = ["softmax", *MIXERS] if args.mixers == "all" else args.mixers.split(",")
    results = {"about": about(args, "mixers"), "rows": []}
    for name in names:
        model = layer_of(name, args)
        attention = model.layers[0].attention
        kernel = getattr(attention, "kernel", "") or softmax_kernel(args)
        if args.compile:
            attention.compile()
        for context in args.contexts:
            row = {"mixer": name, "kernel": kernel, "context": context}
            for work in (train_speed, decode_speed):
                try:
                    row |= work(model, context, args)
                except torch.OutOfMemoryError:
                    row["note"] = f"{work.__name__}: out of memory"
                torch.cuda.empty_cache() if args.device == "cuda" else None
            results["rows"].append(row)
            print(row, flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
        del model
        torch.compiler.reset()
    return results


def show(results: dict) -> None:
    """The table: one row a mixer, train and decode at each context."""
    contexts = sorted({row["context"] for row in results["rows"]})
    print(json.dumps(results["about"]))
    table = []
    for name in dict.fromkeys(row["mixer"] for row in results["rows"]):
        rows = {row["context"]: row for row in results["rows"] if row["mixer"] == name}
        line = {"mixer": name, "kernel": next(iter(rows.values()))["kernel"]}
        for what, key in (("train", "train_tok_s"), ("decode", "decode_tok_s")):
            for context in contexts:
                value = rows.get(context, {}).get(key)
                line[f"{what} {label(context)}"] = f"{value / 1e3:,.0f}k" if value else "-"
        held = [rows[c].get("state_bytes", 0) for c in contexts if c in rows]
        line["state"] = " - ".join(dict.fromkeys(f"{b / 2**20:.3g}" for b in (held[0], held[-1])))
        line["peak"] = f"{max(r.get('peak_bytes', 0) for r in rows.values()) / 2**30:.2f}"
        table.append(line)
    console_table("tokens/s; state MiB a sequence; peak GiB of training", table, width=170)


def label(context: int) -> str:
    return f"{context // 1024}k" if context >= 1024 else str(context)


def plot(results: dict, path: str, lines: str, panels: dict[str, str], title: str) -> None:
    """One panel for each of `panels` (key -> title) against the context; a line for each value
    of the column `lines`, the first one heavy."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: --plot needs matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.6))
    colors = ["black", *pyplot.get_cmap("tab20").colors]
    names = list(dict.fromkeys(row[lines] for row in rows))
    for axis, (key, what) in zip(axes, panels.items(), strict=True):
        for name, color in zip(names, colors, strict=False):
            points = [(r["context"], r[key]) for r in rows if r[lines] == name and r.get(key)]
            if points:
                width = 2.4 if name == names[0] else 1.3
                style = dict(marker="o", markersize=3.5, label=name, color=color, linewidth=width)
                axis.plot(*zip(*points, strict=True), **style)
        axis.set(xscale="log", yscale="log", title=what, xlabel="context, tokens")
        axis.set_xticks(sorted({r["context"] for r in rows}))
        axis.xaxis.set_major_formatter(lambda value, _: label(int(value)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    about = results["about"]
    figure.suptitle(
        f"{title}; {about['device']}, torch {about['torch']}, {about['commit']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


PANELS = {
    "train_tok_s": "training, tokens/s",
    "decode_tok_s": "decoding, tokens/s",
    "state_bytes": "kept of one sequence, bytes",
}


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", default="all", help="softmax and mixer names, or all")
    parser.add_argument("--contexts", default="1024,8192,32768,65536", help="tokens")
    parser.add_argument("--tokens", type=int, default=65536, help="of one training step")
    parser.add_argument("--batch", type=int, default=8, help="sequences decoded together")
    parser.add_argument("--hidden_size", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv_heads", type=int, default=0, help="of softmax; 0 = heads")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=64, help="of the windowed mixers, tokens")
    parser.add_argument("--kernel", default="auto", choices=("auto", "naive", "chunk", "fla"))
    parser.add_argument("--repeats", type=int, default=10)
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
        results = measure(args)
    show(results)
    if args.plot:
        shape = results["about"]
        heads = f"{shape['heads']} heads of {shape['head_dim']}"
        title = f"one layer, hidden {shape['hidden_size']}, {heads}"
        plot(results, args.plot, "mixer", PANELS, title)


if __name__ == "__main__":
    main()
