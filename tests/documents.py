"""Random documents and the data sets that hold them."""

from __future__ import annotations

import numpy as np

from shard_writer import ShardWriter
from tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")
EOS = BYTE.eos_token_id


def random_documents(count, low=1, high=60, seed=0, vocab=256):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(low, high)).tolist() for _ in range(count)]


def write(folder, documents, split="train", tokenizer=BYTE, **kwargs):
    with ShardWriter(folder, split, tokenizer, **kwargs) as writer:
        for document in documents:
            writer.add(document)
    return folder


def flat(documents, eos=EOS):
    return np.array([i for document in documents for i in [*document, eos]])
