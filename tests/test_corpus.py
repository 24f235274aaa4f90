"""The embedded corpus: balance, held-out modules, code without docstrings, --data."""

import ast
import os

import numpy as np
import pytest

import corpus
from config import UserError
from shard_writer import ShardWriter
from shards import TokenDataset
from tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """(cache folder, data set, documents); the library is parsed once for all tests."""
    cache = tmp_path_factory.mktemp("stdlib")
    with pytest.MonkeyPatch.context() as patch:
        modules = corpus._modules()
        patch.setattr(corpus, "_modules", lambda: modules)
        folder = corpus.resolve_data("stdlib", BYTE, cache_dir=cache)
        yield cache, folder, corpus.stdlib_documents()


def test_stdlib_corpus(stdlib):
    cache, folder, documents = stdlib
    assert [p.name for p in cache.iterdir()] == [f"stdlib-{BYTE.hash}-256"]  # no leftovers
    for split, wanted in documents.items():
        data = TokenDataset.open(folder, split, verify=True)
        data.check_tokenizer(BYTE)
        assert len(data.doc_ends) == len(wanted)
        assert BYTE.decode(data.read(0, data.doc_ends[0] - 1).tolist()) == wanted[0].text
        sizes = {}
        for d in wanted:
            sizes[d.kind] = sizes.get(d.kind, 0) + len(d.text)
        assert sizes.keys() == {"topic", "docstrings", "source"}
        assert 0.4 < sizes["source"] / sum(sizes.values()) < 0.6
        kinds = [d.kind for d in wanted]
        assert len(set(kinds[:20])) > 1 and kinds != sorted(kinds)  # mixed
    share = sum(len(d.text) for d in documents["val"]) / sum(
        len(d.text) for ds in documents.values() for d in ds
    )
    assert 0.03 < share < 0.08


def test_stdlib_holds_out_whole_modules(stdlib):
    _, _, documents = stdlib
    names = {s: {(d.kind == "topic", d.name) for d in ds} for s, ds in documents.items()}
    assert names["val"] and not names["train"] & names["val"]
    train = {p for d in documents["train"] for p in d.text.split("\n\n") if len(p) > 300}
    val = {p for d in documents["val"] for p in d.text.split("\n\n") if len(p) > 300}
    assert len(val) > 50
    # Chapters repeated inside chapters, and docstrings inside their source, would show up here.
    assert len(train & val) < 0.02 * len(val)


def test_stdlib_limits_and_source_stays_valid(stdlib):
    small = corpus.stdlib_documents(max_chars=300_000)
    assert small == corpus.stdlib_documents(max_chars=300_000)
    total = sum(len(d.text) for ds in small.values() for d in ds)
    assert 200_000 < total < 400_000
    for ds in small.values():
        assert {d.kind for d in ds} == {"topic", "docstrings", "source"}
        for d in ds:
            if d.kind == "source":
                tree = ast.parse(d.text)
                assert ast.get_docstring(tree) is None


def test_docstrings_leave_the_code():
    module = (
        '"""Module text."""\n\nimport x\n\n\nclass A:\n    """Only text."""\n\n\n'
        'if x:\n\n    def f(a, *b, c=1, **d):\n        """Two\n\n        lines."""\n'
        "        return a\n"
    )
    seen = set()
    prose, code = corpus._take_apart("m", module, seen)
    assert (
        prose == "m\n\nModule text.\n\nm.A\n\nOnly text.\n\nm.f(a, *b, c, **d)\n\nTwo\n\nlines.\n"
    )
    assert "text" not in code and "lines" not in code
    assert [type(node) for node in ast.parse(code).body] == [ast.Import, ast.ClassDef, ast.If]
    # A copy in another module counts once: it could be held out there and trained on here.
    assert corpus._take_apart("copy", module, seen)[0] == "\n"


def test_resolve_data(stdlib, tmp_path, monkeypatch):
    cache, folder, _ = stdlib
    monkeypatch.setattr(corpus, "build_stdlib_corpus", lambda *_: pytest.fail("built again"))
    assert corpus.resolve_data("stdlib", BYTE, cache_dir=cache) == folder
    assert corpus.resolve_data(folder, BYTE) == folder
    other = load_tokenizer("byte")
    other.hash = "00112233445566ff"
    held_out = str(tmp_path / "held-out")  # a domain that is never trained on
    with ShardWriter(held_out, "val", BYTE) as writer:
        writer.add([1, 2, 3])
    assert corpus.resolve_data(held_out, BYTE) == held_out
    for spec in (folder, held_out):
        with pytest.raises(UserError, match=r"written with tokenizer hash"):
            corpus.resolve_data(spec, other)
    np.arange(10, dtype="<u2").tofile(tmp_path / "train.bin")
    assert corpus.resolve_data(f"nanogpt:{tmp_path}", BYTE) == f"nanogpt:{tmp_path}"
    for spec in ("nothing", f"nanogpt:{tmp_path}/nothing", str(tmp_path)):
        with pytest.raises(UserError, match=r"--data .*expected stdlib, .*prepare_data"):
            corpus.resolve_data(spec, BYTE)


def test_stdlib_lost_race_keeps_the_first(tmp_path, monkeypatch):
    documents = {s: [corpus.Document("topic", "t", s * 99)] for s in ("train", "val")}
    monkeypatch.setattr(corpus, "stdlib_documents", lambda max_chars: documents)
    out = corpus.build_stdlib_corpus(tmp_path / "out", BYTE)
    stamp = os.stat(out / "meta.json").st_mtime_ns
    assert corpus.build_stdlib_corpus(out, BYTE) == out
    assert os.stat(out / "meta.json").st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(UserError, match=r"other: cannot put the data set there"):
        corpus.build_stdlib_corpus(tmp_path / "other", BYTE)
