"""Packing, the loader's order and its resume state."""

import json

import numpy as np
import pytest
import torch
from documents import random_documents, write

import data
from config import UserError
from data import (
    IGNORE,
    PackedLoader,
    TokenDataset,
    eval_batches,
    pack_rows,
    permuted_index,
    repeat_spans,
)


@pytest.fixture
def dataset(tmp_path):
    return TokenDataset.open(write(tmp_path / "set", random_documents(150)), "train")


# --- order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 257, 1000, 4097, 100_003])
def test_permuted_index_is_a_bijection(n):
    image = permuted_index(np.arange(n), n, seed=3, epoch=1)
    assert np.array_equal(np.sort(image), np.arange(n))
    assert permuted_index(n // 2, n, 3, 1) == image[n // 2]


def test_permuted_index_looks_shuffled():
    n = 10_007
    i = np.arange(n)
    images = [permuted_index(i, n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for image in images:
        assert (image == i).sum() < 10  # one fixed point is expected
        assert abs(np.corrcoef(i, image)[0, 1]) < 0.05
        assert (np.abs(np.diff(image)) < 20).mean() < 0.02  # neighbours are torn apart
        # A tenth of the positions is spread evenly over the values.
        counts = np.histogram(image[: n // 10], bins=10, range=(0, n))[0]
        assert counts.min() > 60 and counts.max() < 145
    assert (images[0] == images[1]).sum() < 10 and (images[0] == images[2]).sum() < 10
    big = permuted_index(np.arange(1000), 10**12 + 7, 0, 0)
    assert len(set(big.tolist())) == 1000 and big.max() < 10**12 + 7 and big.std() > 10**11


# --- packing --------------------------------------------------------------------------------


def reference_row(dataset, row, seq_len):
    """Token by token: inputs, labels, positions of one row."""
    ends = set(dataset.doc_ends.tolist())
    tokens = dataset.read(0, dataset.num_tokens)
    inputs, labels, positions = [], [], []
    for t in range(row * seq_len, (row + 1) * seq_len):
        fresh = t == row * seq_len or t in ends
        positions.append(0 if fresh else positions[-1] + 1)
        inputs.append(tokens[t])
        labels.append(IGNORE if t + 1 in ends else tokens[t + 1])
    return inputs, labels, positions


@pytest.mark.parametrize("doc_mask", [True, False])
@pytest.mark.parametrize("seq_len", [7, 64, 65])
def test_pack_rows_matches_reference(dataset, doc_mask, seq_len):
    middle = int(dataset.doc_ends[70]) // seq_len  # a document ends in this row
    rows = [middle, 0, dataset.num_rows(seq_len) - 1]
    batch = pack_rows(dataset, rows, seq_len, doc_mask)
    inputs, labels, positions = map(
        np.array, zip(*(reference_row(dataset, row, seq_len) for row in rows), strict=True)
    )
    if not doc_mask:
        positions = np.tile(np.arange(seq_len), (3, 1))
    shape = (1, 3 * seq_len) if doc_mask else (3, seq_len)
    for found, expected in (
        (batch.input_ids, inputs),
        (batch.labels, labels),
        (batch.position_ids, positions),
    ):
        assert found.dtype == torch.int64 and found.shape == shape
        assert np.array_equal(found.numpy().ravel(), expected.ravel())
    assert batch.num_valid == (labels != IGNORE).sum()
    assert (labels == IGNORE).any()
    assert batch.max_seqlen == seq_len and batch.sample_ids == rows
    if doc_mask:
        cu = batch.cu_seqlens
        assert cu.dtype == torch.int32 and len(cu) >= 16 and len(cu).bit_count() == 1
        starts = np.flatnonzero(positions.ravel() == 0)
        assert cu[: len(starts)].tolist() == starts.tolist()
        assert len(cu) > len(starts) and (cu[len(starts) :] == 3 * seq_len).all()
    else:
        assert batch.cu_seqlens is None


def test_cu_seqlens_always_ends_with_the_length(tmp_path):
    short = TokenDataset.open(write(tmp_path, [[1]] * 200), "train")  # documents of two tokens
    for seq_len in range(24, 40):  # 12 .. 20 documents: around the smallest bucket
        cu = pack_rows(short, [0], seq_len, True).cu_seqlens
        assert cu[0] == 0 and cu[-1] == seq_len and cu.diff().sum() == seq_len


def test_repeated_spans_stand_earlier_in_the_row():
    fresh = np.arange(2049)
    rows = [repeat_spans(fresh, np.random.default_rng(i)) for i in range(50)]
    assert (fresh == np.arange(2049)).all()  # the argument is left alone
    copied = np.stack(rows) != fresh
    assert not copied[:, :256].any() and 0.4 < copied.mean() < 0.6
    pairs = zip(rows, copied, strict=True)
    back = np.concatenate([fresh[c] - row[c] for row, c in pairs])
    assert 0.24 < (back < 256).mean() < 0.4 and (back > 1024).mean() > 0.15  # near and far
    again = 0
    for row in rows:
        seen = set()
        for t in range(1, len(row)):
            pair = (row[t - 1], row[t])
            again += row[t] != t and pair in seen
            seen.add(pair)
    assert 0.95 < again / copied.sum() < 0.99  # all but the first token of each span
    for n in range(10):  # such as the rest of a document, alone in its row
        assert len(repeat_spans(np.arange(n), np.random.default_rng(n))) == n


@pytest.mark.parametrize("doc_mask", [True, False])
def test_a_share_of_the_rows_has_repeated_spans(dataset, doc_mask):
    rows, seq_len = list(range(40)), 64
    plain = pack_rows(dataset, rows, seq_len, doc_mask)
    batch = pack_rows(dataset, rows, seq_len, doc_mask, 0.5, seed=3)
    cut = lambda t: t.reshape(len(rows), seq_len)  # noqa: E731
    changed = (cut(batch.input_ids) != cut(plain.input_ids)).any(1)
    assert 10 < changed.sum() < 30
    assert batch.num_valid == (batch.labels != IGNORE).sum() > plain.num_valid
    for part in ("input_ids", "labels", "position_ids"):
        new, old = cut(getattr(batch, part)), cut(getattr(plain, part))
        assert torch.equal(new[~changed], old[~changed])
    # Such a row is one document: each of its tokens may look at all before.
    assert torch.equal(cut(batch.labels)[changed, :-1], cut(batch.input_ids)[changed, 1:])
    assert (cut(batch.position_ids)[changed] == torch.arange(seq_len)).all()
    if doc_mask:
        starts = set(batch.cu_seqlens.tolist())
        for row in np.flatnonzero(changed.numpy()):
            assert starts.isdisjoint(range(row * seq_len + 1, (row + 1) * seq_len))
    again = pack_rows(dataset, rows[::-1], seq_len, doc_mask, 0.5, seed=3)
    assert torch.equal(cut(again.input_ids).flip(0), cut(batch.input_ids))
    other = pack_rows(dataset, rows, seq_len, doc_mask, 0.5, seed=4)
    assert not torch.equal(other.input_ids, batch.input_ids)
    every = pack_rows(dataset, rows, seq_len, doc_mask, 1.0)
    assert (cut(every.labels) != IGNORE).all()


def test_every_target_is_seen_once(dataset):
    """No token but the first is missing as a target: also the last target of each row."""
    seq_len = 16
    rows = list(range(dataset.num_rows(seq_len)))
    labels = pack_rows(dataset, rows, seq_len, False).labels.numpy().ravel()
    expected = dataset.read(1, len(labels))
    expected[dataset.doc_ends[dataset.doc_ends <= len(labels)] - 1] = IGNORE
    assert np.array_equal(labels, expected)


def test_batch_to(dataset):
    batch = pack_rows(dataset, [1, 2], 16, True)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.num_valid == batch.num_valid and batch.input_ids.device.type == "cpu"


# --- loader ---------------------------------------------------------------------------------


def loader(dataset, **kwargs):
    settings = {"seq_len": 16, "rows_per_step": 12, "micro_batch": 2, "seed": 5} | kwargs
    return PackedLoader(dataset, **settings)


def samples(batches):
    return [i for batch in batches for i in batch.sample_ids]


def test_an_epoch_sees_every_row_once_and_runs_on(dataset):
    n = dataset.num_rows(16) - 1
    assert n % 12  # the epoch ends inside a step
    stream = loader(dataset, select=np.arange(n))
    seen = [i for _ in range(2 * n // 12 + 1) for i in samples(stream.next_step())]
    stream.close()
    assert sorted(seen[:n]) == list(range(n)) == sorted(seen[n : 2 * n])
    assert seen[:n] != seen[n : 2 * n]
    assert stream.epoch == len(seen) / n


@pytest.mark.parametrize("world_size, micro_batch", [(2, 3), (3, 4), (6, 1)])
def test_samples_do_not_depend_on_world_size(dataset, world_size, micro_batch):
    one = loader(dataset, prefetch=0)
    ranks = [
        loader(dataset, rank=r, world_size=world_size, micro_batch=micro_batch, prefetch=r % 2)
        for r in range(world_size)
    ]
    for _ in range(20):
        alone = one.next_step()
        parts = [rank.next_step() for rank in ranks]
        assert all(len(part) == 12 // (world_size * micro_batch) for part in parts)
        together = samples([batch for part in parts for batch in part])
        assert sorted(together) == sorted(samples(alone))
        valid = sum(batch.num_valid for part in parts for batch in part)
        assert valid == sum(batch.num_valid for batch in alone)
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("steps", [0, 1, 9, 25])  # one epoch is about 23 steps
@pytest.mark.parametrize("prefetch, repeat", [(0, 0.0), (3, 0.0), (3, 0.5)])
def test_resume_is_exact(dataset, steps, prefetch, repeat):
    whole = loader(dataset, prefetch=prefetch, repeat=repeat)
    for _ in range(steps):
        whole.next_step()
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["samples"] == 12 * steps  # not what was only prefetched
    expected = [whole.next_step() for _ in range(30)]
    resumed = loader(dataset, prefetch=prefetch, repeat=repeat)
    resumed.next_step()  # a loader already under way must drop what it has prepared
    resumed.load_state_dict(state)
    for batches in expected:
        for a, b in zip(batches, resumed.next_step(), strict=True):
            assert a.sample_ids == b.sample_ids
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.cu_seqlens, b.cu_seqlens)
    assert resumed.state_dict() == whole.state_dict()
    whole.close()
    resumed.close()


def test_resume_with_another_batch_size_skips_nothing(dataset):
    first = loader(dataset, prefetch=0)
    seen = samples(first.next_step())
    second = loader(dataset, prefetch=0, rows_per_step=8)
    second.load_state_dict(first.state_dict())
    seen += samples(second.next_step())
    reference = loader(dataset, prefetch=0, rows_per_step=20)
    assert seen == samples(reference.next_step())


def test_resume_refuses_another_order(dataset, tmp_path):
    state = loader(dataset).state_dict()
    other = TokenDataset.open(write(tmp_path / "o", random_documents(150, seed=9)), "train")
    for changed, flag in (
        (loader(other), "--data"),
        (loader(dataset, seed=6), "--seed"),
        (loader(dataset, seq_len=8), "seq_len"),
        (loader(dataset, select=np.arange(50)), "--data"),
        (loader(dataset, repeat=0.5), "--data"),
    ):
        with pytest.raises(UserError, match=rf"{flag}: cannot resume the data order"):
            changed.load_state_dict(state)
    with pytest.raises(UserError, match=r"cannot resume"):
        loader(dataset).load_state_dict({})


@pytest.mark.parametrize("ahead", [1, 30])
def test_rows_looked_up_ahead_change_nothing(dataset, monkeypatch, ahead):
    far, near = loader(dataset, prefetch=0), loader(dataset, prefetch=0)
    for step in range(40):
        monkeypatch.setattr(data, "AHEAD", 4096)
        expected = samples(far.next_step())
        monkeypatch.setattr(data, "AHEAD", ahead)
        assert samples(near.next_step()) == expected
        if step == 20:  # back again
            state = near.state_dict() | {"samples": 12 * 5}
            near.load_state_dict(state)
            far.load_state_dict(state)


def test_close_and_go_on(dataset):
    plain, closing = loader(dataset, prefetch=0), loader(dataset, prefetch=2)
    for _ in range(4):
        assert samples(closing.next_step()) == samples(plain.next_step())
        closing.close()


def test_select_limits_the_rows(dataset):
    chosen = np.array([3, 10, 11, 40, 41, 42, 90])
    stream = loader(dataset, select=chosen, prefetch=0, rows_per_step=7, micro_batch=7)
    for _ in range(3):
        assert sorted(samples(stream.next_step())) == chosen.tolist()


def test_thread_error_surfaces_and_stays(dataset):
    stream = loader(dataset, prefetch=2)
    stream.next_step()
    stream.close()
    whole = dataset.read_into

    def read_into(out, start):
        raise OSError("the disk went away")

    dataset.read_into = read_into
    for _ in range(2):  # not a hang, not a silent restart
        with pytest.raises(OSError, match=r"the disk went away"):
            stream.next_step()
    dataset.read_into = whole
    assert stream.state_dict()["samples"] == 12
    stream.close()


def test_indivisible_batch_and_short_data_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match=r"global batch of 12 rows .* 2 ranks x micro-batch 4"):
        loader(dataset, world_size=2, micro_batch=4)
    with pytest.raises(UserError, match=r"micro-batch 0 must"):
        loader(dataset, micro_batch=0)
    short = TokenDataset.open(write(tmp_path / "s", [[1] * 15]), "train")  # 16 tokens
    loader(short, seq_len=15)
    for build in (loader, lambda d, seq_len: eval_batches(d, seq_len=seq_len, max_tokens=99)):
        with pytest.raises(UserError, match=r"16 tokens, expected at least 17"):
            build(short, seq_len=16)


def test_eval_batches_are_fixed_and_spread(dataset):
    batches = eval_batches(dataset, seq_len=16, max_tokens=16 * 10, micro_batch=4)
    rows = samples(batches)
    assert [len(batch.sample_ids) for batch in batches] == [4, 4, 2]
    n = dataset.num_rows(16)
    assert len(set(rows)) == 10 and rows == sorted(rows) and rows[0] == 0 and rows[-1] >= 0.85 * n
    again = eval_batches(dataset, seq_len=16, max_tokens=16 * 10, micro_batch=4)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(batches, again, strict=True))
    everything = eval_batches(dataset, seq_len=16, max_tokens=10**9, doc_mask=False)
    assert samples(everything) == list(range(n))
