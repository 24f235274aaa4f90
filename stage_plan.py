"""A stage cut to steps, rows and micro-batches for a number of ranks.

Check: `pytest tests/test_trainer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from config import ModelConfig, StageConfig, TrainConfig, UserError
from data import require_rows
from distributed import World
from flops import kept_bytes
from fsdp import keeps_gathered, wants_fsdp
from mixture import Mixture
from model import Transformer

MICRO_BATCH_TOKENS = 32_768  # where memory is not known
MOST_TOKENS = 131_072  # of a micro-batch that is chosen by memory


@dataclass
class StagePlan:
    """A stage cut to steps, rows and micro-batches for this number of ranks."""

    name: str
    stage: StageConfig
    steps: int
    rows: int  # per step, over all ranks
    micro_batch: int  # rows per micro-batch and rank
    seed: int

    def set_tokens(self, tokens: int, max_steps: int) -> None:
        """Give the stage another length."""
        self.stage.tokens = max(1, tokens)
        self.steps = self.stage.steps(max_steps)

    def take_epochs(self, cfg: TrainConfig, data: Mixture) -> None:
        """The length that --epochs means on this data."""
        tokens = data.num_tokens
        if cfg.packing == "best_fit":
            tokens = sum(data.rows(self.stage.seq_len).sizes) * self.stage.seq_len
        self.set_tokens(int(cfg.epochs * tokens), cfg.max_steps)

    @property
    def mixer_lr(self) -> float:
        """0 where mixers have no learning rate of their own; adapters have the stage's."""
        return 0.0 if self.stage.train == "lora" else self.stage.mixer_lr

    def line(self, world: World) -> str:
        s = self.stage
        count = self.rows // (self.micro_batch * world.size)
        return (
            f"{self.name}: {self.steps} steps x {s.batch_tokens:,} tokens = "
            f"{self.steps * s.batch_tokens:,}; step = {world.size} ranks x {count} micro-batches x "
            f"{self.micro_batch} rows x {s.seq_len} tokens; trains {s.train}, lr {s.lr:g}"
            + (f", mixers {self.mixer_lr:g}" if self.mixer_lr else "")
        )


def set_length(plan: StagePlan, cfg: TrainConfig, data: Mixture) -> None:
    """Refuse data that a step cannot be made of, and apply --epochs."""
    require_rows(data, plan.stage.seq_len, plan.rows)
    if cfg.epochs:
        plan.take_epochs(cfg, data)


def micro_batch_tokens(
    cfg: TrainConfig, name: str, stage: StageConfig, world: World, config: ModelConfig
) -> int:
    """Tokens of a micro-batch: on CUDA as many as are likely to fit beside a student and a teacher
    of this shape. The fewer micro-batches, the less a small model waits for the host."""
    if world.device.type != "cuda":
        return MICRO_BATCH_TOKENS
    with torch.device("meta"):
        params = Transformer(config).num_params()
    # Teacher and compute type 2 bytes each; float32 weights, gradients and two AdamW states 16.
    weights = params * (20 if stage.train == "all" else 6)
    if wants_fsdp(cfg, world, config):
        weights //= cfg.shard_ranks or world.size
        if keeps_gathered(cfg, world, [config] * 2):
            weights += params * 4
    token = kept_bytes(config, cfg.activation_checkpointing)
    if name == "align":  # one layer at a time
        token = 2 * token // config.num_hidden_layers
    room = 0.75 * world.gpu_memory - weights
    return min(MOST_TOKENS, max(int(room / token), 0))


def plan_stage(
    cfg: TrainConfig, name: str, stage: StageConfig, world: World, index: int = 0,
    config: ModelConfig | None = None,
) -> StagePlan:  # fmt: skip
    """Divide the global batch over ranks; UserError when it does not divide. config: the student's,
    where micro-batches are to be chosen by memory."""
    rows = stage.rows_per_step(name)
    if cfg.accumulation_steps and not stage.micro_batch:
        share, rest = divmod(rows, cfg.accumulation_steps)
        if rest or not share:
            raise UserError(
                f"--accumulation_steps: {cfg.accumulation_steps} found, a divisor of the {rows} "
                f"rows of a step expected"
            )
        micro = share
    elif stage.micro_batch:
        micro = stage.micro_batch
    else:
        per_rank = max(1, rows // world.size)
        limit = MICRO_BATCH_TOKENS
        if config is not None:
            limit = micro_batch_tokens(cfg, name, stage, world, config)
        limit = max(1, limit // stage.seq_len)
        micro = max(m for m in range(1, per_rank + 1) if per_rank % m == 0 and m <= limit)
    if rows % (world.size * micro):
        flag = f"--{name}_batch_tokens"
        if name == "pretrain":
            flag = "--accumulation_steps" if cfg.accumulation_steps else "--batch_size"
        raise UserError(
            f"{flag}: {rows} rows of {stage.seq_len} tokens a step found, a multiple of "
            f"{world.size} ranks x {micro} rows of a micro-batch expected"
        )
    steps = stage.steps(cfg.max_steps)
    return StagePlan(name, stage, steps, rows, micro, cfg.seed + 1009 * index)
