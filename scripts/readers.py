"""What `prepare_data.py` reads: input files as rows of text, from any row on.

    python -m pytest tests/test_prepare_data.py

A reader takes (path, options, start) and yields `Rows`, which together are the rows of the file
after the first `start`. JSON lines stay as they are: to parse them is the workers' part. Where a
file is damaged it raises `Damaged`, after what comes before.
"""

from __future__ import annotations

import glob
import importlib
import os
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from config import UserError

# Compressed text may grow a hundredfold, so this is less than what a worker takes at a time.
READ_BYTES = 1 << 17
PARQUET_ROWS = 1024
ENDINGS_SHOWN = 8


class Rows(NamedTuple):
    last: int  # rows of the file up to these, the last of them included
    at: int  # bytes of the file that were read for them
    content: bytes | list[str | None]  # JSON lines, or texts; None for a row without text

    @property
    def size(self) -> int:
        texts = [self.content] if isinstance(self.content, bytes) else self.content
        return sum(len(text or "") for text in texts)


class Damaged(Exception):
    """`kind` for the statistics; the message names the file and the place."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_text(path: Path, options, start: int):
    """The file as one document, or split at two or more blank lines in a row."""
    row = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for text in _paragraphs(file) if options.split_paragraph_breaks else [file.read()]:
                row += 1
                if row > start:
                    yield Rows(row, file.buffer.tell(), [text])
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 ({error.reason} at byte {error.start})"
        raise Damaged("not UTF-8", message) from error


def _paragraphs(file):
    lines, blank = [], 0
    for line in file:
        blank = 0 if line.strip() else blank + 1
        if blank == 2:
            yield "".join(lines)
            lines = []
        if lines or not blank:
            lines.append(line)
    yield "".join(lines)


def _package(name: str, path: Path):
    """The module that reads such a file."""
    try:
        return importlib.import_module(name)
    except ImportError:
        extra = 'pip install -e ".[data]" expected'
        raise UserError(f"{path}: {name.partition('.')[0]} is not installed; {extra}") from None


def plain_pieces(path: Path):
    """(bytes read, piece) of a file."""
    at = 0
    with open(path, "rb") as file:
        for piece in iter(partial(file.read, READ_BYTES), b""):
            at += len(piece)
            yield at, piece


def decompressed_pieces(path: Path):
    """The frames of a zstd file, or the members of a gzip file, one after another."""
    new, error_type, padding = partial(zlib.decompressobj, wbits=31), zlib.error, b"\0"
    if path.suffix.lower() != ".gz":
        zstandard = _package("zstandard", path)
        # The window is that of `zstd --long=31`.
        new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        error_type, padding = zstandard.ZstdError, b""
    frame, at, between = None, 0, b""  # zero bytes may follow a gzip member
    for at, chunk in plain_pieces(path):
        while chunk := chunk if frame else chunk.lstrip(between):
            frame = frame or new()
            try:
                piece = frame.decompress(chunk)
            except error_type as error:
                raise Damaged("damaged", f"{path}: damaged ({error}) before byte {at}") from error
            chunk = frame.unused_data
            if frame.eof:
                frame, between = None, padding
            yield at, piece
    if frame is not None:
        raise Damaged("damaged", f"{path}: cut off at byte {at}, inside a frame")
    if at == 0:
        raise Damaged("damaged", f"{path}: empty; at least one compressed frame expected")


def read_jsonl(path: Path, options, start: int, pieces=plain_pieces):
    """Whole lines. What is left of a last line where the file is damaged is one too."""
    row, at, rest, damage = 0, 0, [], None
    try:
        for at, piece in pieces(path):
            end = piece.rfind(b"\n") + 1
            if not end:
                rest.append(piece)  # joined once: a line may be as long as it likes
                continue
            lines = b"".join([*rest, piece[:end]])
            rest = [piece[end:]]
            first, row = row, row + lines.count(b"\n")
            if first < start < row:
                lines = lines.split(b"\n", start - first)[-1]
            if row > start:
                yield Rows(row, at, lines)
    except Damaged as error:
        damage = error
    if (lines := b"".join(rest)) and row >= start:
        yield Rows(row + 1, at, lines)
    if damage:
        raise damage


def read_parquet(path: Path, options, start: int):
    """The text column alone, some rows at a time."""
    parquet, arrow = _package("pyarrow.parquet", path), _package("pyarrow", path)
    arrow.set_memory_pool(arrow.system_memory_pool())  # its own keeps what it once had
    field, row, size = options.text_field, 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            column = file.schema_arrow.field(field) if field in file.schema_arrow.names else None
            kind = column and column.type
            if isinstance(kind, arrow.DictionaryType):  # pandas' category
                kind = kind.value_type
            if str(kind) not in ("string", "large_string", "string_view"):
                found = ", ".join(f"{c.name} ({c.type})" for c in file.schema_arrow)
                message = f"{path}: no text column {field!r} among {found}"
                raise Damaged("no text", message)
            rows, group = file.metadata.num_rows, 0
            while group < file.num_row_groups:
                count = file.metadata.row_group(group).num_rows
                if row + count > start:
                    break
                row, group = row + count, group + 1
            groups = list(range(group, file.num_row_groups))
            for batch in file.iter_batches(
                PARQUET_ROWS, columns=[field], row_groups=groups, use_threads=False
            ):
                texts = batch.column(0).to_pylist()
                row += len(texts)
                if row > start:
                    yield Rows(row, size * row // rows, texts[max(0, len(texts) - (row - start)) :])
    except (OSError, ValueError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())  # which may have several lines
        raise Damaged("damaged", f"{path}: damaged after row {row} ({reason})") from error


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
    name = path.name.lower()
    return next((read for end, read in READERS.items() if name.endswith(end)), None)


def not_read(files: list[Path]) -> str:
    """One line about files that no reader knows: how many have which ending."""
    packed = (".gz", ".zst", ".zstd", ".bz2", ".xz")
    ends = [[suffix.lower() for suffix in path.suffixes] for path in files]
    counts = Counter(
        "".join(end[-2 if end[-1] in packed else -1 :]) if end else "without ending" for end in ends
    )
    shown = [f"{count:,} {end}" for end, count in counts.most_common(ENDINGS_SHOWN)]
    if rest := counts.total() - sum(count for _, count in counts.most_common(ENDINGS_SHOWN)):
        shown.append(f"{rest:,} others")
    return f"not read: {', '.join(shown)} (such as {files[0]})"


def _folder_files(folder: Path) -> list[Path]:
    """The files of a folder and of those below it, in order. Links are followed, to each folder
    once; what begins with a dot is left out."""
    found, seen = [], set()
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        folders[:] = [] if real in seen else sorted(n for n in folders if not n.startswith("."))
        if real not in seen:
            found += [Path(at, name) for name in names if not name.startswith(".")]
        seen.add(real)
    for path in found:
        if reader_of(path):
            _check_link(path)
    return sorted(path for path in found if path.is_file())


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: no such file; it is a link to {os.readlink(path)}")


def input_files(patterns: list[str]) -> tuple[list[Path], list[Path]]:
    """The files behind the inputs, each once, and those of folders that no reader knows;
    `UserError` for an input that names none, or a type whose package is missing."""
    files, unknown = {}, {}
    for pattern in patterns:
        if not pattern:
            raise UserError("INPUT: '' found, a file, folder or pattern expected")
        path = Path(pattern)
        found = [path] if path.exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not found:
            raise UserError(f"{pattern}: no such file, folder or pattern")
        for item in found:
            _check_link(item)
            if item.is_dir():
                every = _folder_files(item)
                inside = [p for p in every if reader_of(p)]
                if not inside:
                    raise UserError(f"{item}: the folder holds no {', '.join(READERS)} file")
                files |= {p.resolve(): p for p in inside}
                unknown |= {p.resolve(): p for p in every if not reader_of(p)}
            elif reader_of(item):
                files[item.resolve()] = item
            else:
                raise UserError(f"{item}: cannot read this type; expected {', '.join(READERS)}")
    for path in files.values():
        if path.suffix.lower() in NEEDS:
            _package(NEEDS[path.suffix.lower()], path)
    return list(files.values()), list(unknown.values())
