"""The tables of ablations that benchmarks/quality.py runs: their rows, and the results of these.

    python benchmarks/quality.py --read runs/quality

Check: `pytest tests/test_quality.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import DistillConfig, Transfer, UserError
from hybrid_layers import MIXERS
from metrics import console_table
from scripts.report import curve, read_run, step_tokens

PARTS = {f.name: f.default for f in dataclasses.fields(Transfer) if f.type == "bool"}
TABLES: dict[str, dict[str, list[str]]] = {
    "lr": {
        "base": [],
        **{
            f"mixer_lr={mixer_lr} lr={lr}": [f"--distill_mixer_lr={mixer_lr}", f"--distill_lr={lr}"]
            for mixer_lr, lr in (
                ("1e-4", "7e-6"),
                ("1e-3", "1e-4"),
                ("1e-3", "3e-4"),
                ("2e-3", "1e-3"),
                ("4e-3", "3e-4"),
            )
        },
        **{f"align_lr={lr}": [f"--align_lr={lr}"] for lr in ("1e-3", "3e-3", "1e-2")},
        "align_muon": ["--align_use_muon=True"],
        "muon": ["--use_muon=True"],
    },
    "transfer": {
        "base": [],
        **{
            f"{part}={'off' if on else 'on'}": [f"--transfer_{part}={not on}"]
            for part, on in PARTS.items()
        },
        "all-off": [f"--transfer_{part}=False" for part in PARTS],
        "kv=rows": ["--transfer_kv=rows"],
    },
    "structure": {
        "base": [],
        "rope": ["--linear_rope=True"],
        "no-conv": ["--linear_conv=1"],
        "no-gate": ["--linear_gate=False"],
    },
    "loss": {
        "forward_kl": ["--distill_loss=forward_kl"],
        "reverse_kl": ["--distill_loss=reverse_kl"],
        "js": ["--distill_loss=js"],
        "cross-entropy": ["--distill_kd_weight=0", "--distill_ce_weight=1"],
    },
    "repeat": {
        "base": [],
        **{f"repeat_rows={r}": [f"--distill_repeat_rows={r}"] for r in ("0.1", "0.25", "0.5")},
    },
    "layers": {
        "3:1": ["--layers=3:1"],
        **{
            scorer: ["--layers=auto:0.75", f"--search_scorer={scorer}"]
            for scorer in ("swap", "drop", "window", "greedy", "gates")
        },
    },
    "share": {
        **{
            f"auto:{share}": [f"--layers=auto:{share}", "--search_scorer=swap"]
            for share in ("0.25", "0.5", "0.75", "0.9")
        },
        "all": ["--layers=all"],
    },
    "mixers": {name: [f"--mixer={name}"] for name in MIXERS},
}


def align_share(cfg: DistillConfig) -> dict[str, list[str]]:
    """The base's tokens divided otherwise: 0, 25, 50 or 75 % of them for align."""
    base = cfg.align.tokens if "align" in cfg.stage_names() else 0
    total = base + cfg.distill.tokens
    rows = {f"{100 * base / total:g}%": []}
    for percent in (0, 25, 50, 75):
        align = total * percent // 100
        flags = ["--stages=align,distill", f"--align_tokens={align}"]
        flags = flags if percent else ["--stages=distill"]
        rows.setdefault(f"{percent}%", [*flags, f"--distill_tokens={total - align}"])
    return rows


def slug(flags: dict[str, str], seed: int = 0) -> str:
    """Name of the folder of a run: base, transfer_decay-true, layers-all-s1."""
    parts = [f"{name}-{re.sub(r'[^A-Za-z0-9._-]', '-', text)}" for name, text in flags.items()]
    return ("+".join(sorted(parts)).lower() or "base") + (f"-s{seed}" if seed else "")


def read_row(folder: Path) -> dict:
    """A finished run as a row of quality.json, but for what its table calls it."""
    run = read_run(str(folder))
    found, times = run.json("eval.json"), run.json("timing.json") or {}
    tokens, rates, before = {}, {}, 0
    for stage, rows in run.stages().items():
        tokens[stage] = (rows[-1]["step"] - before) * step_tokens(run, stage)
        before, speeds = rows[-1]["step"], curve(rows, "tok/s").ys
        rates[stage] = statistics.median(speeds) if speeds else None
    recall = {}
    for task in dict.fromkeys(row["task"] for row in found["recall"]):
        rows = [row for row in found["recall"] if row["task"] == task]
        whose = ("student", "teacher")
        recall[task] = {who: statistics.mean(row[who] for row in rows) for who in whose}
    domains = {
        name: {key: scores[key] for key in ("ratio", "kl", "top1")}
        for name, scores in found["domains"].items()
    }
    return {
        "run": folder.name, "seed": run.config["seed"], "tokens": tokens, "tok_s": rates,
        "minutes": {step: times.get(step, 0.0) for step in ("train", "evaluate")},
        "jobs": times.get("jobs", 1), "domains": domains, "recall": recall,
        **{key: run.record.get(key) for key in ("device", "commit", "command")},
    }  # fmt: skip


def mean_of(row: dict, key: str) -> float:
    return statistics.mean(scores[key] for scores in row["domains"].values())


def minutes_of(row: dict) -> float:
    return sum(row["minutes"].values())


def line(row: dict) -> str:
    """A finished row in one line."""
    ratios = [f"{name} x{scores['ratio']:.4f}" for name, scores in row["domains"].items()]
    recall = [f"{task} {share['student']:.2f}" for task, share in row["recall"].items()]
    kl = f"KL {mean_of(row, 'kl'):.4f}"
    return ", ".join([f"{minutes_of(row):.1f} min", *ratios, kl, *recall])


def spread(values: list[float | None], form: str) -> str:
    """The value, or of several seeds the mean and half of the range."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text, half = format(statistics.mean(known), form), (max(known) - min(known)) / 2
    return f"{text} \u00b1 {format(half, form)}" if len(known) > 1 else text


def table_of(rows: list[dict]) -> list[dict[str, str]]:
    """The rows of one ablation table, seeds together, as they are shown."""
    shown, tasks = [], rows[0]["recall"]
    teacher = {t: statistics.mean(r["recall"][t]["teacher"] for r in rows) for t in tasks}
    for name in dict.fromkeys(row["name"] for row in rows):
        same = [row for row in rows if row["name"] == name]
        cells = {"row": name}
        for domain in same[0]["domains"]:
            ratios = [row["domains"][domain]["ratio"] for row in same]
            cells[f"x teacher, {domain}"] = spread(ratios, ".4f")
        cells["mean KL"] = spread([mean_of(row, "kl") for row in same], ".4f")
        cells["top-1"] = spread([mean_of(row, "top1") for row in same], ".4f")
        for task, theirs in teacher.items():
            shares = [row["recall"][task]["student"] for row in same]
            cells[f"{task} (teacher {theirs:.3f})"] = spread(shares, ".3f")
        speeds = [[*row["tok_s"].values()][-1] if row["tok_s"] else None for row in same]
        cells["tok/s"] = spread(speeds, ",.0f")  # of the last stage
        cells["minutes"] = spread([minutes_of(row) for row in same], ".1f")
        shown.append(cells)
    return shown


def write_tables(out: Path) -> None:
    """Show what is there, and write quality.json and quality.md."""
    if not (out / "series.json").is_file():
        raise UserError(f"{out}: no series.json in it, the --out folder of a series expected")
    every, parts = [], ["# Ablations"]
    for table, names in json.loads((out / "series.json").read_text())["tables"].items():
        rows, missing = [], []
        for name, flags in names.items():
            plain = slug(flags)
            found = [
                path.parent for path in out.glob(f"{plain}*/eval.json")
                if re.fullmatch(r"(-s\d+)?", path.parent.name.removeprefix(plain))
            ]  # fmt: skip
            same = [{"table": table, "name": name, "flags": flags} | read_row(p) for p in found]
            rows += sorted(same, key=lambda row: row["seed"])
            missing += [] if found else [name]
        every += rows
        parts.append(f"## {table}")
        if rows:
            shown = table_of(rows)
            console_table(table, shown, width=200)
            lines = [list(shown[0]), ["---"] * len(shown[0]), *(list(r.values()) for r in shown)]
            parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in lines))
            jobs = max(row["jobs"] for row in rows)
            devices = ", ".join(sorted({str(row["device"]) for row in rows}))
            commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
            parts.append(f"{devices}, commit {commits}, up to {jobs} rows side by side. tok/s: "
                         "median of the last stage.")  # fmt: skip
        if missing:
            parts.append(f"Not run: {', '.join(missing)}.")
    (out / "quality.json").write_text(json.dumps(every, indent=1) + "\n")
    (out / "quality.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"-> {out / 'quality.json'}, {out / 'quality.md'}")
