"""Best-fit packing: no document cut that fits, every token once, the same as packing one by one."""

import itertools

import numpy as np
import pytest
import torch
from documents import EOS, random_documents, write
from kit import assert_close_rms, logits, tiny_model

import packing
from data import IGNORE, PackedLoader, TokenDataset, pack_rows
from evaluate import inputs
from mixture import Mixture
from packing import best_fit


def one_by_one(lengths, capacity):
    """Best-fit decreasing as it is defined: the room that each piece leaves."""
    room = []
    for length in sorted(lengths, reverse=True):
        fits = [r for r in room if r >= length]
        if fits:
            room.remove(min(fits))
        room.append((min(fits) if fits else capacity) - length)
    return sorted(room)


@pytest.mark.parametrize("capacity", [1, 7, 16, 64])
@pytest.mark.parametrize("seed", range(8))
def test_best_fit_is_what_it_says(capacity, seed):
    rng = np.random.default_rng(seed)
    lengths = np.ceil(capacity * rng.random(1 + 40 * seed) ** (1 + seed % 3)).astype(np.int64)
    lengths = lengths.clip(1, capacity)
    rows = best_fit(lengths, capacity)
    used = np.bincount(rows, weights=lengths)
    assert used.min() > 0 and sorted((capacity - used).tolist()) == one_by_one(lengths, capacity)


def test_best_fit_by_hand():
    # 6 | 5 + 3 | 4 + 4 | 2 beside the 6: the fullest row that has room for 2.
    assert best_fit(np.array([2, 4, 6, 4, 3, 5]), 8).tolist() == [0, 2, 0, 2, 1, 1]
    assert best_fit(np.array([], dtype=np.int64), 8).tolist() == []


def test_a_million_documents_take_seconds():
    import time

    lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(np.int64).clip(1, 4096)
    start = time.perf_counter()
    rows = best_fit(lengths, 4096)
    assert time.perf_counter() - start < 20  # 0.1 s on a free core
    assert np.bincount(rows, weights=lengths).max() <= 4096
    assert lengths.sum() / (4096 * (rows.max() + 1)) > 0.999


@pytest.fixture
def corpus(tmp_path):
    documents = [*random_documents(150), [7] * 15, [8] * 16, [9] * 31, [1] * 100]
    return documents, TokenDataset.open(write(tmp_path / "set", documents), "train")


def packed(dataset, names=("a",)):
    return Mixture(dict.fromkeys(names, dataset), [1] * len(names), "best_fit")


@pytest.mark.parametrize("group", [7, 1 << 20])
@pytest.mark.parametrize("seq_len", [16, 64])
def test_every_token_once_and_no_needless_cut(corpus, monkeypatch, seq_len, group):
    monkeypatch.setattr(packing, "GROUP", group)
    documents, dataset = corpus
    source = packed(dataset).rows(seq_len)
    found, tokens = [], 0
    for row in range(source.sizes[0]):
        out = np.empty(seq_len + 1, dtype=np.int64)
        ends, used = source.read(row, out)
        tokens += used
        assert (out[used:seq_len] == EOS).all() and 0 < used <= seq_len
        found += [part.tolist() for part in np.split(out[:used], ends) if len(part)]
    expected = []
    for document in documents:
        whole = [*document, EOS]
        expected += [whole[i : i + seq_len] for i in range(0, len(whole), seq_len)]
    assert sorted(found) == sorted(expected) and tokens == dataset.num_tokens
    (part,) = source.parts
    assert part.cut == sum(len(d) + 1 > seq_len for d in documents) / len(documents)
    assert part.padding == pytest.approx(1 - tokens / (source.sizes[0] * seq_len))
    if group > 7:  # nearly as few rows as there could be
        assert source.sizes[0] <= 1.05 * tokens / seq_len + 1


def test_labels_of_packed_rows(corpus):
    """Next tokens within a document; those of a cut document's piece reach into the next piece."""
    documents, dataset = corpus
    source = packed(dataset).rows(16)
    batch = pack_rows(packed(dataset), range(source.sizes[0]), 16, True)
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    bounds = sorted(set(batch.cu_seqlens.tolist()))
    found, blank = [], 0  # blank: padding, and what is left of documents of 16 tokens: their end
    for a, b in itertools.pairwise(bounds):
        assert batch.position_ids[0, a:b].tolist() == list(range(b - a))
        if labels[a:b] == [IGNORE] * (b - a) and set(ids[a:b]) == {EOS}:
            blank += b - a
            continue
        assert labels[a : b - 1] == ids[a + 1 : b]
        found.append((ids[a:b], labels[b - 1]))
    expected = []
    for document in documents:
        whole = [*document, EOS, IGNORE]
        for i in range(0, len(whole) - 1, 16):
            piece = whole[i : min(i + 16, len(whole) - 1)]
            expected.append((piece, whole[i + len(piece)]))
    ends = expected.count(([EOS], IGNORE))
    expected = [piece for piece in expected if piece != ([EOS], IGNORE)]
    assert sorted(found) == sorted(expected)
    assert blank == len(ids) - dataset.num_tokens + ends and ends > 0
    assert batch.num_valid == sum(label != IGNORE for label in labels)


def test_without_a_document_mask_the_labels_are_the_same(corpus):
    _, dataset = corpus
    rows = range(packed(dataset).rows(16).sizes[0])
    kept, open_ = (pack_rows(packed(dataset), rows, 16, doc_mask) for doc_mask in (True, False))
    assert open_.cu_seqlens is None and open_.input_ids.shape == (len(rows), 16)
    assert (open_.position_ids == torch.arange(16)).all()
    assert torch.equal(open_.input_ids.flatten(), kept.input_ids[0])
    assert torch.equal(open_.labels.flatten(), kept.labels[0])
    assert open_.row_valid == (open_.labels != IGNORE).sum(1).tolist()
    assert torch.equal(open_.text.flatten(), kept.text[0])
    assert open_.row_text == kept.row_text == open_.text.sum(1).tolist()
    assert sum(open_.row_text) == dataset.num_tokens < open_.input_ids.numel()
    assert (open_.input_ids[~open_.text] == EOS).all()


@pytest.mark.parametrize("kinds", ["FF", "LS"])
def test_packed_logits_are_those_of_each_document_alone(corpus, kinds):
    _, dataset = corpus
    data = packed(dataset)
    rows = [0, data.rows(32).sizes[0] // 2, data.rows(32).sizes[0] - 1]
    batch = pack_rows(data, rows, 32, True)
    model = tiny_model(kinds, vocab_size=257)
    together = model(**inputs(batch)) @ model.head_weight.T
    for a, b in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        if b > a:
            alone = logits(model, batch.input_ids[:, a:b])
            assert_close_rms(together[:, a:b], alone, what=f"{a}:{b}")


def test_repeated_spans_stay_within_the_text(corpus):
    _, dataset = corpus
    data = packed(dataset, names=("a",))
    last = data.rows(64).sizes[0] - 1
    plain, batch = (pack_rows(data, [last], 64, True, repeat) for repeat in (0.0, 1.0))
    used = 64 - (plain.input_ids[0].flip(0) == EOS).long().cumprod(0).sum().item() + 1
    assert used < 64 and batch.num_valid == used - 1
    assert torch.equal(batch.input_ids[0, used:], plain.input_ids[0, used:])
    assert (batch.labels[0, used - 1 :] == IGNORE).all()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_union_over_ranks_and_resume(corpus, world_size):
    _, dataset = corpus
    how = {"seq_len": 32, "rows_per_step": 16, "seed": 3, "prefetch": 0}
    one = PackedLoader(packed(dataset), micro_batch=16, **how)
    ranks = [
        PackedLoader(packed(dataset), micro_batch=1, rank=r, world_size=world_size, **how)
        for r in range(world_size)
    ]
    for step in range(15):
        if step == 9:
            state = one.state_dict()
            assert state["fingerprint"] == f"{dataset.fingerprint}-best_fit"
            ranks = [
                PackedLoader(packed(dataset), micro_batch=2, rank=r, world_size=world_size, **how)
                for r in range(world_size)
            ]
            for rank in ranks:
                rank.load_state_dict(state)
        (whole,) = one.next_step()
        parts = [batch for rank in ranks for batch in rank.next_step()]
        rows = sorted(i for batch in parts for i in batch.sample_ids)
        assert rows == sorted(whole.sample_ids)
        assert sum(batch.num_valid for batch in parts) == whole.num_valid
