"""Loss curves of Muon + AdamW and of AdamW alone on the smoke model, each at its best lr.

    python benchmarks/muon_adamw.py --steps 150

Both get the same grid of learning rates: Muon's updates are scaled to the RMS of AdamW's
(`match_rms_adamw`), so the grid means the same to both. Embeddings, norms and gates are always
AdamW's.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import load_config
from config import PretrainConfig
from corpus import resolve_data
from data import PackedLoader, TokenDataset, eval_batches
from evaluate import Evaluator, inputs
from losses import ce_head
from model import Transformer
from optimizer import build_optimizer, clip_grad_norm, lr_factor
from tokenizer import load_tokenizer
from train import model_config


def train_once(cfg, config, data, batches, *, use_muon: bool, lr: float, steps: int) -> dict:
    """One run; returns its training losses, its held-out loss (nats per token) and its time."""
    torch.manual_seed(cfg.seed)
    model = Transformer(config)
    model.init_weights()
    loader = PackedLoader(
        data, seq_len=cfg.context_len, rows_per_step=cfg.batch_size, micro_batch=cfg.batch_size
    )
    optimizer = build_optimizer(model.named_parameters(), lr=lr, use_muon=use_muon)
    losses, start = [], time.perf_counter()
    for step in range(steps):
        factor = lr_factor(
            step, schedule="cosine", total_steps=steps, warmup_steps=steps // 15, min_ratio=0.1
        )
        optimizer.set_lr_factor(factor)
        batch = loader.next_step()[0]
        out = ce_head(model(**inputs(batch)), model.head_weight, batch.labels)
        out.loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    loader.close()
    seconds = time.perf_counter() - start
    held_out = Evaluator(batches, None)(model)["ce"]
    return {"losses": losses, "held_out": held_out, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--grid", default="3e-4,1e-3,3e-3,1e-2,3e-2", help="learning rates of both")
    args = parser.parse_args()
    cfg = load_config(PretrainConfig, {}, "configs/smoke.yaml")
    tokenizer = load_tokenizer(cfg.tokenizer)
    folder = resolve_data("stdlib", tokenizer)
    data = TokenDataset.open(folder, "train")
    batches = eval_batches(
        TokenDataset.open(folder, "val"), seq_len=cfg.context_len, max_tokens=cfg.eval_tokens
    )
    config = model_config(cfg, tokenizer.vocab_size, tokenizer.eos_token_id)
    best = {}
    for use_muon in (False, True):
        name = "muon + adamw" if use_muon else "adamw"
        for lr in (float(x) for x in args.grid.split(",")):
            run = train_once(cfg, config, data, batches, use_muon=use_muon, lr=lr, steps=args.steps)
            print(
                f"{name:>12}  lr {lr:.0e}  held-out {run['held_out']:.4f} nats/token  "
                f"{run['seconds']:.0f} s", flush=True,
            )  # fmt: skip
            if name not in best or run["held_out"] < best[name][1]["held_out"]:
                best[name] = (lr, run)
    print("\nmean training loss over the last tenth up to each step, at the best learning rate")
    width = max(1, args.steps // 10)
    print(f"{'step':>12}" + "".join(f"{n:>16}" for n in best))
    for end in range(width, args.steps + 1, width):
        cells = (sum(r["losses"][end - width : end]) / width for _, r in best.values())
        print(f"{end:>12}" + "".join(f"{c:>16.4f}" for c in cells))
    print(f"{'held-out':>12}" + "".join(f"{r['held_out']:>16.4f}" for _, r in best.values()))
    print(f"{'lr':>12}" + "".join(f"{lr:>16.0e}" for lr, _ in best.values()))
    gap = best["adamw"][1]["held_out"] - best["muon + adamw"][1]["held_out"]
    print(f"Muon's held-out loss is {gap:+.4f} nats/token below AdamW's (x{math.exp(gap):.3f} ppl)")


if __name__ == "__main__":
    main()
