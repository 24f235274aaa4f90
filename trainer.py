"""The one training loop, used by train.py and train_kd.py.

    run = open_run(cfg, argv, world, identity, script="train_kd")   folder, log, resume point
    train_stage(run, plan, objective, ...)                          one stage to its end

What a step's gradients are is the business of an objective (objectives.py).
Check: `pytest tests/test_runs.py tests/test_resume.py`.
"""

from __future__ import annotations

import gc
import shlex
import signal
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml

import checkpoint
from async_save import Saver
from cli import to_dict
from config import STAGES, ModelConfig, Stopped, TrainConfig, UserError
from data import PackedLoader
from distributed import (
    SAVE_FAILED,
    StopSignals,
    World,
    all_sum,
    barrier,
    main_says,
    start_compile_workers,
)
from hybrid_layers import MIXERS
from layers import ShortConvolution, sdpa_priority
from metrics import MetricsLogger, StepTimer, git_commit
from mixture import Mixture, open_corpora
from model import Transformer
from ops import warm
from ops.kernels import PACKAGES
from optimizer import OptimizerSet, StepGuard, build_optimizer, lr_factor
from order import Order
from pace import Pace, quiet_gc
from run_folder import hold, release, take_folder
from stage_plan import StagePlan
from step_log import StepLog, flop_rates
from watchdog import Watchdog

GC_EVERY = 50  # steps between collections of what is young


# ---- precision


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto = bfloat16 where the hardware multiplies it fast, else float32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = device.type == "cpu" and any(getattr(torch.cpu, p, bool)() for p in probes)
    return torch.bfloat16 if fast else torch.float32


def amp_context(device: torch.device, dtype: torch.dtype) -> Callable:
    """A factory of autocast contexts; a null one for float32."""
    if dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype)


# ---- a run: folder, log, resume point


@dataclass
class Run:
    """What all stages of one run share."""

    cfg: TrainConfig
    world: World
    folder: Path
    logger: MetricsLogger
    dtype: torch.dtype
    identity: dict  # what must not change between a run and its continuation
    resumed: dict | None = None  # state of the checkpoint taken up
    resumed_from: Path | None = None
    step: int = 0  # optimizer steps of all stages so far
    done: set[str] = field(default_factory=set)  # stages finished before this process
    watch: Callable[[int, str], None] = lambda step, place: None  # see watchdog.py
    protect: Callable[[], None] = lambda: None  # see async_save.py
    name: str = ""  # by which --run goes on with it, where that is not its folder's
    pace: Pace = field(default_factory=Pace)

    @property
    def amp(self) -> Callable:
        return amp_context(self.world.device, self.dtype)


def set_up_torch(cfg: TrainConfig, world: World) -> torch.dtype:
    """Seeds, matmul precision; returns the compute type."""
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    return compute_dtype(cfg.dtype, world.device)


def open_data(cfg: TrainConfig, tokenizer, *, build: bool = False):
    """(name, training split, held-out split) of --data; see `mixture.open_corpora`."""
    return open_corpora(cfg.data, tokenizer, cfg.packing, build=build)


def compile_wanted(cfg: TrainConfig, world: World) -> bool:
    """--torch_compile: auto = on for CUDA."""
    if cfg.torch_compile == "auto":
        return world.device.type == "cuda"
    return cfg.torch_compile == "true"


def warm_up(config: ModelConfig, kernels: dict[str, str], cfg: TrainConfig, world: World) -> None:
    """Start compiling in the background what the first step will need: Triton kernels, and the
    workers of torch.compile."""
    if cfg.dry_run or world.device.type != "cuda" or world.device.index:
        return
    jobs = {}  # a set that keeps its order
    for name, kernel in kernels.items():
        if kernel not in PACKAGES:
            continue
        mixer = MIXERS[name]
        if kernel == "fla":
            op = mixer.fla_op if name != "linear_attention" else "linear_attention without g"
            sizes = mixer.state_key_dim(config), config.linear_value_head_dim
            jobs[op, config.linear_num_value_heads, *sizes] = True
        with torch.device("meta"):
            modules = mixer(config).modules()
        for m in modules:
            if isinstance(m, ShortConvolution):
                channels, _, taps = m.weight.shape
                jobs["short_conv", channels, taps, int(m.bias is not None)] = True
    warm.start(jobs)
    if compile_wanted(cfg, world):
        start_compile_workers()


def open_run(
    cfg: TrainConfig, argv: list[str], world: World, identity: dict, *, script: str,
    dtype: torch.dtype, stages: list[str],
) -> Run:  # fmt: skip
    """Make or reopen the run's folder, find the checkpoint to go on from, start the log. Of a dry
    run there is no folder."""
    folder = Path(main_says(str(take_folder(cfg, script)) if world.is_main else "", world))
    found, state = None, None
    if cfg.resume == "auto":
        found = checkpoint.find_checkpoint(
            folder, explicit=False, rank=world.rank, world_size=world.size
        )
    elif cfg.resume != "never":
        found = checkpoint.find_checkpoint(
            cfg.resume, explicit=True, rank=world.rank, world_size=world.size
        )
        if found is None:
            raise UserError(f"--resume: {cfg.resume} holds no checkpoint")
    if found is not None:
        state = checkpoint.read_state(found)
        check_identity(found, state, identity, stages)
        if cfg.resume not in ("auto", "never") and not cfg.run:
            folder = found.parent.parent  # go on where the checkpoint lies
    if world.is_main and not cfg.dry_run:
        hold(folder)
    logger = MetricsLogger(
        None if cfg.dry_run else folder, rank=world.rank, project=cfg.wandb_project,
        tracker="wandb" if cfg.wandb_enabled else cfg.tracker,
        run_name=folder.name, config=to_dict(cfg),
        resume_step=state["step"] + 1 if state else (0 if cfg.resume == "auto" else None),
    )  # fmt: skip
    run = Run(cfg, world, folder, logger, dtype, identity, state, found)
    if state:
        run.step = state["step"]
        run.done = set(state["done"])
        logger.say(f"resuming at step {run.step} from {found}")
        later = [p for p in checkpoint.list_checkpoints(folder) if checkpoint.step_of(p) > run.step]
        if later:
            logger.say(
                f"note: {later[-1]} and what else is of later steps stays; --resume auto would go "
                f"on from there"
            )
    elif cfg.resume == "auto" and not getattr(cfg, "cria", 0):  # which always says auto
        logger.say(f"--resume auto: no checkpoint in {folder}, the run begins at step 0")
    if world.is_main and not cfg.dry_run:
        cuda = world.device.type == "cuda"
        record = {
            "command": shlex.join([f"{script}.py", *argv]), "commit": git_commit(),
            "device": torch.cuda.get_device_name(world.device) if cuda else world.device.type,
            "ranks": world.size, "dtype": str(dtype).removeprefix("torch."),
            "torch": str(torch.__version__),
        }  # fmt: skip
        text = yaml.safe_dump({**to_dict(cfg), "_run": record}, sort_keys=False)
        (folder / "config.yaml").write_text(text)
    return run


def check_identity(path: Path, state: dict, identity: dict, stages: list[str]) -> None:
    """Refuse a checkpoint of another model, data set, layer set or stage."""
    same_identity("--resume", path, state["identity"], identity)
    stage = state["stage"]
    if stage not in stages and stage not in _before(stages[0]):
        raise UserError(
            f"--resume: {path} is of stage {stage}, one of {', '.join(stages)} expected"
        )
    if stage not in stages and stage not in state["done"]:
        raise UserError(f"--resume: {path} stopped inside stage {stage}; finish it first")


def same_identity(flag: str, path: Path, old: dict, new: dict, within: str = "") -> None:
    """UserError naming the first setting in which what `path` holds differs from this run."""
    for key in sorted(set(old) | set(new), key=lambda key: (key != "script", key)):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() == b.keys():
                same_identity(flag, path, a, b, "" if key == "stages" else f"{within}{key}_")
            a, b = ",".join(a), ",".join(b)
        raise UserError(
            f"{flag}: {path} has {within}{key} {_short(a)}, this run {_short(b)}; the same expected"
        )


def go_on(run: Run, plans: list[StagePlan]) -> None:
    """The stage that the run finished last goes on where it is longer now. UserError where the one
    it stopped in is further already."""
    for plan in plans if run.resumed else ():
        if run.resumed["stage"] != plan.name:
            continue
        had, planned = run.resumed["stage_step"], run.resumed.get("steps", plan.steps)
        if plan.name in run.done:
            if had >= plan.steps:
                continue
            run.done.remove(plan.name)
            found = f"had ended with step {had:,} and goes on to {plan.steps:,}"
        elif had > plan.steps:
            raise UserError(
                f"--resume: {run.resumed_from} has {had:,} steps of {plan.name}, this run "
                f"{plan.steps:,}; as many or more expected"
            )
        elif planned != plan.steps:
            found = f"was to have {planned:,} steps and has {plan.steps:,} now"
        else:
            continue
        run.logger.say(
            f"note: {plan.name} {found}, its learning rate from here as if that had been its length"
        )


def _before(stage: str) -> list[str]:
    return list(STAGES[: STAGES.index(stage)]) if stage in STAGES else []


def _short(value) -> str:
    text = str(value) or "none"
    return text if len(text) <= 60 else text[:57] + "..."


# ---- one stage


def stage_optimizer(plan: StagePlan, objective, world: World) -> OptimizerSet:
    """The stage's Muon + AdamW over exactly the objective's parameters."""
    s, params = plan.stage, objective.params
    mixers = [n for n in params if n in objective.mixers]
    return build_optimizer(
        params.items(), lr=s.lr, mixer_lr=s.mixer_lr or None, mixer_params=mixers,
        muon_lr=s.muon_lr or None, weight_decay=s.weight_decay, use_muon=s.use_muon,
        rank=world.rank, world_size=world.size,
    )  # fmt: skip


def save_step(
    run: Run, plan: StagePlan, step: int, objective, optimizer, loader, guard: StepGuard,
    saver: Saver, stopped: bool = False,
) -> None:  # fmt: skip
    """Write a checkpoint of the stage after `step` of its steps, or begin to. stopped: before it
    could be evaluated."""
    if not run.cfg.save_model:
        return
    tensors = {f"model.{n}": p.detach() for n, p in objective.saved.items()}
    tensors |= optimizer.state_tensors()
    done = sorted(run.done | ({plan.name} if step == plan.steps else set()))
    state = {
        "step": run.step, "stage": plan.name, "stage_step": step, "done": done,
        "identity": run.identity, "loader": loader.state_dict(), "rng": checkpoint.rng_state(),
        "guard": guard.state_dict(), "stopped": stopped, "steps": plan.steps,
    }  # fmt: skip
    saver.save(run.folder, run.step, tensors, state, keep=run.cfg.keep_checkpoints)


def restore_weights(run: Run, model: Transformer) -> None:
    """Load the weights of the checkpoint that the run goes on from into `model`, in place."""
    if run.resumed_from is None:
        return
    saved = checkpoint.tensor_names(run.resumed_from)
    params = dict(model.named_parameters())
    names = [n.removeprefix("model.") for n in saved if n.startswith("model.")]
    unknown = [n for n in names if n not in params]
    if unknown:
        raise UserError(f"--resume: {run.resumed_from} holds {unknown[0]}, the model does not")
    into = {f"model.{n}": params[n].detach() for n in names}
    checkpoint.load_tensors(run.resumed_from, into, partial=True)


def stage_loader(
    cfg: TrainConfig, plan: StagePlan, data: Mixture, world: World, select=None
) -> PackedLoader:
    """The stage's batches."""
    stage = plan.stage
    if stage.unique_tokens and select is None:
        sizes = data.rows(stage.seq_len).sizes
        count = min(sum(sizes), max(1, stage.unique_tokens // stage.seq_len))
        select = Order(sizes, data.weights, plan.seed).rows(np.arange(count))
    return PackedLoader(
        data, seq_len=stage.seq_len, select=select, rows_per_step=plan.rows,
        micro_batch=plan.micro_batch, rank=world.rank, world_size=world.size, seed=plan.seed,
        doc_mask=cfg.doc_mask, repeat=stage.repeat_rows,
    )  # fmt: skip


def train_stage(
    run: Run, plan: StagePlan, objective, data: Mixture, *, student: Transformer,
    teacher: Transformer | None, evaluate: Callable[[], dict[str, float]] | None = None,
    select: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Run one stage to its end, or the rest of it after a resume. select: numbers of the only rows
    it may see."""
    cfg, world, stage = run.cfg, run.world, plan.stage
    loader = stage_loader(cfg, plan, data, world, select)
    optimizer = stage_optimizer(plan, objective, world)
    start = 0
    if run.resumed and run.resumed["stage"] == plan.name:
        start = run.resumed["stage_step"]
        optimizer.init_state()
        state = optimizer.state_tensors()
        checkpoint.load_tensors(run.resumed_from, state, partial=True)
        optimizer.load_state_tensors(state)
        loader.load_state_dict(run.resumed["loader"])
    if run.resumed:
        checkpoint.set_rng_state(run.resumed["rng"])
    timer = StepTimer(plan.steps, world.device, start_step=start)
    log = StepLog(run, plan, timer, flop_rates(run, plan, student, teacher, objective.first))
    guard = StepGuard(cfg.skip_spikes, world.device)
    if start and "guard" in run.resumed:
        guard.load_state_dict(run.resumed["guard"])
    saver = Saver(world, cfg.async_save and cfg.save_model)
    run.protect, run.pace = saver.protect, Pace(world, run.logger.say)
    profiler = open_profiler(run, plan.steps - start) if cfg.profile else nullcontext()

    def evaluate_at(step: int) -> None:
        if not evaluate or not cfg.eval_every or step % cfg.eval_every or step == plan.steps:
            return
        log.flush()
        run.watch(run.step, "evaluating")
        with timer.paused():
            run.logger.log_eval(run.step, plan.name, evaluate())

    try:
        with (
            quiet_gc(), profiler as step_done, StopSignals(world) as signals,
            Watchdog(world, cfg.hang_timeout) as dog,
        ):  # fmt: skip
            run.watch = dog.watch
            if start and run.resumed.get("stopped"):
                evaluate_at(start)
            for step in range(start, plan.steps):
                if step % GC_EVERY == 0:
                    gc.collect(1)
                values = one_step(run, plan, step, objective, optimizer, loader, guard)
                log.flush()
                run.step += 1
                run.pace.step()
                timer.step(stage.batch_tokens)
                last = step + 1 == plan.steps
                if (step + 1) % cfg.log_every == 0 or last:
                    log.take(values, loader.tokens())
                if step_done is not None:
                    step_done()
                number = signals.agreed(last, saver.failed)
                if number == SAVE_FAILED:
                    run.watch(run.step, "saving")
                    saver.wait()  # raises, on all ranks
                if not number:
                    evaluate_at(step + 1)
                if last or number or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    log.flush()
                    run.watch(run.step, "saving")
                    finish_it = last or number or not saver.background
                    with timer.paused() if finish_it else nullcontext():
                        save_step(
                            run, plan, step + 1, objective, optimizer, loader, guard, saver,
                            stopped=bool(number),
                        )  # fmt: skip
                        if finish_it:
                            saver.wait()
                if number:
                    raise Stopped(128 + number, stopped_line(run, number))
    finally:
        saver.close()
        loader.close()
    run.done.add(plan.name)
    run.resumed = None  # later stages start afresh


def stopped_line(run: Run, number: int) -> str:
    """What a run that is stopped between two steps leaves behind, and how to go on."""
    name = run.name or run.folder.name
    left = f"checkpoints in {run.folder}, --resume auto with --run {name} goes on"
    if not run.cfg.save_model:
        left = "nothing is saved (--save_model=False)"
    return f"stopped by {signal.Signals(number).name} after step {run.step}: {left}"


@contextmanager
def own_dropout(run: Run):
    """Each rank drops what it will, and a run that goes on the same as it would have. What else
    draws numbers, stochastic rounding, goes on drawing the same on all ranks."""
    world = run.world
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(run.cfg.seed + 1_000_003 * (run.step * world.size + world.rank))
        yield


def one_step(
    run: Run, plan: StagePlan, step: int, objective, optimizer, loader, guard: StepGuard
) -> dict:  # fmt: skip
    """One optimizer step; returns 0-d tensors and numbers, without waiting for the device."""
    stage, world = plan.stage, run.world
    factor = lr_factor(
        step, schedule=stage.schedule, total_steps=plan.steps, warmup_steps=stage.warmup_steps,
        min_ratio=stage.min_lr_ratio, decay_fraction=stage.decay_fraction,
    )  # fmt: skip
    optimizer.set_lr_factor(factor)
    run.watch(run.step + 1, "loading data")
    run.pace.begin()
    batches = loader.next_step()
    run.pace.loaded()
    run.watch(run.step + 1, "computing")
    count = float(sum(map(objective.tokens, batches)))
    count = torch.full((), count, device=world.device)  # a fill; torch.tensor would wait
    count = all_sum(count, world).clamp_(min=1)
    run.pace.together()
    dropout = own_dropout(run) if stage.train == "lora" and run.cfg.lora_dropout else nullcontext()
    with run.amp(), sdpa_priority(world.device), dropout:
        sums = objective.backward([b.to(world.device) for b in batches], count, run.pace.computed)
    norm = objective.clip(stage.grad_clip)
    run.protect()
    optimizer.step(guard(norm))
    optimizer.zero_grad()
    counts = {"skipped": guard.skipped, "in_row": guard.in_row}
    return {**sums, "grad_norm": norm, "lr": (plan.mixer_lr or stage.lr) * factor, **counts}


@contextmanager
def open_profiler(run: Run, steps: int):
    """torch.profiler over steps 3 to 5 of each stage, of several ranks over 11 to 13 of `steps` or
    the last ones, for before that others may still compile. A Chrome trace lands in the run's
    folder. Gives what is to be called after every step."""
    from torch.profiler import profile, schedule

    def save(prof) -> None:
        if run.world.is_main:
            prof.export_chrome_trace(str(run.folder / f"trace-{run.step}.json"))

    wait = 1 if run.world.size == 1 else max(1, min(9, steps - 4))
    when = schedule(wait=wait, warmup=1, active=3, repeat=1)
    with profile(schedule=when, on_trace_ready=save) as prof:

        def step_done() -> None:
            if run.world.device.type == "cuda" and prof.step_num == wait:
                torch.cuda.synchronize()  # or the trace would begin with earlier kernels
            prof.step()

        yield step_done


def finish(run: Run) -> None:
    """Close the log and let go of the folder; all ranks leave together."""
    barrier(run.world)
    run.logger.close()
    release(run.folder)
