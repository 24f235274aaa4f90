"""How fast `scripts/prepare_data.py` is beside tiktoken alone, and whether it is right.

    python benchmarks/ingest.py --tokenizer models/smollm2-135m
    python benchmarks/ingest.py --tokenizer byte --megabytes 8 --kills 1

Makes `--megabytes` of text in the layouts of DCLM (folders of .jsonl.zst) and FineWeb (.parquet
with other columns): paragraphs of the sources of Python's standard library, drawn anew for each
document. tiktoken alone (encode_ordinary, one thread, the texts in memory) gives the tokens that
must be in the shards, in order, and the time to compare with, which is taken before and after. Then
one process prepares all; two workers prepare all and are killed (SIGKILL) `--kills` times on the
way; and two workers prepare a quarter, to see whether the memory of their parent grows with the
input. Ends with exit code 1 if a token, a byte of a resumed data set or a count is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shards import TokenDataset
from tokenizer import Tokenizer, load_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prepare_data.py"
FILE_CHARS = 4_000_000
SHARD_TOKENS = 4_000_000
VAL_FRACTION = 0.02


class Done(NamedTuple):
    """One or more processes that prepared a data set together."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int  # of the parent alone
    printed: str


def paragraphs() -> list[str]:
    """Of the standard library's sources; the same in one Python."""
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in names[:900]]
    return [p for text in texts for p in text.split("\n\n") if 40 < len(p) < 4000]


def file_documents(pool: list[str], number: int) -> list[str]:
    """The documents of the file of that number, lengths log-normal as on the web."""
    rng, documents, size = random.Random(number), [], 0
    while size < FILE_CHARS:
        count = 1 + int(rng.lognormvariate(1.5, 0.9))
        documents.append("\n\n".join(rng.choices(pool, k=count)))
        size += len(documents[-1])
    return documents


def make_tree(folder: Path, pool: list[str], count: int) -> list[Path]:
    """Writes the files, in the order in which they are read."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    paths = []
    for i in range(count):
        documents = file_documents(pool, i)
        if i < count // 2:
            path = folder / "dclm" / f"global-shard_{i // 8:02d}" / f"shard_{i:08d}.jsonl.zst"
            records = ({"text": d, "url": f"https://example.org/{i}", "n": i} for d in documents)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            content = zstandard.compress(lines.encode())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        else:
            path = folder / "fineweb" / f"{i:05d}.parquet"
            columns = {
                "text": documents,
                "id": [str(k) for k in range(len(documents))],
                "score": [0.5] * len(documents),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=500)
        paths.append(path)
    return paths


def encode_alone(tokenizer: Tokenizer):
    """What the peer is: tiktoken with the same ranks where there are some."""
    if encoding := getattr(tokenizer, "_encoding", None):
        return encoding.encode_ordinary
    if fast := getattr(tokenizer, "_fast", None):
        return fast._encoding.encode_ordinary
    return tokenizer.encode


def time_alone(encode, pool: list[str], numbers) -> tuple[float, float, int]:
    """(CPU seconds, seconds, tokens) of the peer on the texts of these files."""
    cpu = wall = tokens = 0
    for number in numbers:
        documents = file_documents(pool, number)
        start = time.process_time(), time.perf_counter()
        encoded = [encode(document) for document in documents]
        cpu, wall = cpu + time.process_time() - start[0], wall + time.perf_counter() - start[1]
        tokens += sum(map(len, encoded))
    return cpu, wall, tokens


def expected_tokens(tokenizer: Tokenizer, pool: list[str], count: int) -> dict[str, list]:
    """split -> [documents, tokens, hash of all tokens], by the library that defines the ids."""
    splits = {name: [0, 0, hashlib.blake2b()] for name in ("train", "val")}
    for number in range(count):
        documents = file_documents(pool, number)
        for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
            digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"0").digest()
            held_out = int.from_bytes(digest, "little") < VAL_FRACTION * 2**64
            entry = splits["val" if held_out else "train"]
            entry[0] += 1
            entry[1] += len(ids) + 1
            entry[2].update(np.array([*ids, tokenizer.eos_token_id], np.int64))
    return {name: [*counts, digest.hexdigest()] for name, (*counts, digest) in splits.items()}


def found_tokens(folder: Path) -> dict[str, list]:
    """The same of a data set."""
    splits = {}
    for name in ("train", "val"):
        data, digest = TokenDataset.open(folder, name, verify=True), hashlib.blake2b()
        for start in range(0, data.num_tokens, 1 << 20):
            digest.update(data.read(start, min(1 << 20, data.num_tokens - start)))
        splits[name] = [len(data.doc_ends), data.num_tokens, digest.hexdigest()]
    return splits


def prepare(inputs, out: Path, spec: str, workers: int, kill_at=()) -> Done:
    """Runs the script, kills it when it has written so many bytes, and starts it again."""
    command = [sys.executable, SCRIPT, *inputs, "--out", out]
    command += ["--tokenizer", spec, "--num_workers", workers, "--shard_tokens", SHARD_TOKENS]
    command += ["--val_fraction", VAL_FRACTION, "--fast_tokenizer", "on"]
    data = out.with_name(f".{out.name}.unfinished") / "data"
    start, cpu, peak, printed = time.perf_counter(), 0.0, 0, ""
    for limit in [*kill_at, None]:
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=subprocess.STDOUT
            )
            status = Path(f"/proc/{process.pid}/status")
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                if "VmHWM" in (text := status.read_text()):
                    peak = max(peak, 1024 * int(text.partition("VmHWM:")[2].split()[0]))
                if limit is not None and size_of(data) >= limit:
                    os.kill(process.pid, signal.SIGKILL)
                time.sleep(0.01)
            process.returncode = os.waitstatus_to_exitcode(ended[1])
            cpu += ended[2].ru_utime + ended[2].ru_stime
            output.seek(0)
            printed += output.read()
        assert process.returncode == (-signal.SIGKILL if limit is not None else 0), printed
    return Done(time.perf_counter() - start, cpu, peak, printed)


def size_of(folder: Path) -> int:
    """Of the files in it, which may be renamed meanwhile."""
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="models/smollm2-135m")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.speed_up()
    encode, pool = encode_alone(tokenizer), paragraphs()
    count = max(4, -(-args.megabytes * 1_000_000 // FILE_CHARS))
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_tree(folder / "in", pool, count)
        size = sum(path.stat().st_size for path in paths)
        print(f"{count} files, {count * FILE_CHARS / 1e6:.0f} MB of text, {size / 1e6:.0f} on disk")

        halves = [time_alone(encode, pool, range(0, count, 2))]
        one = prepare([folder / "in"], folder / "one", args.tokenizer, 1)
        halves.append(time_alone(encode, pool, range(1, count, 2)))
        cpu, wall, tokens = map(sum, zip(*halves, strict=True))
        rows = [("alone", cpu, wall), ("one process", one.cpu_seconds, one.seconds)]
        for what, cpu_seconds, seconds in rows:
            print(
                f"{what:>12}: {tokens / cpu_seconds / 1e6:.2f}M tokens/s of CPU time,"
                f" {tokens / seconds / 1e6:.2f}M tokens/s,"
                f" {count * FILE_CHARS / seconds / 1e6:.1f} MB of text/s"
            )
        print(f"{'ratio':>12}: {cpu / one.cpu_seconds:.2f} by CPU time, {wall / one.seconds:.2f}")
        if found_tokens(folder / "one") != expected_tokens(tokenizer, pool, count):
            wrong.append("tokens")

        rng = random.Random(0)
        kills = sorted(rng.randrange(size_of(folder / "one")) for _ in range(args.kills))
        two = prepare([folder / "in"], folder / "two", args.tokenizer, 2, kills)
        if not same_files(folder / "one", folder / "two"):
            wrong.append("resumed")
        found = re.findall(r"goes on after ([\d.,]+) MB", two.printed)
        print(f"two workers, killed {args.kills} times, went on after {' '.join(found)} MB")
        small = prepare([*paths[: count // 8], *paths[-(count // 8) :]], folder / "small",
                        args.tokenizer, 2)  # fmt: skip
        again = prepare([folder / "in"], folder / "again", args.tokenizer, 2)
        for what, done in (("a quarter", small), ("all", again)):
            print(f"peak memory of the parent of two workers, {what}: {done.peak_bytes >> 20} MiB")
    print(f"wrong: {', '.join(wrong) or 'nothing'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
