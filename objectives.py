"""What a micro-batch costs and how gradients meet across ranks, one class per kind of stage.

`HeadObjective`: cross-entropy or distillation through the fused head.
`AlignObjective`: every converted layer against the teacher's.
Check: `pytest tests/test_objectives.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from config import StageConfig
from data import Batch
from distributed import World, data_parallel, sum_gradients
from evaluate import inputs
from fsdp import average_whole_gradients, whole_part
from hybrid_layers import mixer_parameters
from layers import SeqInfo
from lora import lora_parameters
from losses import (
    align_loss,
    ce_head,
    excess_loss,
    heads_loss,
    kd_head,
    map_cross_entropy,
    num_selected,
    select_tokens,
    split_rows,
    spread_over_bytes,
    token_losses,
)
from model import Transformer, is_fsdp
from muon_shards import is_sharded
from optimizer import clip_grad_norm


class HeadLoss(nn.Module):
    """The student with its loss as one module."""

    def __init__(self, student: Transformer, teacher: Transformer | None, stage: StageConfig,
                 first: int, unit_grad: bool):  # fmt: skip
        super().__init__()
        self.student, self.stage, self.first = student, stage, first
        self.unit_grad = unit_grad  # see ops/kd_head.py
        self._teacher = (teacher,)  # in a tuple: not a submodule, never trained or saved

    def forward(self, batch: Batch, normalizer: Tensor):
        stage, teacher = self.stage, self._teacher[0]
        distil, select = teacher is not None and stage.kd_weight > 0, stage.select_tokens < 1
        start, labels, t_hidden, theirs = {}, batch.labels, None, None
        if select and batch.retokenized is not None:
            theirs = self._losses_of_another_tokenizer(batch)
        elif distil or select:
            with torch.no_grad():
                t_hidden = teacher(**inputs(batch), keep=self.first or None)
            if self.first:
                t_hidden, kept = t_hidden
                start = {"hidden": kept, "first": self.first}
        hidden, weight = self.student(**inputs(batch), **start), self.student.head_weight
        if select:
            at = self._selected(batch, hidden, t_hidden, theirs)
            hidden = hidden.flatten(0, -2).index_select(0, at)
            if distil:
                t_hidden = t_hidden.flatten(0, -2).index_select(0, at)
            labels = labels.flatten()[at]
        if not distil:
            return ce_head(hidden, weight, labels, normalizer=normalizer, unit_grad=self.unit_grad)
        return kd_head(
            hidden, weight, t_hidden, teacher.head_weight, labels,
            loss=stage.loss, temperature=stage.temperature, kd_weight=stage.kd_weight,
            ce_weight=stage.ce_weight, top_k=stage.top_k, normalizer=normalizer,
            unit_grad=self.unit_grad,
        )  # fmt: skip

    def _selected(
        self, batch: Batch, hidden: Tensor, t_hidden: Tensor | None, theirs: Tensor | None
    ) -> Tensor:
        """Positions of the tokens that take part (ops/token_select.py). theirs [N]: what the
        teacher loses on each, where its tokenizer is another; else its t_hidden tells."""
        weight, share = self.student.head_weight, self.stage.select_tokens
        if theirs is not None:
            mine = token_losses(hidden, weight, batch.labels)
            excess = excess_loss(mine, theirs, batch.retokenized.known)
        else:
            t_weight = self._teacher[0].head_weight
            vocab = min(len(weight), len(t_weight))
            mine = token_losses(hidden, weight, batch.labels, vocab=vocab)
            excess = mine - token_losses(t_hidden, t_weight, batch.labels, vocab=vocab)
        total = num_selected(batch.row_valid, share)
        return select_tokens(excess, batch.labels, len(batch.row_valid), share, total)

    @torch.no_grad()
    def _losses_of_another_tokenizer(self, batch: Batch) -> Tensor:
        """[N]: what the teacher loses on the bytes of each token; where `known` says so."""
        other, teacher = batch.retokenized, self._teacher[0]
        hidden = teacher(**inputs(other.batch))
        losses = token_losses(hidden, teacher.head_weight, other.batch.labels)
        return spread_over_bytes(
            losses, other.source, other.target, other.share, batch.labels.numel()
        )


class HeadObjective:
    """Cross-entropy (no teacher) or distillation, data-parallel. With `select_tokens` a teacher
    that is not distilled from (kd_weight 0) is the reference that tokens are compared with.

    layers: those whose mixers have a learning rate of their own. first: number of leading blocks
    that student and teacher share; their output is computed once.
    """

    def __init__(self, student: Transformer, teacher: Transformer | None, stage: StageConfig,
                 world: World, layers: list[int], first: int = 0):  # fmt: skip
        self.world, self.stage = world, stage
        mixers = mixer_parameters(student, layers)
        self.mixers = mixers.keys()
        self.first = first
        self.params = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.saved = self.params | mixers | lora_parameters(student)
        self.module = HeadLoss(student, teacher, stage, first, unit_grad=world.size == 1)
        self.sharded, self.ddp = is_fsdp(student), None
        if world.size > 1 and not self.sharded:
            self.ddp = data_parallel(self.params.values())
        self.names = ("ce",)
        if teacher is not None and stage.kd_weight:
            self.names = ("kl", "ce") if stage.ce_weight else ("kl",)

    def tokens(self, batch: Batch) -> int:
        """How many tokens of a batch are in the loss."""
        return num_selected(batch.row_valid, self.stage.select_tokens)

    def backward(
        self, batches: list[Batch], count: Tensor, alone_until: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss over the step's `count` labels, on all ranks. Returns this
        rank's share of the sums: add them over ranks. Up to its call of `alone_until`, which never
        comes under FSDP2, a rank does not wait for others."""
        sums: dict[str, Tensor] = {}
        scale = self.world.size  # DDP and FSDP2 take means over ranks
        for i, batch in enumerate(batches):
            out = self.module(batch, count)
            if not self.sharded and i + 1 == len(batches):
                alone_until()
                if self.ddp is not None:
                    self.ddp()
            (out.loss * scale if scale > 1 else out.loss).backward()
            parts = {"loss": out.loss.detach(), "kl": out.kd / count, "ce": out.ce / count}
            for name in ("loss", *self.names):
                sums[name] = sums.get(name, 0) + parts[name]
        if self.sharded:
            average_whole_gradients(self.params.values(), self.world)
        return sums

    def clip(self, max_norm: float) -> Tensor:
        """Clip all gradients together; returns their norm."""
        return clip_grad_norm(self.params.values(), max_norm)


class AlignObjective:
    """Every converted layer gets the teacher's input to it and must give the teacher's output, or
    heads, or attention map, as the stage's weights say.

    One teacher pass; each layer's backward runs as soon as its target is known, so memory is that
    of one layer. Layers do not influence each other: gradients are clipped per mixer. A direct call
    of the mixers bypasses FSDP2's hooks without an error; `fsdp.whole_part` stands in for them.

    keep: hold the teacher's inputs and outputs of every row in bfloat16, for stages that see the
    same rows several times (`unique_tokens`) where the teacher is what costs.
    """

    first = 0  # as HeadObjective's

    def __init__(
        self,
        student: Transformer,
        teacher: Transformer,
        stage: StageConfig,
        layers: list[int],
        world: World,
        *,
        keep: bool = False,
    ):
        self.student, self.teacher, self.layers, self.world = student, teacher, layers, world
        self.stage, self.heads = stage, stage.heads_weight > 0
        self.saved = mixer_parameters(student, layers)  # what a checkpoint has to hold
        self.params = {n: p for n, p in self.saved.items() if p.requires_grad}
        self.mixers = self.params.keys()
        self.held: dict[int, dict[int, tuple[Tensor, ...]]] | None = {} if keep else None

    @staticmethod
    def tokens(batch: Batch) -> int:
        """How many tokens of a batch have a loss: all but padding."""
        return sum(batch.row_text)

    def backward(
        self, batches: list[Batch], count: Tensor, alone_until: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """As HeadObjective.backward."""
        sharded = is_fsdp(self.student)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            for i, normed, target, seq in no_grad_iter(self._taps(batch)):
                with whole_part(self.student.layers[i].attention) if sharded else nullcontext():
                    loss = self._loss(i, normed, target, seq, count, batch.text)
                    loss.backward()
                name = f"layer_{self.student.first_layer + i}"
                sums[name] = sums.get(name, 0) + loss.detach()
        if not sharded:
            alone_until()
        sum_gradients([p for p in self.params.values() if not is_sharded(p)], self.world)
        sums["loss"] = sum(sums.values()) / len(self.layers)
        return sums

    def _loss(
        self, i: int, normed: Tensor, target, seq: SeqInfo, count: Tensor, text: Tensor | None
    ) -> Tensor:
        """A layer's share of the mean over `count` tokens. target: the output, or (output, heads).
        text: of a Batch."""
        stage, block = self.stage, self.student.layers[i]
        out = block.attention(normed, seq, heads=self.heads)
        out, mixed = out if self.heads else (out, None)
        target, heads = target if self.heads else (target, None)
        parts = []
        if stage.hidden_weight:
            parts.append(stage.hidden_weight * align_loss(out, target, text, normalizer=count))
        if stage.heads_weight:
            parts.append(stage.heads_weight * heads_loss(mixed, heads, text, normalizer=count))
        if stage.maps_weight:
            theirs = self.teacher.layers[i].self_attn
            with torch.no_grad():
                q, k, _ = theirs.rotated(normed, seq)
            q, k, positions = (split_rows(x, seq.rows) for x in (q, k, seq.positions))
            mine = block.attention.log_maps(normed, seq)
            text = None if text is None else text.view(q.shape[:2])
            loss = map_cross_entropy(mine, q, k, positions, window=theirs.window, text=text)
            parts.append(stage.maps_weight / (count * q.shape[2]) * loss)
        return sum(parts)

    def _taps(self, batch: Batch) -> Iterator[tuple[int, Tensor, Tensor | tuple, SeqInfo]]:
        """(layer, input, target, seq): from the teacher, or from what was kept of it."""
        how = {"layers": self.layers, "heads": self.heads}
        if self.held is None:
            yield from self.teacher.attention_taps(**inputs(batch), **how)
            return
        rows = [self.held.get(row) for row in batch.sample_ids]
        dtype = next(self.teacher.parameters()).dtype
        shape = (*batch.input_ids.shape, -1)
        if None not in rows:
            where = inputs(batch)
            for name in {"input_ids", "hidden"} & where.keys():
                del where[name]
            seq = self.student.seq_info(shape[1], dtype=dtype, **where)
            for i in self.layers:
                kept = zip(*(row[i] for row in rows), strict=True)
                x, *y = (torch.cat(part).view(shape).to(dtype) for part in kept)
                yield i, x, tuple(y) if self.heads else y[0], seq
            return
        new: list[dict] = [{} for _ in rows]
        for i, x, y, seq in self.teacher.attention_taps(**inputs(batch), **how):
            # Rounded also the first time, or a resumed run would differ from an uninterrupted one.
            x, *y = (t.bfloat16() for t in (x, *(y if self.heads else (y,))))
            parts = (t.reshape(len(rows), -1, t.shape[-1]) for t in (x, *y))
            for row, *kept in zip(new, *parts, strict=True):
                row[i] = tuple(t.clone() for t in kept)
            y = [t.to(dtype) for t in y]
            yield i, x.to(dtype), tuple(y) if self.heads else y[0], seq
        self.held.update(zip(batch.sample_ids, new, strict=True))

    def clip(self, max_norm: float) -> Tensor:
        """Clip every mixer by itself; returns the largest norm."""
        norms = []
        for i in self.layers:
            mixer = self.student.layers[i].attention
            norms.append(clip_grad_norm(mixer.parameters(), max_norm))
        return torch.stack(norms).max()


class BlockObjective:
    """Consecutive layers of the student against the teacher's, both from the teacher's input to the
    first one: the distance of the residual streams behind the last (`losses.align_loss`)."""

    first = 0

    def __init__(self, student: Transformer, teacher: Transformer, layers: list[int]):
        self.student, self.teacher = student, teacher
        mixers = mixer_parameters(student, layers)
        self.mixers = mixers.keys()
        self.params = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.saved = self.params | mixers | lora_parameters(student)

    tokens = staticmethod(AlignObjective.tokens)

    def backward(
        self, batches: list[Batch], count: Tensor, alone_until: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """As AlignObjective.backward, of one rank."""
        total = torch.zeros_like(count)
        for batch in batches:
            with torch.no_grad():
                target = self.teacher(**inputs(batch))
            loss = align_loss(self.student(**inputs(batch)), target, batch.text, normalizer=count)
            loss.backward()
            total += loss.detach()
        alone_until()
        return {"loss": total}

    def clip(self, max_norm: float) -> Tensor:
        """Clip all gradients together; returns their norm."""
        return clip_grad_norm(self.params.values(), max_norm)


def no_grad_iter(items: Iterator) -> Iterator:
    """Advance a generator without gradients, but run the loop's body with them."""
    while True:
        with torch.no_grad():
            item = next(items, None)
        if item is None:
            return
        yield item
