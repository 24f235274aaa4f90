"""The real checkpoint: our perplexity is transformers', and the q/k row order matters."""

from __future__ import annotations

import math
import pydoc_data.topics

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from hf import load_model
from tokenizer import load_tokenizer

FOLDER = ROOT / "models" / "smollm2-135m"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="model not downloaded"),
]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """[3, 513] ids of the language reference."""
    text = "\n\n".join(pydoc_data.topics.topics[k] for k in ("lambda", "with", "exprlists", "for"))
    ids = load_tokenizer(str(FOLDER)).encode(text)
    return torch.tensor(ids[: 3 * 513]).view(3, 513)


def perplexity(logits_of, windows: torch.Tensor) -> float:
    with torch.no_grad():
        logits = logits_of(windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten())
    return math.exp(loss)


def test_perplexity_equals_transformers(windows):
    from transformers import AutoModelForCausalLM

    ours = load_model(FOLDER, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert ours.num_params() == 134_515_008
    mine = perplexity(lambda ids: ours(ids) @ ours.head_weight.T, windows)
    expected = perplexity(lambda ids: theirs(ids).logits, windows)
    assert mine == pytest.approx(expected, rel=1e-4)
    assert 3 < mine < 40


def test_permuted_rows_are_noticed(windows):
    """llama.cpp stores q and k rows in pairs; a converter that leaves them so ruins the model."""
    model = load_model(FOLDER, dtype=torch.float32)
    right = perplexity(lambda ids: model(ids) @ model.head_weight.T, windows)
    for block in model.layers:
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj):
            rows = linear.weight.data.view(-1, 2, model.config.head_dim // 2, linear.in_features)
            linear.weight.data = rows.transpose(1, 2).reshape(linear.weight.shape).contiguous()
    wrong = perplexity(lambda ids: model(ids) @ model.head_weight.T, windows)
    assert wrong > 3 * right
