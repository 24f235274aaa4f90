r"""Ablations of distillation: tables of rows, each one run of train_kd.py and one of evaluate.py.

    python benchmarks/quality.py transfer mixers --out runs/quality --data data/mix \
        --domains fiction=data/fiction,bbc=data/bbc --jobs 3
    python benchmarks/quality.py --row "deep=--layers 12-29" --row "wide=--layers 0-17"
    python benchmarks/quality.py lr --seeds 0 1 --train="--distill_tokens 1000000"
    python benchmarks/quality.py --read runs/quality       # tables of what is there
    python benchmarks/quality.py --list                     # tables, rows and their flags

A row is the base (--base, --train) and some flags; the first of a table is what the others are
compared with. A run is known by the flags that differ from the base, so tables share runs, and
what is finished is not run again: the same command goes on with an interrupted series. The runs
lie in --out beside their logs, with quality.json and quality.md. Rows side by side (--jobs) are
divided over the GPUs; where they share one, tok/s and minutes are not those of a row alone.
Check: `pytest tests/test_quality.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality_tables import TABLES, align_share, line, read_row, slug, write_tables
from cli import load_config, parse_argv, to_dict
from config import DistillConfig, UserError
from corpus import resolve_data
from evaluate import parse_domains
from hf import tokenizer_spec
from metrics import console_table
from recall import TASKS, questions
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def split_flags(flag: str, text: str) -> list[str]:
    """As a shell would split `text`. UserError where a quote is not closed."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{flag}: {text} found: {e}; flags as in a shell expected") from None


def base_flags(args) -> dict[str, str]:
    """Flags that every row has."""
    preset, flags = parse_argv(split_flags("--train", args.train))
    if preset:
        raise UserError(f"--train: the preset {preset} found, flags expected; --base takes it")
    return {"teacher": args.teacher, "data": args.data} | flags


def base_config(args, **flags: str) -> DistillConfig:
    """The settings of the base with `flags`."""
    if not Path(args.base).is_file():
        raise UserError(f"--base: no file {args.base}")
    return load_config(DistillConfig, base_flags(args) | flags, args.base)


def all_tables(args) -> dict[str, dict[str, list[str]]]:
    tables = TABLES | {"align_share": align_share(base_config(args))}
    own = {}
    for row in args.row:
        name, named, flags = row.partition("=")
        if not name or not named or name in own or flags.lstrip()[:2] not in ("", "--"):
            raise UserError(f'--row: "{row}" found, "NAME=--flag value ..." expected')
        own[name] = split_flags("--row", flags)
    return tables | ({"own": own} if own else {})


def changes(args, flags: list[str]) -> dict[str, str]:
    """The flags of a row that say something else than the base."""
    given = parse_argv(flags)[1]
    whole = base_config(args, **given)

    def same_without(name: str) -> bool:
        try:
            return base_config(args, **{n: t for n, t in given.items() if n != name}) == whole
        except UserError:  # another flag needs it
            return False

    return {name: text for name, text in given.items() if not same_without(name)}


# ---- running


@dataclasses.dataclass
class Job:
    """One row of one seed while it is run."""

    label: str  # table/row of the first table that has it
    flags: dict[str, str]  # what differs from the base
    seed: int
    step: str = "train"  # then evaluate
    process: subprocess.Popen | None = None
    device: str = ""  # as in CUDA_VISIBLE_DEVICES; empty without CUDA
    begun: float = 0.0  # of the row; seconds of time.monotonic
    step_begun: float = 0.0

    @property
    def slug(self) -> str:
        return slug(self.flags, self.seed)


def command(job: Job, args) -> list[str]:
    """What the job's step runs."""
    folder = Path(args.out) / job.slug
    if job.step == "train":
        flags = base_flags(args) | job.flags
        flags |= {"seed": job.seed, "save_model_dir": args.out, "run": job.slug}
        flags |= {"resume": "auto"} if folder.exists() else {}
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [sys.executable, str(ROOT / "train_kd.py"), f"--config={args.base}", *words]
    cfg = base_config(args)
    length = cfg.eval_seq_len or getattr(cfg, cfg.stage_names()[-1]).seq_len
    words = [str(folder / "model"), "--out", str(folder), "--data", args.domains or args.data]
    words += ["--teacher", args.teacher, "--eval_tokens", str(args.eval_tokens)]
    words += ["--seq_len", str(length), "--dtype", cfg.dtype]
    words += ["--device", cfg.device] if cfg.device != "auto" else []
    if args.recall_tasks:
        words += ["--recall_tasks", args.recall_tasks, "--recall_lengths"]
        words += [*map(str, args.recall_lengths), "--recall_samples", str(args.recall_samples)]
    return [sys.executable, str(ROOT / "evaluate.py"), *words]


def devices() -> list[str]:
    """The GPUs that rows are divided over."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


def start(job: Job, args) -> None:
    """Begin the job's step, in a process group of its own."""
    words, job.step_begun = command(job, args), time.monotonic()
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": job.device} if job.device else {})
    with open(Path(args.out) / f"{job.slug}.log", "ab") as log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        job.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0, env=env
        )


def stop(jobs: list[Job]) -> None:
    """End what is running, with its children."""
    jobs = [job for job in jobs if job.process is not None]
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, number)
        deadline = time.monotonic() + (patience or 0)
        for job in jobs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(patience and max(0.0, deadline - time.monotonic()))


def timing(job: Job, args) -> dict:
    """What is noted of a run: minutes of its steps, rows side by side, whether it is trained."""
    path = Path(args.out) / job.slug / "timing.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def note_end(job: Job, args) -> None:
    """Note that a step has ended, well or not. A run without a folder has nothing to note."""
    folder, times = Path(args.out) / job.slug, timing(job, args)
    if folder.is_dir() and job.process is not None:
        minutes = (time.monotonic() - job.step_begun) / 60
        times[job.step] = times.get(job.step, 0.0) + minutes
        times["jobs"] = max(times.get("jobs", 1), args.jobs)
        times["trained"] = job.step == "evaluate" or job.process.poll() == 0
        (folder / "timing.json").write_text(json.dumps(times) + "\n")


def advance(job: Job, args) -> str | None:
    """Look at a running job. None: goes on; "" done; else what went wrong."""
    code = job.process.poll()
    late = args.timeout and time.monotonic() - job.begun > args.timeout
    if code is None and not late:
        return None
    if code is None:
        stop([job])
    note_end(job, args)
    if code is None or code:
        return f"time-out of {args.timeout:g} s" if code is None else f"exit code {code}"
    if job.step == "evaluate":
        # Each holds the optimizer's state too: three times the model that stays.
        shutil.rmtree(Path(args.out) / job.slug / "checkpoints", ignore_errors=True)
        return ""
    job.step = "evaluate"
    start(job, args)
    return None


def run_jobs(waiting: list[Job], args, signals: list[int]) -> int:
    """Run them, --jobs at a time, until a signal is in `signals`. Returns how many failed."""
    begun, running, failed = time.monotonic(), [], 0
    try:
        while (waiting or running) and not signals:
            if waiting and args.minutes and time.monotonic() - begun > 60 * args.minutes:
                names = ", ".join(job.label for job in waiting)
                print(f"{args.minutes:g} minutes are over, not started: {names}", flush=True)
                waiting = []
            while waiting and len(running) < args.jobs:
                job, *waiting = waiting
                job.begun = time.monotonic()
                job.step = "evaluate" if timing(job, args).get("trained") else "train"
                taken = [other.device for other in running]
                job.device = min(devices(), key=taken.count, default="")
                running.append(job)
                start(job, args)
            for job in list(running):
                end = advance(job, args)
                if end is None:
                    continue
                running.remove(job)
                failed += bool(end)
                if end:
                    log = Path(args.out) / f"{job.slug}.log"
                    print(f"failed: {job.label}: {end}, see {log}", file=sys.stderr, flush=True)
                else:
                    print(f"{job.label}: {line(read_row(Path(args.out) / job.slug))}", flush=True)
            time.sleep(0.1)
    finally:
        stop(running)  # empty but where this was interrupted
        for job in running:
            note_end(job, args)
    return failed


# ---- the series


def check(args) -> None:
    """What can be refused before anything runs; makes the embedded corpus if it is asked for."""
    if args.jobs < 1:
        raise UserError(f"--jobs: {args.jobs} found, at least 1 expected")
    if not Path(args.teacher).is_dir():
        raise UserError(f"--teacher: no folder {args.teacher}")
    tokenizer = load_tokenizer(tokenizer_spec(args.teacher))
    for spec in (args.data, *parse_domains(args.domains or args.data).values()):
        resolve_data(spec, tokenizer)
    if args.recall_tasks:
        tasks = args.recall_tasks.split(",")
        questions(tokenizer, tasks=tasks, lengths=args.recall_lengths, depths=[0.5], samples=1)


def plan(args) -> list[Job]:
    """The jobs of the rows asked for, no run twice; series.json gets their tables."""
    known, tables = all_tables(args), {}
    for table in [*args.tables, *(["own"] if args.row else [])]:
        if table not in known:
            raise UserError(f"'{table}' found, some of the tables {', '.join(known)} expected")
        tables[table] = known[table]
    names = [name for rows in tables.values() for name in rows]
    for name in args.rows or names[:0]:
        if name not in names:
            raise UserError(f"--rows: '{name}' found, some of {', '.join(names)} expected")
    wanted = {*(args.rows or names), *tables.get("own", ())}
    flags = {
        t: {n: changes(args, words) for n, words in rows.items() if n in wanted}
        for t, rows in tables.items()
    }
    jobs: dict[str, Job] = {}
    for seed in args.seeds:
        base_config(args, seed=str(seed))
        for table, rows in flags.items():
            for name, changed in rows.items():
                job = Job(f"{table}/{name}", changed, seed)
                job.label += f" (seed {seed})" if len(args.seeds) > 1 else ""
                jobs.setdefault(job.slug, job)
    remember(args, flags)
    return list(jobs.values())


def remember(args, tables: dict[str, dict[str, dict[str, str]]]) -> None:
    """Add the tables to series.json. UserError where its rows are of other settings than these."""
    settings = to_dict(base_config(args))
    for group in [name for name, value in settings.items() if isinstance(value, dict)]:
        settings |= {f"{group}_{name}": value for name, value in settings.pop(group).items()}
    settings |= {"domains": args.domains or args.data, "evaluation_tokens": args.eval_tokens}
    recall = [args.recall_tasks, args.recall_lengths, args.recall_samples]
    settings |= dict(zip(("recall_tasks", "recall_lengths", "recall_samples"), recall, strict=True))
    path = Path(args.out) / "series.json"
    old = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "tables": {}}
    for name, value in settings.items():
        if old["settings"].get(name, value) != value:
            raise UserError(
                f"--out: {args.out} has rows with {name} {old['settings'][name]}, not {value}; "
                "another folder expected"
            )
    for table, rows in tables.items():
        old["tables"].setdefault(table, {}).update(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(old, indent=1) + "\n")


def run_series(args) -> int:
    """Everything asked for that is not there yet. Returns how many rows failed."""
    if not args.tables and not args.row:
        raise UserError(f"no table found, some of {', '.join(all_tables(args))} expected")
    check(args)
    jobs = plan(args)
    out = Path(args.out)
    missing = [job for job in jobs if not (out / job.slug / "eval.json").is_file()]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished before", flush=True)
    # Noted and not raised: an exception could come between a process and its place in the list.
    signals: list[int] = []
    note = lambda number, _: signals.append(number)  # noqa: E731
    known = (signal.SIGTERM, signal.SIGINT)
    heard = [n for n in known if signal.getsignal(n) != signal.SIG_IGN]  # background jobs ignore
    before = {n: signal.signal(n, note) for n in heard}
    try:
        failed = run_jobs(missing, args, signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        write_tables(out)
    if signals:
        raise SystemExit(128 + signals[0])
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help="tables of --list")
    parser.add_argument("--list", action="store_true", help="show tables, rows and their flags")
    parser.add_argument("--read", default="", help="show what this --out folder holds")
    parser.add_argument("--out", default="runs/quality", help="folder of the runs")
    parser.add_argument("--base", default="configs/ablation.yaml", help="preset of every row")
    parser.add_argument("--train", default="", help='more flags for every row: --train="--a=1"')
    parser.add_argument("--teacher", default="models/smollm2-135m")
    parser.add_argument("--data", default="stdlib", help="data set to train on")
    parser.add_argument("--domains", default="", help="NAME=DATA,... to evaluate on; empty = data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="every row once for each")
    parser.add_argument("--rows", nargs="+", help="only these rows of the tables named")
    parser.add_argument(
        "--row", action="append", default=[], help='a row of the table "own": "NAME=--flag value"'
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows run side by side")
    parser.add_argument("--minutes", type=float, default=0.0, help="then start no row; 0 = no end")
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds a row; 0 = no limit")
    parser.add_argument("--eval_tokens", type=int, default=65_536, help="tokens of each domain")
    parser.add_argument("--recall_tasks", default=",".join(TASKS), help="empty = none")
    parser.add_argument("--recall_lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--recall_samples", type=int, default=8, help="of each length and depth")
    args = parser.parse_args(argv)
    failed = 0
    try:
        if args.list:
            for table, rows in all_tables(args).items():
                shown = [{"row": name, "flags": " ".join(flags)} for name, flags in rows.items()]
                console_table(table, shown)
        elif args.read:
            write_tables(Path(args.read))
        else:
            failed = run_series(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
