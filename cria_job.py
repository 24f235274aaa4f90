"""A block-wise distillation (cria.py): its blocks, its folder, what it refuses, and a block of
the teacher as a model.

Check: `pytest tests/test_cria.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from config import DistillConfig, ModelConfig, UserError
from cria_files import SavedRows, read_tensor_file, sealed, unsealed
from distributed import World, main_first, start, this_process
from hf import HYBRIDS, load_type, model_type, read_config
from hybrid_layers import resolve_kernels, use_kernels
from layer_lists import auto_share
from mixture import Mixture
from model import Block, Transformer
from run_folder import check_run_folder, run_folder, take_folder
from shard_writer import write_file
from stage_plan import StagePlan, plan_stage, set_length
from student import preflight, run_identity
from tokenizer import load_tokenizer
from trainer import open_data, same_identity, set_up_torch


class Cria(Transformer):
    """Consecutive blocks of a model, without embedding, last norm and head: hidden states go in
    (`hidden`) and come out. Block j is layer `first_layer` + j of the whole."""

    def __init__(self, whole: ModelConfig, layers: range):
        nn.Module.__init__(self)
        self.config = block_config(whole, layers)
        self.first_layer, self.compiled = layers.start, False
        self.layers = nn.ModuleList(Block(self.config, i) for i in range(len(layers)))
        self.norm = nn.Identity()


def block_config(whole: ModelConfig, layers: range) -> ModelConfig:
    """Some layers of a model as a model's shape; a vocabulary of 1 stands for no embedding."""
    kinds = whole.layer_types[layers.start : layers.stop]
    linear = whole.layer_types[: layers.start].count("linear_attention")
    return dataclasses.replace(
        whole, num_hidden_layers=len(layers), layer_types=kinds, vocab_size=1,
        mixer=whole.mixer[linear : linear + kinds.count("linear_attention")],
    )  # fmt: skip


@dataclass
class Job:
    """What every step needs."""

    cfg: DistillConfig
    argv: list[str]
    folder: Path  # runs/RUN/cria
    teacher: ModelConfig
    student: ModelConfig
    layers: list[int]  # that become linear
    spec: str  # of the tokenizer
    identity: dict
    plans: list[StagePlan]
    data: Mixture
    ranks: World  # processes that torchrun started together
    world: World  # this one, by itself
    dtype: torch.dtype

    @property
    def blocks(self) -> list[range]:
        return cut(self.teacher.num_hidden_layers, self.cfg.cria)

    @property
    def trained(self) -> list[int]:
        """Blocks with a layer that becomes linear; the others are the teacher's."""
        return with_any(self.blocks, self.layers)

    def weights(self, block: int | str) -> Path:
        return self.folder / "weights" / name_of(block)

    def inputs(self, kind: str, block: int) -> Path:
        """Folder of saved inputs; kind: calibration or inputs."""
        return self.folder / kind / name_of(block)

    def saved(self, kind: str, block: int) -> SavedRows:
        return SavedRows(self.inputs(kind, block), pin=self.world.device.type == "cuda")

    def result(self, block: int) -> Path:
        return result_of(self.folder, block)


def cut(layers: int, size: int) -> list[range]:
    """Blocks of `size` layers; the last one may have fewer."""
    return [range(i, min(i + size, layers)) for i in range(0, layers, size)]


def with_any(blocks: list[range], layers: list[int]) -> list[int]:
    """Which of the blocks have one of the layers."""
    return [b for b, block in enumerate(blocks) if set(block) & set(layers)]


def largest(blocks: list[range], layers: list[int]) -> range:
    """The block with most of the layers: what fits for it fits for all, so it decides how many rows
    are taken at once."""
    return max(blocks, key=lambda block: len(set(block) & set(layers)))


def name_of(block: int | str) -> str:
    return block if isinstance(block, str) else f"block-{block:03d}"


def result_of(folder: Path, block: int) -> Path:
    """What is distilled of a block, in a run's folder cria."""
    return folder / "blocks" / name_of(block) / "trained"


def say(line: str) -> None:
    print(line, flush=True)


# ---- what is to be done


def refuse(cfg: DistillConfig) -> None:
    """UserError for flags that --cria cannot honour."""
    names = cfg.stage_names()
    if names[0] != "align":
        raise UserError(f"--stages: {cfg.stages} found, align first with --cria")
    for flag, value, why in (
        ("student", cfg.student, "blocks are of the teacher"),
        ("aligned", cfg.aligned, "blocks begin with the teacher's layers"),
    ):
        if value:
            raise UserError(f"--{flag}: {value} found, none expected with --cria: {why}")
    if auto_share(cfg.layers) is not None and not cfg.keep_layers:
        raise UserError(
            f"--layers: {cfg.layers} found, named ones expected with --cria: a choice needs the "
            f"whole student"
        )
    for flag in ("seq_len", "repeat_rows", "select_tokens"):
        if "block" in names and getattr(cfg.align, flag) != getattr(cfg.block, flag):
            raise UserError(
                f"--block_{flag}: {getattr(cfg.block, flag)} found, align's "
                f"{getattr(cfg.align, flag)} expected: both see the rows that were saved"
            )
    if cfg.resume not in ("never", "auto"):
        raise UserError(
            f"--resume: {cfg.resume} found, none expected with --cria, which goes on where --run is"
        )
    if cfg.trunk_dtype != "float32" and "block" in names and cfg.block.train == "all":
        raise UserError(
            f"--trunk_dtype: {cfg.trunk_dtype} found, float32 expected with --block_train all"
        )
    if cfg.share_trunk != "auto":
        raise UserError(f"--share_trunk: {cfg.share_trunk} found, auto expected with --cria")
    if model_type(cfg.teacher) in HYBRIDS:
        raise UserError(
            f"--teacher: a {model_type(cfg.teacher)} found, softmax layers or a model of ours "
            f"expected with --cria"
        )
    if cfg.cria_step != "all" and not cfg.run:
        raise UserError(f"--cria_step: {cfg.cria_step} found without --run, the name of the run")
    if cfg.cria_block >= 0 and cfg.cria_step != "train":
        raise UserError("--cria_block: found without --cria_step train")
    if not cfg.save_model:
        raise UserError("--save_model: False found, True expected with --cria")


def prepare(cfg: DistillConfig, argv: list[str]) -> Job:
    """Check the flags, open the data; the run's folder, if there is one, must be of this run."""
    refuse(cfg)
    named = bool(cfg.run)
    if not named:
        if this_process(cfg.device).size > 1:
            raise UserError("--run: none found; --cria under torchrun needs --run_name NAME")
        cfg = dataclasses.replace(cfg, run=run_folder(cfg, "train_kd").name)
    if not (run_folder(cfg, "") / "cria" / "cria.json").exists():
        check_run_folder(dataclasses.replace(cfg, resume="never"))  # another run's
    cfg = dataclasses.replace(cfg, resume="auto")
    layers, spec, student, _ = preflight(cfg)
    if not named:  # not before: what is refused leaves no folder
        new = dataclasses.replace(cfg, run="", resume="never")
        cfg = dataclasses.replace(cfg, run=take_folder(new, "train_kd").name)
    ranks = this_process(cfg.device)
    world = World(0, 1, ranks.device)  # who trains a block
    tokenizer = load_tokenizer(spec)
    start(ranks)
    dtype = set_up_torch(cfg, world)
    _, data, _ = main_first(ranks, lambda: open_data(cfg, tokenizer, build=True))
    names = [name for name in cfg.stage_names() if name in ("align", "block")]
    shape = block_config(student, largest(cut(student.num_hidden_layers, cfg.cria), layers))
    own = in_a_process(cfg)
    plans = [plan_stage(own, n, getattr(cfg, n), world, i, shape) for i, n in enumerate(names)]
    for plan in plans:
        set_length(plan, cfg, data)
        plan.seed = plans[0].seed  # which rows have repeated spans hangs on it: those were saved
    identity = run_identity(cfg, layers, True, plans, data, dtype)
    identity |= {"cria": cfg.cria, "steps": {plan.name: plan.steps for plan in plans}}
    teacher = read_config(cfg.teacher)
    job = Job(cfg, argv, run_folder(cfg, "") / "cria", teacher, student, layers, spec, identity,
              plans, data, ranks, world, dtype)  # fmt: skip
    if cfg.cria_block >= len(job.blocks):
        raise UserError(
            f"--cria_block: {cfg.cria_block} found, 0 to {len(job.blocks) - 1} expected"
        )
    if not cfg.dry_run:
        main_first(ranks, lambda: begin_folder(job))
    return job


def in_a_process(cfg: DistillConfig) -> DistillConfig:
    """The settings of a block's own process, which cuts nothing over ranks."""
    return dataclasses.replace(cfg, parallel="ddp", shard_ranks=0)


def begin_folder(job: Job) -> None:
    """Make the run's folder; what is there already must be of this run."""
    path = job.folder / "cria.json"
    if path.exists():
        same_identity("--run", path, unsealed(path), job.identity)
    elif job.cfg.cria_step in ("collect", "train", "stitch"):
        raise UserError(f"--run: no {path}; --cria_step shard makes it")
    else:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_file(path, sealed(job.identity))


def resident_groups(trained: list[int], most: int) -> list[range]:
    """Blocks that are in memory together while collecting, `most` at once (0: all). A group begins
    where inputs are saved anyway, so that it is longer where blocks without converted layers lie
    between. What is behind the last input is not needed."""
    starts = [0]
    for b in trained:
        if most and b - starts[-1] >= most:
            starts.append(b)
    return [range(a, z) for a, z in zip(starts, [*starts[1:], trained[-1] + 1], strict=True)]


def saved_by(group: range, trained: list[int]) -> list[int]:
    """Blocks whose inputs the pass over a group saves, that of the next group among them; the
    input of its own first block it reads."""
    return [b for b in trained if (b > group[0] or b == 0) and b <= group[-1] + 1]


def later_stages(cfg: DistillConfig) -> list[str]:
    """What the stitched student goes through, in an ordinary run."""
    return [n for n in cfg.stage_names() if n not in ("align", "block")]


def load_block(job: Job, b: int) -> Cria:
    """A block of the frozen teacher, in the compute type."""
    block = job.blocks[b]
    with torch.device("meta"):
        model = Cria(job.teacher, block)
    tensors = {}
    for name, tensor in read_tensor_file(job.weights(b)).items():
        _, layer, rest = name.split(".", 2)
        if not rest.endswith("rotary_emb.inv_freq"):
            tensors[f"layers.{int(layer) - block.start}.{rest}"] = tensor.to(
                job.world.device, load_type(name, tensor, job.dtype)
            )
    missing = sorted(model.state_dict().keys() - tensors.keys())
    if missing:
        _, layer, rest = missing[0].split(".", 2)
        name = f"layers.{int(layer) + block.start}.{rest}"
        raise UserError(f"{job.cfg.teacher}: weight {name} is missing ({len(missing)} in all)")
    model.load_state_dict(tensors, assign=True)
    kernels = resolve_kernels(model.config, job.cfg.kernel, job.world.device, job.cfg.dtype)
    use_kernels(model, kernels, job.world.device)
    return model.eval().requires_grad_(False)
