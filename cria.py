"""Block-wise distillation: a teacher cut into blocks of C consecutive layers ("crias"), each of
which is distilled alone, from saved inputs, in a process of its own (LoLCATs, Zhang et al. 2024,
arXiv 2410.10254, section 3.3.2).

    python train_kd.py --cria 10 --layers all --mixer hedgehog_window --stages align,block,distill

    shard    the teacher's weights, one file per block
    collect  one pass of the softmax teacher: the residual stream before each block, of every row
             that align will see; blocks need each other no more
    train    align, then `block`: the student's block against the teacher's, adapters train
    stitch   the blocks as one student; later stages are an ordinary run with it as --student

Everything is in runs/RUN/cria, every step goes on where it was stopped, and any number of processes
may train at once, a block each, torchrun's ranks too (docs/large_teachers.md).
Check: `pytest tests/test_cria.py`.

Shapes: R rows, T tokens per row, d hidden size.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config import DIVERGED, DistillConfig, Stopped, UserError
from cria_files import (
    Background,
    RowWriter,
    check_size,
    is_finished,
    read_tensor_file,
    sealed,
    write_tensor_file,
)
from cria_job import (
    Cria,
    Job,
    later_stages,
    load_block,
    name_of,
    prepare,
    resident_groups,
    saved_by,
    say,
)
from data import PackedLoader
from distributed import all_have_done, compile_blocks, tell_failure
from evaluate import inputs
from hf import stock_type, write_folder
from hf_files import our_name, read_weights, require_tied
from hybrid_layers import (
    check_transfer,
    convert_layers,
    mixer_names,
    resolve_kernels,
    use_kernels,
)
from layers import sdpa_priority
from lora import add_lora, merge_lora, wants_lora
from metrics import memory_gib
from model import Transformer
from objectives import AlignObjective, BlockObjective
from recompute import set_recompute
from shard_writer import write_file
from student import calibrate, calibration_loader, mixer_shape, set_trainable
from trainer import (
    amp_context,
    compile_wanted,
    open_run,
    restore_weights,
    stage_loader,
    train_stage,
)


def run(cfg: DistillConfig, argv: list[str]) -> DistillConfig | None:
    """Do the steps asked for; of torchrun's ranks all train, rank 0 does the rest. Returns the
    settings of the ordinary run that is left to do with the stitched student, None where there is
    none."""
    job = prepare(cfg, argv)
    cfg = job.cfg
    steps = {"shard": shard, "collect": collect, "train": train_as_one_of_many, "stitch": stitch}
    if job.ranks.is_main:
        say(
            f"cria: layers {job.student.layer_map()} in {len(job.blocks)} blocks of {cfg.cria}, "
            f"{len(job.trained)} to distil; in {job.folder}"
        )
        for plan in job.plans if cfg.dry_run else ():
            say(f"{plan.line(job.world)}, in every block")
    if cfg.dry_run:
        return None
    for name in steps if cfg.cria_step == "all" else [cfg.cria_step]:
        if job.ranks.is_main:
            steps[name](job)
        elif name == "train":
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                train_as_one_of_many(job)  # each block's folder has its log
        all_have_done(name, job.ranks)
    later = later_stages(cfg)
    if cfg.cria_step != "all" or not later:
        return None
    return dataclasses.replace(
        cfg, student=str(job.folder / "student"), stages=",".join(later), cria=0
    )


def train_as_one_of_many(job: Job) -> None:
    """`train` on a rank that others wait for: a block that diverges is a failure to them, though a
    run of its own has only stopped."""
    try:
        train(job)
    except Stopped as stopped:
        if stopped.code == DIVERGED and job.ranks.size > 1:
            tell_failure(stopped)
        raise


# ---- shard


def shard(job: Job) -> None:
    """One file of weights per block, as the teacher stores them; one of the embedding, the last
    norm and the head."""

    def write(name: int | str, wanted: Callable[[str], bool]) -> None:
        if not is_finished(job.weights(name)):
            found = read_weights(job.cfg.teacher, wanted)
            tensors = {our_name(key): t for key, t in found.items()}
            if job.teacher.tie_word_embeddings and "lm_head.weight" in tensors:
                require_tied(job.cfg.teacher, tensors.__getitem__)
            write_tensor_file(job.weights(name), tensors)

    for b, block in enumerate(job.blocks):
        names = tuple(f"layers.{i}." for i in block)
        write(b, lambda name, names=names: name.startswith(names))
    write("outer", lambda name: not name.startswith("layers."))
    say(f"shard: {len(job.blocks)} blocks and the rest in {job.folder / 'weights'}")


# ---- collect


def collected_rows(loader: PackedLoader, steps: int) -> list[int]:
    """The rows that so many steps see, in order, without micro-batches of which all came before."""
    seen, order = set(), []
    for step in range(steps):
        for rows in loader.step_rows(step * loader.rows_per_step).tolist():
            if not seen.issuperset(rows):
                order += rows
                seen.update(rows)
    return order


def row_sets(job: Job) -> Iterator[tuple[str, PackedLoader, list[int]]]:
    """(kind, loader, rows) of what blocks need."""
    if job.cfg.calibrate_tokens:
        loader = calibration_loader(job.cfg, job.data)
        yield "calibration", loader, collected_rows(loader, 1)
    plan = job.plans[0]
    loader = stage_loader(job.cfg, plan, job.data, job.world)
    yield "inputs", loader, collected_rows(loader, plan.steps)


def collect(job: Job) -> None:
    """Save the inputs of all blocks; not again where every block is distilled."""
    if all(is_finished(job.result(b)) for b in job.trained):
        return
    for kind, loader, order in row_sets(job):
        for group in resident_groups(job.trained, job.cfg.cria_resident):
            collect_group(job, kind, loader, order, group)
            gc.collect()  # compiled blocks are in cycles, with their weights


def collect_group(
    job: Job, kind: str, loader: PackedLoader, order: list[int], group: range
) -> None:
    """Run a group of blocks, from tokens or the inputs of its first, over all rows, and save the
    input of each block to distil, that of the next group among them."""
    saved = saved_by(group, job.trained)
    background, copies = Background(), Copies(job.world.device)
    writers = {b: RowWriter(job.inputs(kind, b), len(order), background.put) for b in saved}
    begin = min((w.done for w in writers.values()), default=len(order))
    if begin == len(order):
        return
    needed = [b for b in group if b < max(saved)]
    models = {b: load_block(job, b) for b in needed}
    for model in models.values() if compile_wanted(job.cfg, job.world) else ():
        compile_blocks(model)
    device, size = job.world.device, loader.micro_batch
    source = job.saved(kind, group[0]) if group[0] else None
    table = None
    if source is None:
        table = read_tensor_file(job.weights("outer"))["embed_tokens.weight"]
        table = table.to(device, job.dtype)
    say(f"collect: {kind} before blocks {', '.join(map(str, saved))}, from row {begin:,} of "
        f"{len(order):,}")  # fmt: skip
    start = told = time.perf_counter()
    amp = amp_context(device, job.dtype)
    with background, torch.no_grad(), amp(), sdpa_priority(device):
        for at in range(begin, len(order), size):
            rows = order[at : at + size]
            batch = loader.batch_of(rows)
            if source is not None:
                batch = source(batch)
            batch = batch.to(device)
            where = inputs(batch)
            if source is None:
                h = F.embedding(where.pop("input_ids"), table)
            else:
                h = where.pop("hidden")
            for b in range(group[0], max(saved) + 1):
                if b in writers:
                    host, ready = copies.take(h.reshape(len(rows), -1, h.shape[-1]))
                    writers[b].add(at, rows, host, ready)
                if b in models:
                    h = models[b](hidden=h, **where)
            copies.bound()
            if time.perf_counter() - told > 10:
                told = time.perf_counter()
                say(rate_line(at + size - begin, len(order) - begin, loader, told - start))
    line = rate_line(len(order) - begin, len(order) - begin, loader, time.perf_counter() - start)
    say(f"{line}, at most {memory_gib(device):.2f} GiB")


class Copies:
    """Copies to the host, on a stream of their own: blocks go on computing meanwhile."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ends: deque[torch.cuda.Event] = deque()

    def take(self, h: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
        """(h on the host, what waits until it is there). h must not be written to any more."""
        if self.stream is None:
            return h, None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host = h.to("cpu", non_blocking=True)  # page-locked
            h.record_stream(self.stream)
            copied = self.stream.record_event()
        return host, copied.synchronize

    def bound(self) -> None:
        """Once per micro-batch: wait for the one before the last, so that neither the GPU's memory
        nor the host's fills with what is on its way."""
        if self.stream is not None:
            self.ends.append(self.stream.record_event())
            if len(self.ends) > 2:
                self.ends.popleft().synchronize()


def rate_line(done: int, total: int, loader: PackedLoader, seconds: float) -> str:
    rate = done * loader.seq_len / seconds
    left = (total - done) * loader.seq_len / rate
    return f"collect: {done:,} of {total:,} rows, {rate:,.0f} tok/s, {left:.0f} s left"


# ---- train


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether no other process holds this lock, which ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train(job: Job) -> None:
    """Train every block that is not done and nobody else is at."""
    only = job.cfg.cria_block
    if only >= 0 and only not in job.trained:
        raise UserError(f"--cria_block: {only} found, which has no layer of --layers")
    for b in job.trained if only < 0 else [only]:
        with claimed(job.folder / "blocks" / f"{name_of(b)}.lock") as mine:
            if mine and not is_finished(job.result(b)):
                train_block(job, b)
                gc.collect()  # see collect
            elif not mine:
                say(f"train: block {b} is another process's")


def make_block(job: Job, b: int) -> tuple[Cria, Cria, list[int]]:
    """(teacher, student, converted layers within the block). Where the rest stays frozen, it is
    the teacher's own."""
    block = job.blocks[b]
    teacher = load_block(job, b)
    local = [i - block.start for i in job.layers if i in block]
    names = dict(zip(job.layers, mixer_names(job.cfg.mixer, len(job.layers)), strict=True))
    student = convert_layers(
        teacher, local, mixer=",".join(names[block.start + i] for i in local),
        share_trunk=all(plan.stage.train != "all" for plan in job.plans),
        transfer=job.cfg.transfer, **mixer_shape(job.cfg),
    )  # fmt: skip
    kernels = resolve_kernels(student.config, job.cfg.kernel, job.world.device, job.cfg.dtype)
    use_kernels(student, kernels, job.world.device)
    return teacher, student.train(), local


def train_block(job: Job, b: int) -> None:
    """align and block of one block, as a run of its own; what differs from the teacher is saved."""
    block, plans = job.blocks[b], job.plans
    cfg = dataclasses.replace(
        job.cfg, save_model_dir=str(job.folder / "blocks"), run=name_of(b),
        stages=",".join(plan.name for plan in plans),
    )  # fmt: skip
    rows = {kind: (job.saved(kind, b), order) for kind, _, order in row_sets(job)}
    for saved, order in rows.values():
        saved.require(order)
    teacher, student, local = make_block(job, b)
    run = open_run(cfg, job.argv, job.world, job.identity | {"block": b}, script="train_kd",
                   dtype=job.dtype, stages=cfg.stage_names())  # fmt: skip
    run.name = job.cfg.run
    run.logger.say(f"train: block {b}, layers {block.start} to {block.stop - 1}, "
                   f"{student.config.layer_map()}")  # fmt: skip
    if run.resumed_from is None and job.cfg.calibrate_tokens:
        job.data.attach = rows["calibration"][0]
        hidden = rows["calibration"][0].read(rows["calibration"][1][:1])
        check_transfer(teacher, student, local, hidden=hidden.to(job.world.device),
                       most=1e-3 if cfg.transfer.kv == "heads" else torch.inf)  # fmt: skip
        errors = calibrate(run, teacher, student, local, job.data)
        run.logger.say(f"calibrated: mean error {sum(errors.values()) / len(errors):.3f}")
    if wants_lora(cfg):
        add_lora(student, cfg)
    set_recompute(student, cfg.activation_checkpointing)
    if compile_wanted(cfg, job.world):
        compile_blocks(teacher)
        compile_blocks(student)
    restore_weights(run, student)
    saved, order = rows["inputs"]
    job.data.attach = saved
    for plan in plans:
        if plan.name in run.done:
            continue
        set_trainable(student, plan.stage, local)
        if plan.name == "align":
            keep = bool(plan.stage.unique_tokens)
            objective = AlignObjective(student, teacher, plan.stage, local, job.world, keep=keep)
        else:
            objective = BlockObjective(student, teacher, local)
        train_stage(
            run, plan, objective, job.data, student=student, teacher=teacher,
            select=None if plan.name == "align" else sorted(set(order)),
        )  # fmt: skip
    job.data.attach = None
    merge_lora(student)
    theirs = dict(teacher.named_parameters())
    tensors = {
        f"layers.{block.start + int(name.split('.', 2)[1])}.{name.split('.', 2)[2]}": p
        for name, p in student.named_parameters() if p is not theirs.get(name)
    }  # fmt: skip
    write_tensor_file(job.result(b), tensors)
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # larger than all that is kept
    run.logger.close()


# ---- stitch


def stitch(job: Job) -> None:
    """The blocks as one student, of which a block at a time is in memory; nothing where it is made
    of these files already."""
    for b in job.trained:
        if not is_finished(job.result(b)):
            raise UserError(f"{job.result(b)}.json: no such file; block {b} is not trained yet")
    folder, mark = job.folder / "student", job.folder / "student.json"
    files = [job.weights(b) for b in ("outer", *range(len(job.blocks)))]
    files += [job.result(b) for b in job.trained]
    made_of = sealed({f"{f.parent.name}/{f.name}": check_size(f)["xxh3_64"] for f in files})
    if folder.is_dir() and mark.is_file() and mark.read_bytes() == made_of:
        return say(f"stitch: the student is in {folder} already")
    mark.unlink(missing_ok=True)
    with torch.device("meta"):
        wanted = list(dict(Transformer(job.student).named_parameters()))
    kind = stock_type(job.student) or "retort"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        outer = read_tensor_file(job.weights("outer"))
        yield from ((n, outer[n]) for n in wanted if not n.startswith("layers."))
        for b, block in enumerate(job.blocks):
            mine = read_tensor_file(job.weights(b))
            if b in job.trained:
                mine |= read_tensor_file(job.result(b))
            names = tuple(f"layers.{i}." for i in block)
            yield from ((n, mine[n]) for n in wanted if n.startswith(names))

    dtype = read_tensor_file(job.weights("outer"))["embed_tokens.weight"].dtype
    write_folder(folder, job.student, kind, dtype, tensors(), job.spec)
    for b in job.trained:
        trained = read_tensor_file(job.result(b))
        found = read_weights(folder, lambda name, trained=trained: name in trained)
        for key, tensor in found.items():
            if not torch.equal(tensor, trained[our_name(key)]):
                raise RuntimeError(f"{folder}: {key} is not what block {b} has")
        assert len(found) == len(trained), (len(found), len(trained))
    write_file(mark, made_of)
    say(f"stitch: student of {len(job.trained)} distilled blocks in {folder} as {kind}")
