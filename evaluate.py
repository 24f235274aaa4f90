"""Held-out perplexity of student and teacher side by side, KL, top-1 agreement, samples.

    python evaluate.py runs/demo/model --teacher models/smollm2-135m --eval_tokens 4096

Check: `pytest tests/test_evaluate.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from config import UserError
from data import Batch, TokenDataset, eval_batches
from distributed import World, all_sum
from generate import generate
from hybrid_layers import resolve_kernels, use_kernels
from layers import sdpa_priority
from losses import ce_head, kd_head
from model import Transformer
from tokenizer import load_tokenizer

PROMPTS = (
    "The capital of France is",
    "To open a file for reading in Python, call",
    "def factorial(n):\n",
)


class Evaluator:
    """Scores models on fixed held-out batches, against one teacher (or none).

    The teacher's hidden states are computed once on the CPU, where they are dear, and again each
    time elsewhere. first: number of leading blocks that student and teacher share (0 = none).
    Under several ranks each scores its share of the rows, and all get the result.
    """

    def __init__(
        self,
        batches: list[Batch],
        teacher: Transformer | None,
        *,
        amp=nullcontext,
        first: int = 0,
        world: World | None = None,
    ):
        if not batches:
            raise UserError(
                "--eval_tokens: no held-out row fits, more tokens or shorter rows expected"
            )
        self.world = world or World(0, 1, torch.device("cpu"))
        self.batches = batches[self.world.rank :: self.world.size]
        self.teacher, self.amp, self.first = teacher, amp, first
        self._held: list[tuple[Tensor, Tensor | None]] | None = None

    def _teacher_states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        out = self.teacher(**inputs(batch), keep=self.first or None)
        return out if self.first else (out, None)

    def _pairs(self) -> Iterator[tuple[Batch, tuple[Tensor, Tensor | None]]]:
        device = self.teacher.embed_tokens.weight.device
        if device.type != "cpu":
            for batch in self.batches:
                batch = batch.to(device)
                yield batch, self._teacher_states(batch)
            return
        if self._held is None:
            self._held = [self._teacher_states(batch) for batch in self.batches]
        yield from zip(self.batches, self._held, strict=True)

    @torch.no_grad()
    def __call__(self, model: Transformer) -> dict[str, float]:
        """ppl, ce (nats per token); with a teacher also teacher_ppl, ratio, kl (teacher to
        student, nats per token) and top1 (share of tokens with the same argmax)."""
        device = model.embed_tokens.weight.device
        # float32 sums of a batch are exact enough; their total is not over many batches.
        sums = torch.zeros(5, dtype=torch.float64, device="cpu")
        # Uncompiled: a few forwards are not worth another graph of every block.
        eager = torch.compiler.set_stance("force_eager")
        with self.amp(), sdpa_priority(device), eager:
            if self.teacher is None:
                for batch in self.batches:
                    batch = batch.to(device)
                    out = ce_head(model(**inputs(batch)), model.head_weight, batch.labels)
                    sums[:2] += torch.stack([out.ce, out.count.to(out.ce)]).cpu()
            else:
                for batch, (t_hidden, kept) in self._pairs():
                    s_hidden = t_hidden
                    if model is not self.teacher:
                        start = {} if kept is None else {"hidden": kept, "first": self.first}
                        s_hidden = model(**inputs(batch), **start)
                    out = kd_head(
                        s_hidden, model.head_weight, t_hidden, self.teacher.head_weight,
                        batch.labels, with_metrics=True, ce_weight=1.0,
                    )  # fmt: skip
                    parts = (out.ce, out.count, out.kd, out.teacher_ce, out.agree)
                    sums += torch.stack([p.to(out.ce) for p in parts]).cpu()
        sums = all_sum(sums.to(self.world.device, torch.float32), self.world)
        ce, count, *rest = sums.tolist()
        if not count:
            raise UserError("--eval_tokens: no label in the held-out rows, more tokens expected")
        result = {"ce": ce / count, "ppl": _exp(ce / count)}
        if self.teacher is not None:
            kd, teacher_ce, agree = rest
            result["teacher_ppl"] = _exp(teacher_ce / count)
            result["ratio"] = _exp((ce - teacher_ce) / count)
            result["kl"], result["top1"] = kd / count, agree / count
        return result


def eval_rows(seq_len: int, device: torch.device) -> int:
    """Rows of a held-out batch: on a GPU enough to keep it busy, elsewhere one."""
    return max(1, 16_384 // seq_len) if device.type == "cuda" else 1


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def inputs(batch: Batch) -> dict:
    """A batch as the model's arguments."""
    return {
        "input_ids": batch.input_ids,
        "positions": batch.position_ids if batch.cu_seqlens is not None else None,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "rows": len(batch.sample_ids) if batch.cu_seqlens is not None else 1,
    }


@contextmanager
def zeroed_attention(model: Transformer, layers: list[int]):
    """Within: the attention outputs of `layers` are zero, the floor that any mixer must beat."""
    weights = [model.layers[i].attention.o_proj.weight for i in layers]
    saved = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w in weights:
            w.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for w, old in zip(weights, saved, strict=True):
                w.copy_(old)


def completions(
    model: Transformer, tokenizer, tokens: int, amp=nullcontext, temperature: float = 0.0
) -> list[str]:
    """Completions of PROMPTS: greedy at temperature 0, else drawn with a fixed seed."""
    texts = []
    device = model.embed_tokens.weight.device
    with amp():
        for prompt in PROMPTS:
            new = generate(
                model, tokenizer.encode(prompt), tokens, temperature=temperature,
                eos=tokenizer.eos_token_id, generator=torch.Generator(device).manual_seed(0),
            )  # fmt: skip
            texts.append(tokenizer.decode(new))
    return texts


def main(argv: list[str] | None = None) -> None:
    from corpus import resolve_data
    from hf import load_model, tokenizer_spec

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--teacher", default="", help="folder to compare with; empty = none")
    parser.add_argument("--data", default="stdlib", help="as in train_kd.py; its held-out split")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens per row")
    parser.add_argument("--eval_tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        tokenizer = load_tokenizer(tokenizer_spec(args.model))
        model = load_model(args.model, device=args.device, dtype=torch.float32)
        teacher = None
        if args.teacher:
            teacher = load_model(args.teacher, device=args.device, dtype=torch.float32)
        device = torch.device(args.device)
        for each in (model, teacher):
            if each is not None and device.type == "cuda":
                kernels = resolve_kernels(each.config, "auto", device, "float32")
                print(use_kernels(each, kernels, device), file=sys.stderr)
        data = TokenDataset.open(resolve_data(args.data, tokenizer), "val")
        batches = eval_batches(data, seq_len=args.seq_len, max_tokens=args.eval_tokens)
        scores = Evaluator(batches, teacher)(model)
        for name, value in scores.items():
            print(f"{name:>12} {value:.4f}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
