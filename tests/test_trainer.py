"""How a step is cut into micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import trainer
from benchmarks.decode import SHAPES
from config import DistillConfig, ModelConfig, UserError
from distributed import World
from hybrid_layers import convert_config
from layer_lists import parse_layers
from stage_plan import plan_stage

CUDA = World(0, 1, torch.device("cuda"))


def hybrid(shape: str) -> ModelConfig:
    config = ModelConfig(**SHAPES[shape])
    return convert_config(config, parse_layers("3:1", config.num_hidden_layers), "gated_deltanet")


def rows(monkeypatch, shape: str, gigabytes: int, stage="distill", world=CUDA, **flags) -> int:
    """Rows of a micro-batch where the device has so much memory."""
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(trainer.torch.cuda, "get_device_properties", lambda device: memory)
    cfg = DistillConfig(**flags)
    return plan_stage(cfg, stage, getattr(cfg, stage), world, config=hybrid(shape)).micro_batch


def test_micro_batches_are_chosen_by_memory(monkeypatch):
    """A step of distill has 32 rows of 4096 tokens; those that fit go together."""
    cfg = DistillConfig()
    assert (cfg.distill.batch_tokens, cfg.distill.seq_len) == (131_072, 4096)
    assert rows(monkeypatch, "smollm2-135m", 85) == 16
    assert rows(monkeypatch, "smollm2-135m", 24) == 4
    assert rows(monkeypatch, "qwen2.5-1.5b", 85) == 2
    assert rows(monkeypatch, "qwen2.5-1.5b", 85, activation_checkpointing="full") == 16
    assert rows(monkeypatch, "qwen2.5-1.5b", 8) == 1  # too small, but the run may try
    assert rows(monkeypatch, "smollm2-135m", 1000) == 32
    assert rows(monkeypatch, "smollm2-135m", 85, world=World(0, 8, CUDA.device)) == 4
    # One layer at a time: all of the step's 96 rows of 512.
    assert rows(monkeypatch, "qwen2.5-1.5b", 85, "align") == 96


def test_elsewhere_by_a_constant(monkeypatch):
    world = World(0, 1, torch.device("cpu"))
    assert rows(monkeypatch, "qwen2.5-1.5b", 85, world=world) == 8
    assert plan_stage(DistillConfig(), "distill", DistillConfig().distill, CUDA).micro_batch == 8


def test_what_does_not_divide_is_refused():
    cfg = DistillConfig(accumulation_steps=5)
    with pytest.raises(UserError, match="--accumulation_steps: 5 found"):
        plan_stage(cfg, "distill", cfg.distill, CUDA)
