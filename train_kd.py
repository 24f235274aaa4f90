"""Distil a transformer into a hybrid of softmax and linear attention.

    python scripts/download_model.py
    python train_kd.py --layers 10,14,20
    torchrun --nproc_per_node 8 train_kd.py --layers 3:1 --data data/fineweb

Stages: align (every converted layer against the softmax layer it replaces), distill (the whole
student against the teacher's predictions), long (cross-entropy at long context). With --cria also
block (blocks of layers, each alone against the teacher's): see cria.py.
Without --config: configs/smollm2.yaml on CUDA, configs/smollm2-cpu.yaml elsewhere.
"""

from __future__ import annotations

import json
import math

import torch

import cria
import planner
from budget import show_budget
from cli import run_main
from config import DistillConfig, UserError
from cria_plan import cria_budget
from data import eval_batches
from distributed import (
    broadcast,
    choose_device,
    compile_blocks,
    main_first,
    require_same,
    start,
    stop,
    this_process,
)
from evaluate import Evaluator, completions, eval_rows, zeroed_attention
from fsdp import gathered, keeps_gathered, parallel_flags, ranks_line, shard, wants_fsdp
from hf import DTYPES, read_config, save_model
from hybrid_layers import (
    cast_trunk,
    check_transfer,
    mixer_parameters,
    resolve_kernels,
    restore_layers,
    use_kernels,
)
from layer_lists import auto_share
from layers import attention_kernel
from lora import adapters_alone, add_lora, lora_parameters, merge_lora, wants_lora
from metrics import trim_rows
from mixture import rows_line
from model import Transformer, is_fsdp
from objectives import AlignObjective, HeadObjective
from ops.float8_linear import float8_copy, supports_float8
from prompts import IN_RUN, PROMPTS
from recompute import set_recompute
from search import FILE, check_text, choose_layers, pattern_table, read_choice, write_choice
from shard_writer import write_file
from stage_plan import plan_stage, set_length
from student import (
    build_models,
    calibrate,
    narrow,
    preflight,
    run_identity,
    set_trainable,
    to_save,
)
from tokenizer import load_tokenizer
from trainer import (
    Run,
    compile_wanted,
    finish,
    go_on,
    open_data,
    open_run,
    restore_weights,
    set_up_torch,
    train_stage,
    warm_up,
)


class Table:
    """The rows of the final table, kept in the run's folder so that a resumed run has them all."""

    def __init__(self, run: Run):
        self.run, self.path = run, run.folder / "table.json"
        self.rows: list[dict] = []
        if run.resumed_from is None or not self.path.is_file():
            return
        try:
            self.rows = [row for row in json.loads(self.path.read_text()) if row["model"]]
        except (ValueError, KeyError, TypeError):
            run.logger.say(f"{self.path}: no rows found; those of earlier stages are missing")

    def has(self, name: str) -> bool:
        return any(row["model"] == name for row in self.rows)

    def add(self, name: str, scores: dict[str, float]) -> None:
        """One evaluated model; also a row of metrics.jsonl."""
        self.run.logger.log_eval(self.run.step, name, scores)
        row = {
            "model": name, "perplexity": round(scores["ppl"], 3),
            "x teacher": round(scores["ratio"], 4), "KL": round(scores["kl"], 4),
            "top-1": round(scores["top1"], 4),
        }  # fmt: skip
        self.rows = [r for r in self.rows if r["model"] != name] + [row]
        if self.run.world.is_main:
            write_file(self.path, f"{json.dumps(self.rows, indent=1)}\n".encode())


class Samples:
    """The fixed prompts completed by teacher and student; each call is a row of samples.jsonl."""

    def __init__(self, run: Run, teacher: Transformer, tokenizer):
        self.run, self.teacher, self.tokenizer = run, teacher, tokenizer
        self.theirs: list[str] = []
        self.path = run.folder / "samples.jsonl"
        again = run.resumed_from is not None or run.cfg.resume == "auto"
        kept = trim_rows(self.path, run.step + 1) if run.world.is_main and again else []
        self.written = {row["step"] for row in kept}

    def write(self, student: Transformer) -> list[dict[str, str]]:
        """prompt, teacher, student for each prompt; nothing on ranks other than 0."""
        cfg, main = self.run.cfg, self.run.world.is_main
        if not cfg.sample_tokens or not (main or is_fsdp(student)):
            return []
        how = (self.tokenizer, cfg.sample_tokens, self.run.amp, cfg.sample_temperature)
        self.theirs = self.theirs or completions(self.teacher, *how)
        texts = zip(PROMPTS[:IN_RUN], self.theirs, completions(student, *how), strict=True)
        rows = [{"prompt": p, "teacher": t, "student": s} for p, t, s in texts]
        if not main:
            return []
        if self.run.step in self.written:  # of a finished run, begun again
            return rows
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": self.run.step, "samples": rows}) + "\n")
        return rows


def distil(cfg: DistillConfig, argv: list[str]) -> None:
    layers, spec, shape, convert = preflight(cfg)
    if cfg.plan:
        return show_budget(cfg, planner.distillation(cfg, layers, shape, convert))
    planner.check_disk(cfg, planner.distillation(cfg, layers, shape, convert, full=False))
    tokenizer = load_tokenizer(spec)
    names = cfg.stage_names()
    for name in names if not layers else ():
        getattr(cfg, name).mixer_lr = 0.0  # there are none
    world = this_process(cfg.device)
    fsdp = wants_fsdp(cfg, world, shape)
    kernels = resolve_kernels(shape, cfg.kernel, world.device, cfg.dtype)
    plans = [plan_stage(cfg, n, getattr(cfg, n), world, i, shape) for i, n in enumerate(names)]
    open_data(cfg, tokenizer)
    warm_up(shape, kernels, cfg, world)
    start(world)
    keep = fsdp and keeps_gathered(cfg, world, [read_config(cfg.teacher), shape])
    micro_batches = {f"--{plan.name}_micro_batch": plan.micro_batch for plan in plans}
    require_same(parallel_flags(fsdp, keep) | micro_batches, world)
    dtype = set_up_torch(cfg, world)
    if cfg.teacher_float8 and not (supports_float8(world.device) and dtype == torch.bfloat16):
        raise UserError(
            f"--teacher_float8: {world.device.type} in {dtype} found, an NVIDIA GPU of compute "
            f"capability 8.9 or more in bfloat16 expected"
        )
    data, train_data, val_data = main_first(world, lambda: open_data(cfg, tokenizer, build=True))

    share = auto_share(cfg.layers) if convert and not cfg.keep_layers else None
    if share is not None:
        check_text(cfg.search, val_data, tokenizer, cfg.seed)
    for plan in plans:
        set_length(plan, cfg, train_data)
    seq_len = cfg.eval_seq_len or plans[-1].stage.seq_len
    held_out = eval_batches(
        val_data, seq_len=seq_len, max_tokens=cfg.eval_tokens, doc_mask=cfg.doc_mask,
        micro_batch=eval_rows(seq_len, world.device),
    )  # fmt: skip
    teacher, source, student, shared = build_models(cfg, layers, convert, world, dtype, fsdp)
    kernel_line = use_kernels(student, kernels, world.device)
    use_kernels(
        teacher, resolve_kernels(teacher.config, cfg.kernel, world.device, cfg.dtype), world.device
    )
    identity = run_identity(cfg, layers, convert, plans, train_data, dtype)
    run = open_run(cfg, argv, world, identity, script="train_kd", dtype=dtype, stages=names)
    go_on(run, plans)
    describe(
        run, cfg, teacher, student, layers, convert, plans, train_data, data, kernel_line, shared,
        fsdp,
    )  # fmt: skip
    fresh = run.resumed_from is None
    if layers and convert and fresh and not cfg.aligned:
        text = train_data.parts[0]
        ids = text.read(0, min(128, text.num_tokens))
        ids = torch.from_numpy(ids)[None].to(world.device)
        most = 1e-3 if cfg.transfer.kv == "heads" else math.inf
        worst = check_transfer(source, student, layers, ids, most)
        run.logger.say(
            f"transfer self-test: q, k, v of every head within {max(worst.values()):.1e}"
        )
        if cfg.calibrate_tokens:
            errors = calibrate(run, source, student, layers, train_data)
            mean = sum(errors.values()) / len(errors)
            run.logger.say(f"calibrated on {cfg.calibrate_tokens} tokens: mean error {mean:.3f}")
        # The fits round differently on different devices.
        broadcast(mixer_parameters(student, layers).values(), world)
    del source
    if adapters_alone(cfg):  # not before the mixers are calibrated
        narrow(student, dtype)
    adapters = wants_lora(cfg)
    if adapters:
        add_lora(student, cfg)
        say_adapters(run, student)
    if cfg.dry_run:
        run.logger.say("dry run: nothing trained")
        finish(run)
        return
    set_recompute(student, cfg.activation_checkpointing)
    if compile_wanted(cfg, world):
        compile_blocks(teacher, hooks=fsdp)
        compile_blocks(student, hooks=fsdp)
    if fsdp:
        how = {"dtype": dtype, "shard_ranks": cfg.shard_ranks, "keep": keep, "amp": run.amp}
        for model, folder in ((teacher, cfg.teacher), (student, cfg.student)):
            shard(model, world, folder=folder, **how)

    table = Table(run)
    first = min(layers) if shared and not adapters else 0
    evaluator = Evaluator(held_out, teacher, amp=run.amp, first=first, world=world)
    if not table.has("teacher"):
        table.add("teacher", evaluator(teacher))
    if fresh:
        if layers:
            with zeroed_attention(student, layers):
                table.add("converted attention outputs zeroed", evaluator(student))
        converted = "student after transfer" if layers and convert else "student at start"
        table.add(converted, evaluator(student))
    guide = teacher
    if cfg.teacher_float8:
        guide = float8_copy(teacher, first)  # the student runs the first blocks too
        if compile_wanted(cfg, world):
            compile_blocks(guide)
        if not table.has("teacher in float8"):
            table.add("teacher in float8", evaluator(guide))

    def restore(chosen: list[int]) -> list[int]:
        """Make all converted layers but the chosen ones softmax again."""
        restore_layers(student, teacher, [i for i in layers if i not in chosen])
        if cfg.trunk_dtype != "float32" and not shared:
            cast_trunk(student, chosen, DTYPES[cfg.trunk_dtype])
        if adapters:  # on the layers that are softmax again
            add_lora(student, cfg)
        if compile_wanted(cfg, world):
            compile_blocks(student)
        run.logger.say(f"layers: {student.config.layer_map()}  ({len(chosen)} linear)")
        return chosen

    def choose() -> list[int]:
        found = select(run, share, student, teacher, layers, train_data, val_data, tokenizer)
        chosen = restore(found["linear"])
        table.add("student with the chosen layers", evaluator(student))
        return chosen

    if share is not None and not fresh and run.resumed["stage"] != "align":
        found = read_choice(run.resumed_from.parent.parent)
        if world.is_main:
            write_choice(run.folder, found)
        layers, share = restore(found["linear"]), None
    restore_weights(run, student)
    samples = Samples(run, teacher, tokenizer)

    def evaluate_and_sample() -> dict[str, float]:
        samples.write(student)
        return evaluator(student)

    for plan in plans:
        row = f"student after {plan.name}"
        if plan.name in run.done:
            # A run killed between a stage's last checkpoint and its evaluation lacks the row.
            if run.resumed["stage"] == plan.name and not table.has(row):
                table.add(row, evaluator(student))
            continue
        if share is not None and plan.name != "align":
            layers, share = choose(), None
        set_trainable(student, plan.stage, layers)
        if plan.name == "align":
            keep = bool(plan.stage.unique_tokens)
            objective = AlignObjective(student, teacher, plan.stage, layers, world, keep=keep)
        else:
            objective = HeadObjective(student, guide, plan.stage, world, layers, first)
            objective.saved = to_save(objective, cfg, plan.name, student, convert)
        train_stage(
            run, plan, objective, train_data, student=student, teacher=teacher,
            evaluate=evaluate_and_sample,
        )  # fmt: skip
        table.add(row, evaluator(student))
    if share is not None:
        choose()
    conclude(run, cfg, table, samples, student, spec)


def select(run, share, student, teacher, layers, train_data, val_data, tokenizer) -> dict:
    """`--layers auto:...`: score the converted layers, and write the choice into the run."""
    cfg, world, say = run.cfg, run.world, run.logger.say
    say(f"choosing {share:g} of {len(layers)} layers to be linear, by {cfg.search.scorer}")
    found = choose_layers(
        student, teacher, layers, share=share, settings=cfg.search, train_data=train_data,
        val_data=val_data, tokenizer=tokenizer, amp=run.amp, world=world, seed=cfg.seed,
        doc_mask=cfg.doc_mask,
    )  # fmt: skip
    if world.is_main:
        write_choice(run.folder, found)
    noise = f", noise of a score {found['noise']:.2g}" if "noise" in found else ""
    run.logger.table("before distillation", pattern_table(found, len(student.layers)))
    say(f"layers chosen in {found['seconds']:.0f} s{noise}; scores in {run.folder / FILE}")
    return found


def describe(
    run, cfg, teacher, student, layers, convert, plans, train_data, data, kernels, shared, fsdp
) -> None:
    """The plan, before anything runs."""
    say, world = run.logger.say, run.world
    mixers = sum(p.numel() for p in mixer_parameters(student, layers).values())
    say(f"layers: {student.config.layer_map()}  ({len(layers)} of {len(student.layers)} converted)")
    say(
        f"teacher: {cfg.teacher}, {teacher.num_params():,} parameters; student: "
        f"{student.num_params():,}, mixers {mixers:,}"
        + ("; trunk shared and frozen" if shared else "")
    )
    say(f"data: {train_data.num_tokens:,} tokens of {data}")
    softmax = attention_kernel(
        world.device, run.dtype, packed=cfg.doc_mask, sink=teacher.config.attention_sink,
        compiled=compile_wanted(cfg, world),
    )  # fmt: skip
    say(
        f"compute: {ranks_line(cfg, world, fsdp)}, {run.dtype}; softmax kernel {softmax}, "
        f"{kernels}, compile {'on' if compile_wanted(cfg, world) else 'off'}"
    )
    if cfg.student and not convert:
        say("note: --student is converted already; --layers, --mixer, --linear_... are not used")
    linear = [i for i in layers if student.config.layer_types[i] == "linear_attention"]
    if linear and teacher.config.attention_sink:
        say("note: the attention sinks of converted layers are not carried over")
    longest = teacher.config.max_position_embeddings
    for plan in plans:
        say(plan.line(world))
        s, rows = plan.stage, plan.steps * plan.rows
        if s.seq_len > longest:
            say(
                f"note: rows of {s.seq_len:,} tokens, max_position_embeddings of the teacher "
                f"{longest:,}: positions behind it are new to it, and RoPE is not rescaled"
            )
        if s.unique_tokens:
            rows = min(rows, max(1, s.unique_tokens // s.seq_len))
        say(f"{plan.name}: {rows_line(train_data, s.seq_len, rows)}")


def say_adapters(run, student: Transformer) -> None:
    found, cfg = lora_parameters(student), run.cfg
    count = sum(p.numel() for p in found.values())
    run.logger.say(
        f"lora: {len(found) // 2} adapters of rank {cfg.lora_rank} on {cfg.lora_targets}, "
        f"{count:,} parameters"
    )


def conclude(run, cfg, table, samples, student, spec) -> None:
    """The table, the samples, the saved student."""
    run.logger.table("held-out documents", table.rows)
    rows = samples.write(student)
    if rows:
        run.logger.table("completions" if cfg.sample_temperature else "greedy completions", rows)
    if is_fsdp(student) and cfg.save_model:
        student = gathered(student, run.world)
    elif cfg.save_model:
        merge_lora(student)
    if run.world.is_main and cfg.save_model:
        folder = run.folder / "model"
        kind = save_model(student, folder, tokenizer_from=spec)
        run.logger.say(f"student saved in {folder} as {kind}")
    finish(run)


def default_preset(flags: dict[str, str]) -> str:
    """The preset of this machine's device."""
    device = flags.get("device", "auto").lower()
    cuda = choose_device("auto").type == "cuda" if device == "auto" else device == "cuda"
    cuda |= bool(flags.get("plan_device"))
    return "configs/smollm2.yaml" if cuda else "configs/smollm2-cpu.yaml"


def main(cfg: DistillConfig, argv: list[str]) -> None:
    try:
        if cfg.cria and cfg.plan:
            return show_budget(cfg, cria_budget(cfg))
        if cfg.cria:
            planner.check_disk(cfg, cria_budget(cfg, full=False))
            cfg = cria.run(cfg, argv)
        if cfg is not None:
            distil(cfg, argv)
    finally:
        stop()


if __name__ == "__main__":
    run_main(DistillConfig, main, default_preset=default_preset)
