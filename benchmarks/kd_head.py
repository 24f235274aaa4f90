"""The distillation head, forward and backward: time, memory and exactness, beside its peers.

    python benchmarks/kd_head.py --json kd_head.json
    python benchmarks/kd_head.py --parts                   # what of it is matmul
    python benchmarks/kd_head.py --device cpu --tokens 256 --hidden_size 64 --vocab_size 1000

Forward KL from hidden states and weights in bfloat16 on CUDA; dW in float32, which is counted. The
error is that of dh and dW on the first 256 tokens, against float64, as a ratio of RMS. Two rows are
what --select_tokens makes of ours: losses of all tokens first, then the head on those kept. Peers
that are not installed are named and left out: Liger's chunked JSD with beta 0, fla's
FusedKLDivLoss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import about, clock, extra_memory
from metrics import console_table
from ops import kd_head as head
from ops.kd_head import kd_head, naive_kd_head
from ops.token_select import num_selected, select_tokens, token_losses

CHECKED = 256  # tokens
FLOAT32 = "ours, float32 weights"
SHARES = {"0.6 of the tokens": 0.6, "0.3 of the tokens": 0.3}  # chosen by excess loss


def make(args, tokens: int) -> list[torch.Tensor]:
    """h_s, w_s, h_t, w_t, labels; logits of about 2, teacher and student alike but not equal."""
    generator = torch.Generator(args.device).manual_seed(0)
    size, vocab, device = args.hidden_size, args.vocab_size, args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    h_t, w_t = random(tokens, size), random(vocab, size, scale=2 * size**-0.5)
    h_s = (h_t + 0.3 * random(tokens, size)).requires_grad_()
    w_s = (w_t + random(vocab, size, scale=0.3 * size**-0.5)).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    return [h_s, w_s, h_t, w_t, labels]


def ours(h_s, w_s, h_t, w_t, labels, chunk_size=0):
    return kd_head(h_s, w_s, h_t, w_t, labels, chunk_size=chunk_size, unit_grad=True).loss


def ours_float32_weights(h_s, w_s, h_t, w_t, labels, chunk_size=0):
    """As a run has it: float32 weights under autocast."""
    with torch.autocast(h_s.device.type, torch.bfloat16, enabled=h_s.is_cuda):
        return ours(h_s, w_s, h_t, w_t, labels, chunk_size)


def selecting(h_s, w_s, h_t, w_t, labels, share, chunk_size=0):
    """As a stage with select_tokens has it; all tokens are one row."""
    losses = (
        token_losses(h, w, labels, chunk_size=chunk_size) for h, w in ((h_s, w_s), (h_t, w_t))
    )
    total = num_selected([len(labels)], share)
    at = select_tokens(next(losses) - next(losses), labels, 1, share, total)
    return ours(h_s.index_select(0, at), w_s, h_t[at], w_t, labels[at], chunk_size)


def full_logits(h_s, w_s, h_t, w_t, labels):
    log_p = (h_s @ w_s.t()).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (h_t @ w_t.t()).float().log_softmax(-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def liger() -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return lambda h_s, w_s, h_t, w_t, labels: loss(h_s, w_s, h_t, w_t, labels)


def fla() -> Callable:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    loss = FusedKLDivLoss()
    return lambda h_s, w_s, h_t, w_t, labels: loss(h_s, h_t, w_s, w_t)


def variants(args) -> dict[str, Callable]:
    """name -> loss(h_s, w_s, h_t, w_t, labels) of what can run here."""
    found = {"ours": partial(ours, chunk_size=args.chunk_size), "full logits": full_logits}
    for name, share in SHARES.items():
        found[name] = partial(selecting, share=share, chunk_size=args.chunk_size)
    if args.device == "cuda":
        found[FLOAT32] = partial(ours_float32_weights, chunk_size=args.chunk_size)
    for name, load in (("Liger", liger), ("fla", fla)):
        if args.device != "cuda":
            continue
        try:
            found[name] = load()
        except ImportError as error:
            print(f"left out: {name} ({error})")
    chosen = args.variants.split(",") if args.variants else found
    return {name: found[name] for name in chosen if name in found}


def exactness(loss: Callable, args) -> float:
    """The larger of the error ratios of dh and dW on a few tokens."""
    inputs = make(args, min(CHECKED, args.tokens))
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
             for x in inputs]  # fmt: skip
    wanted = torch.autograd.grad(naive_kd_head(*exact).loss, exact[:2])
    grads = torch.autograd.grad(loss(*inputs), inputs[:2])
    pairs = zip(grads, wanted, strict=True)
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in pairs)


def measure(args) -> dict:
    results = {"about": about(args, "kd_head"), "rows": []}
    for name, loss in variants(args).items():
        row = {"variant": name}
        try:
            if name not in SHARES:
                row["error"] = exactness(loss, args)
            inputs = make(args, args.tokens)
            if name == FLOAT32:
                inputs[1] = inputs[1].detach().float().requires_grad_()

            def step(inputs=inputs, loss=loss):
                inputs[0].grad = inputs[1].grad = None
                loss(*inputs).backward()

            step()
            inputs[0].grad = inputs[1].grad = None
            row["bytes"] = extra_memory(step, args.device)
            step()
            row["ms"] = 1e3 * clock(step, args.device, args.repeats)
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        results["rows"].append(row)
        print(row, flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results


def parts(args) -> None:
    """Milliseconds of a step's matmuls and of the Triton kernel, chunk by chunk, on their own."""
    h_s, w_s, h_t, w_t, labels = (x.detach() for x in make(args, args.tokens))
    vocab, dtype = w_s.shape[0], h_s.dtype
    width = -(-vocab // 64) * 64
    chunk = head._auto_chunk(len(h_s), width * dtype.itemsize, "triton")
    z = [torch.empty(chunk, width, dtype=dtype, device=h_s.device)[:, :vocab] for _ in range(2)]
    dh, dw = torch.empty_like(h_s), torch.zeros(w_s.shape, device=h_s.device)
    out, options = torch.zeros(4, chunk, device=h_s.device), head.HeadOptions()
    one = torch.ones((), device=h_s.device)
    count = -(-len(h_s) // chunk)
    work = {
        "logits": lambda: [torch.mm(h[:chunk], w.t(), out=o)
                           for h, w, o in ((h_s, w_s, z[0]), (h_t, w_t, z[1]))],
        "kernel": lambda: head.launch_chunk(z, labels[:chunk], one, out, options, True),
        "dh": lambda: torch.mm(z[0], w_s, out=dh[:chunk]),
        "dW": lambda: head._addmm_(dw, z[0].t(), h_s[:chunk]),
    }  # fmt: skip
    table = []
    for name, run in work.items():
        run()
        ms = 1e3 * clock(run, args.device, args.repeats) * count
        table.append({"part": name, "ms a step": f"{ms:.2f}"})
    console_table(f"{count} chunks of {chunk} tokens", table)
    a, b = (torch.randn(8192, 8192, dtype=dtype, device=h_s.device) for _ in range(2))
    rate = 2 * 8192**3 / clock(lambda: torch.mm(a, b), args.device, args.repeats)
    print(f"a matmul of 8192 x 8192 x 8192: {rate / 1e12:.0f} TFLOP/s")


def show(results: dict) -> None:
    print(json.dumps(results["about"]))
    table = []
    for row in results["rows"]:
        if "ms" in row:
            line = {"ms": f"{row['ms']:.2f}", "GiB": f"{row['bytes'] / 2**30:.2f}"}
            line["error"] = f"{row['error']:.2e}" if "error" in row else "-"
            table.append({"variant": row["variant"], **line})
        else:
            table.append({"variant": row["variant"], "ms": row["note"], "GiB": "", "error": ""})
    console_table("distillation head, forward and backward", table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden_size", type=int, default=1536)
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--variants", default="", help="ours, full logits, Liger, fla; empty = all")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--triton", action=flag, default=True, help="ours: the Triton kernel")
    parser.add_argument("--block", type=int, default=0, help="of our kernel; 0 = as it is")
    parser.add_argument("--warps", type=int, default=0)
    parser.add_argument("--chunk_size", type=int, default=0, help="tokens, of ours; 0 = by memory")
    parser.add_argument("--parts", action="store_true", help="time the parts of ours instead")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="", help="write the numbers here, row by row")
    parser.add_argument("--read", default="", help="show these numbers instead of measuring")
    args = parser.parse_args(argv)
    head.TRITON = args.triton
    head.BLOCK, head.WARPS = args.block or head.BLOCK, args.warps or head.WARPS
    if args.parts:
        parts(args)
        return
    show(json.loads(Path(args.read).read_text()) if args.read else measure(args))


if __name__ == "__main__":
    main()
