"""Several corpora as one, each with a weight: `--data web=data/web:0.7,code=data/code:0.3`.

    python -m pytest tests/test_mixture.py

No torch import here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from config import UserError
from corpus import resolve_data
from order import Order, corpus_cycle, whole_weights
from packing import Rows
from shards import TokenDataset

FORM = "DATA:WEIGHT or NAME=DATA:WEIGHT, as in data/web:0.7,data/code:0.3,"


def parse_data(spec: str) -> dict[str, tuple[str, Fraction]]:
    """`--data` as name -> (data set, weight). Without a comma it is one data set, of weight 1."""
    if "," not in spec:
        return {Path(spec).name: (spec, Fraction(1))}
    found: dict[str, tuple[str, Fraction]] = {}
    for part in spec.split(","):
        named, _, weight = part.strip().rpartition(":")
        name, equals, data = named.partition("=")
        name, data = (name, data) if equals else (Path(named).name, named)
        try:
            size = float(weight)
        except ValueError:
            size = None
        if size is None or not data or not name:
            raise UserError(f"--data: '{part}' found, {FORM} expected")
        if not 0 < size < float("inf"):
            raise UserError(f"--data: weight {weight} of {data} found, a positive number expected")
        if name in found:
            raise UserError(
                f"--data: '{name}' found twice, NAME=DATA:WEIGHT with two names expected"
            )
        if data in [other for other, _ in found.values()]:
            raise UserError(f"--data: {data} found twice, each corpus once expected")
        found[name] = (data, Fraction(weight))
    corpus_cycle([weight for _, weight in found.values()])  # refuses some weights
    return found


class Mixture:
    """Data sets of one tokenizer with weights, and how their rows are packed. In what loaders ask
    of it a `TokenDataset` is the mixture of itself alone.

    parts, weights   the data sets and their relative shares of the rows
    num_tokens       of all parts
    fingerprint      over the content of all parts; of one: its own
    attach           what a loader does with every batch: see retokenize.py, cria.py; None: nothing
    """

    attach = None

    def __init__(
        self, parts: dict[str, TokenDataset], weights: Sequence[Fraction], packing="concatenate"
    ):
        self.names, self.parts = list(parts), list(parts.values())
        self.weights, self.packing = whole_weights(weights), packing
        self.num_tokens = sum(part.num_tokens for part in self.parts)
        prints = [part.fingerprint for part in self.parts]
        self.fingerprint = prints[0]
        if len(prints) > 1:
            digest = hashlib.blake2b(json.dumps(prints).encode(), digest_size=16)
            self.fingerprint = digest.hexdigest()
        self._rows: dict[int, Rows] = {}

    def identity(self) -> dict:
        """What a run's continuation must share; without what one corpus, concatenated, lacks."""
        found = {"data": self.fingerprint}
        if len(self.parts) > 1:
            found["data_weights"] = ":".join(map(str, self.weights))
        if self.packing != "concatenate":
            found["packing"] = self.packing
        return found

    def rows(self, seq_len: int) -> Rows:
        """The rows of all parts; made once for each `seq_len`."""
        if seq_len not in self._rows:
            self._rows[seq_len] = Rows(self.parts, seq_len, self.packing)
        return self._rows[seq_len]


def open_corpora(
    spec: str, tokenizer, packing: str, *, build: bool = True
) -> tuple[str, Mixture, Mixture] | None:
    """(name, training split, held-out split) of `--data`, checked against the tokenizer. Held-out
    rows are never packed by best fit, so that scores compare. Without `build` the embedded corpus
    is not made: where it is asked for, the others are checked and None is returned."""
    splits = {"train": {}, "val": {}}
    corpora = parse_data(spec)
    for name, (data, _) in corpora.items():
        if data == "stdlib" and not build:
            continue
        folder = resolve_data(data, tokenizer)
        for split, parts in splits.items():
            parts[name] = TokenDataset.open(folder, split)
            parts[name].check_tokenizer(tokenizer)
    if len(splits["train"]) < len(corpora):
        return None
    weights = [weight for _, weight in corpora.values()]
    title = spec if len(corpora) > 1 else folder
    return title, Mixture(splits["train"], weights, packing), Mixture(splits["val"], weights)


def rows_line(data: Mixture, seq_len: int, rows: int) -> str:
    """What a stage of `rows` rows draws from each corpus, and what packing costs."""
    source = data.rows(seq_len)
    drawn = Order(source.sizes, data.weights, 0).counts(rows)
    line = []
    for name, part, count in zip(data.names, source.parts, drawn, strict=True):
        text = f"{count:,} rows of {name}, {count / part.num_rows:.3g} epochs"
        if data.packing == "best_fit":
            text += f" ({part.padding:.2%} padding, {part.cut:.2%} of the documents cut)"
        line.append(text)
    return "; ".join(line)
