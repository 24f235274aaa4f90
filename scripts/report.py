"""A run as one HTML page: its curves, tables, samples, evaluation and settings.

    python scripts/report.py runs/mine                       # writes runs/mine/report.html
    python scripts/report.py runs/mine --out mine.html

Takes the folder of a run of train_kd.py or train.py, finished, running or killed, and shows what is
there, eval.json (evaluate.py --out) and layer_scores.json among it. What is missing gets a line
that says so. The page loads nothing and needs no JavaScript. Plots need matplotlib
(pip install -e ".[plot]"). Tested by tests/test_report.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import ModelConfig, UserError
from layer_lists import parse_layers
from scripts import report_page as page
from scripts.report_page import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Curve, Line

STAGE_COLOURS = {"align": ORANGE, "distill": BLUE, "long": GREEN, "pretrain": PURPLE}
KEY_COLOURS = {"loss": BLUE, "kl": RED, "ce": GREEN}
# Evaluations of what is not the student: their line in a plot.
REFERENCES = {
    "teacher": ("teacher", BLACK, "--"),
    "teacher in float8": ("teacher in float8", GREY, "-."),
    "converted attention outputs zeroed": ("attention zeroed", RED, ":"),
}
# Key of an evaluation -> the plot's title, its unit.
HELD_OUT = {
    "eval/ppl": ("perplexity", "perplexity"),
    "eval/kl": ("KL to the teacher", "nats per token"),
    "eval/top1": ("agreement with the teacher", "share of tokens"),
}
# Key of a training row -> title in the table of medians, factor, significant digits.
MEDIANS = {
    "tok/s": ("median tok/s", 1, 4),
    "time_per_step": ("median seconds a step", 1, 4),
    "mfu": ("median MFU, %", 100, 3),
    "useful_tflops": ("median useful TFLOP/s a device", 1, 4),
}


# ---- what a run's folder holds


@dataclass
class Folder:
    """A run as read from its files."""

    path: Path
    config: dict  # the resolved settings
    record: dict  # command, commit and whatever else was saved beside them
    rows: list[dict]  # of metrics.jsonl
    samples: list[dict]  # of samples.jsonl
    unreadable: dict[str, int]  # file -> lines skipped

    def stages(self) -> dict[str, list[dict]]:
        """Stage -> its training rows, in the order they ran."""
        found: dict[str, list[dict]] = {}
        for row in self.rows:
            if "loss" in row:
                found.setdefault(row["stage"], []).append(row)
        return found

    def evaluations(self) -> list[dict]:
        return [row for row in self.rows if any(key.startswith("eval/") for key in row)]

    def json(self, name: str):
        """What a JSON file holds; None if it is not there."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{name} is not JSON ({error})") from None


def read_lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict], int]:
    """The objects of a JSON-lines file that have all `keys`, and how many other lines there are: a
    run that was killed may leave half a line."""
    if not path.is_file():
        return [], 0
    rows, bad = [], 0
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = None
        if isinstance(row, dict) and all(key in row for key in keys):
            rows.append(row)
        else:
            bad += bool(line.strip())
    return rows, bad


def read_run(path: str) -> Folder:
    """The run in a folder. UserError where there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder, that of a run (runs/NAME) expected")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no config.yaml in it, the folder of a run expected") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: its config.yaml holds no settings, those of a run expected")
    record = config.pop("_run", None) or {}
    rows, bad_rows = read_lines(folder / "metrics.jsonl", ("step", "stage"))
    samples, bad_samples = read_lines(folder / "samples.jsonl", ("step", "samples"))
    unreadable = {"metrics.jsonl": bad_rows, "samples.jsonl": bad_samples}
    return Folder(folder, config, record, rows, samples, unreadable)


def student_config(run: Folder) -> ModelConfig | None:
    """The student's shape: from the saved model or, before there is one, from the settings and the
    teacher; None if neither tells."""
    from hf import read_config
    from hybrid_layers import convert_config

    c = run.config
    try:
        if (run.path / "model" / "config.json").is_file():
            return read_config(run.path / "model")
        if "teacher" in c:
            shape = read_config(c.get("student") or c["teacher"])
            if "linear_attention" in shape.layer_types:
                return shape
        else:
            n, window = c["num_blocks"], c.get("sliding_window", 0)
            kinds = ["sliding_attention" if window else "full_attention"] * n
            shape = ModelConfig(num_hidden_layers=n, layer_types=kinds, sliding_window=window)
        found = run.json("layer_scores.json")
        layers = (
            found["linear"] if found
            else parse_layers(c["layers"], shape.num_hidden_layers, c.get("keep_layers", ""))
        )  # fmt: skip
        window = c.get("linear_window", 0)
        return convert_config(shape, layers, c["mixer"], linear_window=window) if layers else shape
    except (UserError, KeyError):
        return None


def step_tokens(run: Folder, stage: str) -> int | None:
    """Tokens of one optimizer step of a stage; None if the settings do not say."""
    c = run.config
    if isinstance(c.get(stage), dict):
        return c[stage].get("batch_tokens")
    if "batch_size" not in c:
        return None
    return c["batch_size"] * (c.get("accumulation_steps") or 8) * (c.get("context_len") or 512)


def number(value) -> float | None:
    """A finite number, else None: metrics.jsonl has null for NaN and for what is not known."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def curve(rows: list[dict], key: str, label: str = "", colour: str | tuple = BLUE) -> Curve:
    points = [(row["step"], row[key]) for row in rows if number(row.get(key)) is not None]
    return Curve(label, [x for x, _ in points], [y for _, y in points], colour)


# ---- sections: a run -> HTML


def headline(run: Folder) -> str:
    c, shape = run.config, student_config(run)
    layers = page.note("No layer map: neither model/ nor the teacher's folder is there.")
    if shape is not None:
        softmax = {
            "full_attention": "softmax attention",
            "sliding_attention": f"softmax attention, window {shape.sliding_window}",
        }
        kinds = enumerate(shape.layer_types)
        names = [softmax.get(kind) or shape.mixer_name(i) for i, kind in kinds]
        counts = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
        layers = page.layer_cells(shape.layer_map(), names) + f"<p>{page.esc(counts)}</p>"
    before, total, lines = 0, 0, []
    if run.rows and "loss" not in run.rows[0]:
        before = run.rows[0]["step"]  # more than 0 in a run that goes on from another's checkpoint
    for stage, rows in run.stages().items():
        steps, tokens = rows[-1]["step"] - before, step_tokens(run, stage)
        before = rows[-1]["step"]
        total = None if total is None or tokens is None else total + steps * tokens
        lines.append(
            f"{stage}: {steps:,} steps" + (f", {steps * tokens:,} tokens" if tokens else "")
        )
    planned = c.get("stages", "pretrain").replace(" ", "").split(",")
    ends = {"eval/unigram_entropy", f"student after {planned[-1]}"}
    finished = any(ends & {*row, row["stage"]} for row in run.rows)
    about = {
        "teacher": c.get("teacher", "none: pretraining"),
        "device": run.record.get("device") or c.get("device", "not recorded"),
        "dtype": run.record.get("dtype") or c.get("dtype", "not recorded"),
        "commit": run.record.get("commit") or "not recorded",
        "stages": "; ".join(lines) or f"none begun of {', '.join(planned)}",
        "tokens in all": "not recorded" if total is None else f"{total:,}",
        "state": "finished" if finished else f"not finished: last logged step {before:,}",
    }
    skipped = [
        page.note(f"{name}: {count} unreadable line{'s' if count > 1 else ''} skipped.")
        for name, count in run.unreadable.items() if count
    ]  # fmt: skip
    return layers + page.facts(about) + "".join(skipped)


def final_table(run: Folder) -> str:
    rows = run.json("table.json")
    if rows:
        return page.table(rows, "final")
    missing = page.note("No table.json: it is written by train_kd.py, at its first evaluation.")
    last = {row["stage"]: row for row in run.evaluations()}
    shown = [
        {"model": stage, "step": row["step"]}
        | {k[5:]: round(v, 4) for k, v in row.items() if k[:5] == "eval/" and number(v) is not None}
        for stage, row in last.items()
    ]  # fmt: skip
    if not shown:
        return missing
    return missing + "<p>The last evaluations in metrics.jsonl:</p>" + page.table(shown, "final")


def curves(run: Folder) -> str:
    stages, evals = run.stages(), run.evaluations()
    if not stages and not evals:
        return page.note("No curves: metrics.jsonl is not there, or has no row yet.")
    charts = []
    for stage, rows in stages.items():
        drawn: list[Curve] = []
        for key, colour in KEY_COLOURS.items():
            new = curve(rows, key, key, colour)
            same = [i for i, c in enumerate(drawn) if c.ys == new.ys]
            if not same:
                drawn.append(new)
            elif new.ys:
                drawn[same[0]] = drawn[same[0]]._replace(label=f"{drawn[same[0]].label} = {key}")
        unit = "RMS error" if stage == "align" else "loss per token"
        charts.append(page.line_chart(f"{stage}: training loss", unit, drawn))
    students = [r for r in evals if r["stage"] in stages or r["stage"].startswith("student")]
    others = {r["stage"]: r for r in evals if r["stage"] in REFERENCES}
    ends = [rows[-1]["step"] for rows in stages.values()][:-1]
    for key, (title, unit) in HELD_OUT.items():
        lines = [
            Line(row[key], *REFERENCES[name]) for name, row in others.items()
            if number(row.get(key)) is not None and (key, name) != ("eval/kl", "teacher")
        ]  # fmt: skip
        entropies = [r["eval/unigram_entropy"] for r in evals if "eval/unigram_entropy" in r]
        if key == "eval/ppl" and entropies:
            lines.append(Line(math.exp(entropies[-1]), "unigram frequencies", RED, ":"))
        found = curve(students, key, "student" if others else "model")
        charts.append(page.line_chart(f"held out: {title}", unit, [found], lines=lines, ends=ends))
    charts += [
        by_stage(run, "lr", "learning rate of new mixers, else of all", "learning rate"),
        by_stage(run, "grad_norm", "gradient norm before clipping", "norm"),
    ]
    missing = "" if evals else page.note("No held-out curves: metrics.jsonl has no evaluation yet.")
    return missing + page.grid(charts)


def by_stage(run: Folder, key: str, caption: str, unit: str) -> str:
    """One curve for each stage."""
    stages = run.stages().items()
    found = [curve(rows, key, s, STAGE_COLOURS.get(s, BLACK)) for s, rows in stages]
    return page.line_chart(caption, unit, found)


def alignment(run: Folder) -> str:
    rows = run.stages().get("align", [])
    names = {key for row in rows for key in row if re.fullmatch(r"layer_\d+", key)}
    layers = sorted(int(name[6:]) for name in names)
    if not layers:
        return page.note("No alignment errors: metrics.jsonl has no row of the stage align.")
    import matplotlib

    most = max(1, len(layers) - 1)
    shades = [matplotlib.colormaps["viridis"](0.9 * i / most) for i in range(len(layers))]
    in_legend = {layers[round(i * most / 4) % len(layers)] for i in range(5)}
    if len(layers) <= 9:
        in_legend = set(layers)
    found = {
        n: curve(rows, f"layer_{n}", f"layer {n}" if n in in_legend else "", shade)
        for n, shade in zip(layers, shades, strict=True)
    }
    last = {n: c.ys[-1] for n, c in found.items() if c.ys}
    values = [
        {"layer": n, "first": f"{found[n].ys[0]:.4g}", "last": f"{v:.4g}"} for n, v in last.items()
    ]
    charts = [
        page.bar_chart("alignment error by layer, last step", "RMS error", {"": (BLUE, last)}),
        page.line_chart(
            "alignment error, means over time",
            "RMS error",
            [page.means(c, 120) for c in found.values()],
        ),
    ]
    return page.grid(charts) + page.details("values", page.table(values, "layer-errors"))


def throughput(run: Folder) -> str:
    rows = []
    for stage, steps in run.stages().items():
        row = {"stage": stage, "rows": len(steps)}
        for key, (title, factor, digits) in MEDIANS.items():
            if values := curve(steps, key).ys:
                row[title] = float(f"{factor * statistics.median(values):.{digits}g}")
        if memory := curve(steps, "mem").ys:
            row["peak memory, GiB"] = round(max(memory), 2)
        rows.append(row)
    if not rows:
        return page.note("No throughput: metrics.jsonl has no training row yet.")
    charts = [
        by_stage(run, "tok/s", "throughput", "tokens per second"),
        by_stage(run, "mfu", "model FLOPs utilisation", "share of the peak"),
        by_stage(run, "mem", "peak memory so far", "GiB"),
    ]
    missing = "" if charts[1] else page.note("No MFU: the run did not know its device's peak.")
    return page.table(rows, "medians") + missing + page.grid(charts)


def samples_of_run(run: Folder) -> str:
    if not run.samples:
        return page.note("No samples: samples.jsonl is not there, or has no row yet.")
    last = run.samples[-1]
    parts = [f"<p>After step {last['step']:,}:</p>"]
    for now in last["samples"]:
        history = [
            {"step": row["step"], "student": s["student"]}
            for row in run.samples for s in row["samples"] if s["prompt"] == now["prompt"]
        ]  # fmt: skip
        parts.append(
            page.sample(
                now, page.details("the student over the steps", page.table(history, "texts"))
            )
        )
    return "".join(parts)


def evaluation(run: Folder) -> str:
    found = run.json("eval.json")
    if found is None:
        return page.note("No evaluation: eval.json is not there; evaluate.py --out writes it.")
    names = ("model", "teacher", "device", "dtype", "commit")
    parts = [page.facts({name: found[name] for name in names if found.get(name)})]
    parts.append(page.facts({"command": found["command"]}, "wide"))
    domains = []
    for domain, scores in found["domains"].items():
        row = {"domain": domain, "tokens": scores["tokens"], "bytes": scores["bytes"]}
        for key, title in (("ppl", "perplexity"), ("bits_per_byte", "bits/byte")):
            for who in ("teacher", "student"):
                if who in scores:
                    row[f"{who} {title}"] = round(float(scores[who][key]), 4)
        for key, title in (("ratio", "x teacher"), ("kl", "KL"), ("top1", "top-1")):
            if key in scores:
                row[title] = round(float(scores[key]), 4)
        domains.append(row)
    if domains:
        parts.append("<h3>By domain</h3>" + page.table(domains, "domains"))
    recall, completions = found.get("recall", []), found.get("samples", [])
    parts.append(
        "<h3>Recall</h3><p>Share of right answers, by length of the prompt in tokens and, where a "
        "task has one, depth of the answer in it (0 = start).</p>"
        if recall else page.note("No recall tasks in eval.json.")
    )  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in recall):
        rows = [row for row in recall if row["task"] == task]
        maps = [page.heat_map(task, rows, who) for who in ("teacher", "student")]
        parts.append(f'<h4>{page.esc(task)}</h4><div class="maps">{"".join(maps)}</div>')
    parts.append(
        "<h3>Completions</h3>" if completions else page.note("No completions in eval.json.")
    )
    return "".join(parts + [page.sample(row) for row in completions])


def layer_search(run: Folder) -> str:
    found = run.json("layer_scores.json")
    if found is None:
        return page.note("No layer search: layer_scores.json is not there.")
    scores = sorted(found["layers"], key=lambda row: row["layer"])
    linear, base = set(found["linear"]), found["baseline"]
    count = 1 + max([row["layer"] for row in scores] + found["linear"] + found["uniform"])
    about = {"scorer": found["scorer"], "share of linear layers": found["share"]}
    scores_of = found.get("patterns", {}) | {"all linear": base}
    patterns = [
        {"layers": name} | {key: f"{value:.4g}" for key, value in scores_of[name].items()}
        for name in ("chosen", "uniform", "all linear", "teacher") if name in scores_of
    ]  # fmt: skip
    parts = [page.facts(about), page.table(patterns, "patterns")]
    for title, chosen in (("chosen", linear), ("uniform", set(found["uniform"]))):
        letters = ["L" if i in chosen else "F" for i in range(count)]
        names = ["linear" if i in chosen else "softmax attention" for i in range(count)]
        parts.append(f"<h4>{title}: {len(chosen)} of {count} linear</h4>")
        parts.append(page.layer_cells(letters, names))
    noise, charts = number(found.get("noise")), []
    for key, title, unit in (
        ("score", "importance", "score"), ("kl", "KL", "nats per token"),
        ("recall_ce", "cross-entropy of recalled answers", "nats per token"),
    ):  # fmt: skip
        values = {r["layer"]: r[key] for r in scores if number(r.get(key)) is not None}
        groups = {
            "stays softmax": (BLUE, {n: v for n, v in values.items() if n not in linear}),
            "becomes linear": (ORANGE, {n: v for n, v in values.items() if n in linear}),
        }
        lines = [Line(base[key], "baseline", BLACK, "--")] if key in base else []
        if key == "score" and noise is not None:
            lines.append(Line(noise, "noise", BLACK, ":"))
        charts.append(
            page.bar_chart(f"{title} by layer", unit, groups, lines=lines) if values else ""
        )
    values = [
        {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in scores
    ]
    return "".join(parts) + page.grid(charts) + page.details("values", page.table(values, "scores"))


def configuration(run: Folder) -> str:
    saved = page.note("No command and no commit in config.yaml.")
    settings = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    inner = f'<div class="text settings">{page.esc(settings)}</div>'
    return (page.facts(run.record, "wide") if run.record else saved) + page.details(
        "settings", inner
    )


SECTIONS = {
    "": headline, "Final table": final_table, "Curves": curves, "Alignment by layer": alignment,
    "Throughput and memory": throughput, "Samples": samples_of_run, "Evaluation": evaluation,
    "Layer search": layer_search, "Configuration": configuration,
}  # fmt: skip


def build(run: Folder) -> str:
    """The page. A file that is not as expected costs its section, which says so, as does stderr."""
    sections = {}
    for title, section in SECTIONS.items():
        try:
            sections[title] = section(run)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            what = str(error) if isinstance(error, UserError) else f"a file has {error!r}"
            print(f"warning: {title or 'headline'} left out: {what}", file=sys.stderr)
            sections[title] = page.note(f"Left out: {what}")
    return page.document(run.path.resolve().name, sections)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, runs/NAME")
    parser.add_argument("--out", default="", help="file to write; empty = report.html in the run")
    args = parser.parse_args(argv)
    try:
        run = read_run(args.run)
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError(
                'package matplotlib not found, expected after pip install -e ".[plot]"'
            ) from None
        out = Path(args.out or run.path / "report.html")
        out.write_bytes(build(run).encode("utf-8", "replace"))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"-> {out} ({out.stat().st_size / 1024:,.0f} KiB)")


if __name__ == "__main__":
    main()
