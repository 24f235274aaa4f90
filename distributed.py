"""Ranks and devices: process groups, DDP, gradients outside a backward, per-block compile, signals.

FSDP2 is in fsdp.py.
Check: `pytest tests/test_runs.py tests/faults`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Stopped, UserError

SAVE_FAILED = 999  # in place of a signal's number
JOIN = 600.0  # seconds that ranks started without torchrun have to find each other
FAILURE = "failure"  # the store's key for what ended the first rank that failed
ONE_SIGNAL = 2.0  # seconds: who stops a job may tell each process, and torchrun tells them again
_hosts: dist.ProcessGroup | None = None  # for what hosts tell each other, apart from tensors' sums
_store: dist.Store | None = None  # see `shared_store`


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    device: torch.device
    memory: int = 0  # bytes of a GPU that is only planned for; 0: this machine's own

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def gpu_memory(self) -> int:
        """Bytes of the GPU's memory."""
        return self.memory or torch.cuda.get_device_properties(self.device).total_memory


def choose_device(name: str) -> torch.device:
    """auto = cuda, then mps, then cpu. UserError for a device this machine lacks."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: '{name}' found, auto, cpu, cuda or mps expected") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"{torch.cuda.device_count()} CUDA devices" if device.index else "no CUDA device"
        raise UserError(f"--device: {name} found, but PyTorch sees {seen}; cpu expected")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device: mps found, but PyTorch sees no MPS device; cpu expected")
    return device


def this_process(device_name: str) -> World:
    """Rank, ranks and device from the flags and torchrun's environment; touches neither."""
    device = choose_device(device_name)
    rank, size, local = _ranks()
    if size == 1:
        return World(0, 1, torch.device("cuda", 0) if device.type == "cuda" else device)
    if device.type == "mps":
        raise UserError("--device: mps found under torchrun, cpu or cuda expected")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: local rank {local} found, this machine has "
                f"{torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", local)
    return World(rank, size, device)


def _ranks() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets, or whoever starts ranks by hand."""
    wanted = {"RANK", "WORLD_SIZE"} & os.environ.keys()
    if os.environ.get("WORLD_SIZE", "1") != "1" or "RANK" in wanted:
        wanted = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    lacking = sorted(wanted - os.environ.keys())
    if lacking:
        raise UserError(
            f"{lacking[0]}: not set, though {', '.join(sorted(wanted & os.environ.keys()))} found; "
            f"all of {', '.join(sorted(wanted))} expected, as torchrun sets them, or none"
        )
    size = _number("WORLD_SIZE", "1", 1, 1 << 30)
    found = _number("RANK", "0", 0, size - 1), size, _number("LOCAL_RANK", "0", 0, size - 1)
    if size > 1:
        _number("MASTER_PORT", "", 1, 65535)
        if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
            raise UserError(
                f"LOCAL_RANK: not set, 0 to {torch.cuda.device_count() - 1}, this rank's GPU, "
                f"expected"
            )
    return found


def _number(name: str, default: str, low: int, high: int) -> int:
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        expected = f"{low} to {high}" if high < 1 << 30 else "the number of ranks"
        raise UserError(f"{name}: '{text}' found in the environment, {expected} expected")
    return int(text)


def start(world: World) -> None:
    """Join the other ranks if there are any (gloo on CPU, nccl on CUDA); once is enough."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1 or dist.is_initialized():
        return
    cuda = world.device.type == "cuda"
    store = _attempt_store(world) if dist.is_torchelastic_launched() else _join(world)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=world.rank if store else -1,
        world_size=world.size if store else -1,
        timeout=timedelta(minutes=30),
        device_id=world.device if cuda else None,
    )
    global _hosts, _store
    _hosts = dist.new_group(backend="gloo")
    # The store may be that of an earlier attempt, whose keys are still in it.
    box = [f"retort-{time.time_ns()}"]
    dist.broadcast_object_list(box, src=0, group=_hosts)
    _store = dist.PrefixStore(box[0], dist.distributed_c10d._get_default_store())


def shared_store() -> dist.Store:
    """What all ranks of this attempt read and write, on a connection of its own: a wait on it holds
    up nobody."""
    store = _store.clone()
    store.set_timeout(timedelta(seconds=5))
    return store


def _attempt_store(world: World) -> dist.Store | None:
    """torchrun's store, with names of this attempt alone: after a restart the ranks would find the
    addresses of those before them, and wait for these for ever. None under several torchruns, whose
    counts of restarts differ; they need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."""
    agents, ours = os.environ["GROUP_WORLD_SIZE"], os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if agents != "1" or ours != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world.size, timeout=timedelta(minutes=30))
    return dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _join(world: World) -> dist.Store:
    """The store that rank 0 opens at MASTER_ADDR:MASTER_PORT, when every rank has come to it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where, deadline = f"MASTER_ADDR, MASTER_PORT: {host}:{port}", time.monotonic() + JOIN
    nobody = f"{where} found without an answer for {JOIN:g} s, rank 0 expected there"
    problem = ""
    while world.rank:  # PyTorch would say each vain attempt in a page
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as e:
            problem = f" ({e.strerror or e})"
        if time.monotonic() > deadline:
            raise UserError(nobody + problem)
        time.sleep(0.2)
    made: list = []

    def connect() -> None:
        how = {"is_master": world.is_main, "wait_for_workers": False}
        try:
            made.append(dist.TCPStore(host, port, world.size, timeout=timedelta(0, JOIN), **how))
        except dist.DistError as e:
            made.append(e)

    # In a thread: who listens there without being a store would have PyTorch wait for ever.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    store = made[0] if made else None
    if isinstance(store, dist.DistError) and "EADDRINUSE" in str(store):
        raise UserError(f"{where} found in use by another process, a free port expected")
    if not isinstance(store, dist.Store):
        raise UserError(nobody + (f" ({str(store).splitlines()[0]})" if store else ""))
    if store.add(f"come/{world.rank}", 1) > 1:
        raise UserError(f"RANK: {world.rank} found twice at {host}:{port}, once expected")
    missing = set(range(world.size))
    while True:
        missing = {r for r in missing if not store.check([f"come/{r}"])}
        if not missing:
            break
        if time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)[:8])) + (", ..." if len(missing) > 8 else "")
            raise UserError(
                f"WORLD_SIZE: {world.size - len(missing)} of {world.size} ranks found at "
                f"{host}:{port} after {JOIN:g} s, all expected; missing: rank {names}"
            )
        time.sleep(0.05)
    store.set_timeout(timedelta(minutes=30))
    return store


def stop() -> None:
    """Leave the process groups, together where all come: gloo's threads can end the process
    ("terminate called without an active exception") if one rank leaves while another sends.

    To be called in a `finally`. With an error on its way the group is left as it is, since NCCL
    would wait for ranks that wait for this one. The first such error is told to the other ranks'
    watchdogs; what another rank gets to feel of it is no error of its own, and becomes Stopped."""
    if not dist.is_initialized():
        return
    error = sys.exception()
    if error is not None and not isinstance(error, Stopped):
        told, first = tell_failure(error)
        if first != told and isinstance(error, RuntimeError):  # DistError, gloo's and NCCL's are
            raise Stopped(1, f"stopped, since another rank failed: {first}")
    else:
        with contextlib.suppress(Exception):
            deadline, store = time.monotonic() + 2, _store
            store = store or dist.distributed_c10d._get_default_store()
            store.add("left", 1)
            while store.add("left", 0) < dist.get_world_size() and time.monotonic() < deadline:
                time.sleep(0.01)
        dist.destroy_process_group()


def tell_failure(error: BaseException) -> tuple[str, str]:
    """Tell the other ranks what ended this one: (what was told, what the first to fail told)."""
    told = first = f"rank {dist.get_rank()}: {error_line(error)}"
    with contextlib.suppress(Exception):  # the store's host may be gone
        first = _store.compare_set(FAILURE, "", told).decode()
    return told, first


def error_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class StopSignals:
    """Within it SIGTERM and SIGINT are noted, so that a run can end between two steps. One more,
    seconds later, ends the process at once, as does the first one anywhere else."""

    def __init__(self, world: World):
        self.world, self.heard, self.when = world, 0, 0.0
        self.asked: tuple | None = None  # the ranks' answer, on its way

    def __enter__(self) -> StopSignals:
        known = (signal.SIGTERM, signal.SIGINT)
        heard = [n for n in known if signal.getsignal(n) != signal.SIG_IGN]  # nohup's stay ignored
        self.before = {n: signal.signal(n, self._note) for n in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        now = time.monotonic()
        if self.heard and now - self.when > ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.heard:
            self.heard, self.when = number, now

    def agreed(self, last: bool = False, failed: bool = False) -> int:
        """The signal that every rank stops for now, 0 for none, SAVE_FAILED where a save in the
        background has `failed` on one; every rank asks after each step. What a rank has heard
        reaches the others while the next step runs, so that none waits for it; after the `last`
        step they wait."""
        mine = SAVE_FAILED if failed else self.heard
        if self.world.size == 1:
            return mine
        number = self._answer() if self.asked else 0
        flag = torch.tensor(mine)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=_hosts, async_op=True)
        self.asked = work, flag
        return max(number, self._answer()) if last or number else 0

    def _answer(self) -> int:
        work, flag = self.asked
        work.wait()
        return int(flag)


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


def all_have_done(what: str, world: World) -> None:
    """A barrier that may take days, for what ranks do by themselves; each `what` once. Stopped
    where a rank has failed."""
    if world.size == 1:
        return
    store = shared_store()
    store.set(f"{what} {world.rank}", "")
    while not store.check([f"{what} {r}" for r in range(world.size)]):
        if store.check([FAILURE]):
            first = store.get(FAILURE).decode()
            raise Stopped(1, f"stopped, since another rank failed: {first}")
        time.sleep(0.1)


def main_says(value, world: World):
    """Rank 0's `value` (anything JSON-like) on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def main_first(world: World, work):
    """Run `work()` on rank 0, then on the others, which find its result on disk. A UserError on
    rank 0 is raised everywhere, so that no rank waits for ever."""
    if world.size == 1:
        return work()
    error, result = None, None
    if world.is_main:
        try:
            result = work()
        except UserError as e:
            error = str(e)
    error = main_says(error, world)
    if error is not None:
        raise UserError(error)
    return result if world.is_main else work()


def on_all_ranks(action: Callable[[], Any], path: Path, world_size: int) -> list:
    """Runs `action` on every rank; returns all ranks' results, or raises on all if one failed.

    Without this, a rank whose disk is full would leave the others waiting in the next barrier.
    """
    if world_size == 1:
        return [action()]
    assert dist.is_initialized(), f"world_size={world_size} needs a process group"
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    message = None if failure is None else str(failure) or type(failure).__name__
    gathered: list = [None] * world_size
    told = (result, message, isinstance(failure, UserError))
    dist.all_gather_object(gathered, told, group=_hosts)
    if failure is not None:
        raise failure
    for rank, (_, message, is_users_mistake) in enumerate(gathered):
        if is_users_mistake:  # ends every rank in the same quiet way
            raise UserError(message)
        if message is not None:
            raise OSError(errno.EIO, f"rank {rank} failed: {message}", str(path))
    return [result for result, *_ in gathered]


def everyone(value, world: World) -> list:
    """Every rank's `value` (anything JSON-like), on all of them."""
    found = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(found, value, group=_hosts)
    return found


def require_same(found: dict[str, Any], world: World) -> None:
    """flag -> what a rank chose by its own GPU. UserError where ranks differ: one would wait for
    ever for what another does not do."""
    every = everyone(found, world)
    for flag in found:
        seen = sorted({str(theirs[flag]) for theirs in every})
        if len(seen) > 1:
            raise UserError(
                f"{flag}: {' and '.join(seen)} found, chosen by ranks whose GPUs have different "
                f"memory; the flag itself expected"
            )


def gather_later(mine: Tensor, world: World) -> tuple[dist.Work, list[Tensor]]:
    """All ranks' values of a small CPU tensor, there when the work is done; nobody waits."""
    found = [torch.empty_like(mine) for _ in range(world.size)]
    return dist.all_gather(found, mine, group=_hosts, async_op=True), found


def all_sum(t: Tensor, world: World) -> Tensor:
    """Sum over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(t)
    return t


@torch.no_grad()
def broadcast(params: Iterable[Tensor], world: World) -> None:
    """Give every rank rank 0's values, in place."""
    if world.size > 1:
        for p in params:
            dist.broadcast(p, src=0)


class _Parameters(nn.Module):
    def __init__(self, params: Iterable[nn.Parameter]):
        super().__init__()
        for i, p in enumerate(params):
            self.register_parameter(str(i), p)

    def forward(self) -> None:
        pass


def data_parallel(params: Iterable[nn.Parameter]) -> nn.parallel.DistributedDataParallel:
    """DistributedDataParallel of parameters that are used elsewhere: call it, without arguments,
    right before a step's last backward, which then makes every .grad its mean over ranks.

    The model is not inside, since torch.compile would cut blocks that run there at the ends of
    DDP's messages, and not every backward is of its forward. All ranks begin with rank 0's values.
    The backward has to reach every parameter (RuntimeError in the next step)."""
    return nn.parallel.DistributedDataParallel(_Parameters(params), gradient_as_bucket_view=True)


def sum_gradients(params: Iterable[nn.Parameter], world: World) -> None:
    """Sum gradients over ranks in one flat message (for modules called outside DDP)."""
    if world.size == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in grads:
        by_dtype.setdefault(g.dtype, []).append(g)
    for group in by_dtype.values():
        flat = torch.cat([g.flatten() for g in group])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in group])
        torch._foreach_copy_(group, [new.view_as(g) for g, new in zip(group, parts, strict=True)])


def start_compile_workers() -> None:
    """Start torch.compile's worker processes, if they do not run yet, deaf to SIGTERM and SIGINT.

    Who stops a job tells its whole process group, and without its workers a compilation waits for
    them for ever (seen with torch 2.13). They leave when this process ends. What comes meanwhile
    reaches this process afterwards."""
    from torch._inductor.async_compile import AsyncCompile

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        AsyncCompile.warm_pool()
        AsyncCompile.wakeup()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def compile_blocks(model: nn.Module, hooks: bool = False) -> None:
    """torch.compile every block by itself: one graph is reused by all blocks of a kind. hooks: such
    as FSDP2's are to come, which stay outside of the graph."""
    if torch.cuda.is_available():
        start_compile_workers()
    model.compiled = True
    for block in model.layers:
        if block.kind != "linear_attention":
            block.self_attn.compiled = True
        if block.kind != "full_attention":
            block.attention.compile()  # align calls a converted one by itself
        if hooks:
            block.forward = torch.compile(block.forward)
        else:
            block.compile()
    model.norm.compile()
