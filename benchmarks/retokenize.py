"""What a reference of another tokenizer costs the loader: batches turned into its tokens.

    python benchmarks/retokenize.py --tokenizer byte --other models/smollm2-135m
    python benchmarks/retokenize.py --tokenizer models/smollm2-135m --other byte

The texts of `pydoc_data.topics`, in micro-batches of --rows rows of --seq_len tokens. Beside it the
time in which the other tokenizer alone encodes the same documents, and that in which the rows are
packed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import clock
from data import TokenDataset, pack_rows
from fast_tokenizer import Unsupported
from retokenize import Retokenizer
from shard_writer import ShardWriter
from tokenizer import load_tokenizer


def seconds(call: Callable, repeats: int) -> float:
    """The median over some calls, after one that is not counted."""
    call()
    return clock(call, "cpu", repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--other", default="models/smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    own, other, texts = load_tokenizer(args.tokenizer), load_tokenizer(args.other), []
    retokenize = Retokenizer(own, other, 8192)
    try:
        other.speed_up()
    except Unsupported as error:
        print(f"not the faster library: {error}")
    with tempfile.TemporaryDirectory() as name:
        with ShardWriter(Path(name) / "data", "train", own) as writer:
            for text in topics.topics.values():
                writer.add(own.encode(text))
                texts.append(text)
        data = TokenDataset.open(Path(name) / "data", "train")
        rows = range(data.num_rows(args.seq_len) // args.rows * args.rows)
        parts = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
        batches = [pack_rows(data, part, args.seq_len, True) for part in parts]
        packing = seconds(
            lambda: [pack_rows(data, part, args.seq_len, True) for part in parts], args.repeats
        )
    found = [retokenize(batch).retokenized for batch in batches]
    taken = seconds(lambda: [retokenize(batch) for batch in batches], args.repeats)
    alone = seconds(lambda: other.encode_arrays(texts), args.repeats)
    tokens, labels = len(rows) * args.seq_len, sum(batch.num_valid for batch in batches)
    inputs = sum(one.batch.num_valid for one in found)
    known = sum(int(one.known.sum()) for one in found)
    print(
        f"{tokens / taken / 1e6:.2f}M tokens/s of {own.name} ({len(rows)} rows of {args.seq_len})"
    )
    print(f"{inputs / taken / 1e6:.2f}M tokens/s of {other.name}, run by {other.library}")
    print(f"{inputs / tokens:.3f} of these for each of those; {known / labels:.2%} have a loss")
    print(f"{taken / alone:.1f} x the time of encoding alone, {taken / packing:.1f} x of packing")


if __name__ == "__main__":
    main()
