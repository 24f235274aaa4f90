"""What a run would take of work, memory and disk, by its settings and its models' shapes alone.

    python train_kd.py --plan --teacher configs/shapes/llama-3.1-70b --plan_device 8xH100

`distillation` and `pretraining` make a `Budget`, budget.py prints it. Nothing is loaded and no
device is touched. What models, optimizers and checkpoints hold is exact (footprint.py, room.py);
activations are estimates, and docs/performance.md says how far off they were.
Check: `pytest tests/test_planner.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import torch

from budget import GIB, Budget, StageBudget
from config import DistillConfig, ModelConfig, PretrainConfig, TrainConfig, UserError
from distributed import World, this_process
from flops import (
    MEMORY_GIB,
    MEMORY_SEEN,
    PEAK_FLOPS,
    StageFlops,
    peak_flops,
    peak_of_name,
    stage_flops,
    uses_teacher,
)
from footprint import (
    RUNTIME,
    WORK,
    Machine,
    Stage,
    evaluation_memory,
    gathered_bytes,
    held,
    meta_model,
    on_meta,
    stage_memory,
)
from fsdp import keeps_gathered, wants_fsdp
from hf import DTYPES, read_config, tokenizer_spec
from hybrid_layers import cast_trunk, mixer_parameters
from layer_lists import auto_share
from lora import adapters_alone, add_lora, is_lora, wants_lora
from model import Transformer
from room import (
    LAYER_BYTES,
    ROW_BYTES,
    RUN_BYTES,
    STATE_BYTES,
    Saves,
    check_room,
    disk_parts,
    file_bytes,
    tokenizer_bytes,
)
from search import uniform_pattern
from stage_plan import StagePlan, plan_stage
from student import narrow, set_trainable, shares_trunk, to_save
from tokenizer import load_tokenizer
from trainer import compile_wanted, compute_dtype, open_data

# ---- the machine


def planned_world(cfg: TrainConfig) -> tuple[World, str]:
    """Ranks and device, of --plan_device if it names one; the device's name."""
    if not cfg.plan_device:
        world = this_process(cfg.device)
        name = world.device.type
        return world, torch.cuda.get_device_name(world.device) if name == "cuda" else name
    found = re.fullmatch(r"(?:(\d+)x)?(.+)", cfg.plan_device)
    part = next((p for p in PEAK_FLOPS if re.search(rf"\b{p}\b", found[2])), None)
    count = int(found[1] or 1)
    if part is None or not count:
        raise UserError(
            f"--plan_device: '{cfg.plan_device}' found, one of {', '.join(PEAK_FLOPS)} expected, "
            f"several as in 8xH100"
        )
    memory = int(MEMORY_GIB[part] * GIB * MEMORY_SEEN)
    return World(0, count, torch.device("cuda", 0), memory), found[2]


def machine(cfg: TrainConfig, config: ModelConfig, teacher: ModelConfig | None = None) -> Machine:
    """What a run of models of these shapes computes on."""
    world, name = planned_world(cfg)
    dtype = DTYPES.get(cfg.dtype)
    if dtype is None:  # all cards of the table have bfloat16
        dtype = torch.bfloat16 if cfg.plan_device else compute_dtype(cfg.dtype, world.device)
    shards = (cfg.shard_ranks or world.size) if wants_fsdp(cfg, world, config) else 1
    keep = shards > 1 and keeps_gathered(cfg, world, filter(None, (config, teacher)))
    return Machine(world, name, dtype, compile_wanted(cfg, world), shards, keep)


def peak_rate(cfg: TrainConfig, m: Machine) -> float | None:
    """FLOP/s of one device; None where they are not known."""
    if cfg.plan_device and not cfg.peak_flops:
        return peak_of_name(m.name, m.dtype)
    return peak_flops(m.world.device, m.dtype, cfg.peak_flops)


# ---- stages


def planned_student(
    cfg: DistillConfig, config: ModelConfig, layers: list[int], dtype: torch.dtype, fsdp: bool
) -> Transformer:
    """`student.build_models`'s, each parameter in its dtype, with its adapters."""
    model = meta_model(config)
    if shares_trunk(cfg, fsdp):
        mixers = mixer_parameters(model, layers)
        for name, p in model.named_parameters():
            p.data = p.data.to(p.dtype if name in mixers else dtype)
    elif cfg.trunk_dtype != "float32":
        cast_trunk(model, layers, DTYPES[cfg.trunk_dtype])
    if adapters_alone(cfg):
        narrow(model, dtype)
    if wants_lora(cfg):
        add_lora(model, cfg)
    return model


def distillation_stages(
    cfg: DistillConfig, plans: list[StagePlan], layers: list[int], config: ModelConfig,
    convert: bool, dtype: torch.dtype, fsdp: bool,
) -> Iterator[Stage]:  # fmt: skip
    """The stages of train_kd.py, one at a time: the next one changes what the student trains.
    Layers still to be searched for are taken to be spread evenly."""
    student = planned_student(cfg, config, layers, dtype, fsdp)
    searched = auto_share(cfg.layers) if convert and not cfg.keep_layers else None
    for plan in plans:
        if searched is not None and plan.name != "align":
            chosen = uniform_pattern(layers, searched)
            source = read_config(cfg.student or cfg.teacher).layer_types
            again = [i for i in layers if i not in chosen]
            kinds = [source[i] if i in again else k for i, k in enumerate(config.layer_types)]
            linear = [i for i, kind in enumerate(kinds) if kind == "linear_attention"]
            names = [config.mixer_name(i) for i in linear]
            config = dataclasses.replace(config, layer_types=kinds, mixer=names)
            layers, searched = chosen, None
            student = planned_student(cfg, config, layers, dtype, fsdp)
        set_trainable(student, plan.stage, layers)
        stage = on_meta(plan, student, layers)
        stage.objective.saved = to_save(stage.objective, cfg, plan.name, student, convert)
        yield stage


def total_flops(plan: StagePlan, work: StageFlops) -> float:
    """FLOPs of a stage whose tokens need `work` each."""
    tokens = plan.steps * plan.stage.batch_tokens
    taught = min(tokens, plan.stage.unique_tokens or tokens)  # what is kept is computed once
    return taught * work.teacher + tokens * (work.forward + work.backward)


def stage_budget(
    cfg: TrainConfig, stage: Stage, teacher: ModelConfig | None, known: bool, shared: int = 0
) -> StageBudget:
    """Work and saves; teacher: also --reference of train.py; shared: as `stage_flops`."""
    plan, s = stage.plan, stage.plan.stage
    kind = plan.name if isinstance(cfg, DistillConfig) else "pretrain"
    guided = uses_teacher(kind, s)
    work = stage_flops(
        kind, stage.student.config, teacher, s.seq_len, s.train, shared, guided=guided
    )
    total = total_flops(plan, work)
    trained = sum(p.numel() for p in stage.objective.params.values())
    count = 1
    if cfg.save_every:
        count = -(-plan.steps // cfg.save_every) if known else cfg.keep_checkpoints + 1
    saves = Saves(plan.name, count, cfg.save_every, file_bytes(stage.tensors()) + STATE_BYTES)
    width = ROW_BYTES + LAYER_BYTES * len(stage.layers) * (kind == "align")
    logs = plan.steps // cfg.log_every * width
    return StageBudget(plan.name, plan, trained, work, total, saves, logs)


def on_disk(
    cfg: TrainConfig, stages: list[StageBudget], student: Transformer, tokenizer_from: str
) -> tuple[list[tuple[str, int]], int]:
    """`room.disk_parts` of a run that saves this student at its end."""
    named = dict(student.named_parameters())
    adapted = {n.rpartition(".")[0] for n in named if is_lora(n)}  # and merged into float32
    saved = {
        f"model.{n}": p.float() if n.removesuffix(".weight") in adapted else p
        for n, p in named.items() if not is_lora(n)
    }  # fmt: skip
    model = file_bytes(saved) + tokenizer_bytes(tokenizer_from)
    logs = RUN_BYTES + sum(stage.logs for stage in stages)
    return disk_parts(cfg, [stage.saves for stage in stages], model, logs)


# ---- runs


def distillation(
    cfg: DistillConfig, layers: list[int], config: ModelConfig, convert: bool, full: bool = True
) -> Budget:
    """The budget of train_kd.py; arguments as `student.preflight` returns them. full: memory too,
    and the length by the data where --epochs asks for it."""
    teacher = read_config(cfg.teacher)
    m = machine(cfg, config, teacher)
    fsdp = m.shards > 1
    names = cfg.stage_names()
    plans = [plan_stage(cfg, n, getattr(cfg, n), m.world, i, config) for i, n in enumerate(names)]
    budget = Budget(m, peak_rate(cfg, m), [], known=not cfg.epochs)
    if cfg.epochs and full:
        budget.known = take_epochs(cfg, plans)
    first = min(layers) if shares_trunk(cfg, fsdp) and not wants_lora(cfg) else 0
    guide = meta_model(teacher, m.dtype)
    base = {"runtime": RUNTIME[m.world.device.type]}
    base["teacher"] = held(guide.named_parameters(), m.shards)
    for stage in distillation_stages(cfg, plans, layers, config, convert, m.dtype, fsdp):
        student = stage.student
        budget.stages.append(stage_budget(cfg, stage, teacher, budget.known, first))
        if not full:
            continue
        own = dict(student.named_parameters())
        if shares_trunk(cfg, fsdp):
            mixers = mixer_parameters(student, stage.layers)
            own = {n: p for n, p in own.items() if n in mixers or is_lora(n)}
        base["student"] = held(own.items(), m.shards)
        if fsdp:
            base["gathered blocks"] = gathered_bytes(m, [guide, student])
        float8 = {}
        if cfg.teacher_float8 and stage.plan.name != "align":
            float8["teacher in float8"] = sum(p.numel() for p in guide.layers[first:].parameters())
        memory = base | float8 | stage_memory(cfg, m, stage, teacher)
        if not budget.moments and (convert or not (fsdp and cfg.student)):
            whole = {"runtime": base["runtime"], "teacher": held(guide.named_parameters())}
            whole["student"] = held(own.items()) * (2 if cfg.student and convert else 1)
            budget.moments["loading"] = whole | calibration(cfg, config, convert)
        seq_len = cfg.eval_seq_len or plans[-1].stage.seq_len
        evaluation = base | evaluation_memory(cfg, m, student, teacher, seq_len, first)
        if not m.gpu:  # one comes after the stage, of which malloc has given nothing back
            memory[WORK] = max(memory[WORK], evaluation[WORK])
        budget.moments["evaluation"] = evaluation
        budget.stages[-1].memory = memory
    budget.disk, budget.there = on_disk(cfg, budget.stages, student, cfg.tokenizer or cfg.teacher)
    if auto_share(cfg.layers) is not None and not cfg.keep_layers:
        budget.notes.append("the search of layers is not counted")
    return budget


def take_epochs(cfg: DistillConfig, plans: list[StagePlan]) -> bool:
    """Give the plans the length that --epochs means; False where the data is not there yet."""
    found = open_data(cfg, load_tokenizer(cfg.tokenizer or tokenizer_spec(cfg.teacher)))
    for plan in plans if found else ():
        plan.take_epochs(cfg, found[1])
    return found is not None


def calibration(cfg: DistillConfig, config: ModelConfig, convert: bool) -> dict[str, int]:
    """What fitting a mixer to its layer takes: each head's share of the output, three times over
    (mixers/base.py)."""
    if not convert or cfg.aligned or not config.mixer or not cfg.calibrate_tokens:
        return {}
    outputs = cfg.calibrate_tokens * config.linear_num_value_heads * config.hidden_size
    return {"calibration": 3 * 4 * outputs}


def pretraining(
    cfg: PretrainConfig, config: ModelConfig, rows: int | None, full: bool = True
) -> Budget:
    """The budget of train.py. rows: of the data set; None where they are not known."""
    m = machine(cfg, config)
    reference = read_config(cfg.reference) if cfg.reference else None
    plan = plan_stage(cfg, "pretrain", cfg.stage(rows or 0), m.world)
    known = rows is not None or bool(cfg.max_steps and not cfg.epochs)
    model = meta_model(config)
    stage = on_meta(plan, model, [])
    budget = Budget(m, peak_rate(cfg, m), [stage_budget(cfg, stage, reference, known)], known=known)
    budget.disk, budget.there = on_disk(cfg, budget.stages, model, cfg.tokenizer)
    if not full:
        return budget
    base = {"runtime": RUNTIME[m.world.device.type]}
    models = [model]
    if reference is not None:
        models.append(meta_model(reference, m.dtype))
        base["reference"] = held(models[1].named_parameters())
    whole = base | {"model": held(model.named_parameters())}
    base["model"] = held(model.named_parameters(), m.shards)
    if m.shards > 1:
        budget.moments["loading"] = whole
        base["gathered blocks"] = gathered_bytes(m, [model])
    seq_len = cfg.eval_seq_len or plan.stage.seq_len
    evaluation = evaluation_memory(cfg, m, model, None, seq_len, 0)
    budget.moments["evaluation"] = base | evaluation
    budget.stages[0].memory = base | stage_memory(cfg, m, stage, None)
    return budget


def check_disk(cfg: TrainConfig, budget: Budget) -> None:
    """UserError where the disk is too small for the run."""
    check_room(cfg, budget.disk, budget.there)
