"""LoRA: low-rank adapters on the projections of attention, linear or softmax.

    python train_kd.py --layers 3:1 --distill_train lora --lora_rank 8 --max_steps 2

    y = W x + b + (alpha / r) B A dropout(x)        A [r, in], B [out, r]

(Hu et al. 2021, arXiv 2106.09685.) B starts at zero, so that a model with adapters is the model.
Adapters are merged into W before a student is saved. They are no `weight` of a module: AdamW takes
them, without decay, and FSDP2 leaves them whole in float32. Check: `pytest tests/test_lora.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import DistillConfig, UserError

FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
TARGETS = ("q", "k", "v", "o")


class LoRALinear(nn.Linear):
    """A Linear, its parameters and their names as they were, with an adapter lora_A, lora_B."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float, seed: int):
        out, into = linear.weight.shape
        super().__init__(into, out, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = alpha / rank, dropout
        # On the meta device weights have no values yet (fsdp.read_pieces); adapters have some.
        device = "cpu" if linear.weight.is_meta else linear.weight.device
        bound = 1 / math.sqrt(into)
        # From a generator of its own: all ranks, and a run that goes on, have the same.
        a = torch.empty(rank, into).uniform_(
            -bound, bound, generator=torch.Generator().manual_seed(seed)
        )
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        # Evaluations leave the mode alone; a stage that trains something else drops nothing.
        training = self.training and torch.is_grad_enabled() and self.lora_A.requires_grad
        narrow = F.linear(F.dropout(x, self.dropout, training), self.lora_A)
        return F.linear(x, self.weight, self.bias) + F.linear(narrow * self.scale, self.lora_B)

    def delta(self) -> Tensor:
        """What the adapter adds to W [out, in], float32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())


def wants_lora(cfg: DistillConfig) -> bool:
    """Whether a stage of the run trains adapters."""
    return any(getattr(cfg, name).train == "lora" for name in cfg.stage_names())


def adapters_alone(cfg: DistillConfig) -> bool:
    """Whether every stage of the run trains adapters, so that all else stays as it is."""
    return all(getattr(cfg, name).train == "lora" for name in cfg.stage_names())


def check_lora(cfg: DistillConfig) -> None:
    """UserError for flags of --lora_... that cannot be."""
    names = cfg.lora_targets.split(",")
    odd = [n for n in names if n not in TARGETS]
    if odd or len(set(names)) < len(names):
        raise UserError(
            f"--lora_targets: {cfg.lora_targets} found, some of {','.join(TARGETS)} expected"
        )
    if cfg.align.train in ("lora", "all"):
        raise UserError(f"--align_train: {cfg.align.train} found, mixers or feature_maps expected")
    if wants_lora(cfg) and cfg.lora_dropout and cfg.activation_checkpointing != "none":
        raise UserError(
            f"--lora_dropout: {cfg.lora_dropout:g} found with --activation_checkpointing "
            f"{cfg.activation_checkpointing}, which would draw it twice; 0 expected"
        )


def add_lora(model: nn.Module, cfg: DistillConfig) -> None:
    """An adapter on each target of every block's attention that has none yet, in place."""
    wanted = cfg.lora_targets.split(",")
    for i, block in enumerate(model.layers):
        for k, name in enumerate(wanted):
            path = block.attention.projections[name]
            linear = block.attention.get_submodule(path)
            if type(linear) is nn.Linear:  # mamba2 has one for q, k and v
                seed = (cfg.seed * len(model.layers) + i) * len(wanted) + k
                adapted = LoRALinear(linear, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, seed)
                block.attention.set_submodule(path, adapted)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> every adapter's parameter."""
    return {n: p for n, p in model.named_parameters() if is_lora(n)}


def is_lora(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W <- W + (alpha / r) B A, in place; no adapter is left. The sum is in float32 at least, as a
    small change rounds away in bfloat16. A weight that another model has too is left to that one.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                w = child.weight
                merged = w.float() + child.delta()
                plain.weight = nn.Parameter(merged.to(torch.promote_types(w.dtype, merged.dtype)))
                plain.bias = child.bias
                setattr(module, name, plain)
