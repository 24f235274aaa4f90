"""A batch's text as the tokens of another tokenizer, so that its model can say how likely it is.

    python -m pytest tests/test_retokenize.py

`--select_tokens` compares two models token by token. Where their tokenizers differ the ids of a
batch are turned back into bytes, document by document, and these into the reference's tokens; the
loss of each of those is spread over its bytes, and a token of ours gets the sum of its bytes'
shares (ops/token_select.py). End of text stands for end of text: one place, as if it were a byte.

What has no loss under the reference: the bytes of a document's first token there, which nothing
predicts, as nothing predicts the first of ours; control tokens; bytes that belong to no whole
character, where a row begins or ends within one; a document from where the other tokenizer changes
its text on (NFC). Tokens with such bytes are not in `known`.

All of it depends on the batch alone, row by row. It runs in the loader's thread, on the host.

Shapes: R rows, T tokens of a row, N = R * T, K tokens of ours, L of theirs, S bytes, M inputs,
P pairs of tokens with bytes in common.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from config import UserError
from data import IGNORE, Batch, Retokenized, padded_bounds
from tokenizer import Tokenizer

PROBE = "Two  words\n\tna\u00efve \u4f60\u597d, \U0001f600 and 3 more"
STRAY = re.compile("([\udc80-\udcff]+)")  # bytes outside of characters, by surrogateescape


class Spelling:
    """What a tokenizer's ids are in bytes. Raises UserError where its tokens are not bytes.

    text [V] bool: whether the token has bytes; length [V]: their number, else the one place that
    the token takes.
    """

    def __init__(self, tokenizer: Tokenizer, flag: str):
        table = tokenizer.token_bytes()
        ids = tokenizer.encode(PROBE)
        if table is None or b"".join(table[i] for i in ids) != PROBE.encode():
            raise UserError(
                f"{flag}: tokenizer {tokenizer.name} found, whose tokens are not the bytes of the "
                "text; byte-level BPE, tiktoken or byte expected, where two tokenizers meet"
            )
        self.eos = tokenizer.eos_token_id
        table[self.eos] = b""
        self.table = table
        self.text = np.array([bool(token) for token in table])
        self.length = np.array([max(1, len(token)) for token in table])

    def spell(self, ids: np.ndarray) -> bytes:
        """The bytes of ids."""
        return b"".join(map(self.table.__getitem__, ids.tolist()))

    def agreeing(self, ids: np.ndarray, text: str) -> int:
        """How many of the first ids spell `text`: all, unless a normalizer has changed it."""
        spelled, raw = (np.frombuffer(x, np.uint8) for x in (self.spell(ids), text.encode()))
        if np.array_equal(spelled, raw):
            return len(ids)
        same = min(len(spelled), len(raw))
        same = np.append(spelled[:same] != raw[:same], True).argmax()
        return int(np.cumsum(self.length[ids]).searchsorted(same, side="right"))


class Retokenizer:
    """`Batch` -> the same with `retokenized`. context: tokens that the other model sees at most;
    longer documents are cut for it, as rows are, and no token loses its loss by that."""

    def __init__(self, own: Tokenizer, other: Tokenizer, context: int):
        self.own, self.other = Spelling(own, "--tokenizer"), Spelling(other, "--reference")
        self.tokenizer, self.context = other, context

    def __call__(self, batch: Batch) -> Batch:
        rows, own = len(batch.sample_ids), self.own
        ids, labels = (x.numpy().reshape(rows, -1) for x in (batch.input_ids, batch.labels))
        # Rows with their last target: [R, T + 1]. What no label names begins a document.
        begin, end = np.ones((rows, 1), bool), labels[:, -1:]
        first = np.concatenate([begin, labels < 0], 1)
        tokens = np.concatenate([ids, end], 1)
        keep = tokens >= 0
        if batch.cu_seqlens is not None:  # documents of one token, padding above all
            keep &= ~(first & np.concatenate([first[:, 1:], begin], 1))
        row, column = keep.nonzero()
        tokens, first = tokens[keep], first[keep]  # [K]
        label_at = row * ids.shape[1] + column - 1
        document = first.cumsum() - 1
        length = own.length[tokens]
        start = length.cumsum() - length

        found, piece = self._other_tokens(tokens, first, start)
        theirs = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in found)])  # [L]
        place = np.concatenate([np.empty(0, np.int64), *(at for _, at in found)])
        piece = np.repeat(piece, np.array([len(ids) for ids, _ in found], np.int64))
        apart = document if batch.cu_seqlens is not None else row
        inputs, loss_at = self._packed(theirs, document[piece], apart[piece])

        width = self.other.length[theirs]
        named = (loss_at >= 0) & (place >= 0)
        owner, share = np.full(length.sum(), -1), np.zeros(length.sum())  # [S]
        at = _ranges(place[named], width[named])
        owner[at] = loss_at[named].repeat(width[named])
        share[at] = (1 / width[named]).repeat(width[named])

        whole = ~first
        if len(tokens):
            whole &= np.logical_and.reduceat(owner >= 0, start)
        known = np.zeros(labels.size, bool)
        known[label_at[whole]] = True
        at = _ranges(start[whole], length[whole])
        target = label_at[whole].repeat(length[whole])
        parts = (torch.from_numpy(x) for x in in_common(owner[at], target, share[at]))
        found = Retokenized(inputs, torch.from_numpy(known), *parts)
        return replace(batch, retokenized=found)

    def _other_tokens(self, tokens, first, start) -> tuple[list[tuple], np.ndarray]:
        """(ids, their places in the text or -1) of each piece of text or end of text, and the token
        of ours in which it begins. start [K]: places of ours."""
        own, control = self.own, ~self.own.text[tokens]
        alone = control.nonzero()[0]
        edges = np.unique(np.concatenate([first.nonzero()[0], alone, alone + 1, [len(tokens)]]))
        pieces, texts = [], []
        for a, b in pairwise(edges.tolist()):
            if not control[a]:
                for offset, text in whole_characters(own.spell(tokens[a:b])):
                    pieces.append((a, start[a] + offset, True))
                    texts.append(text)
            elif tokens[a] == own.eos:
                pieces.append((a, start[a], False))
        encoded = iter(zip(self.tokenizer.encode_arrays(texts), texts, strict=True))
        found = []
        for _, at, is_text in pieces:
            ids, agreeing = np.array([self.other.eos]), 1
            if is_text:
                ids, text = next(encoded)
                ids = ids.astype(np.int64)
                agreeing = self.other.agreeing(ids, text)
            width = self.other.length[ids]
            place = at + width.cumsum() - width
            place[agreeing:] = -1
            found.append((ids, place))
        return found, np.array([a for a, _, _ in pieces], np.int64)

    def _packed(self, tokens, document, apart) -> tuple[Batch, np.ndarray]:
        """Their tokens [L] as a batch [1, M], and which of its labels each token is, or -1: the
        first of a document. apart [L]: what does not see each other."""
        follows = np.diff(apart, prepend=-1) == 0
        inputs = np.append(follows, False)[1:]
        predicted = np.diff(document, prepend=-1) == 0
        loss_at = np.where(predicted, follows.cumsum() - 1, -1)
        labels = np.where(predicted, tokens, IGNORE)[follows]
        ids, apart = tokens[inputs], apart[inputs]
        opens = np.diff(apart, prepend=-1).nonzero()[0]
        position = np.arange(len(ids)) - np.repeat(opens, np.diff(opens, append=len(ids)))
        position %= self.context
        # Few distinct lengths, for kernels that are planned for one; what is added is apart.
        used, total = len(ids), _rounded(len(ids))
        ids = np.pad(ids, (0, total - used), constant_values=self.other.eos)
        labels = np.pad(labels, (0, total - used), constant_values=IGNORE)
        position = np.append(position, np.arange(total - used) % self.context)
        batch = Batch(
            input_ids=torch.from_numpy(ids[None]),
            labels=torch.from_numpy(labels[None]),
            position_ids=torch.from_numpy(position[None]),
            cu_seqlens=padded_bounds((position == 0).nonzero()[0], total),
            max_seqlen=1 << int(position.max()).bit_length(),
            num_valid=int((labels != IGNORE).sum()),
            sample_ids=[0],
        )
        return batch, loss_at


def in_common(source: np.ndarray, target: np.ndarray, share: np.ndarray) -> tuple:
    """source, target and share [S] of bytes as those [P] of what two tokens have in common."""
    new = np.ones(len(source), bool)
    new[1:] = (np.diff(source) != 0) | (np.diff(target) != 0)
    new = new.nonzero()[0]
    count = np.diff(new, append=len(source))
    return source[new], target[new], (share[new] * count).astype(np.float32)


def whole_characters(raw: bytes) -> Iterator[tuple[int, str]]:
    """(offset, text) of what decodes: raw may begin or end within a character."""
    at = 0
    for i, text in enumerate(STRAY.split(raw.decode("utf-8", "surrogateescape"))):
        if text and not i % 2:
            yield at, text
        at += len(text.encode("utf-8", "surrogateescape"))


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], ..., start[0] + length[0] - 1, start[1], ..."""
    before = length.cumsum() - length
    return np.arange(length.sum()) + (start - before).repeat(length)


def _rounded(n: int) -> int:
    """n up to a multiple of an eighth of the power of two below it, at least 16."""
    step = 1 << max(4, n.bit_length() - 4)
    return max(1, -(-n // step)) * step
