"""What a block-wise distillation would take; planner.py does the same for the other runs.

    python train_kd.py --plan --cria 9 --teacher configs/shapes/llama-3.1-405b --layers all

Memory is that of the largest block, which is planned as a small model without a vocabulary.
Check: `pytest tests/test_cria_plan.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from budget import Budget, StageBudget
from config import DistillConfig
from cria_files import PART_BYTES, is_finished
from cria_job import (
    block_config,
    cut,
    in_a_process,
    largest,
    later_stages,
    refuse,
    resident_groups,
    result_of,
    saved_by,
    with_any,
)
from flops import StageFlops, forward_flops, stage_flops
from footprint import RUNTIME, held, meta_model, stage_memory
from hf import read_config
from planner import (
    distillation,
    distillation_stages,
    machine,
    peak_rate,
    stage_budget,
    total_flops,
)
from room import Saves, tokenizer_bytes
from run_folder import run_folder
from stage_plan import StagePlan, plan_stage
from student import preflight, shares_trunk

SIDECAR_BYTES = 250  # of a .json
# Parts of the disk: checkpoints of blocks go before there is a student or what comes after it.
IN_TRAINING, STUDENT = "checkpoints of blocks in training", "the stitched student"
GONE_BY_THEN = "of the checkpoints and what follows, the smaller"


def cria_budget(cfg: DistillConfig, full: bool = True) -> Budget:
    """The budget of `train_kd.py --cria`, with what comes after the blocks; full: memory too."""
    refuse(cfg)
    layers, _, student, _ = preflight(dataclasses.replace(cfg, plan=True))
    teacher = read_config(cfg.teacher)
    blocks = cut(teacher.num_hidden_layers, cfg.cria)
    trained = with_any(blocks, layers)
    shapes = [(block_config(teacher, blocks[b]), block_config(student, blocks[b])) for b in trained]
    names = [n for n in cfg.stage_names() if n in ("align", "block")]
    own = dataclasses.replace(in_a_process(cfg), stages=",".join(names))
    most = trained.index(blocks.index(largest(blocks, layers)))
    m = machine(own, shapes[most][1])
    alone = dataclasses.replace(m, world=dataclasses.replace(m.world, size=1))
    plans = [plan_stage(own, n, getattr(own, n), alone.world, i, shapes[most][1])
             for i, n in enumerate(names)]  # fmt: skip
    budget = Budget(m, peak_rate(cfg, m), [], known=not cfg.epochs)
    rows = distinct_rows(plans[0])
    budget.stages.append(collection(cfg, plans[0], teacher, blocks, trained, rows, alone))
    local = [i - blocks[trained[most]].start for i in layers if i in blocks[trained[most]]]
    guide, shape = shapes[most]
    for stage in distillation_stages(own, plans, local, shape, True, m.dtype, False):
        found = stage_budget(own, stage, guide, budget.known)
        s = stage.plan.stage
        work = [
            stage_flops(found.name, mine, theirs, s.seq_len, s.train) for theirs, mine in shapes
        ]
        found.flops = sum(total_flops(stage.plan, w) for w in work)
        if full:
            ours = {
                n: p
                for n, p in stage.student.named_parameters()
                if not shares_trunk(own, False) or p.dtype != m.dtype or p.requires_grad
            }
            found.memory = {
                "runtime": RUNTIME[m.world.device.type],
                "teacher": held(meta_model(guide, m.dtype).named_parameters()),
                "student": held(ours.items()), **stage_memory(own, alone, stage, guide),
            }  # fmt: skip
        budget.stages.append(found)
    folder = run_folder(cfg, "") / "cria"
    left = [b for b in trained if not (cfg.run and is_finished(result_of(folder, b)))]
    budget.disk = disk(cfg, budget, student, layers, blocks, trained, rows, len(left))
    if cfg.run:
        needless = () if left else ("inputs", "calibration")
        budget.there = sum(
            p.stat().st_size for p in folder.rglob("*.safetensors")
            if p.relative_to(folder).parts[0] not in needless
        )  # fmt: skip
    budget.notes.append(
        f"collect, align, block: {len(trained)} blocks of {cfg.cria} layers, steps and FLOPs of a "
        f"token those of one; hours those of all, collect on one GPU, the others on {m.world.size}"
    )
    later = later_stages(cfg)
    if later:
        rest = dataclasses.replace(
            cfg, cria=0, stages=",".join(later), student=str(folder),
            resume="auto" if cfg.run else "never",
        )  # fmt: skip
        after = distillation(rest, layers, student, False, full)
        budget.stages += after.stages
        budget.moments |= after.moments
        budget.disk += [(f"{name} (after the blocks)", size) for name, size in after.disk]
        budget.there += after.there
    size, names = dict(budget.disk), [name for name, _ in budget.disk]
    later = sum(size[name] for name in names[names.index(STUDENT) :])
    budget.disk.append((GONE_BY_THEN, -min(size[IN_TRAINING], later)))
    return budget


def distinct_rows(plan: StagePlan) -> int:
    """Rows that align sees, each once; of a smaller data set there are fewer."""
    seen = plan.steps * plan.rows
    unique = plan.stage.unique_tokens
    return min(seen, max(1, unique // plan.stage.seq_len)) if unique else seen


def collection(cfg, plan, teacher, blocks, trained, rows, m) -> StageBudget:
    """The pass that saves inputs."""
    last = blocks[trained[-1]].start
    before = block_config(teacher, range(last)) if last else None
    work = forward_flops(before, plan.stage.seq_len) if before else 0.0
    groups = resident_groups(trained, cfg.cria_resident)
    saves = [(group, saved_by(group, trained)) for group in groups]
    resident = max((sum(b < s[-1] for b in group) for group, s in saves if s), default=0)
    layers = resident * cfg.cria
    sizes = held(meta_model(block_config(teacher, blocks[0]), m.dtype).named_parameters())
    tokens = plan.micro_batch * plan.stage.seq_len
    saved = max(len(s) for _, s in saves)
    row = plan.stage.seq_len * teacher.hidden_size * m.dtype.itemsize
    # Of one token, at the MLP. Compiled, it multiplies in place: measured were 2 I + 4.4 d with
    # Qwen2.5-1.5B's shape and 2 I + 4.8 d with SmolLM2's (H200, torch 2.11).
    gate, stream = (2, 5) if m.compiled else (3, 6)
    widest = gate * teacher.intermediate_size + stream * teacher.hidden_size
    memory = {
        "runtime": RUNTIME[m.world.device.type],
        "teacher": sizes * layers // cfg.cria
        + teacher.vocab_size * teacher.hidden_size * m.dtype.itemsize,
        "activations": tokens * m.dtype.itemsize * widest,
    }  # fmt: skip
    if not m.gpu:
        memory["held rows"] = (saved + 1) * min(PART_BYTES, rows * row)
    total = rows * plan.stage.seq_len * work
    none = Saves("collect", 0, 0, 0)
    return StageBudget("collect", plan, 0, StageFlops(work, 0, 0), total, none, 0, memory, 1)


def disk(cfg, budget, student, layers, blocks, trained, rows, left) -> list[tuple[str, int]]:
    """The parts of runs/RUN/cria. left: blocks that are not distilled yet; where there is none,
    inputs may be gone."""
    m, teacher = budget.machine, meta_model(read_config(cfg.teacher))
    files = list(Path(cfg.teacher).glob("*.safetensors"))
    weights = sum(p.stat().st_size for p in files)
    weights = weights or teacher.num_params() * m.dtype.itemsize
    item = weights // teacher.num_params()  # bytes of a stored weight
    width = student.hidden_size * m.dtype.itemsize * len(trained) * (left > 0)
    plan = budget.stages[1].plan
    calibration = min(512, cfg.calibrate_tokens) or 1
    calibration *= cfg.calibrate_tokens // calibration
    model = meta_model(student)
    every = any(s.plan.stage.train == "all" for s in budget.stages)
    targets = tuple(f"{t}_proj.weight" for t in cfg.lora_targets.split(","))
    adapted = any(s.plan.stage.train == "lora" for s in budget.stages)
    inside = tuple(f"layers.{i}." for b in trained for i in blocks[b])
    kinds = tuple(f"layers.{i}.{k}." for i in layers for k in ("linear_attn", "self_attn"))
    done, rest = 0, 0
    for name, p in model.named_parameters():
        if name.startswith(kinds) or (every and name.startswith(inside)):
            done += p.numel() * 4
        elif adapted and name.startswith(inside) and name.endswith(targets):
            done += p.numel() * m.dtype.itemsize
        else:
            rest += p.numel() * item
    saves = [s.saves for s in budget.stages[1:]]
    kept = max(s.size * min(s.count, cfg.keep_checkpoints + 1) for s in saves)
    return [
        ("weights, a file per block", weights + SIDECAR_BYTES * len(blocks)),
        ("inputs of blocks", rows * plan.stage.seq_len * width),
        ("calibration", calibration * width),
        ("distilled blocks", done),
        ("logs", sum(s.logs for s in budget.stages) * len(trained)),
        (IN_TRAINING, kept * min(m.world.size, left)),
        (STUDENT, done + rest + tokenizer_bytes(cfg.tokenizer or cfg.teacher)),
    ]
