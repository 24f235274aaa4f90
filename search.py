"""Which layers stay softmax: `train_kd.py --layers auto:0.75`.

From one student whose layers are all linear and aligned, so that nothing is trained for a single
choice. Five scorers:

    swap     each layer by itself is made softmax again; how much nearer the student comes to the
             teacher is its score (arXiv 2512.20569, there after training each such student)
    drop     each layer by itself is linear, in the teacher; how much farther that is from the
             teacher is its score (arXiv 2601.22156, where it is recall's fall over reasoning's)
    window   drop with each layer's own attention cut to its last tokens in the place of a linear
             one: what a layer looks up far away, whatever the mixers and the state of the student
    greedy   swap round by round: the best layer stays softmax, the others are scored again
    gates    out = a softmax(x) + (1 - a) linear(x) in every layer; the gates a are learned together
             while their sum is held to the number of softmax layers wanted. They are relaxed
             Bernoulli variables (Louizos et al. 2018, arXiv 1712.01312) and end near 0 or 1

"Nearer" is the fall of KL on held-out text plus `recall_weight` times that of the cross-entropy of
recall's answers (recall.py), each as a share of the all-linear student's. The choice lands in
layer_scores.json beside the uniform pattern and the scores' noise; scripts/report.py shows it.
Check: `pytest tests/test_search.py`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Search, UserError
from data import Batch, PackedLoader, eval_batches, require_rows
from distributed import World, sum_gradients
from evaluate import Evaluator, eval_rows, inputs
from hybrid_layers import convert_layers
from layer_lists import uniform_layers
from layers import sdpa_priority
from losses import ce_head, kd_head
from mixture import Mixture
from model import Transformer
from recall import Question, questions
from shard_writer import write_file

FILE = "layer_scores.json"
GROUPS = 4  # of held-out rows and questions, to tell a score's noise
GATE_LR, GATE_TEMPERATURE, GATE_PENALTY = 0.1, 2 / 3, 10.0


def uniform_pattern(candidates: list[int], share: float) -> list[int]:
    """The linear ones of `candidates` with the softmax ones spread evenly. UserError for a share
    that leaves nothing to choose."""
    found = [candidates[k] for k in uniform_layers(len(candidates), share)]
    if not 0 < len(found) < len(candidates):
        raise UserError(
            f"--layers: auto:{share:g} found; it makes {len(found)} of {len(candidates)} layers "
            f"linear, 1 to {len(candidates) - 1} expected"
        )
    return found


def answer_batches(asked: list[Question], tokenizer, rows: int) -> list[Batch]:
    """Questions with their answers, `rows` at a time, of which only the answers' tokens are
    labels: what a model gives them in one forward is what it would generate greedily."""
    batches = []
    pad = tokenizer.eos_token_id or 0
    asked = sorted(asked, key=lambda q: len(q.prompt))
    for first in range(0, len(asked), rows):
        some = asked[first : first + rows]
        texts = [(q.prompt, tokenizer.encode(" " + q.answer)) for q in some]
        length = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
        ids = torch.full((len(some), length), pad)
        labels = torch.full((len(some), length), -100)
        for row, (prompt, answer) in enumerate(texts):
            whole = prompt + answer
            ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
            labels[row, len(prompt) - 1 : len(whole) - 1] = torch.tensor(answer)
        positions = torch.arange(length).repeat(len(some), 1)  # expanded, it could not be pinned
        count = int((labels >= 0).sum())
        batches.append(Batch(ids, labels, positions, None, length, count, list(range(len(some)))))
    return batches


@contextmanager
def made_softmax(student: Transformer, teacher: Transformer, layers: list[int]):
    """Within: the student runs the teacher's blocks at `layers`. Before distillation only the
    attention of converted layers tells the two apart."""
    own = {i: student.layers[i] for i in layers}
    for i in layers:
        student.layers[i] = teacher.layers[i]
    try:
        yield
    finally:
        for i, block in own.items():
            student.layers[i] = block


@dataclass
class Measure:
    """One student on every group: KL of text, cross-entropy of answers (nats per token; none
    without questions)."""

    kl: list[float]
    recall: list[float]

    def means(self) -> dict[str, float]:
        found = {"kl": statistics.mean(self.kl)}
        return found | ({"recall_ce": statistics.mean(self.recall)} if self.recall else {})


class Scorer:
    """Measures students that differ in which layers are softmax."""

    def __init__(
        self, student: Transformer, teacher: Transformer, text: list[Batch], asked: list[Batch],
        *, weight: float, amp, world: World,
    ):  # fmt: skip
        self.student, self.teacher, self.weight = student, teacher, weight

        def split(batches: list[Batch]) -> list[Evaluator]:
            groups = [batches[g::GROUPS] for g in range(GROUPS)]
            return [Evaluator(g, teacher, amp=amp, world=world) for g in groups if g]

        self.text, self.asked = split(text), split(asked)

    def measure(self, softmax: list[int]) -> Measure:
        with made_softmax(self.student, self.teacher, softmax):
            kl = [evaluator(self.student)["kl"] for evaluator in self.text]
            return Measure(kl, [evaluator(self.student)["ce"] for evaluator in self.asked])

    def gain(self, base: Measure, new: Measure, start: Measure) -> tuple[float, float]:
        """The score of going from `base` to `new`, in shares of `start`, and its standard error."""

        def falls(a: list[float], b: list[float], unit: list[float]) -> list[float]:
            scale = statistics.mean(unit)
            return [(x - y) / scale for x, y in zip(a, b, strict=True)]

        parts = [falls(base.kl, new.kl, start.kl)]
        if base.recall:
            parts.append([self.weight * x for x in falls(base.recall, new.recall, start.recall)])
        error = math.hypot(*(standard_error(part) for part in parts))
        return sum(statistics.mean(part) for part in parts), error


def standard_error(values: list[float]) -> float:
    """Of their mean; 0 of a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def swap_scores(
    scorer: Scorer, candidates: list[int], keep: int, rounds: int, start: Measure
) -> dict:
    """Each layer's row, and the `keep` layers to stay softmax. start: of the all-linear student.
    rounds 1: every layer by itself; more: the best one of a round stays softmax, and its score
    counts above all that come after it."""
    base = start
    rows: dict[int, dict] = {}
    chosen: list[int] = []
    for turn in range(rounds):
        found = {}
        for i in candidates:
            if i in chosen:
                continue
            found[i] = scorer.measure([*chosen, i])
            score, error = scorer.gain(base, found[i], start)
            if turn == 0:
                rows[i] = {"layer": i, **found[i].means()}
            rows[i] |= {"score": score, "error": error}
        if rounds > 1:
            best = max(found, key=lambda i: rows[i]["score"])
            rows[best]["round"] = turn + 1
            chosen.append(best)
            base = found[best]
    order = sorted(candidates, key=lambda i: (rows[i].get("round", keep + 1), -rows[i]["score"]))
    return {"rows": [rows[i] for i in candidates], "softmax": sorted(order[:keep])}


def drop_scores(
    scorer: Scorer, candidates: list[int], keep: int, start: Measure, teacher: Measure
) -> dict:
    """As swap_scores, with all layers but one softmax."""
    rows = []
    for i in candidates:
        found = scorer.measure([j for j in candidates if j != i])
        score, error = scorer.gain(found, teacher, start)
        rows.append({"layer": i, **found.means(), "score": score, "error": error})
    order = sorted(rows, key=lambda row: -row["score"])
    return {"rows": rows, "softmax": sorted(row["layer"] for row in order[:keep])}


class Blend(nn.Module):
    """A block whose attention is a softmax(x) + (1 - a) linear(x)."""

    def __init__(self, block: nn.Module, softmax: nn.Module, gate: Tensor):
        super().__init__()
        self.block, self.softmax, self.gate = block, softmax, gate

    def forward(self, h: Tensor, seq, cache=None) -> Tensor:
        b = self.block
        normed = b.input_layernorm(h)
        a = self.gate.to(h.dtype)
        h = h + a * self.softmax(normed, seq) + (1 - a) * b.attention(normed, seq)
        return h + b.mlp(b.post_attention_layernorm(h))


def gate_scores(
    student: Transformer, teacher: Transformer, candidates: list[int], keep: int, *,
    text: Iterable[list[Batch]], asked: list[Batch], start: Measure, settings: Search, amp,
    world: World, seed: int,
) -> dict:  # fmt: skip
    """As swap_scores, but a score is the gate's value at the end. text: batches of each step."""
    device, n = world.device, len(candidates)
    theta = nn.Parameter(torch.full((n,), math.log(keep / (n - keep)), device=device))
    optimizer = torch.optim.Adam([theta], lr=GATE_LR)
    draw = torch.Generator().manual_seed(seed)
    student.requires_grad_(False)
    own = {i: student.layers[i] for i in candidates}
    scale = start.means()
    eager = torch.compiler.set_stance("force_eager")
    for step, batches in enumerate(text):
        u = torch.rand(n, generator=draw).clamp(1e-6, 1 - 1e-6).logit().to(device)
        gates = torch.sigmoid((theta + u) / GATE_TEMPERATURE)
        values = gates.detach().requires_grad_()  # each part of the loss is freed at once
        for k, i in enumerate(candidates):
            student.layers[i] = Blend(own[i], teacher.layers[i].self_attn, values[k])
        try:
            with amp(), sdpa_priority(device), eager:
                for batch in batches:
                    part = distance(student, teacher, batch.to(device))
                    (part / (scale["kl"] * len(batches))).backward()
                if asked and settings.recall_weight:
                    batch = asked[(step * world.size + world.rank) % len(asked)].to(device)
                    weight = settings.recall_weight / scale["recall_ce"]
                    (weight * answer_loss(student, batch)).backward()
        finally:
            for i, block in own.items():
                student.layers[i] = block
        gates.backward(values.grad)
        penalty = GATE_PENALTY * (theta.sigmoid().mean() - keep / n).square()
        penalty.backward()  # of the same size on every rank
        sum_gradients([theta], world)
        optimizer.step()
        optimizer.zero_grad()
    values = dict(zip(candidates, theta.detach().sigmoid().tolist(), strict=True))
    order = sorted(candidates, key=lambda i: -values[i])
    rows = [{"layer": i, "score": values[i]} for i in candidates]
    return {"rows": rows, "softmax": sorted(order[:keep])}


def distance(student: Transformer, teacher: Transformer, batch: Batch) -> Tensor:
    """Mean KL from teacher to student, with gradients for the student's hidden states."""
    with torch.no_grad():
        target = teacher(**inputs(batch))
    return kd_head(
        student(**inputs(batch)), student.head_weight, target, teacher.head_weight, batch.labels,
        normalizer=torch.tensor(float(batch.num_valid), device=batch.labels.device),
    ).loss  # fmt: skip


def answer_loss(student: Transformer, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers, with gradients."""
    count = torch.tensor(float(batch.num_valid), device=batch.labels.device)
    return ce_head(
        student(**inputs(batch)), student.head_weight, batch.labels, normalizer=count
    ).loss


def questions_of(settings: Search, tokenizer, seed: int) -> list[Question]:
    """What a search asks, none where recall does not count. UserError where a row is too short."""
    if not settings.recall_samples:
        return []
    try:
        return questions(
            tokenizer, lengths=(settings.seq_len,), depths=(0.1, 0.5), seed=seed,
            samples=-(-settings.recall_samples // 2),
        )  # fmt: skip
    except UserError as e:
        reason = str(e).removeprefix("--recall_lengths: ")
        raise UserError(
            f"--search_seq_len: {settings.seq_len} found, too short to ask for recall ({reason}); "
            f"a longer one, or --search_recall_samples 0, expected"
        ) from None


def check_text(settings: Search, val_data: Mixture, tokenizer, seed: int) -> None:
    """UserError, before anything is trained, where a search would find no text or no questions."""
    require_rows(val_data, settings.seq_len)
    questions_of(settings, tokenizer, seed)


def choose_layers(
    student: Transformer, teacher: Transformer, candidates: list[int], *, share: float,
    settings: Search, train_data: Mixture, val_data: Mixture, tokenizer, amp,
    world: World, seed: int, doc_mask: bool = True,
) -> dict:  # fmt: skip
    """Score `candidates`, all linear in `student`, and choose `share` of them to stay linear.
    Returns what layer_scores.json holds."""
    began = time.perf_counter()
    uniform = uniform_pattern(candidates, share)
    keep = len(candidates) - len(uniform)
    seq_len = settings.seq_len
    rows = eval_rows(seq_len, world.device)
    text = eval_batches(
        val_data, seq_len=seq_len, max_tokens=settings.tokens, micro_batch=rows, doc_mask=doc_mask
    )

    def ask(seed: int, rows: int) -> list[Batch]:
        return answer_batches(questions_of(settings, tokenizer, seed), tokenizer, rows)

    asked = ask(seed, rows)
    scorer = Scorer(
        student, teacher, text, asked, weight=settings.recall_weight, amp=amp, world=world
    )
    start, best = scorer.measure([]), scorer.measure(candidates)
    if settings.scorer == "gates":
        micro = max(1, rows // 4)  # with gradients
        loader = PackedLoader(
            train_data, seq_len=seq_len, rows_per_step=micro * world.size, micro_batch=micro,
            rank=world.rank, world_size=world.size, seed=seed + 1, doc_mask=doc_mask,
        )  # fmt: skip
        found = gate_scores(
            student, teacher, candidates, keep, start=start, settings=settings, amp=amp,
            text=(loader.next_step() for _ in range(settings.gate_steps)),
            asked=ask(seed + 1, micro), world=world, seed=seed,
        )  # fmt: skip
        loader.close()
    elif settings.scorer == "window":
        own = convert_layers(
            teacher, candidates, mixer="sliding_window", linear_window=settings.window,
            share_trunk=True,
        )  # fmt: skip
        scorer.student = own.eval()
        found = drop_scores(scorer, candidates, keep, scorer.measure([]), best)
        scorer.student = student
    elif settings.scorer == "drop":
        found = drop_scores(scorer, candidates, keep, start, best)
    else:
        rounds = keep if settings.scorer == "greedy" else 1
        found = swap_scores(scorer, candidates, keep, rounds, start)
    errors = [row["error"] for row in found["rows"] if "error" in row]
    linear = [i for i in candidates if i not in found["softmax"]]
    patterns = {
        name: scorer.measure([i for i in candidates if i not in those]).means()
        for name, those in (("chosen", linear), ("uniform", uniform))
    } | {"teacher": best.means()}
    return {
        "scorer": settings.scorer, "share": share, "baseline": start.means(),
        "tokens": sum(b.num_valid for b in text), "layers": found["rows"], "linear": linear,
        "uniform": uniform, "patterns": patterns, "seconds": time.perf_counter() - began,
        **({"noise": statistics.mean(errors)} if errors else {}),
    }  # fmt: skip


def write_choice(folder: Path, found: dict) -> None:
    """layer_scores.json of a run."""
    write_file(folder / FILE, f"{json.dumps(found, indent=1)}\n".encode())


def read_choice(folder: Path) -> dict:
    """The same back; a run that goes on needs its "linear" layers."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text())
        return found | {"linear": [int(i) for i in found["linear"]]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: the run's choice of layers expected, none found") from None


def pattern_table(found: dict, layers: int) -> list[dict]:
    """The chosen and the uniform pattern between what all linear and none scores, for the console.
    found: of `choose_layers`."""
    linear = {
        "chosen": found["linear"], "uniform": found["uniform"],
        "all linear": [row["layer"] for row in found["layers"]], "teacher": [],
    }  # fmt: skip
    scores = found["patterns"] | {"all linear": found["baseline"]}
    return [
        {"pattern": name, "layers": "".join("L" if i in those else "F" for i in range(layers))}
        | {key: round(value, 4) for key, value in scores[name].items()}
        for name, those in linear.items()
    ]
