"""Means of gradients over ranks against whole batches on one: accumulation, types, a tied head."""

from __future__ import annotations

import gc
import weakref

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import leave
from kit import random_ids, tiny_model

from distributed import data_parallel


def means_are_those_of_all(rank: int, ranks: int, rendezvous: str) -> None:
    """Two micro-batches a rank, of which the first is not sent; in three steps."""
    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    how = {"dtype": torch.float32, "tie_word_embeddings": True}
    model, whole = (tiny_model("LF", seed=seed, **how) for seed in (rank, 0))
    for m in (model, whole):
        m.few = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    params = list(model.parameters())
    ddp = data_parallel(params)
    assert all(p.equal(q) for p, q in zip(params, whole.parameters(), strict=True))

    def loss(model, seed: int):
        h = model.embed(random_ids(model, 1, 9, seed=seed))
        seq = model.seq_info(9, dtype=h.dtype)
        for block in model.layers:
            h = block(h, seq)
        return (model.norm(h) @ model.head_weight.T).logsumexp(-1).mean() * model.few.float().sum()

    messages: set[int] = set()
    for step in range(3):
        for p in (*params, *whole.parameters()):
            p.grad = None
        for r in range(ranks):
            for part in range(2):
                (loss(whole, 100 * step + 10 * r + part) / ranks).backward()
        loss(model, 100 * step + 10 * rank).backward()
        places = {p.grad.untyped_storage().data_ptr() for p in params}
        assert step < 2 or not places & messages  # so both are there (footprint.py)
        ddp()
        loss(model, 100 * step + 10 * rank + 1).backward()
        messages = {p.grad.untyped_storage().data_ptr() for p in params}
        for p, q in zip(params, whole.parameters(), strict=True):
            assert p.grad.is_contiguous()
            tolerance = 1e-5 if p.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)
    ended = weakref.ref(ddp)
    del ddp
    gc.collect()  # as every stage begins with: the messages' memory is free again
    assert ended() is None
    leave()


def test_means_are_those_of_all(tmp_path):
    mp.spawn(means_are_those_of_all, (2, str(tmp_path / "rendezvous")), nprocs=2)
