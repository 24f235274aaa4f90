"""prepare_data.py at some size: killed at random, and how much memory it takes."""

from __future__ import annotations

import random
import re

import pytest
from test_tokenizer import make_folder

from benchmarks import ingest
from tokenizer import load_tokenizer

FILES = 10  # 40 MB of text


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """(folder with files of both kinds, spec of a tokenizer for them, text they are made of)."""
    folder, pool = tmp_path_factory.mktemp("tree"), ingest.paragraphs()
    tokenizer = make_folder(folder / "tokenizer", texts=pool[::50], vocab_size=4000)
    ingest.make_tree(folder / "in", pool, FILES)
    return folder / "in", str(tokenizer), pool


@pytest.mark.slow
def test_every_token_after_ten_kills(tree, tmp_path, monkeypatch):
    """By tiktoken, in two workers, killed at random: the tokens of the `tokenizers` library, and
    the bytes of an undisturbed run of one process."""
    folder, spec, pool = tree
    monkeypatch.setattr(ingest, "SHARD_TOKENS", 500_000)
    done = ingest.prepare([folder], tmp_path / "one", spec, 1)
    tokenizer = load_tokenizer(spec)
    expected = ingest.expected_tokens(tokenizer, pool, FILES)
    assert ingest.found_tokens(tmp_path / "one") == expected
    assert f"train: {expected['train'][0]:,} documents, {expected['train'][1]:,}" in done.printed
    kills = sorted(random.randrange(ingest.size_of(tmp_path / "one")) for _ in range(10))
    cut = ingest.prepare([folder], tmp_path / "cut", spec, 2, kills)
    went_on = [float(at) for at in re.findall(r"goes on after ([\d.]+) MB", cut.printed)]
    assert len(set(went_on)) >= 3 and went_on == sorted(went_on), kills
    assert ingest.same_files(tmp_path / "one", tmp_path / "cut")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "one"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tree, tmp_path):
    folder, _, _ = tree
    paths = sorted(folder.rglob("*.*"))
    few = ingest.prepare([*paths[:2], *paths[-2:]], tmp_path / "few", "byte", 2)
    all_ = ingest.prepare([folder], tmp_path / "all", "byte", 2)
    # The other 24 MB of text are 48 MB of tokens; the queue is 10 MB fuller in a longer run.
    assert all_.peak_bytes < few.peak_bytes + (24 << 20), (few.peak_bytes, all_.peak_bytes)


@pytest.mark.slow
def test_speed_beside_tiktoken_alone(tree, tmp_path):
    """By CPU time, start and checks included, which weigh more here than in a long run."""
    folder, spec, pool = tree
    tokenizer = load_tokenizer(spec)
    tokenizer.speed_up()
    cpu, _, _ = ingest.time_alone(ingest.encode_alone(tokenizer), pool, range(FILES))
    done = ingest.prepare([folder], tmp_path / "out", spec, 1)
    assert cpu / done.cpu_seconds > 0.4, (cpu, done)
