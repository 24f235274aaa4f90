"""What a row of training tokens is: a stretch of the whole text, or documents packed by best fit.

    python -m pytest tests/test_packing.py

No torch import here. T = seq_len. A row is T inputs and the token after them, the last target.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

GROUP = 1 << 20  # documents packed at a time: bounds the memory that packing needs


class Concatenated:
    """Row i of a `TokenDataset` is `tokens[i*T : i*T + T + 1]`: documents are cut anywhere."""

    padding = cut = 0.0

    def __init__(self, dataset, seq_len: int):
        self.dataset, self.seq_len = dataset, seq_len
        self.num_rows = dataset.num_rows(seq_len)

    def read(self, row: int, out: np.ndarray) -> tuple[np.ndarray, int]:
        """Fill out [T + 1]. Returns where documents end, in 1 .. T, and the inputs that are text,
        here all T."""
        first = row * self.seq_len
        self.dataset.read_into(out, first)
        ends = self.dataset.doc_ends
        lo, hi = ends.searchsorted((first, first + self.seq_len), side="right")
        return ends[lo:hi] - first, self.seq_len


class BestFit:
    """Rows of whole documents: only one longer than T is cut, into pieces of T and what is left.

    Pieces are packed by best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language
    Modeling", arXiv:2404.10830), GROUP documents at a time; the rest of a row is padding. Kept are
    8 bytes for each piece and each row, beside the 8 that `doc_ends` has for each document.

    padding: its share of all inputs. cut: the share of documents that are.
    """

    def __init__(self, dataset, seq_len: int):
        self.dataset, self.seq_len = dataset, seq_len
        pieces, counts, cut, ends = [], [], 0, dataset.doc_ends
        for at in range(0, len(ends), GROUP):
            start = np.concatenate([ends[at - 1 : at] if at else [0], ends[at : at + GROUP]])
            length = np.diff(start)
            start, whole, rest = start[:-1], length // seq_len, length % seq_len
            number = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
            left = rest > 0
            row = best_fit(rest[left], seq_len)
            by_row = np.argsort(row, kind="stable")
            pieces += [np.repeat(start, whole) + number * seq_len]
            pieces += [(start + whole * seq_len)[left][by_row]]
            counts += [np.ones(len(number), dtype=np.int64), np.bincount(row)]
            cut += int((length > seq_len).sum())
        self.pieces = np.concatenate(pieces)
        self.first = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        self.num_rows = len(self.first) - 1
        self.padding = 1 - int(ends[-1]) / (self.num_rows * seq_len)
        self.cut = cut / len(ends)

    def read(self, row: int, out: np.ndarray) -> tuple[np.ndarray, int]:
        """As `Concatenated.read`; what follows the text is padding."""
        starts = self.pieces[self.first[row] : self.first[row + 1]]
        doc_ends = self.dataset.doc_ends
        doc_ends = doc_ends[doc_ends.searchsorted(starts, side="right")]
        lengths = np.minimum(doc_ends - starts, self.seq_len)
        ends = np.cumsum(lengths)
        at = 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            self.dataset.read_into(out[at:end], start)
            at = end
        out[at:] = self.dataset.eos
        if doc_ends[-1] > start + lengths[-1]:  # a piece of T whose document goes on
            self.dataset.read_into(out[at:], start + at)
            ends = ends[:0]
        return ends, at


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [n]: the row of each piece, the longest first, each into the fullest row that has room
    for it. lengths: in 1 .. capacity.

    Pieces of one length are placed together: a row that is the fullest with room for one stays it
    until it has none. A row's room more than halves whenever it is visited, so that the loop turns
    about capacity * log(capacity) times at most, whatever n.
    """
    pieces = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), dtype=np.int64)
    sizes, counts = np.unique(lengths, return_counts=True)
    free: dict[int, list[np.ndarray]] = {}  # room -> rows that have it
    rooms: list[int] = []  # the keys of `free`, sorted

    def give_back(some: np.ndarray, room: int) -> None:
        if room and len(some):
            if room not in free:
                insort(rooms, room)
            free.setdefault(room, []).append(some)

    made = at = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            i = bisect_left(rooms, size)
            if i < len(rooms):
                room = rooms.pop(i)
                open_rows = np.concatenate(free.pop(room))
            else:
                room = capacity
                open_rows = np.arange(made, made - (-count // (room // size)))
                made += len(open_rows)
            each = room // size
            full = min(len(open_rows), count // each)  # rows that take `each`
            some = 0 if full == len(open_rows) else count - full * each  # what one more takes
            taken = np.repeat(open_rows[:full], each)
            rows[pieces[at : at + len(taken)]] = taken
            give_back(open_rows[:full], room - each * size)
            if some:
                rows[pieces[at + len(taken) : at + len(taken) + some]] = open_rows[full]
                give_back(open_rows[full : full + 1], room - some * size)
            give_back(open_rows[full + (some > 0) :], room)
            at += len(taken) + some
            count -= len(taken) + some
    return rows


PACKINGS = {"concatenate": Concatenated, "best_fit": BestFit}


class Rows:
    """The rows of several data sets, numbered from one to the next."""

    def __init__(self, datasets: Sequence, seq_len: int, packing: str):
        self.seq_len = seq_len
        self.parts = [PACKINGS[packing](dataset, seq_len) for dataset in datasets]
        self.sizes = [part.num_rows for part in self.parts]
        self.first = list(accumulate(self.sizes, initial=0))

    def read(self, row: int, out: np.ndarray) -> tuple[np.ndarray, int]:
        """See `Concatenated.read`."""
        part = bisect_right(self.first, row) - 1
        return self.parts[part].read(row - self.first[part], out)
