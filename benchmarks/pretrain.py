r"""A pretraining step against nanoGPT's and nanochat's on the same shapes: tokens/s, memory, MFU.

    python benchmarks/pretrain.py --nanogpt ../nanoGPT --nanochat ../nanochat --json pretrain.json
    python benchmarks/pretrain.py --read pretrain.json
    python benchmarks/pretrain.py --device cpu --tiny --repeats 2

Ours is `trainer.one_step` on what train.py builds: fused head, clipping, optimizer. The peers take
their own steps, those of nanoGPT's bench.py and nanochat's base_train.py, which do not clip;
nanochat has full attention, for want of FlashAttention 3. All get the same random tokens, unpacked
and on the device already. Each is timed twice: every loss read a step late without waiting, as our
trainer does it, and every loss waited for, as bench.py and base_train.py do.
Peak memory is that of a whole step, weights and optimizer included. MFU by PaLM's 6 N + 12 L H Q T,
N being the weights of matmuls, and by nanoGPT's, the same with all parameters but position
embeddings. One model at a time, medians.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about, clock, show_profile
from benchmarks.loader import DeviceLoader, pretraining
from config import ModelConfig, PretrainConfig, UserError
from data import Batch
from flops import matmul_params, mfu, model_flops_per_token, peak_flops
from metrics import console_table
from model import Transformer
from train import model_config

# Flags of train.py, the vocabulary, and who is measured beside it.
SETTINGS = {
    "gpt-124m": (dict(num_heads=12, context_len=1024), 50304, "nanogpt"),
    "nanochat-d12": (dict(num_heads=6, context_len=2048, tie_embeddings=False), 32768, "nanochat"),
}
FULL = dict(num_blocks=12, embedding_dim=768, batch_size=32)
TINY = dict(num_blocks=2, embedding_dim=72, batch_size=2, context_len=64)
NEEDED = {"nanogpt": "model.py", "nanochat": "nanochat/gpt.py"}  # a file of each checkout


# Each of these gives (model, step); a step returns its loss. data [2, B, T]: inputs and labels.


def ours(config: ModelConfig, cfg: PretrainConfig, data: Tensor, args) -> tuple:
    """This repository's, as train.py makes it."""
    model, step = pretraining(config, cfg, args)
    (x, y), rows = data, list(range(cfg.batch_size))
    positions = torch.arange(cfg.context_len, device=data.device).expand_as(x)
    valid = [cfg.context_len] * len(rows)  # labels that count, row by row
    batch = Batch(x, y, positions, None, cfg.context_len, y.numel(), rows, valid)
    loader = DeviceLoader([batch])
    return model, lambda: step(loader)


def nanogpt(config: ModelConfig, cfg: PretrainConfig, data: Tensor, args) -> tuple:
    """nanoGPT's model and fused AdamW."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(args.nanogpt) / "model.py")
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(
        block_size=cfg.context_len, vocab_size=config.vocab_size, n_layer=cfg.num_blocks,
        n_head=cfg.num_heads, n_embd=cfg.embedding_dim, dropout=0.0, bias=False,
    )).to(args.device)  # fmt: skip
    optimizer = model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), args.device)
    forward = torch.compile(model) if args.compile else model

    def step() -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            _, loss = forward(*data)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return model, step


def nanochat(config: ModelConfig, cfg: PretrainConfig, data: Tensor, args) -> tuple:
    """nanochat's model and its Muon + AdamW; it does without autocast."""
    sys.path.append(args.nanochat)
    module = importlib.import_module("nanochat.gpt")
    with torch.device("meta"):
        model = module.GPT(module.GPTConfig(
            sequence_len=cfg.context_len, vocab_size=config.vocab_size, n_layer=cfg.num_blocks,
            n_head=cfg.num_heads, n_kv_head=cfg.num_heads, n_embd=cfg.embedding_dim,
            window_pattern="L",
        ))  # fmt: skip
    model.to_empty(device=args.device)
    model.init_weights()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    forward = torch.compile(model, dynamic=False) if args.compile else model

    def step() -> Tensor:
        loss = forward(*data)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss

    return model, step


MODELS = {"muon": ours, "adamw": ours, "nanogpt": nanogpt, "nanochat": nanochat}


def read_late(step: Callable[[], Tensor], device: str) -> Callable[[], float]:
    """A step that returns the loss of the one before, which the host reads while this one runs."""
    taken = []

    def take() -> None:
        loss = step().detach()
        if device != "cuda":
            taken.append((loss, None))
            return
        done = torch.cuda.Event()
        loss = loss.to("cpu", non_blocking=True)  # .item() would wait for what was just launched
        done.record()
        taken.append((loss, done))

    def work() -> float:
        take()
        loss, done = taken.pop(0)
        if done is not None:
            done.synchronize()
        return loss.item()

    take()
    return work


def measure(name: str, config: ModelConfig, cfg: PretrainConfig, args) -> dict:
    """Build one model, warm it up, time its steps."""
    cuda = args.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    generator = torch.Generator().manual_seed(0)
    size = (2, cfg.batch_size, cfg.context_len)
    data = torch.randint(config.vocab_size, size, generator=generator).to(args.device)
    model, step = MODELS[name](config, cfg, data, args)
    first = clock(lambda: step().item(), args.device, 1)
    work = read_late(step, args.device)
    clock(work, args.device, args.warmup)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(work, args.device, args.repeats)
    waiting = clock(lambda: step().item(), args.device, args.repeats)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    if args.profile:
        show_profile(work, name)
    linear = (m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    matmuls = matmul_params(config) if isinstance(model, Transformer) else sum(linear)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    counted = sum(size for name, size in sizes.items() if "wpe" not in name)
    rate, top = cfg.batch_size * cfg.context_len / seconds, peak_flops(args.device, torch.bfloat16)
    row = {
        "params": sum(sizes.values()), "tok_s": rate, "ms": 1e3 * seconds,
        "waiting_ms": 1e3 * waiting, "peak_bytes": peak, "first_step_s": first,
        "loss": step().item(),
    }  # fmt: skip
    # Attention has the same shape in all of them, so our config describes everyone's.
    for formula, n in (("palm", matmuls), ("nanogpt", counted)):
        flops = model_flops_per_token(config, cfg.context_len, num_matmul_params=n)
        row[f"mfu_{formula}"] = mfu(rate, flops, 1, top)
    return row


def run(args) -> dict:
    """Ours with each optimizer, then the peer, in every setting."""
    if not args.compile:  # nanochat's optimizer compiles itself
        torch.compiler.set_stance("force_eager")
    results = {"about": about(args, "pretrain"), "rows": []}
    for setting in args.settings:
        shape, vocab, peer = SETTINGS[setting]
        shape, vocab = (shape | TINY, 512) if args.tiny else (shape | FULL, vocab)
        for name in (*args.optimizer, peer):
            if name == peer and not getattr(args, peer):
                print(f"{peer}: no --{peer} DIR, left out of {setting}", flush=True)
                continue
            cfg = PretrainConfig(**shape, accumulation_steps=1, max_steps=10**6,
                                 use_muon=name == "muon", weight_decay=0.1)  # fmt: skip
            label = name if name == peer else f"ours, {name}"
            row = {"setting": setting, "model": label, "peer": peer}
            try:
                row |= measure(name, model_config(cfg, vocab, None), cfg, args)
            except (ImportError, AttributeError, TypeError) as error:
                if name != peer:
                    raise
                print(f"{peer}: does not run here, left out: {error!r}", flush=True)
                continue
            print(row, flush=True)
            results["rows"].append(row)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
            torch.compiler.reset()
            gc.collect()  # compiled models sit in cycles; their memory is the next one's
    return results


def show(results: dict) -> None:
    """A row for each model; the last columns are tokens/s over the peer's: read late as ours, and
    over the peer as it ships."""
    print(json.dumps(results["about"]))
    times = {row["model"]: row for row in results["rows"]}  # a peer has one setting
    table = []
    for row in results["rows"]:
        line = {"setting": row["setting"], "model": row["model"]}
        line |= {"parameters": f"{row['params']:,}", "tok/s": f"{row['tok_s']:,.0f}"}
        line |= {"ms": f"{row['ms']:.2f}", "ms, waiting": f"{row['waiting_ms']:.2f}"}
        line["peak GiB"] = f"{row['peak_bytes'] / 2**30:.2f}"
        for name in ("palm", "nanogpt"):
            share = row[f"mfu_{name}"]
            line[f"MFU {name}"] = f"{100 * share:.1f}%" if share else "-"
        peer = times.get(row["peer"])
        for name, key in (("of peer", "ms"), ("of peer, waiting", "waiting_ms")):
            line[name] = f"{peer[key] / row['ms']:.3f}" if peer else "-"
        table.append(line)
    console_table("one pretraining step", table, width=150)


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    both = ["muon", "adamw"]
    parser.add_argument("--optimizer", nargs="+", default=both, choices=both, help="of ours")
    for peer, file in NEEDED.items():
        parser.add_argument(f"--{peer}", default="", help=f"checkout of it, which holds {file}")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script")
    parser.add_argument("--warmup", type=int, default=10 if cuda else 1, help="steps not timed")
    parser.add_argument("--repeats", type=int, default=20, help="steps timed")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--profile", action="store_true", help="also show where the time goes")
    parser.add_argument("--json", default="", help="write the numbers here, row by row")
    parser.add_argument("--read", default="", help="show these numbers instead of measuring")
    args = parser.parse_args(argv)
    try:
        for peer, file in NEEDED.items():
            folder = getattr(args, peer)
            if folder and not (Path(folder) / file).is_file():
                raise UserError(f"--{peer}: no {file} in {folder}, a checkout expected")
        show(json.loads(Path(args.read).read_text()) if args.read else run(args))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
