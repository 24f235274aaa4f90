"""Tokenises text into a data set folder that `--data FOLDER` takes.

    python scripts/prepare_data.py README.md docs --out data/docs --tokenizer byte

Inputs are files, folders (searched recursively) and quoted glob patterns: .txt and .md files, one
document each; .jsonl files, one document a line, also as .gz and .zst (DCLM); .parquet files, one
document a row (FineWeb). A document is held out or not by the hash of its text, so that two copies
of one text are never on both sides, whatever the order of the inputs or the number of workers.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import importlib
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# Runnable as a file: the modules live one folder up and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import UserError
from shards import ShardWriter
from tokenizer import load_tokenizer

BATCH_CHARS = 1 << 20  # of one task for a worker: large against the cost of sending it
BATCH_DOCUMENTS = 2048
READ_BYTES = 1 << 20
PARQUET_ROWS = 1024
BAD_SHOWN = 10


def read_text(path: Path, options, bad):
    """The file as one document, or split at two or more blank lines in a row."""
    try:
        with open(path, encoding="utf-8") as file:
            if not options.split_paragraph_breaks:
                yield file.read()
                return
            lines, blank = [], 0
            for line in file:
                blank = 0 if line.strip() else blank + 1
                if blank == 2:
                    yield "".join(lines)
                    lines = []
                if lines or not blank:
                    lines.append(line)
            yield "".join(lines)
    except UnicodeDecodeError as error:
        bad(f"{path}: not UTF-8 ({error.reason} at byte {error.start})")


def _package(name: str, path: Path):
    """The module that reads such a file."""
    try:
        return importlib.import_module(name)
    except ImportError:
        extra = 'pip install -e ".[data]" expected'
        raise UserError(f"{path}: {name.partition('.')[0]} is not installed; {extra}") from None


def plain_pieces(path: Path, bad):
    with open(path, "rb") as file:
        yield from iter(partial(file.read, READ_BYTES), b"")


def decompressed_pieces(path: Path, bad):
    """The frames of a zstd file, or the members of a gzip file, one after another; what comes
    before damage is used."""
    new, error_type = partial(zlib.decompressobj, wbits=31), zlib.error
    if path.suffix != ".gz":
        zstandard = _package("zstandard", path)
        new, error_type = lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    frame, at = None, 0
    for chunk in plain_pieces(path, bad):
        at += len(chunk)
        while chunk:
            frame = frame or new()
            try:
                piece = frame.decompress(chunk)
            except error_type as error:
                bad(f"{path}: damaged ({error}) before byte {at}")
                return
            chunk = frame.unused_data
            frame = None if frame.eof else frame
            yield piece
    if frame is not None:
        bad(f"{path}: cut off at byte {at}, inside a frame")


def lines_of(pieces):
    """The lines of a file that comes in pieces, with their numbers."""
    number, rest = 0, b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            number += 1
            yield number, line
    if rest:
        yield number + 1, rest


def read_jsonl(path: Path, options, bad, pieces=plain_pieces):
    """The text field of each line; a line that has none is reported and left out. What is left of
    a last line where the file is damaged counts as damage too."""
    for number, line in lines_of(pieces(path, bad)):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # JSON or UTF-8
            bad(f"{path}:{number}: not JSON ({error})")
            continue
        text = record.get(options.text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield text
        else:
            bad(f"{path}:{number}: no text field {options.text_field!r}")


def read_parquet(path: Path, options, bad):
    """The text column alone, some rows at a time."""
    parquet = _package("pyarrow.parquet", path)
    field, row = options.text_field, 0
    try:
        with parquet.ParquetFile(path) as file:
            column = file.schema_arrow.field(field) if field in file.schema_arrow.names else None
            if column is None or str(column.type) not in ("string", "large_string"):
                found = ", ".join(f"{c.name} ({c.type})" for c in file.schema_arrow)
                bad(f"{path}: no text column {field!r} among {found}")
                return
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        bad(f"{path}: row {row} has no text")
                    else:
                        yield text
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two kinds
        bad(f"{path}: damaged after row {row} ({error})")


# A reader yields the documents of a file and calls bad(message) for what it has to leave out.
READERS = {
    ".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet,
}  # fmt: skip
READERS |= dict.fromkeys(
    (".jsonl.gz", ".json.gz", ".jsonl.zst", ".jsonl.zstd"),
    partial(read_jsonl, pieces=decompressed_pieces),
)


NEEDS = {".parquet": "pyarrow.parquet", ".zst": "zstandard", ".zstd": "zstandard"}


def reader_of(path: Path):
    """By the end of its name; None if no reader knows it."""
    return next((read for end, read in READERS.items() if path.name.endswith(end)), None)


def input_files(patterns: list[str]) -> list[Path]:
    """The files behind the inputs, each once; `UserError` for an input that names none."""
    files = {}
    for pattern in patterns:
        path = Path(pattern)
        found = [path] if path.exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            raise UserError(f"{pattern}: no such file, folder or pattern")
        for item in found:
            if item.is_dir():
                inside = [p for p in sorted(item.rglob("*")) if reader_of(p) and p.is_file()]
                if not inside:
                    raise UserError(f"{item}: the folder holds no {', '.join(READERS)} file")
                files |= {p.resolve(): p for p in inside}
            elif reader_of(item):
                files[item.resolve()] = item
            else:
                raise UserError(f"{item}: cannot read this type; expected {', '.join(READERS)}")
    return list(files.values())


def documents(files: list[Path], options, bad):
    for path in files:
        for text in reader_of(path)(path, options, bad):
            if text.strip():
                yield text


def batches(texts):
    """Lists of texts of bounded size, so that memory does not grow with the input."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Encoder:
    """Tokenises batches; what a worker process keeps between tasks."""

    def __init__(self, spec: str, val_fraction: float, seed: int):
        self.tokenizer = load_tokenizer(spec)
        self.threshold = int(val_fraction * 2**64)
        self.key = str(seed).encode()

    def split(self, text: str) -> str:
        data = text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(data, digest_size=8, key=self.key).digest()
        return "val" if int.from_bytes(digest, "little") < self.threshold else "train"

    def __call__(self, texts: list[str]) -> list[tuple[str, int, list[int]]]:
        """(split, characters, ids) of each text."""
        encoded = self.tokenizer.encode_batch(texts)
        triples = zip(texts, encoded, strict=True)
        return [(self.split(text), len(text), ids) for text, ids in triples]


_worker: Encoder | None = None  # set once in each worker process, never in the parent


def _start_worker(*args) -> None:
    global _worker
    # One process a core already: the tokenizers' own threads would only compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Encoder(*args)


def _work(texts: list[str]):
    return _worker(texts)


def encode_all(texts, encoder_args: tuple, num_workers: int):
    """Encoded documents in input order, with a bounded number of batches under way."""
    if num_workers <= 1:
        encoder = Encoder(*encoder_args)
        for batch in batches(texts):
            yield from encoder(batch)
        return
    pool = ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=_start_worker, initargs=encoder_args
    )
    with pool:
        pending = deque()
        try:
            for batch in batches(texts):
                pending.append(pool.submit(_work, batch))
                if len(pending) >= 2 * num_workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def prepare(options) -> dict:
    """Writes the data set; returns the statistics that `main` prints."""
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val_fraction {options.val_fraction}: expected 0 up to less than 1")
    for flag in ("shard_tokens", "num_workers"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)}: expected at least 1")
    files = input_files(options.inputs)
    for path in files:
        if path.suffix in NEEDS:
            _package(NEEDS[path.suffix], path)
    out = Path(options.out)
    _check_out(out, options.overwrite)
    tokenizer = load_tokenizer(options.tokenizer)
    counts = Counter()

    def bad(message: str) -> None:
        counts["bad"] += 1
        if counts["bad"] <= BAD_SHOWN:
            print(f"left out: {message}", file=sys.stderr)

    # Everything goes to a folder beside the target, which takes its place only when complete.
    tmp = out.resolve().with_name(f".{out.resolve().name}.tmp-{os.getpid()}")
    settings = {"shard_tokens": options.shard_tokens, "source": "scripts/prepare_data.py"}
    encoder_args = (options.tokenizer, options.val_fraction, options.seed)
    try:
        with (
            ShardWriter(tmp, "train", tokenizer, **settings) as train,
            ShardWriter(tmp, "val", tokenizer, **settings) as val,
        ):
            writers = {"train": train, "val": val}
            texts = documents(files, options, bad)
            for split, chars, ids in encode_all(texts, encoder_args, options.num_workers):
                writers[split].add(ids)
                counts["chars"] += chars
        if train.num_documents == 0:
            raise UserError(
                f"no training document in {len(files)} files ({counts['bad']} left out as bad,"
                f" {val.num_documents} held out); expected at least one"
            )
        if out.exists():
            shutil.rmtree(out)
        tmp.rename(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    sizes = {name: (w.num_documents, w.num_tokens) for name, w in writers.items()}
    return {"files": len(files), "splits": sizes, **counts}


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"--out {out}: exists and is not empty; choose another, or add --overwrite")
    names = [p.name for p in out.iterdir()] if out.is_dir() else [out.name]
    strange = [n for n in names if n != "meta.json" and not n.endswith((".bin", ".docs.npy"))]
    if strange or "meta.json" not in names:
        raise UserError(f"--out {out}: not only a data set; --overwrite would delete other files")


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
    add("--seed", type=int, default=0, help="another seed holds out other documents")
    add("--overwrite", action="store_true", help="replace the data set at --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    try:
        options = parse(argv)
        stats = prepare(options)
    except (UserError, OSError) as error:  # OSError: unreadable input, full disk
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    tokens = 0
    for name, (count, size) in stats["splits"].items():
        print(f"{name}: {count:,} documents, {size:,} tokens")
        tokens += size
    print(
        f"{stats['files']:,} files, {stats['chars'] / tokens:.2f} characters per token,"
        f" {stats.get('bad', 0):,} left out, {tokens / seconds:,.0f} tokens/s -> {options.out}"
    )
    if stats["splits"]["val"][0] == 0 and options.val_fraction > 0:
        print(
            "warning: no document was held out, so there is nothing to evaluate on; raise"
            " --val_fraction, change --seed, or give more documents",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
