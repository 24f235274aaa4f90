"""Batches of packed rows from token shards: shuffled, split over ranks, resumable.

    python -m pytest tests/test_data.py

Shards are written and read by shards.py; its two classes can be imported from here as well.

Shapes: T = seq_len, R = rows of a micro-batch, N = R * T tokens, M = length of cu_seqlens.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import xxhash

from config import UserError
from ops.bounds import remember
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
]

IGNORE = -100
REPEATED = (8, 128)  # tokens of a repeated span


def permuted_index(i, n: int, seed: int, epoch: int):
    """Where a shuffle of range(n) puts `i` (an int, or an int array), without storing the shuffle.

    A Feistel network over the next even power of two is a bijection; walking its cycle until the
    value is below n keeps it one on range(n) (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). Fewer than four passes are expected.
    """
    index = np.array(i, dtype=np.uint64, ndmin=1)
    assert 1 <= n < 1 << 62 and (index < n).all(), "index outside range(n)"
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    key = hashlib.blake2b(f"{seed}/{epoch}/{n}".encode(), digest_size=64).digest()
    keys = np.frombuffer(key, "<u8")
    walking = np.arange(index.size)
    while walking.size:
        x = index[walking]
        left, right = x >> shift, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index[walking] = (left << shift) | right
        walking = walking[index[walking] >= n]
    return index.astype(np.int64) if np.ndim(i) else int(index[0])


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit changes about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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

    def to(self, device) -> Batch:
        device = torch.device(device)
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                if device.type == "cuda":
                    value = value.pin_memory()  # only a pinned copy overlaps with compute
                moved[field.name] = value.to(device, non_blocking=True)
        if self.cu_seqlens is not None and device.type == "cuda" != self.cu_seqlens.device.type:
            remember(moved["cu_seqlens"], self.cu_seqlens)
        return replace(self, **moved)


def repeat_spans(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A row [n] with spans that stand earlier in it in place of about half of its tokens: after an
    eighth of it a span, as many fresh tokens, and so on. Spans have REPEATED tokens, short and long
    ones alike often on a logarithmic scale, and begin anywhere before."""
    tokens, low, high = tokens.copy(), *np.log(REPEATED)
    at = len(tokens) // 8
    while at < len(tokens):
        span = min(int(np.exp(rng.uniform(low, high))), at, len(tokens) - at)
        first = int(rng.integers(at - span + 1))
        tokens[at : at + span] = tokens[first : first + span]
        at += span + int(np.exp(rng.uniform(low, high)))
    return tokens


def pack_rows(
    dataset: TokenDataset, rows, seq_len: int, doc_mask: bool, repeat: float = 0.0, seed: int = 0
) -> Batch:
    """Rows `tokens[i*T : i*T + T + 1]` as one Batch; the extra token is the last target. A share
    `repeat` of them, chosen by `seed`, is a single document with repeated spans each."""
    count = len(rows)
    tokens = np.stack([dataset.read(int(row) * seq_len, seq_len + 1) for row in rows])
    repeated = set()
    for r, row in enumerate(rows) if repeat else ():
        rng = np.random.default_rng((seed, int(row)))
        if rng.random() < repeat:
            tokens[r] = repeat_spans(tokens[r], rng)
            repeated.add(r)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()  # [R, T]
    starts = [np.arange(count) * seq_len]  # where a document or row starts, in 0 .. N - 1
    for r, row in enumerate(rows):
        if r in repeated:
            continue
        first = int(row) * seq_len
        lo, hi = np.searchsorted(dataset.doc_ends, (first, first + seq_len), side="right")
        ends = dataset.doc_ends[lo:hi] - first  # in 1 .. T
        labels[r, ends - 1] = IGNORE
        starts.append(r * seq_len + ends[ends < seq_len])
    num_valid = int((labels != IGNORE).sum())
    if doc_mask:
        total = count * seq_len
        begin = np.sort(np.concatenate(starts))
        positions = np.arange(total) - np.repeat(begin, np.diff(np.append(begin, total)))
        # Few distinct lengths, so that a compiled graph is reused; the extra entries are empty.
        bucket = max(16, 1 << len(begin).bit_length())
        cu_seqlens = np.full(bucket, total, dtype=np.int32)
        cu_seqlens[: len(begin)] = begin
        shape = (1, total)
    else:
        positions = np.tile(np.arange(seq_len), count)
        cu_seqlens, shape = None, (count, seq_len)
    return Batch(
        input_ids=torch.from_numpy(inputs.reshape(shape).copy()),
        labels=torch.from_numpy(labels.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        cu_seqlens=None if cu_seqlens is None else torch.from_numpy(cu_seqlens),
        max_seqlen=seq_len,
        num_valid=num_valid,
        sample_ids=[int(row) for row in rows],
    )


class PackedLoader:
    """The training stream of one rank: `next_step()` gives its micro-batches of the next step.

    Sample k of the run is row `permuted_index(k % n, n, seed, k // n)`, and a step takes the next
    `rows_per_step` samples, of which rank r gets every world-th: which samples a step sees, and in
    which order, depends on nothing but (data, seed, seq_len). `select` limits the run to those
    row numbers. `repeat` is the share of rows with repeated spans (`repeat_spans`), the same ones
    in every epoch. `prefetch` is how many steps a thread keeps ready, 0 for none.
    """

    def __init__(
        self,
        dataset: TokenDataset,
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
        _require_row(dataset, seq_len)
        self.dataset, self.seq_len, self.doc_mask = dataset, seq_len, doc_mask
        self.rows_per_step, self.micro_batch = rows_per_step, micro_batch
        self.rank, self.world_size, self.seed, self.repeat = rank, world_size, seed, repeat
        self.fingerprint = dataset.fingerprint
        self._select = None
        self.num_rows = dataset.num_rows(seq_len)
        if select is not None:
            self._select = np.asarray(select, dtype="<i8")
            assert self._select.size and self._select.min() >= 0, "select needs row numbers"
            assert self._select.max() < self.num_rows, "select names rows past the end"
            self.num_rows = len(self._select)
            self.fingerprint += f"-{xxhash.xxh3_64_hexdigest(self._select.tobytes())}"
        self.fingerprint += f"-repeat{repeat:g}" if repeat else ""
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

    def _build(self, first: int) -> list[Batch]:
        samples = np.arange(first, first + self.rows_per_step)
        epochs, index = np.divmod(samples, self.num_rows)
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permuted_index(index[here], self.num_rows, self.seed, int(epoch))
        if self._select is not None:
            rows = self._select[rows]
        rows = rows[self.rank :: self.world_size].reshape(-1, self.micro_batch)
        how = (self.seq_len, self.doc_mask, self.repeat, self.seed)
        return [pack_rows(self.dataset, micro, *how) for micro in rows]

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
    dataset: TokenDataset,
    *,
    seq_len: int,
    max_tokens: int,
    micro_batch: int = 1,
    doc_mask: bool = True,
) -> list[Batch]:
    """The same rows every time, at most max_tokens (but one row), spread evenly over the split."""
    _require_row(dataset, seq_len)
    available = dataset.num_rows(seq_len)
    count = min(available, max(1, max_tokens // seq_len))
    rows = np.arange(count) * available // count
    parts = [rows[i : i + micro_batch] for i in range(0, count, micro_batch)]
    return [pack_rows(dataset, part, seq_len, doc_mask) for part in parts]


def _require_row(dataset: TokenDataset, seq_len: int) -> None:
    if dataset.num_rows(seq_len) < 1:
        raise UserError(
            f"--data {dataset.name}: {dataset.num_tokens} tokens, expected at least {seq_len + 1}"
            f" for one row of sequence length {seq_len}"
        )
