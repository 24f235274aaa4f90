"""A corpus that is always there: the running Python's own standard library.

    python -m pytest tests/test_corpus.py

Three kinds of document: the language reference (`pydoc_data.topics`), the docstrings of each
module, and the code of as many modules as make code about half of the text. A docstring is taken
out of the code it came from, so no text is there twice. About 5 % of the topics and modules are
held out; a held-out module is held out with its docstrings and its code. Nothing is executed:
modules are parsed. The same Python gives the same corpus.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from config import UserError
from shard_writer import ShardWriter
from shards import TokenDataset, split_names

HELD_OUT = 0.05
# Tests, tables and generated files teach nothing about prose or code.
EXCLUDED_FOLDERS = {"__pycache__", "encodings", "idlelib", "msilib", "pydoc_data", "site-packages"}
EXCLUDED_FOLDERS |= {"_bundled", "dist-packages", "test", "tests", "idle_test", "turtledemo"}
EXCLUDED_FILES = {"html/entities.py", "stringprep.py"}
MIN_CHARS = 200
SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Document(NamedTuple):
    kind: str  # "topic", "docstrings" or "source"
    name: str  # topic or dotted module name
    text: str


def stdlib_documents(*, max_chars: int | None = None) -> dict[str, list[Document]]:
    """The corpus as {"train": documents, "val": documents}, kinds mixed.

    `max_chars` limits the whole corpus about evenly over splits and kinds, at least one document
    of each kind remaining in each split.
    """
    topics = _topics()
    docstrings, sources = _modules()
    # A module's docstrings and code are one thing to hold out.
    texts: dict[str, str] = {}
    for document in docstrings + sources:
        texts[document.name] = texts.get(document.name, "") + document.text
    held_modules = _held_out([Document("module", name, text) for name, text in texts.items()])
    held_out = {"topic": _held_out(topics), "docstrings": held_modules, "source": held_modules}
    prose_chars = sum(len(d.text) for d in topics + docstrings)
    if prose_chars < 100_000:
        raise UserError(
            f"--data stdlib: only {prose_chars} characters of documentation found in"
            f" {sysconfig.get_path('stdlib')}; expected a Python installed with its library sources"
        )
    share = 1.0 if max_chars is None else min(1.0, max_chars / (2 * prose_chars))
    splits = {}
    for split in ("train", "val"):
        chosen = []
        for kind, documents in (("topic", topics), ("docstrings", docstrings)):
            mine = [d for d in documents if (d.name in held_out[kind]) == (split == "val")]
            chosen += _take(mine, share * sum(len(d.text) for d in mine))
        mine = [d for d in sources if (d.name in held_out["source"]) == (split == "val")]
        chosen += _take(mine, sum(len(d.text) for d in chosen))
        splits[split] = sorted(chosen, key=lambda d: _order(d.kind, d.name))
    return splits


def build_stdlib_corpus(out_dir, tokenizer, *, max_chars: int | None = None) -> Path:
    """Writes the corpus as a data set folder, which appears only when complete, and returns it.

    If another process makes the same folder meanwhile, the first one stays.
    """
    out = Path(out_dir)
    tmp = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)  # a killed process that had our id
    source = f"standard library of Python {platform.python_version()}"
    try:
        for split, documents in stdlib_documents(max_chars=max_chars).items():
            with ShardWriter(tmp, split, tokenizer, source=source) as writer:
                for ids in tokenizer.encode_batch([d.text for d in documents]):
                    writer.add(ids)
        try:
            tmp.rename(out)
        except OSError as error:
            if not (out / "meta.json").is_file():
                raise UserError(
                    f"{out}: cannot put the data set there ({error.strerror})"
                ) from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def resolve_data(spec: str, tokenizer, *, cache_dir="data") -> str:
    """What `TokenDataset.open` takes for `--data SPEC`.

    "stdlib" is built on first use, once per tokenizer, in `cache_dir`. Anything else must be a
    data set folder or `nanogpt:FOLDER_OR_FILE`; `UserError` otherwise.
    """
    if spec == "stdlib":
        # The eos id is in the name: base and chat models share a vocabulary but end differently.
        out = Path(cache_dir) / f"stdlib-{tokenizer.hash}-{tokenizer.eos_token_id}"
        if not (out / "meta.json").is_file():
            build_stdlib_corpus(out, tokenizer)
        return str(out)
    if spec.startswith("nanogpt:"):
        if Path(spec.removeprefix("nanogpt:")).expanduser().exists():
            return spec
    elif (Path(spec) / "meta.json").is_file():
        # One only to evaluate on has no training split.
        split = "train" if "train" in split_names(spec) else "val"
        TokenDataset.open(spec, split).check_tokenizer(tokenizer)
        return spec
    raise UserError(
        f"--data {spec!r}: no data set there; expected stdlib, a folder written by"
        " scripts/prepare_data.py, or nanogpt:FOLDER with train.bin and val.bin"
    )


def _order(*parts: str) -> bytes:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest()


def _held_out(documents: list[Document]) -> set[str]:
    return {d.name for d in _take(documents, HELD_OUT * sum(len(d.text) for d in documents))}


def _take(documents: list[Document], budget: float) -> list[Document]:
    """Documents in hash order that fit into `budget` characters; the shortest if none does."""
    chosen, used = [], 0
    for document in sorted(documents, key=lambda d: _order("take", d.kind, d.name)):
        if used + len(document.text) <= budget:
            chosen.append(document)
            used += len(document.text)
    return chosen or [min(documents, key=lambda d: (len(d.text), d.name))]


def _topics() -> list[Document]:
    """The chapters of the reference, without those that a longer chapter repeats."""
    try:
        from pydoc_data.topics import topics  # one dict literal; Debian may leave it out
    except ImportError as error:
        raise UserError("--data stdlib: this Python has no pydoc_data.topics") from error
    kept, seen = [], []
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) > 30}
        # A section must not be held out while the chapter around it is trained on.
        if any(len(lines & longer) > 0.3 * len(lines) for longer in seen):
            continue
        seen.append(lines)
        if len(text) >= MIN_CHARS:
            kept.append(Document("topic", name, text))
    return kept


def _modules() -> tuple[list[Document], list[Document]]:
    """Docstrings and code of every module, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    docstrings, sources, seen = [], [], set()
    # Syntax trees are many objects and no cycles: with torch loaded, half of the time would go to
    # the collector walking over everything else.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path in _module_files(root):
            relative = path.relative_to(root)
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            prose, code = _take_apart(name, path.read_text("utf-8", errors="replace"), seen)
            if len(prose) >= MIN_CHARS:
                docstrings.append(Document("docstrings", name, prose))
            if len(code) >= MIN_CHARS:
                sources.append(Document("source", name, code))
    finally:
        if collecting:
            gc.enable()
    return docstrings, sources


def _take_apart(name: str, text: str, seen: set[str]) -> tuple[str, str]:
    """(docstrings, code without them) of a module."""
    lines: list[str | None] = text.split("\n")
    parts: list[str] = []
    _visit(ast.parse(text), name, lines, parts, seen)
    code = "\n".join(line for line in lines if line is not None)
    return "\n\n".join(parts) + "\n", code


def _module_files(root: Path):
    for top in sorted(sys.stdlib_module_names):
        if (root / f"{top}.py").is_file():
            files = [root / f"{top}.py"]
        else:
            files = sorted((root / top).rglob("*.py")) if (root / top).is_dir() else []
        for path in files:
            relative = path.relative_to(root)
            if relative.as_posix() in EXCLUDED_FILES or EXCLUDED_FOLDERS & set(relative.parts):
                continue
            yield path


def _visit(node, name: str, lines: list, parts: list[str], seen: set[str]) -> None:
    """Moves the docstrings of `node` and what is inside from `lines` (removed: None) to `parts`."""
    if isinstance(node, SCOPES):
        text = ast.get_docstring(node)
        if text is not None:
            _cut(node, node.body[0], lines)
            # Copies in several modules (say `_pyio` and `io`) would end up on both sides.
            if text not in seen:
                seen.add(text)
                parts.append(f"{name}{_signature(node)}\n\n{text}")
    for child in node.body:
        if isinstance(child, SCOPES):
            _visit(child, f"{name}.{child.name}", lines, parts, seen)
        elif isinstance(child, ast.If | ast.Try):  # definitions that depend on the platform
            _visit(child, name, lines, parts, seen)


def _cut(node, docstring, lines: list) -> None:
    """Takes the docstring's lines out of the code, leaving it valid."""
    start, end = docstring.lineno - 1, docstring.end_lineno
    alone = lines[start][: docstring.col_offset].strip() == "" and (
        len(node.body) == 1 or node.body[1].lineno > docstring.end_lineno
    )
    if not alone:  # `def f(): "text"`: rare, and short
        return
    only = len(node.body) == 1 and not isinstance(node, ast.Module)
    lines[start:end] = [None] * (end - start)
    if only:
        lines[start] = " " * docstring.col_offset + "pass"


def _signature(node) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    a = node.args
    names = [arg.arg for arg in a.posonlyargs + a.args]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [arg.arg for arg in a.kwonlyargs]
    names += [f"**{a.kwarg.arg}"] if a.kwarg else []
    return f"({', '.join(names)})"
