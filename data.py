"""Batches of packed rows from token shards: shuffled, split over ranks, resumable.

    python -m pytest tests/test_data.py

Shards are written and read by shards.py; its two classes can be imported from here as well.

Shapes: T = seq_len, R = rows of a micro-batch, N = R * T tokens, M = length of cu_seqlens.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import xxhash

from config import UserError
from ops.bounds import remember
from order import Order, hashed, permuted_index
from packing import Rows
from shard_writer import ShardWriter
from shards import TokenDataset

__all__ = [
    "Batch",
    "PackedLoader",
    "ShardWriter",
    "TokenDataset",
    "eval_batches",
    "pack_rows",
    "permuted_index",
    "require_rows",
]

IGNORE = -100
REPEATED = (8, 128)  # tokens of a repeated span
AHEAD = 4096  # samples whose rows are looked up at once: it costs little more than for 32


@dataclass
class Batch:
    """One micro-batch. [1, N] when documents are kept apart, [R, T] when not."""

    input_ids: torch.Tensor  # int64 [1, N] or [R, T]
    labels: torch.Tensor  # int64, same shape: the next token, -100 where it opens another document
    position_ids: torch.Tensor  # int64, same shape; 0 at each document and row start
    cu_seqlens: torch.Tensor | None  # int32 [M]: 0, starts, then N to fill; None for [R, T]
    max_seqlen: int  # T, whatever the documents: a constant for compiled graphs
    num_valid: int  # labels that are not -100
    sample_ids: list[int]  # the R row numbers
    row_valid: list[int] = field(default_factory=list)  # num_valid, row by row
    row_text: list[int] = field(default_factory=list)  # input tokens that are not padding, likewise
    text: torch.Tensor | None = None  # bool, as input_ids: no padding; None: there is none
    retokenized: Retokenized | None = None  # see retokenize.py
    hidden: torch.Tensor | None = None  # [.., d], where a block's input was saved: see cria.py

    def to(self, device) -> Batch:
        device = torch.device(device)
        moved = on_device(self, device)
        if self.cu_seqlens is not None and device.type == "cuda" != self.cu_seqlens.device.type:
            remember(moved["cu_seqlens"], self.cu_seqlens)
        return replace(self, **moved)


@dataclass
class Retokenized:
    """A Batch's text as another tokenizer's tokens [1, M], and how a loss of each of these is one
    of the Batch's N labels: label target[i] gets share[i] of the loss of label source[i]."""

    batch: Batch
    known: torch.Tensor  # bool [N]: labels whose every byte has a loss
    source: torch.Tensor  # int64 [P], in 0 .. M - 1
    target: torch.Tensor  # int64 [P], in 0 .. N - 1, increasing
    share: torch.Tensor  # float32 [P]

    def to(self, device) -> Retokenized:
        return replace(self, **on_device(self, torch.device(device)))


def on_device(data: Batch | Retokenized, device: torch.device) -> dict:
    """The fields that have a device, moved there."""
    moved = {}
    for one in fields(data):
        value = getattr(data, one.name)
        if isinstance(value, torch.Tensor):
            if device.type == "cuda":
                value = value.pin_memory()  # only a pinned copy overlaps with compute
            moved[one.name] = value.to(device, non_blocking=True)
        elif isinstance(value, Batch | Retokenized):
            moved[one.name] = value.to(device)
    return moved


def padded_bounds(begin: np.ndarray, total: int) -> torch.Tensor:
    """cu_seqlens of documents that begin there. Few distinct lengths, so that a compiled graph is
    reused; the extra entries are empty."""
    bounds = np.full(max(16, 1 << len(begin).bit_length()), total, dtype=np.int32)
    bounds[: len(begin)] = begin
    return torch.from_numpy(bounds)


def repeat_spans(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A row [n] with spans that stand earlier in it in place of about half of its tokens: after an
    eighth of it a span, as many fresh tokens, and so on. Spans have REPEATED tokens, short and long
    ones alike often on a logarithmic scale. Half of them begin anywhere before, half at a distance
    that is as often short as long on that scale."""
    tokens, low, high = tokens.copy(), *np.log(REPEATED)
    at = max(1, len(tokens) // 8)
    while at < len(tokens):
        span = min(int(np.exp(rng.uniform(low, high))), at, len(tokens) - at)
        first = int(rng.integers(at - span + 1))
        if rng.random() < 0.5:
            first = at - max(span, int(np.exp(rng.uniform(np.log(span), np.log(at)))))
        tokens[at : at + span] = tokens[first : first + span]
        at += span + int(np.exp(rng.uniform(low, high)))
    return tokens


def text_mask(lengths: np.ndarray, seq_len: int) -> torch.Tensor:
    """bool [R, T]: the first lengths[r] tokens of row r."""
    return torch.from_numpy(np.arange(seq_len) < lengths[:, None])


def pack_rows(
    dataset, rows, seq_len: int, doc_mask: bool, repeat: float = 0.0, seed: int = 0
) -> Batch:
    """Some rows of a `TokenDataset` or `Mixture` as one Batch; see `pack`."""
    return pack(dataset.rows(seq_len), rows, doc_mask, repeat, seed)


def pack(source: Rows, rows, doc_mask: bool, repeat: float = 0.0, seed: int = 0) -> Batch:
    """Rows as one Batch. A share `repeat` of them, chosen by `seed`, is a single document with
    repeated spans each."""
    count, seq_len = len(rows), source.seq_len
    tokens = np.empty((count, seq_len + 1), dtype=np.int64)
    labels = np.empty((count, seq_len), dtype=np.int64)
    lengths = np.empty(count, dtype=np.int64)  # without padding
    starts = [np.arange(count) * seq_len]  # where a document or row starts, in 0 .. N - 1
    for r, row in enumerate(rows):
        ends, used = source.read(int(row), tokens[r])
        if repeat:
            rng = np.random.default_rng((seed, int(row)))
            if rng.random() < repeat:
                text = seq_len + 1 if used == seq_len else used
                tokens[r, :text] = repeat_spans(tokens[r, :text], rng)
                ends = np.array([used] if used < seq_len else [], dtype=np.int64)
        labels[r] = tokens[r, 1:]
        labels[r, ends - 1] = IGNORE
        labels[r, used:] = IGNORE  # padding, a document of its own
        lengths[r] = used
        starts.append(r * seq_len + ends[ends < seq_len])
    valid = (labels != IGNORE).sum(1)
    if doc_mask:
        total = count * seq_len
        begin = np.sort(np.concatenate(starts))
        positions = np.arange(total) - np.repeat(begin, np.diff(np.append(begin, total)))
        cu_seqlens, shape = padded_bounds(begin, total), (1, total)
    else:
        positions = np.tile(np.arange(seq_len), count)
        cu_seqlens, shape = None, (count, seq_len)
    return Batch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy().reshape(shape)),
        labels=torch.from_numpy(labels.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        cu_seqlens=cu_seqlens,
        max_seqlen=seq_len,
        num_valid=int(valid.sum()),
        sample_ids=[int(row) for row in rows],
        row_valid=valid.tolist(),
        row_text=lengths.tolist(),
        text=None if lengths.min() == seq_len else text_mask(lengths, seq_len).view(shape),
    )


class PackedLoader:
    """The training stream of one rank: `next_step()` gives its micro-batches of the next step.

    Which row sample k of the run is depends on nothing but (data, weights, seed, seq_len); see
    order.py. A step takes the next `rows_per_step` samples, of which rank r gets every world-th.
    `select` limits the run to those row numbers. `repeat` is the share of rows with repeated
    spans (`repeat_spans`), the same ones in every epoch. `prefetch` is how many steps a thread
    keeps ready, 0 for none. `dataset`: a `TokenDataset` or a `mixture.Mixture`.
    """

    def __init__(
        self,
        dataset,
        *,
        seq_len: int,
        rows_per_step: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        doc_mask: bool = True,
        select: np.ndarray | None = None,
        repeat: float = 0.0,
        prefetch: int = 2,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        if min(seq_len, rows_per_step, micro_batch) < 1:
            raise UserError(
                f"sequence length {seq_len}, global batch {rows_per_step} and micro-batch"
                f" {micro_batch} must each be at least 1"
            )
        if rows_per_step % (world_size * micro_batch):
            raise UserError(
                f"global batch of {rows_per_step} rows does not divide by {world_size} ranks x"
                f" micro-batch {micro_batch}; expected a multiple of {world_size * micro_batch}"
            )
        require_rows(dataset, seq_len, rows_per_step)
        self.dataset, self.seq_len, self.doc_mask = dataset, seq_len, doc_mask
        self.rows_per_step, self.micro_batch = rows_per_step, micro_batch
        self.rank, self.world_size, self.seed, self.repeat = rank, world_size, seed, repeat
        self.source = dataset.rows(seq_len)
        self.order = Order(self.source.sizes, dataset.weights, seed)
        self.num_rows = sum(self.source.sizes)
        self.fingerprint = dataset.fingerprint
        if len(dataset.weights) > 1:
            self.fingerprint += f"-mix{':'.join(map(str, dataset.weights))}"
        if dataset.packing != "concatenate":
            self.fingerprint += f"-{dataset.packing}"
        self._select = None
        if select is not None:
            self._select = np.asarray(select, dtype="<i8")
            assert self._select.size and self._select.min() >= 0, "select needs row numbers"
            assert self._select.max() < self.num_rows, "select names rows past the end"
            self.num_rows = len(self._select)
            self.order = Order([self.num_rows], [1], seed)
            self.fingerprint += f"-{xxhash.xxh3_64_hexdigest(self._select.tobytes())}"
        self.fingerprint += f"-repeat{repeat:g}" if repeat else ""
        self._ahead, self._ahead_from = np.empty(0, dtype=np.int64), 0  # rows of coming samples
        self._samples = 0  # handed out, over all ranks
        self._prefetch = prefetch
        self._thread = self._error = None

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches. Raises whatever stopped the prefetch thread."""
        if self._error is not None:
            raise self._error
        if self._prefetch == 0:
            batches = self._build(self._samples)
        else:
            if self._thread is None:
                self._queue = queue.Queue(maxsize=self._prefetch)
                self._stop = threading.Event()
                args = (self._queue, self._stop, self._samples)
                self._thread = threading.Thread(target=self._fill, args=args, daemon=True)
                self._thread.start()
            batches = self._queue.get()
            if isinstance(batches, BaseException):
                self._error = batches
                raise batches
        self._samples += self.rows_per_step
        return batches

    def step_rows(self, first: int) -> np.ndarray:
        """Row numbers [micro-batches, rows] of this rank's step that begins with sample `first`."""
        at = first - self._ahead_from
        if not 0 <= at <= len(self._ahead) - self.rows_per_step:
            samples = np.arange(first, first + max(AHEAD, self.rows_per_step))
            self._ahead, self._ahead_from, at = self.order.rows(samples), first, 0
        rows = self._ahead[at : at + self.rows_per_step]
        if len(self.order.sizes) > 1:  # or two ranks would see a corpus each, given equal weights
            rows = rows[np.argsort(hashed(np.arange(first, first + len(rows))))]
        if self._select is not None:
            rows = self._select[rows]
        return rows[self.rank :: self.world_size].reshape(-1, self.micro_batch)

    def batch_of(self, rows) -> Batch:
        """Some rows, as the loader hands them out."""
        batch = pack(self.source, rows, self.doc_mask, self.repeat, self.seed)
        return self.dataset.attach(batch) if self.dataset.attach else batch

    def _build(self, first: int) -> list[Batch]:
        return [self.batch_of(rows) for rows in self.step_rows(first)]

    def _fill(self, ready: queue.Queue, stop: threading.Event, first: int) -> None:
        item = None
        while not stop.is_set() and not isinstance(item, BaseException):
            try:
                item = self._build(first)
            except BaseException as error:  # carried over to next_step, which raises it
                item = error
            first += self.rows_per_step
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue

    @property
    def epoch(self) -> float:
        """Passes over the data handed out so far."""
        return self._samples / self.num_rows

    def tokens(self) -> dict[str, int]:
        """Inputs handed out so far of each corpus of a mixture, over all ranks."""
        if len(self.order.sizes) == 1:
            return {}
        counts = self.order.counts(self._samples)
        names = (f"tokens/{name}" for name in self.dataset.names)
        return {n: c * self.seq_len for n, c in zip(names, counts, strict=True)}

    def state_dict(self) -> dict:
        """Where the stream stands, as plain JSON values. Steps only prefetched do not count."""
        return {
            "seed": self.seed,
            "samples": self._samples,
            "fingerprint": self.fingerprint,
            "seq_len": self.seq_len,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues after `state`. Raises `UserError` if that was another order of other rows."""
        for key, flag in (("fingerprint", "--data"), ("seed", "--seed"), ("seq_len", "seq_len")):
            if state.get(key) != getattr(self, key):
                raise UserError(
                    f"{flag}: cannot resume the data order: {key} is {getattr(self, key)!r},"
                    f" expected {state.get(key)!r} as in the checkpoint"
                )
        self.close()
        self._samples, self._error = int(state["samples"]), None

    def close(self) -> None:
        """Stops the prefetch thread; steps prepared but not handed out are built again if asked."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None


def eval_batches(
    dataset,
    *,
    seq_len: int,
    max_tokens: int,
    micro_batch: int = 1,
    doc_mask: bool = True,
) -> list[Batch]:
    """The same rows every time, at most max_tokens (but one row), spread evenly over the split; of
    a mixture each corpus has its share."""
    require_rows(dataset, seq_len)
    source, most = dataset.rows(seq_len), max(1, max_tokens // seq_len)
    rows: list[int] = []
    for first, available, weight in zip(source.first, source.sizes, dataset.weights, strict=False):
        count = min(available, max(1, most * weight // sum(dataset.weights)))
        rows += (first + np.arange(count) * available // count).tolist()
    parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    return [pack(source, part, doc_mask) for part in parts]


def require_rows(dataset, seq_len: int, per_step: int = 0) -> None:
    """UserError where a data set has no row, or one of several has fewer than a step takes of it:
    a batch would hold a row twice."""
    total = sum(dataset.weights)
    sizes = dataset.rows(seq_len).sizes
    for part, size, weight in zip(dataset.parts, sizes, dataset.weights, strict=True):
        share = -(-per_step * weight // total) if len(sizes) > 1 else 1
        if size < 1:
            raise UserError(
                f"--data {part.name}: {part.num_tokens} tokens, expected at least {seq_len + 1}"
                f" for one row of sequence length {seq_len}"
            )
        if size < share:
            raise UserError(
                f"--data {part.name}: {size} rows of sequence length {seq_len} found, at least the"
                f" {share} that a step of {per_step} takes of it expected"
            )
