"""Sums of gradients over ranks against whole batches on one: messages, types, parts left out."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import leave
from kit import random_ids, tiny_model

from distributed import World
from gradient_sums import GradientSums


def sums_are_those_of_all(rank: int, ranks: int, rendezvous: str, message: int) -> None:
    """Two micro-batches a rank, of which the first is not sent; a tied head, a first block that no
    loss reaches; twice, as in two steps."""
    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    world = World(rank, ranks, torch.device("cpu"))
    how = {"dtype": torch.float32, "tie_word_embeddings": True}
    model, whole = (tiny_model("LFL", seed=seed, **how) for seed in (rank, 0))
    for m in (model, whole):
        m.layers[1].mlp.few = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    params = list(model.parameters())
    with mock.patch.object(GradientSums, "MESSAGE", message):
        sums = GradientSums(params, world)
    assert all(p.equal(q) for p, q in zip(params, whole.parameters(), strict=True))
    assert sum(map(len, sums.messages)) == len(params)
    assert len(sums.messages) == (2 if message > 1 else len(params))

    def loss(model, seed: int):
        h = model.embed(random_ids(model, 1, 9, seed=seed))
        seq = model.seq_info(9, dtype=h.dtype)
        for block in model.layers[1:]:
            h = block(h, seq)
        few = model.layers[1].mlp.few.float().sum()
        return (model.norm(h) @ model.head_weight.T).logsumexp(-1).mean() * few

    for step in range(2):
        for p in (*params, *whole.parameters()):
            p.grad = None
        for r in range(ranks):
            for part in range(2):
                loss(whole, 100 * step + 10 * r + part).backward()
        loss(model, 100 * step + 10 * rank).backward()
        assert not sums.sent
        sums.begin()
        loss(model, 100 * step + 10 * rank + 1).backward()
        assert message > 1 or 0 < len(sums.sent) < len(sums.messages)  # while it ran, most of them
        sums.end()
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == name.startswith("layers.0."), name
            if p.grad is not None:
                assert p.grad.is_contiguous() and p.grad.data_ptr() % 16 == 0
                tolerance = 1e-5 if p.dtype == torch.float32 else 2e-2
                torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)
    leave()


@pytest.mark.parametrize("message", [1, 2**30])
def test_sums_are_those_of_all(message, tmp_path):
    mp.spawn(sums_are_those_of_all, (2, str(tmp_path / "rendezvous"), message), nprocs=2)
