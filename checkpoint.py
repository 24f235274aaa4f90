"""Training checkpoints: safetensors and JSON only, checksummed, published by one rename.

    <run_dir>/checkpoints/step-200/
        shard-00001-model-00001-of-00001.safetensors   tensors, one set of files per rank
        state.json                                     everything that is not a tensor
        manifest.json                                  size and xxh3_64 of every file, written last

A folder without a manifest was never finished; `step-N.tmp` is one being written or deleted.
No pickle is read, and a folder that holds one is refused. docs/checkpoints.md says what is
guaranteed and what is not. Try it: pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from config import UserError
from distributed import on_all_ranks
from tensor_files import Piece, file_entry, local_plan, own_files, write_tensors

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 2 << 30
STEP_FOLDER = re.compile(r"step-(\d+)")
# Files that some loader would unpickle, which runs code. `.metadata` is DCP's own pickle.
PICKLES = (".metadata", ".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".distcp")


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict,
    *,
    keep: int = 2,
    rank: int = 0,
    world_size: int = 1,
) -> Path:
    """Write `<run_dir>/checkpoints/step-<step>` and prune to the last `keep`. Collective.

    Args:
        tensors: every rank passes the same names. Plain tensors are taken to be the same on all
            ranks and are written once, spread over the ranks; of a DTensor each rank writes its
            own shard. Names that share storage are a bug of the caller (drop the tied alias).
        state: what JSON can hold, with string keys; rank 0's is the one written.
        keep: how many finished checkpoints of this step and earlier ones stay, >= 2, so that one
            is left when the newest turns out damaged. Later steps, which a run that went back
            has left behind, are never deleted, only replaced when their step comes again.

    Raises, on every rank: UserError for `keep` < 2; OSError naming the path when the disk is full
    or not writable. The earlier checkpoints are then as they were.
    """
    save = Save(Path(run_dir) / "checkpoints", step, keep, rank, world_size)
    save.begin(tensors, state)
    with save.whole_or_nothing():
        written = on_all_ranks(save.write, save.tmp, world_size)
        on_all_ranks(lambda: save.publish(written), save.tmp, world_size)
    save.prune()
    return save.final


@dataclass
class Save:
    """A checkpoint on its way. `begin` is collective; then every rank calls `write` for itself, in
    whatever thread; then rank 0 calls `publish` with what all have written, and `prune`. Where one
    of them fails rank 0 calls `discard`, when none writes any more."""

    folder: Path
    step: int
    keep: int
    rank: int
    world_size: int
    state: str = ""
    files: dict[str, list[Piece]] = field(default_factory=dict)  # this rank's

    @property
    def final(self) -> Path:
        return self.folder / f"step-{self.step}"

    @property
    def tmp(self) -> Path:
        return self.folder / f"step-{self.step}.tmp"

    @contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """`discard` where what is done within fails; the error goes on. What ends the process, and
        may come at any point, leaves the folder for the next save to clear."""
        try:
            yield
        except Exception:
            self.discard()
            raise

    def begin(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Make the folder and share out the tensors; nothing is left of it if this raises."""
        if self.keep < 2:
            raise UserError(
                f"--keep_checkpoints={self.keep}: expected 2 or more, so that one is left if the "
                "newest is damaged"
            )

        def prepare() -> Any:
            _check_tensors(tensors)
            self.state = _json_text(state)
            if self.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob("step-*.tmp"):
                    shutil.rmtree(stale)
                self.tmp.mkdir()
            return local_plan(tensors, self.rank == 0)

        with self.whole_or_nothing():
            plans = on_all_ranks(prepare, self.tmp, self.world_size)
        self.files = own_files(tensors, plans, self.rank, MAX_FILE_BYTES)

    def write(self) -> dict[str, dict]:
        """This rank's files: name -> size and checksum."""
        found = {n: write_tensors(self.tmp / n, pieces) for n, pieces in self.files.items()}
        if self.rank == 0:
            _write_text(self.tmp / STATE, self.state)
            found[STATE] = file_entry(self.tmp / STATE)
        return found

    def publish(self, written: list[dict[str, dict]]) -> None:
        """The manifest, then the rename; `written`: what each rank's `write` returned."""
        if self.rank != 0:
            return
        files = {name: entry for part in written for name, entry in part.items()}
        (self.tmp / MANIFEST).write_bytes(_manifest_bytes(self.step, files))
        _fsync(self.tmp / MANIFEST)
        _fsync(self.tmp)
        if self.final.exists():  # a run that went back has reached this step again
            self.final.rename(self.folder / f"step-{self.step}.replaced.tmp")
        self.tmp.rename(self.final)
        _fsync(self.folder)

    def discard(self) -> None:
        """A full disk gets its room back."""
        if self.rank == 0:
            shutil.rmtree(self.tmp, ignore_errors=True)

    def prune(self) -> None:
        if self.rank == 0:
            _prune(self.folder, self.step, self.keep)


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Finished checkpoints (those with a manifest), oldest first, ordered by step number."""
    return [path for path in _step_folders(run_dir) if (path / MANIFEST).is_file()]


def verify_checkpoint(path: str | Path) -> str | None:
    """None if every byte is as written, else one line naming the first file that is not."""
    path = Path(path)
    try:
        problem, files = _check_listing(path)
        if problem is not None:
            return problem
        for name, expected in files.items():
            found = file_entry(path / name)["xxh3_64"]
            if found != expected["xxh3_64"]:
                return f"{name} is damaged: checksum {found}, expected {expected['xxh3_64']}"
    except OSError as error:  # a failing disk gives read errors, not wrong bytes
        return f"{error.filename or path} cannot be read: {error.strerror}"
    return None


def find_checkpoint(
    run_dir_or_ckpt: str | Path, *, explicit: bool, rank: int = 0, world_size: int = 1
) -> Path | None:
    """The newest valid checkpoint of a run, or the one checkpoint named; every byte is checked.

    Collective: rank 0 reads and checks, the others get its answer.

    Args:
        run_dir_or_ckpt: a run, its `checkpoints` folder, or one `step-N` folder.
        explicit: the user asked for it by name. Then a damaged or missing checkpoint is a
            UserError, also when it is the newest one of the run named. Otherwise (auto-resume) a
            damaged one is named in a warning and the one before it is taken; a UserError if all
            are damaged, None if there is none.
    """

    def search() -> Path | None:
        return _search(Path(run_dir_or_ckpt), explicit) if rank == 0 else None

    return on_all_ranks(search, Path(run_dir_or_ckpt), world_size)[0]


def read_state(path: str | Path) -> dict:
    """The `state` given to save_checkpoint, as JSON gives it back (tuples are lists)."""
    path = Path(path)
    _refuse_unfinished(path)
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / STATE}: expected JSON, found damage: {error}") from None


def tensor_names(path: str | Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, dtype) of every tensor, from the files' headers; shapes are global."""
    path = Path(path)
    _refuse_unfinished(path)
    metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in sorted(metadata.state_dict_metadata.items())
    }


def load_tensors(path: str | Path, into: dict[str, Tensor], *, partial: bool = False) -> None:
    """Copy a checkpoint's tensors into those of `into`, in place, on whatever device they are.

    Works for any world size, whatever the one it was saved with, and is not collective: each rank
    reads what its own tensors need (all of a plain tensor, its shard of a DTensor).

    Args:
        partial: allow tensors in the checkpoint that `into` does not ask for (a later stage that
            takes the weights but not the optimizer).

    Raises UserError naming missing or unexpected tensors, or one whose shape or dtype differs:
    the reader would otherwise cast in silence. Bytes are checked by find_checkpoint, not here.
    """
    path = Path(path)
    saved = tensor_names(path)
    missing = sorted(into.keys() - saved.keys())
    unexpected = [] if partial else sorted(saved.keys() - into.keys())
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"it lacks {_some(missing)}, which this run expects")
        if unexpected:
            parts.append(f"it holds {_some(unexpected)}, which this run has no place for")
        raise UserError(f"checkpoint {path} does not fit this run: {'; '.join(parts)}")
    for name, tensor in into.items():
        shape, dtype = saved[name]
        if (shape, dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"checkpoint {path}: {name} is {tuple(shape)} {dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )
    if not into:
        return
    with _dcp_errors(path):
        dcp.load(
            dict(into),  # DCP assigns into the dict it is given
            storage_reader=dcp.HuggingFaceStorageReader(str(path)),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )


def rng_state() -> dict:
    """State of every random generator this process uses, as JSON. CUDA: the current device's."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
    }


def set_rng_state(state: dict) -> None:
    """Undo of rng_state. A CUDA state on a machine without CUDA is skipped with a warning."""
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] is not None:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(_from_text(state["cuda"]))
        else:
            logger.warning("checkpoint has a CUDA random state, this machine no CUDA: ignored")
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


# Writing


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    seen: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        assert isinstance(tensor, Tensor), f"{name}: {type(tensor).__name__} belongs in state"
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        assert local.device.type != "meta", f"{name} is a meta tensor: it has no values to save"
        if local.numel() == 0:
            continue
        # On CPU the writer refuses aliases with a page of text; on CUDA it writes them twice.
        other = seen.setdefault((local.device, local.data_ptr()), name)
        assert other == name, f"{other} and {name} share storage: drop the tied alias"


@contextmanager
def _dcp_errors(path: Path) -> Iterator[None]:
    """Turns DCP's CheckpointException into an OSError or RuntimeError naming the path.

    It is a BaseException, so that `except Exception` misses it, and prints every rank's traceback.
    Also hides DCP's warning that there is no process group, which is our normal case.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, OSError):
            # The file name is lost when the error of another rank is sent over.
            name = cause.filename or str(path)
            raise OSError(cause.errno, cause.strerror, name) from cause
        raise RuntimeError(f"{path}: rank {rank}: {cause}") from cause


def _json_text(state: dict) -> str:
    _check_keys(state, STATE)
    # Python's own NaN and Infinity are let through: only read_state reads this file.
    return json.dumps(state, indent=1)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _fsync(path)


def _check_keys(value: Any, where: str) -> None:
    """json.dumps turns other keys into text in silence; they would come back as strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string and would become one")
            _check_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item, where)


def _fsync(path: Path) -> None:
    """Flushes a file or folder to the disk itself: a rename may outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, step: int, keep: int) -> None:
    finished = [p for p in list_checkpoints(folder) if step_of(p) <= step]
    for old in finished[:-keep]:
        # Renamed first: an interrupted deletion must not look like a damaged checkpoint.
        doomed = old.rename(old.with_name(old.name + ".tmp"))
        _remove(doomed)
    _remove(folder / f"step-{step}.replaced.tmp")


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # the new checkpoint is complete: no reason to stop training
        logger.warning("could not delete the old checkpoint %s: %s", path, error)


# Checking


def _manifest_bytes(step: int, files: dict[str, dict]) -> bytes:
    """The one way a manifest is spelled, its own checksum included: any changed byte shows."""
    content = {"format_version": FORMAT_VERSION, "step": step, "files": dict(sorted(files.items()))}
    content["self_xxh3_64"] = xxhash.xxh3_64(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content, indent=1) + "\n").encode()


def _check_listing(path: Path) -> tuple[str | None, dict[str, dict]]:
    """(problem or None, the manifest's files), from the manifest, names and sizes only."""
    if not path.is_dir():
        return "no such folder", {}
    present = sorted(p.name for p in path.iterdir())
    for name in present:
        if name.endswith(PICKLES):
            return f"{name} could be a pickle, which can run code: refusing the folder", {}
    if MANIFEST not in present:
        return f"{MANIFEST} is missing: the checkpoint was not finished", {}
    raw = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        version, step, files = (manifest[k] for k in ("format_version", "step", "files"))
        intact = raw == _manifest_bytes(step, files) or version != FORMAT_VERSION
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        return f"{MANIFEST} is damaged", {}
    if version != FORMAT_VERSION:
        return f"{MANIFEST} has format_version {version}, expected {FORMAT_VERSION}", {}
    for name, entry in files.items():
        if name not in present:
            return f"{name} is missing", {}
        size = (path / name).stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes, expected {entry['size']}", {}
    for name in present:  # the reader takes every safetensors file it finds
        if name.endswith(".safetensors") and name not in files:
            return f"{name} is not in {MANIFEST}", {}
    if STATE not in files:
        return f"{STATE} is missing", {}
    return None, files


def _refuse_unfinished(path: Path) -> None:
    problem, _ = _check_listing(path)
    if problem is not None:
        raise UserError(f"checkpoint {path}: {problem}")


def _search(path: Path, explicit: bool) -> Path | None:
    if STEP_FOLDER.fullmatch(path.name) or (path / MANIFEST).is_file():
        candidates = [path]
    else:
        candidates = _step_folders(path)[::-1]
    if explicit and not candidates:
        raise UserError(f"{path}: expected checkpoints/step-N folders of a run, found none")
    problems = [(c, verify_checkpoint(c)) for c in candidates[:1]]
    for older in candidates[1:]:
        if problems[-1][1] is None:
            break
        problems.append((older, verify_checkpoint(older)))
    found = next((c for c, problem in problems if problem is None), None)
    for damaged, problem in problems:
        if problem is None:
            continue
        hint = "none is intact, so a run of another name is all that is left"
        if found:
            hint = f"{found} is intact and can be named instead"
        if explicit or not found:  # never from step 0 again over what a run has left
            raise UserError(f"checkpoint {damaged}: {problem}; {hint}")
        logger.warning("checkpoint %s: %s; using %s", damaged, problem, found.name)
    return found


def _step_folders(path: str | Path) -> list[Path]:
    """All step-N folders of a run, or of its `checkpoints` folder, finished or not, by number."""
    path = Path(path)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if STEP_FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(steps, key=step_of)


def step_of(path: Path) -> int:
    """The number of a step-N folder."""
    return int(STEP_FOLDER.fullmatch(path.name)[1])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
