r"""A model beside its teacher: perplexity and bits per byte by domain, KL, top-1 agreement, answers
it has to generate (recall.py), and the fixed prompts completed by both (prompts.py).

    python evaluate.py runs/demo/model --teacher models/smollm2-135m --eval_tokens 4096
    python evaluate.py runs/demo/model --teacher models/smollm2-135m --out runs/demo \
        --data prose=data/prose,code=data/code --recall_tasks passkey,key_value,mqar,copy

--out FOLDER gets eval.json, which scripts/report.py shows, and eval.md to read.
Check: `pytest tests/test_evaluate.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import UserError
from data import IGNORE, Batch, TokenDataset, eval_batches
from distributed import World, all_sum, choose_device
from fsdp import reshard
from generate import Decoder, for_decoding, generate, generate_batch, require_finite
from hf_files import require_rows
from hybrid_layers import resolve_kernels, use_kernels
from layers import sdpa_priority
from losses import ce_head, kd_head
from metrics import check_writable, console_table, git_commit
from mixers.hedgehog_window import BRANCHES, HedgehogWindow
from model import Transformer
from prompts import IN_RUN, PROMPTS
from recall import TASKS, Question, answer_all, questions, rates
from tokenizer import load_tokenizer

# A decoded token's logits, in float32, may differ from a forward's by so much of their RMS; kernels
# on CUDA multiply in TF32. In bfloat16 the two differ by 0.2 to 7 %, one wrong layer makes 0.5 %.
DECODING_TOLERANCE = {"cuda": 1e-2}


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
        over = -len(batches) % self.world.size  # every rank runs as many forwards (FSDP2)
        blank = replace(batches[-1], labels=torch.full_like(batches[-1].labels, IGNORE))
        self.batches = [*batches, *[blank] * over][self.world.rank :: self.world.size]
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
        for one in (model, self.teacher):
            reshard(one)
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
    start = {"input_ids": batch.input_ids} if batch.hidden is None else {"hidden": batch.hidden}
    return {
        **start,
        "positions": batch.position_ids if batch.cu_seqlens is not None else None,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "rows": len(batch.sample_ids) if batch.cu_seqlens is not None else 1,
    }


@contextmanager
def zeroed_attention(model: Transformer, layers: list[int]):
    """Within: the attention outputs of `layers` are zero, the floor that any mixer must beat."""
    weights = [p for i in layers for p in model.layers[i].attention.o_proj.parameters()]
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
    model: Transformer, tokenizer, tokens: int, amp=nullcontext, temperature: float = 0.0,
    prompts: Sequence[str] = PROMPTS[:IN_RUN],
) -> list[str]:  # fmt: skip
    """Completions of prompts: greedy at temperature 0, else drawn with a fixed seed."""
    texts = []
    device = model.embed_tokens.weight.device
    with amp():
        for prompt in prompts:
            ids = tokenizer.prompt(prompt)
            new = generate(
                model, ids, tokens, temperature=temperature,
                stops=tokenizer.stops, generator=torch.Generator(device).manual_seed(0),
            )  # fmt: skip
            texts.append(tokenizer.continuation(ids, new))
    reshard(model)
    return texts


@torch.no_grad()
def check_decoding(
    model: Transformer, prompt: list[int], tokens: int = 8, name: str = "model"
) -> None:
    """Decode with the cache and compare with one forward over everything; RuntimeError if they
    differ: whatever is generated then tells of the cache and not of the model. UserError with the
    model's `name` if the forward's logits are not finite. The model has to be in float32, and
    outside autocast."""
    decoder = Decoder(model)
    found = [decoder.prefill([prompt])]
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(found[-1].argmax()))
        found.append(decoder.step(found[-1].argmax(-1)))
    device = found[0].device
    with torch.compiler.set_stance("force_eager"):
        hidden = model(torch.tensor([ids], device=device))[0, len(prompt) - 1 :]
    expected = decoder.head(hidden)
    require_finite(expected, name)
    most = DECODING_TOLERANCE.get(device.type, 1e-3)
    for i, (a, b) in enumerate(zip(torch.cat(found), expected, strict=True)):
        error = ((a - b).norm() / b.norm()).item()
        if not error <= most:
            raise RuntimeError(
                f"decoding with a cache differs from a forward without one: token {i} after a "
                f"prompt of {len(prompt)}, logits off by {error:.2g} of their RMS, at most "
                f"{most} expected"
            )


def ask(
    model: Transformer, asked: list[Question], tokenizer, amp=nullcontext, batch_tokens: int = 0
) -> list[bool]:
    """Which of the questions the model answers right (`recall.answer_all`)."""
    device = model.embed_tokens.weight.device

    def complete(prompts: list[list[int]], most: int) -> list[list[int]]:
        with amp():
            return generate_batch(
                model, prompts, most, stops=tokenizer.stops, graph=device.type == "cuda"
            )

    batch_tokens = batch_tokens or (65_536 if device.type == "cuda" else 4096)
    return answer_all(asked, tokenizer, complete, batch_tokens=batch_tokens)


def label_bytes(batches: list[Batch], tokenizer) -> int:
    """UTF-8 bytes of text in the labels that count: those of control tokens, an end of text among
    them, are none."""
    table = tokenizer.token_bytes()
    if table is not None:
        sizes = torch.tensor([len(b) for b in table])
        labels = torch.cat([batch.labels[batch.labels >= 0] for batch in batches])
        return int(sizes[labels[labels < len(sizes)]].sum())
    control, total = {tokenizer.eos_token_id, tokenizer.bos_token_id}, 0
    text = lambda pair: pair[1] >= 0 and pair[1] not in control  # noqa: E731
    for batch in batches:
        both = torch.stack([batch.input_ids, batch.labels], -1)
        for row in both.reshape(-1, batch.max_seqlen, 2).tolist():
            for known, some in itertools.groupby(row, text):
                if known:  # after the token before, which keeps the space that begins a run
                    before, labels = zip(*some, strict=True)
                    prompt = [] if before[0] in control else [before[0]]
                    total += len(tokenizer.continuation(prompt, list(labels)).encode())
    return total


def parse_domains(spec: str) -> dict[str, str]:
    """`prose=data/prose,code=data/code` -> name: data set; one without a name is its own."""
    domains = {}
    for part in spec.split(","):
        name, named, data = part.partition("=")
        name, data = (name, data) if named else (Path(part).name, part)
        if not name or not data or name in domains:
            raise UserError(f"--data: '{part}' found, one data set, or NAME=DATA,... expected")
        domains[name] = data
    return domains


def score_domains(model, teacher, tokenizer, args, amp=nullcontext) -> dict[str, dict]:
    """Domain -> tokens, bytes, student and teacher (ppl, bits_per_byte), ratio, kl, top1."""
    from corpus import resolve_data

    found = {}
    for name, spec in parse_domains(args.data).items():
        data = TokenDataset.open(resolve_data(spec, tokenizer), "val")
        data.check_tokenizer(tokenizer)
        batches = eval_batches(
            data, seq_len=args.seq_len, max_tokens=args.eval_tokens,
            micro_batch=eval_rows(args.seq_len, choose_device(args.device)),
        )  # fmt: skip
        scores = Evaluator(batches, teacher, amp=amp)(model)
        tokens, size = sum(b.num_valid for b in batches), label_bytes(batches, tokenizer)
        bits = tokens / (size * math.log(2))  # nats per token -> bits per byte
        row = {"tokens": tokens, "bytes": size}
        row["student"] = {"ppl": scores["ppl"], "bits_per_byte": scores["ce"] * bits}
        if teacher is not None:
            teacher_ce = math.log(scores["teacher_ppl"])
            row["teacher"] = {"ppl": scores["teacher_ppl"], "bits_per_byte": teacher_ce * bits}
            row |= {key: scores[key] for key in ("ratio", "kl", "top1")}
        found[name] = row
    return found


def domain_rows(domains: dict[str, dict]) -> list[dict]:
    """As a table."""
    table = []
    for name, row in domains.items():
        line = {"domain": name, "tokens": row["tokens"]}
        for who in ("student", "teacher"):
            if who in row:
                of = f"{who} " if "teacher" in row else ""
                line |= {f"{of}ppl": round(row[who]["ppl"], 3)}
                line |= {f"{of}bits/byte": round(row[who]["bits_per_byte"], 4)}
        line |= {key: round(row[key], 4) for key in ("ratio", "kl", "top1") if key in row}
        table.append(line)
    return table


def markdown(result: dict) -> str:
    """eval.md."""

    def table(rows: list[dict]) -> str:
        names = list(rows[0])
        lines = [names, ["---"] * len(names), *([row.get(n, "") for n in names] for row in rows)]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

    def quoted(text: str) -> str:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return f"{fence}\n{text}\n{fence}"

    parts = [
        f"# {result['model']}",
        f"Teacher: {result['teacher'] or 'none'}. `{result['command']}`",
    ]
    parts.append(table(domain_rows(result["domains"])))
    if result["recall"]:
        parts += ["## Generated answers, share that is right", table(result["recall"])]
    if result["samples"]:
        parts.append("## Completions")
        for sample in result["samples"]:
            parts.append("**Prompt**\n\n" + quoted(sample["prompt"]))
            for who in ("teacher", "student"):
                if who in sample:
                    parts.append(f"{who}:\n\n" + quoted(sample[who]))
    return "\n\n".join(parts) + "\n"


def load_checked(
    folder: str, device: torch.device, dtype: str, prompt: list[int] | None
) -> Transformer:
    """A model for evaluation in `dtype`, whose decoding was checked on `prompt` (None: not)."""
    from hf import load_model

    model = load_model(folder, device=device, dtype=torch.float32)
    cuda = device.type == "cuda"
    if cuda:
        use_kernels(model, resolve_kernels(model.config, "auto", device, "float32"), device)
    if prompt is not None:
        check_decoding(model, prompt, name=folder)
    if cuda:
        kernels = resolve_kernels(model.config, "auto", device, dtype)
        print(use_kernels(model, kernels, device), file=sys.stderr)
        if dtype == "bfloat16":
            for_decoding(model)
    return model


def set_branch(model: Transformer, branch: str) -> None:
    """Let one part of every hedgehog_window speak alone."""
    found = [m for m in model.modules() if isinstance(m, HedgehogWindow)]
    if branch != "both" and not found:
        raise UserError(f"--branch: {branch} found, a model with hedgehog_window expected")
    for mixer in found:
        mixer.branch = branch


def evaluate(args) -> dict:
    """What eval.json holds."""
    from hf import read_config, tokenizer_spec

    tokenizer = load_tokenizer(tokenizer_spec(args.model))
    theirs = load_tokenizer(tokenizer_spec(args.teacher)) if args.teacher else tokenizer
    if theirs.hash != tokenizer.hash:
        raise UserError(
            f"--teacher: tokenizer {theirs.name} ({theirs.hash}) found, the model's "
            f"{tokenizer.name} ({tokenizer.hash}) expected"
        )
    for folder in filter(None, (args.model, args.teacher)):
        require_rows(folder, read_config(folder).vocab_size, tokenizer)
    asked = []
    if args.recall_tasks:
        asked = questions(
            tokenizer, tasks=args.recall_tasks.split(","), lengths=args.recall_lengths,
            depths=args.recall_depths, samples=args.recall_samples,
        )  # fmt: skip
    device = choose_device(args.device)
    kind = args.dtype
    if kind == "auto":
        kind = "bfloat16" if device.type == "cuda" else "float32"
    amp = partial(torch.autocast, device.type, torch.bfloat16, enabled=kind == "bfloat16")
    prompt = None
    if asked or args.sample_tokens:
        prompt = min((q.prompt for q in asked), key=len, default=tokenizer.prompt(PROMPTS[0]))
    models = {}
    for who, folder in (("student", args.model), ("teacher", args.teacher)):
        if not folder:
            continue
        models[who] = load_checked(folder, device, kind, prompt)
    set_branch(models["student"], args.branch)
    result = {
        "model": args.model, "teacher": args.teacher or None, "device": args.device, "dtype": kind,
        "commit": git_commit(), "command": "python evaluate.py " + shlex.join(args.argv),
        "domains": score_domains(models["student"], models.get("teacher"), tokenizer, args, amp),
        "recall": [], "samples": [],
    }  # fmt: skip
    if asked:
        right = {who: ask(model, asked, tokenizer, amp) for who, model in models.items()}
        result["recall"] = rates(asked, right)
    if args.sample_tokens:
        texts = {
            who: completions(model, tokenizer, args.sample_tokens, amp, prompts=PROMPTS)
            for who, model in models.items()
        }
        result["samples"] = [
            {"prompt": prompt} | {who: found[i] for who, found in texts.items()}
            for i, prompt in enumerate(PROMPTS)
        ]
    return result


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder")
    parser.add_argument("--teacher", default="", help="folder to compare with; empty = none")
    parser.add_argument(
        "--data", default="stdlib",
        help="data set as in train_kd.py, or several by name: NAME=DATA,...; their held-out splits",
    )  # fmt: skip
    parser.add_argument("--seq_len", type=int, default=512, help="tokens per row")
    parser.add_argument("--eval_tokens", type=int, default=16384, help="held-out tokens a domain")
    parser.add_argument(
        "--recall_tasks", default="", help=f"some of {','.join(TASKS)}; empty = none"
    )
    parser.add_argument("--recall_lengths", type=int, nargs="+", default=[512, 1024, 2048])
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    parser.add_argument("--recall_depths", type=float, nargs="+", default=depths)
    parser.add_argument("--recall_samples", type=int, default=8, help="of each length and depth")
    parser.add_argument("--sample_tokens", type=int, default=0, help="of completions; 0 = none")
    parser.add_argument(
        "--branch", default="both", choices=BRANCHES,
        help="of hedgehog_window: its sliding window or its linear attention alone, in the student",
    )  # fmt: skip
    parser.add_argument("--out", default="", help="folder for eval.json and eval.md; empty = none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        for name in ("eval.json", "eval.md") if args.out else ():
            check_writable("out", Path(args.out) / name)
        for flag in ("seq_len", "eval_tokens"):
            if getattr(args, flag) < 1:
                raise UserError(f"--{flag}: {getattr(args, flag)} found, at least 1 expected")
        result = evaluate(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    console_table("held-out documents", domain_rows(result["domains"]))
    if result["recall"]:
        console_table("generated answers, share that is right", result["recall"])
    if args.out:
        folder = Path(args.out)
        (folder / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "eval.md").write_text(markdown(result), encoding="utf-8")
        print(f"-> {folder / 'eval.json'}, {folder / 'eval.md'}")


if __name__ == "__main__":
    main()
