"""Chunk tables of packed documents from bounds that the host knows."""

from __future__ import annotations

import pytest
import torch

from data import Batch
from ops import bounds as module
from ops.bounds import chunk_table, known_chunk_table, remember

BOUNDS = torch.tensor([0, 1, 64, 129, 129, 300, 300], dtype=torch.int32)


@pytest.fixture(autouse=True)
def forget():
    module._known.clear()


def test_every_chunk_of_every_document():
    """Lengths 1, 63, 65, 0, 171, 0."""
    expected = [(0, 0), (1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2)]
    table = chunk_table(BOUNDS, 64)
    assert table.dtype == torch.int32 and list(map(tuple, table.tolist())) == expected


@pytest.mark.parametrize("chunk", [16, 64])
def test_it_is_flas_table(chunk):
    index = pytest.importorskip("fla.ops.utils.index")
    assert torch.equal(chunk_table(BOUNDS, chunk), index.prepare_chunk_indices(BOUNDS, chunk))


def test_only_what_was_remembered_is_known(monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    tensors = [BOUNDS.clone() for _ in range(3)]
    assert known_chunk_table(tensors[0], 64) is None
    for t in tensors:
        remember(t, BOUNDS)
    assert known_chunk_table(tensors[0], 64) is None  # the oldest went
    table = known_chunk_table(tensors[2], 64)
    assert torch.equal(table, chunk_table(BOUNDS, 64))
    assert known_chunk_table(tensors[2], 64) is table
    assert known_chunk_table(tensors[2][:3], 64) is None  # the same address, but fewer documents


def batch(device: str) -> Batch:
    tokens = torch.zeros(1, 300, dtype=torch.int64)
    return Batch(tokens, tokens, tokens, BOUNDS.clone(), 300, 300, [0]).to(device)


def test_on_a_cpu_nothing_is_remembered():
    batch("cpu")
    assert not module._known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_moving_a_batch_needs_no_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = known_chunk_table(batch("cuda").cu_seqlens, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(table.cpu(), chunk_table(BOUNDS, 64))
