"""Tokenises text into a data set folder that `--data FOLDER` takes.

    python scripts/prepare_data.py README.md docs --out data/docs --tokenizer byte

Inputs are files, folders (searched recursively) and quoted glob patterns: .txt and .md files, one
document each; .jsonl files, one document a line, also as .gz and .zst (DCLM); .parquet files, one
document a row (FineWeb). A document is held out or not by the hash of its text, so that two copies
of one text are never on both sides, whatever the order of the inputs or the number of workers.
Killed at any moment, the same command goes on, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Runnable as a file: the modules live one folder up and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import UserError
from scripts.readers import Damaged, input_files, not_read, reader_of
from scripts.unfinished import Unfinished
from shard_writer import ShardWriter, pack_documents
from tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "val")
TASK_BYTES = 1 << 20  # of one task for a worker: large against the cost of sending it
SAVE_SECONDS = 10.0  # of work that a crash may cost
FAST_BYTES = 4_000_000  # of input that make up for the comparison of the two libraries
BAD_SHOWN = 10
TERMINAL_SECONDS, LINE_SECONDS = 2.0, 30.0  # between two reports


class Position(NamedTuple):
    """The next row to read."""

    file: int
    row: int
    at: int  # bytes of the file read before it, for the display


class Packed(NamedTuple):
    """What a worker makes of a task."""

    splits: dict[str, tuple[np.ndarray, np.ndarray]]  # tokens and document ends
    chars: int
    bad: list[tuple[str, str]]  # kind and message of what was left out


def tasks(files: list[Path], options, start: Position):
    """(task, position after it): a task is a list of (path, rows before, content), with the
    content (kind, message) where a file is damaged. Its size is bounded, so that memory does not
    grow with the input."""
    task, size, position = [], 0, start
    for i in range(start.file, len(files)):
        path, row = files[i], start.row if i == start.file else 0
        try:
            for rows in reader_of(path)(path, options, row):
                task.append((str(path), row, rows.content))
                row, size = rows.last, size + rows.size
                if size >= TASK_BYTES:
                    yield task, Position(i, row, rows.at)
                    task, size = [], 0
        except Damaged as damage:
            task.append((str(path), row, (damage.kind, str(damage))))
        position = Position(i + 1, 0, 0)
    if task:
        yield task, position


class Encoder:
    """Makes tokens of tasks; what a worker process keeps between them."""

    def __init__(self, tokenizer: Tokenizer, options):
        self.tokenizer, self.text_field = tokenizer, options.text_field
        self.threshold = int(options.val_fraction * 2**64)
        self.key = str(options.seed).encode()

    def split(self, text: str) -> str:
        data = text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(data, digest_size=8, key=self.key).digest()
        return "val" if int.from_bytes(digest, "little") < self.threshold else "train"

    def __call__(self, task) -> Packed:
        bad = []
        texts = [text for text in self.texts(task, bad) if text and not text.isspace()]
        splits = {split: [] for split in SPLITS}
        for text, ids in zip(texts, self.tokenizer.encode_arrays(texts), strict=True):
            splits[self.split(text)].append(ids)
        packed = {split: pack_documents(ids, self.tokenizer) for split, ids in splits.items()}
        return Packed(packed, sum(map(len, texts)), bad)

    def texts(self, task, bad):
        for path, row, content in task:
            if isinstance(content, tuple):
                bad.append(content)
            elif isinstance(content, bytes):
                yield from self.json_texts(path, row, content, bad)
            else:
                for number, text in enumerate(content, row + 1):
                    if text is None:
                        bad.append(("no text", f"{path}: row {number} has no text"))
                    else:
                        yield text

    def json_texts(self, path, row, content, bad):
        """The text field of each line; a line that has none is reported and left out."""
        for number, line in enumerate(content.split(b"\n"), row + 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # JSON or UTF-8; very deep lists
                bad.append(("not JSON", f"{path}:{number}: not JSON ({error})"))
                continue
            text = record.get(self.text_field) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield text
            else:
                bad.append(("no text", f"{path}:{number}: no text field {self.text_field!r}"))


NOTHING = {"position": (0, 0, 0), "chars": 0, "bad": {}, "splits": {}}

_worker: Encoder | None = None  # set once in each worker process, never in the parent


def _start_worker(options, fast: bool) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One process a core already: the tokenizers' own threads would only compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(options.tokenizer)
    if fast:
        tokenizer.speed_up(checked=True)
    _worker = Encoder(tokenizer, options)


@contextlib.contextmanager
def _deaf_children():
    """Processes started within it do not hear Ctrl-C, not even while they still import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A killed parent closes no pool, and its workers would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task) -> Packed:
    return _worker(task)


def encode_all(todo, tokenizer: Tokenizer, fast: bool, options):
    """(packed, position after it) in input order, with a bounded number of tasks under way."""
    if options.num_workers == 1:
        encoder = Encoder(tokenizer, options)
        for task, position in todo:
            yield encoder(task), position
        return
    pool = ProcessPoolExecutor(
        options.num_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(options, fast),
    )
    with pool:
        pending = deque()
        try:
            for task, position in todo:
                with _deaf_children():  # a task may be what starts one more worker
                    pending.append((pool.submit(_work, task), position))
                if len(pending) >= 2 * options.num_workers:
                    future, position = pending.popleft()
                    yield future.result(), position
            for future, position in pending:
                yield future.result(), position
        finally:
            pool.shutdown(cancel_futures=True)


class Display:
    """Progress on stderr: one line that is rewritten on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int, tokens: int):
        self.total, self.first = total, (done, tokens)
        self.terminal = sys.stderr.isatty()
        self.every = TERMINAL_SECONDS if self.terminal else LINE_SECONDS
        self.start = self.shown = time.monotonic()

    def update(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self.shown < self.every:
            return
        self.shown, seconds = now, now - self.start
        speed, pace = ((b - a) / seconds for a, b in zip(self.first, (done, tokens), strict=True))
        left = timedelta(seconds=round((self.total - done) / speed)) if speed else "?"
        self.say(
            f"{done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB, {speed / 1e6:,.1f} MB/s,"
            f" {tokens:,} tokens, {pace:,.0f} tokens/s, {left} left",
            end="" if self.terminal else "\n",
        )

    def say(self, message: str, end: str = "\n") -> None:
        self.clear()
        print(message, end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.terminal:
            print(end="\r\x1b[K", file=sys.stderr, flush=True)


def pick_tokenizer(options, input_bytes: int) -> tuple[Tokenizer, bool, str]:
    """(tokenizer, whether it was sped up, why it was not)."""
    tokenizer, want = load_tokenizer(options.tokenizer), options.fast_tokenizer
    if want == "off" or (want == "auto" and input_bytes < FAST_BYTES):
        return tokenizer, False, ""
    try:
        tokenizer.speed_up()
    except ValueError as error:
        if want == "on":
            raise UserError(f"--fast_tokenizer on: impossible with this one; {error}") from None
        return tokenizer, False, f" (slower than tiktoken, which cannot: {error})"
    return tokenizer, True, ""


def command_of(options, tokenizer: Tokenizer, files: list[Path], stats) -> dict:
    """All that decides the content of the data set."""
    names = ("val_fraction", "text_field", "split_paragraph_breaks", "shard_tokens", "seed")
    command = {f"--{name}": getattr(options, name) for name in names}
    command["--tokenizer"] = [options.tokenizer, tokenizer.hash, tokenizer.eos_token_id]
    entries = zip(files, stats, strict=True)
    command["files"] = [[str(path.resolve()), s.st_size, s.st_mtime_ns] for path, s in entries]
    return command


def prepare(options) -> dict:
    """Writes the data set; returns the statistics that `main` prints."""
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val_fraction {options.val_fraction}: expected 0 up to less than 1")
    for flag in ("shard_tokens", "num_workers"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)}: expected at least 1")
    files, unknown = input_files(options.inputs)
    if unknown:
        print(not_read(unknown), file=sys.stderr)
    file_stats = [path.stat() for path in files]
    starts = np.cumsum([0, *(s.st_size for s in file_stats)]).tolist()
    tokenizer, fast, why_not = pick_tokenizer(options, starts[-1])
    command = command_of(options, tokenizer, files, file_stats)
    work = Unfinished(Path(options.out), command, overwrite=options.overwrite)
    before = work.progress or NOTHING
    if not work.is_done():
        try:
            write(work, tokenizer, fast, files, starts, options)
        except OSError as error:
            raise UserError(
                f"{error.filename or work.folder}: {error.strerror or error}; when that is mended,"
                " the same command goes on"
            ) from error
    work.finish()
    file, _, at = before["position"]
    return {
        "files": len(files),
        "bytes": starts[-1] - starts[file] - at,
        "old_tokens": sum(state["tokens"] for state in before["splits"].values()),
        "library": tokenizer.library + why_not,
        **work.progress,
    }


def write(work: Unfinished, tokenizer, fast: bool, files, starts, options) -> None:
    """From where `work` stands to the end of the inputs."""
    settings = {"shard_tokens": options.shard_tokens, "source": "scripts/prepare_data.py"}
    progress = work.progress or NOTHING
    position = Position(*progress["position"])
    chars, bad = progress["chars"], Counter(progress["bad"])
    writers = {
        split: ShardWriter(
            work.data, split, tokenizer, resume=progress["splits"].get(split), **settings
        )
        for split in SPLITS
    }

    def save(done: bool = False) -> None:
        states = {split: writer.save_state() for split, writer in writers.items()}
        work.save(
            {"position": position, "chars": chars, "bad": bad, "splits": states, "done": done}
        )

    def count(what: str) -> int:
        return sum(getattr(writer, what) for writer in writers.values())

    def read_bytes() -> int:
        return starts[position.file] + position.at

    display = Display(starts[-1], read_bytes(), count("num_tokens"))
    if work.progress:
        display.say(f"goes on after {read_bytes() / 1e6:,.1f} MB, in {work.folder}")
    shards, saved = count("num_shards"), time.monotonic()
    try:
        todo = tasks(files, options, position)
        for packed, after in encode_all(todo, tokenizer, fast, options):
            for split, documents in packed.splits.items():
                writers[split].add_packed(*documents)
            position, chars = after, chars + packed.chars
            for kind, message in packed.bad:
                bad[kind] += 1
                if bad.total() <= BAD_SHOWN:
                    display.say(f"left out: {message}")
            if count("num_shards") > shards or time.monotonic() - saved >= SAVE_SECONDS:
                save()
                shards, saved = count("num_shards"), time.monotonic()
            display.update(read_bytes(), count("num_tokens"))
        if writers["train"].num_documents == 0:
            work.discard()
            raise UserError(
                f"no training document in {len(files)} files ({bad.total()} left out as bad,"
                f" {writers['val'].num_documents} held out); expected at least one"
            )
        for split in ("val", "train"):
            writers[split].close()
        save(done=True)
    finally:
        display.clear()
        for writer in writers.values():
            writer.abandon()


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(argv: list[str] | None):
    parser = _Parser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or quoted glob pattern")
    add("--out", required=True, help="folder to write")
    add("--tokenizer", default="byte", help="byte, a tiktoken name, or a tokenizer.json or folder")
    add("--val_fraction", type=float, default=0.01, help="share of documents held out")
    add("--text_field", default="text", help="of a JSON record, or the parquet column")
    add("--split_paragraph_breaks", action="store_true", help="cut text files at 2+ blank lines")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens of one shard, about")
    add(
        "--fast_tokenizer",
        choices=["auto", "on", "off"],
        default="auto",
        help="run a tokenizer.json by tiktoken if that gives the same ids (auto: from 4 MB on)",
    )
    add("--seed", type=int, default=0, help="another seed holds out other documents")
    add("--overwrite", action="store_true", help="replace the data set at --out, or start over")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    try:
        options = parse(argv)
        stats = prepare(options)
    except (UserError, OSError) as error:  # OSError: unreadable input
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "prepare_data.py: a worker process was killed (is memory short?); the same command"
            " goes on, also with fewer --num_workers",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("prepare_data.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    report(stats, options, time.perf_counter() - start)
    return 0


def report(stats: dict, options, seconds: float) -> None:
    splits = stats["splits"]
    for name, state in splits.items():
        print(f"{name}: {state['documents']:,} documents, {state['tokens']:,} tokens")
    documents = sum(state["documents"] for state in splits.values())
    tokens = sum(state["tokens"] for state in splits.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in stats["bad"].items())
    print(
        f"{stats['files']:,} files, {stats['chars'] / tokens:.2f} characters per token,"
        f" {splits['val']['documents'] / documents:.2%} of documents held out,"
        f" {sum(stats['bad'].values()):,} left out" + (f" ({kinds})" if kinds else "")
    )
    print(
        f"{stats['bytes'] / 1e6 / seconds:,.1f} MB/s of input,"
        f" {(tokens - stats['old_tokens']) / seconds:,.0f} tokens/s by {stats['library']}"
        f" -> {options.out}"
    )
    if splits["val"]["documents"] == 0 and options.val_fraction > 0:
        print(
            "warning: no document was held out, so there is nothing to evaluate on; raise"
            " --val_fraction, change --seed, or give more documents",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
