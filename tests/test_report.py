"""scripts/report.py on a run folder whose numbers are known, and on real tiny runs. Its pages are
parsed as HTML, not searched as text."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import statistics
import sys

import pytest
import yaml
from conftest import ROOT, call_script, tiny_config
from html_tree import Node, facts, figures, letters, parse, svg_texts

from cli import to_dict
from config import DistillConfig, PretrainConfig
from metrics import MetricsLogger

pytest.importorskip("matplotlib")
_SPEC = importlib.util.spec_from_file_location("report", ROOT / "scripts" / "report.py")
report = importlib.util.module_from_spec(_SPEC)
sys.modules["report"] = report  # dataclasses look their module up
_SPEC.loader.exec_module(report)

EVIL = '</div><script>alert(1)</script><img src=x onerror=alert(2)> & "q" \''
LETTERS = {"F": "full_attention", "S": "sliding_attention", "L": "linear_attention"}


def make(folder, *flags: str) -> Node:
    """The page of a run, through the command line."""
    report.main([str(folder), *flags])
    return parse((folder / "report.html").read_bytes().decode("utf-8"))


def part(folder, build) -> Node:
    """One section, by itself."""
    return parse(build(report.read_run(str(folder))))


def section(page: Node, title: str) -> Node:
    return page.one("section", id=title.lower().replace(" ", "-"))


TABLE = [
    {"model": "teacher", "perplexity": 9.5, "x teacher": 1.0, "KL": 0.0, "top-1": 1.0},
    {"model": EVIL, "perplexity": 1234.125, "x teacher": 129.9079, "KL": 3.25, "top-1": 0.0625},
]
RECALL = [
    {"task": "passkey", "length": 512, "depth": 0.0, "samples": 8, "student": 0.625, "teacher": 1},
    {"task": "passkey", "length": 512, "depth": 1.0, "samples": 8, "student": 1.0, "teacher": 0.5},
    {"task": "passkey", "length": 2048, "depth": 1.0, "samples": 8, "student": 0.0, "teacher": 1.0},
    {"task": "mqar", "length": 512, "depth": None, "samples": 24, "student": 1 / 3, "teacher": 0.9},
]
EVAL = {
    "model": "runs/a/model", "teacher": "models/t", "device": "cpu", "dtype": "float32",
    "commit": "0123abc", "command": "python evaluate.py runs/a/model --out runs/a",
    "domains": {
        "prose": {
            "tokens": 4096, "bytes": 12345, "student": {"ppl": 11.25, "bits_per_byte": 1.125},
            "teacher": {"ppl": 10.5, "bits_per_byte": 1.0625}, "ratio": 1.0714, "kl": 0.0521,
            "top1": 0.875,
        },
        EVIL: {"tokens": 10, "bytes": 30, "student": {"ppl": 3, "bits_per_byte": 0.5}},
    },
    "recall": RECALL,
    "samples": [{"prompt": "\n\nOnce", "teacher": "\n upon", "student": EVIL + "\ud800"}],
}  # fmt: skip
SCORES = {
    "scorer": "swap", "share": 0.5, "baseline": {"kl": 0.25, "recall_ce": 0.5}, "noise": 0.0625,
    "layers": [
        {"layer": i, "kl": 0.01 * i + 0.001, "recall_ce": 0.1 * i, "score": s}
        for i, s in enumerate((0.7, 0.1, 0.9, 0.3))
    ],
    "linear": [1, 3], "uniform": [0, 1],
    "patterns": {"chosen": {"kl": 0.125, "recall_ce": 0.25}, "teacher": {"kl": 0.0}},
}  # fmt: skip


def write_config(folder, cfg, record: dict) -> None:
    text = yaml.safe_dump({**to_dict(cfg), "_run": record}, sort_keys=False)
    (folder / "config.yaml").write_text(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 40 align and 12 distill steps, with an evaluation and a layer search."""
    folder = tmp_path_factory.mktemp("runs") / "night & day"
    folder.mkdir()
    cfg = DistillConfig(teacher="models/t", layers="1,2", dtype="float32", device="cpu")
    cfg.align.batch_tokens, cfg.distill.batch_tokens = 1000, 3000
    write_config(folder, cfg, {"command": "train_kd.py --layers 1,2", "commit": "deadbeef"})
    shape = tiny_config(
        layer_types=[LETTERS[letter] for letter in "FLLS"], mixer=["gla", "kda"], sliding_window=48
    )
    (folder / "model").mkdir()
    config = {"model_type": "retort", "retort": dataclasses.asdict(shape)}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    log = MetricsLogger(folder)
    scores = {"ppl": 9.5, "kl": 0.0, "top1": 1.0, "ratio": 1.0}
    log.log_eval(0, "teacher", scores)
    log.log_eval(0, "converted attention outputs zeroed", scores | {"ppl": 400.0, "kl": 3.0})
    log.log_eval(0, "student after transfer", scores | {"ppl": 90.0, "kl": 2.0, "top1": 0.5})
    for step in range(1, 41):
        layer = {"layer_1": 1 / step, "layer_2": 3 / step}
        log.log(step, "align", {
            **layer, "loss": 2 / step, "grad_norm": float("nan") if step == 7 else 0.5,
            "lr": 1e-3, "tok/s": 100.0 * step, "mfu": None, "mem": 1.5,
        })  # fmt: skip
    log.log_eval(40, "student after align", scores | {"ppl": 20.0, "kl": 0.5, "top1": 0.75})
    for step in range(41, 53):
        kl = 0.5 / step
        log.log(step, "distill", {"loss": kl, "kl": kl, "grad_norm": 0.1, "lr": 1e-4,
                                  "tok/s": 50.0, "mfu": 0.25, "mem": 2.5})  # fmt: skip
    log.log_eval(52, "student after distill", scores | {"ppl": 10.0, "kl": 0.1, "top1": 0.9})
    log.close()
    (folder / "table.json").write_text(json.dumps(TABLE))
    with open(folder / "samples.jsonl", "w") as f:
        for step, text in ((20, "early"), (52, EVIL)):
            rows = [{"prompt": "def f():\n", "teacher": "\n    <b>pass</b>", "student": text}]
            f.write(json.dumps({"step": step, "samples": rows}) + "\n")
    (folder / "eval.json").write_text(json.dumps(EVAL))
    (folder / "layer_scores.json").write_text(json.dumps(SCORES))
    return folder


@pytest.fixture(scope="module")
def page(whole) -> Node:
    """Its page; not to be changed."""
    return make(whole)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run to change."""
    return shutil.copytree(whole, tmp_path / "run", ignore=lambda *_: ["report.html"])


def test_headline(page):
    assert page.one("h1").text == page.one("title").text == "night & day"
    cells = page.all("ol", class_="layers")[0]
    assert letters(cells) == "FLLS"
    titles = [li.attrs["title"] for li in cells.all("li")]
    assert titles == [
        "layer 0: softmax attention", "layer 1: gla", "layer 2: kda",
        "layer 3: softmax attention, window 48",
    ]  # fmt: skip
    about = facts(page.all("dl")[0])
    assert about == {
        "teacher": "models/t", "device": "cpu", "dtype": "float32", "commit": "deadbeef",
        "stages": "align: 40 steps, 40,000 tokens; distill: 12 steps, 36,000 tokens",
        "tokens in all": "76,000", "state": "finished",
    }  # fmt: skip


def test_final_table(page):
    rows = page.one("table", class_="final").rows()
    assert rows == [
        ["model", "perplexity", "x teacher", "KL", "top-1"],
        ["teacher", "9.500", "1.0000", "0.00", "1.0000"],
        [EVIL, "1,234.125", "129.9079", "3.25", "0.0625"],
    ]


def test_curves(page):
    found = figures(section(page, "Curves"))
    assert list(found) == [
        "align: training loss", "distill: training loss", "held out: perplexity",
        "held out: KL to the teacher", "held out: agreement with the teacher",
        "learning rate of new mixers, else of all", "gradient norm before clipping",
    ]  # fmt: skip
    assert {"loss", "RMS error"} <= set(svg_texts(found["align: training loss"]))
    assert "loss = kl" in svg_texts(found["distill: training loss"])
    for title in ("held out: perplexity", "held out: agreement with the teacher"):
        assert {"student", "teacher", "attention zeroed"} <= set(svg_texts(found[title]))
    # 9.5 to 400 is drawn on a logarithmic axis, 0.5 to 1 is not.
    labels = svg_texts(found["held out: perplexity"])
    assert {"100", "200"} <= set(labels) and not {"150", "300"} & set(labels)
    assert "0.7" in svg_texts(found["held out: agreement with the teacher"])
    assert points(found["held out: perplexity"], report.BLUE) == 3  # of the student alone
    assert "teacher" not in svg_texts(found["held out: KL to the teacher"])  # 0 by definition
    assert {"align", "distill"} <= set(svg_texts(found["gradient norm before clipping"]))


def points(svg: Node, colour: str) -> int:
    """How many points the longest line of a colour has."""
    paths = [p for p in svg.all("path") if f"stroke: {colour.lower()}" in p.attrs.get("style", "")]
    paths = [p for p in paths if "clip-path" in p.attrs]  # not the legend's
    return max(p.attrs["d"].count("L") + 1 for p in paths)


def test_what_is_null_is_not_drawn(whole, page):
    rows = report.read_run(str(whole)).stages()["align"]
    assert rows[6]["grad_norm"] is None
    assert len(report.curve(rows, "grad_norm").xs) == 39
    found = figures(section(page, "Throughput and memory"))
    assert set(found) == {"throughput", "model FLOPs utilisation", "peak memory so far"}
    mfu = found["model FLOPs utilisation"]
    assert "distill" in svg_texts(mfu) and points(mfu, report.BLUE) <= 12


def test_alignment(page):
    found = section(page, "Alignment by layer")
    assert found.one("table", class_="layer-errors").rows() == [
        ["layer", "first", "last"], ["1", "1", "0.025"], ["2", "3", "0.075"],
    ]  # fmt: skip
    bars, lines = figures(found).values()
    style = f"fill: {report.BLUE.lower()}"
    boxes = [p for p in bars.all("path") if p.attrs.get("style", "").startswith(style)]
    heights = []
    for box in boxes:
        ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", box.attrs["d"])]
        heights.append(max(ys) - min(ys))
    assert len(heights) == 2 and heights[1] == pytest.approx(3 * heights[0], rel=1e-4)
    assert {"layer 1", "layer 2"} <= set(svg_texts(lines))


def test_throughput(page, run):
    found = section(page, "Throughput and memory")
    head, align, distill = found.one("table", class_="medians").rows()
    align, distill = dict(zip(head, align, strict=True)), dict(zip(head, distill, strict=True))
    median = statistics.median(100 * step for step in range(1, 41))
    assert float(align["median tok/s"].replace(",", "")) == median
    assert float(distill["median tok/s"]) == 50 and align["rows"] == "40"
    assert align["median MFU, %"] == "-" and distill["median MFU, %"] == "25"
    assert (align["peak memory, GiB"], distill["peak memory, GiB"]) == ("1.5", "2.5")
    log = run / "metrics.jsonl"
    log.write_text(log.read_text().replace('"mfu": 0.25', '"mfu": null'))
    found = part(run, report.throughput)
    assert "No MFU" in found.text and "model FLOPs utilisation" not in figures(found)


def test_samples(page):
    found = section(page, "Samples")
    texts = [d.text for d in found.all("div") if "text" in d.attrs.get("class", "").split()]
    assert texts == ["def f():\n", "\n    <b>pass</b>", EVIL]
    assert [h.text for h in found.all("h4")] == ["teacher", "student"]
    history = found.one("details").one("table", class_="texts").rows()
    assert history == [["step", "student"], ["20", "early"], ["52", EVIL]]


def test_evaluation(page):
    found = section(page, "Evaluation")
    assert facts(found)["command"] == EVAL["command"]
    head, prose, evil = found.one("table", class_="domains").rows()
    assert dict(zip(head, prose, strict=True)) == {
        "domain": "prose", "tokens": "4,096", "bytes": "12,345", "teacher perplexity": "10.5",
        "student perplexity": "11.25", "teacher bits/byte": "1.0625", "student bits/byte": "1.125",
        "x teacher": "1.0714", "KL": "0.0521", "top-1": "0.875",
    }  # fmt: skip
    assert evil[0] == EVIL and dict(zip(head, evil, strict=True))["teacher perplexity"] == "-"
    texts = [d.text for d in found.all("div") if "text" in d.attrs.get("class", "").split()]
    assert texts == ["\n\nOnce", "\n upon", EVIL + "?"]  # half a surrogate pair is no character


def test_heat_maps(page):
    found = section(page, "Evaluation")
    maps = {t.attrs["data-map"]: t for t in found.all("table", class_="heat")}
    assert list(maps) == ["passkey, teacher", "passkey, student", "mqar, teacher", "mqar, student"]
    assert maps["passkey, student"].rows() == [
        ["depth", "512", "2048"], ["0.0", "0.625", "-"], ["1.0", "1", "0"],
    ]  # fmt: skip
    assert maps["passkey, teacher"].rows()[1:] == [["0.0", "1", "-"], ["1.0", "0.5", "1"]]
    assert maps["mqar, student"].rows()[1] == ["all", "0.333"]
    styles: dict[str, set[str]] = {}
    for heat in maps.values():
        for cell in heat.all("td"):
            if cell.text != "-":
                styles.setdefault(cell.text, set()).add(cell.attrs["style"])
    # One scale for all: a value has one colour, and another value another.
    assert all(len(found) == 1 for found in styles.values())
    assert len({style for found in styles.values() for style in found}) == len(styles) == 6
    assert maps["mqar, student"].one("td").attrs["title"] == "24 samples"


def test_without_a_teacher(run):
    alone = json.loads(json.dumps(EVAL))
    alone["teacher"] = None
    for row in (*alone["recall"], *alone["samples"], *alone["domains"].values()):
        row.pop("teacher", None)
    (run / "eval.json").write_text(json.dumps(alone))
    found = part(run, report.evaluation)
    maps = [t.attrs["data-map"] for t in found.all("table", class_="heat")]
    assert maps == ["passkey, student", "mqar, student"]
    assert "teacher" not in facts(found) and "teacher" not in [h.text for h in found.all("h4")]


def test_layer_search(page, run):
    search = section(page, "Layer search")
    assert [letters(cells) for cells in search.all("ol", class_="layers")] == ["FLFL", "LLFF"]
    assert facts(search) == {"scorer": "swap", "share of linear layers": "0.5"}
    assert search.one("table", class_="patterns").rows() == [
        ["layers", "kl", "recall_ce"], ["chosen", "0.125", "0.25"], ["all linear", "0.25", "0.5"],
        ["teacher", "0", "-"],
    ]  # fmt: skip
    found = figures(search)
    assert set(found) == {
        "importance by layer", "KL by layer", "cross-entropy of recalled answers by layer",
    }  # fmt: skip
    assert {"stays softmax", "becomes linear", "noise"} <= set(
        svg_texts(found["importance by layer"])
    )
    assert "baseline" in svg_texts(found["KL by layer"])
    rows = search.one("table", class_="scores").rows()
    assert rows[0] == ["layer", "kl", "recall_ce", "score"] and rows[3][-1] == "0.9"
    without = {k: v for k, v in SCORES.items() if k != "noise"}
    (run / "layer_scores.json").write_text(json.dumps(without))
    found = figures(part(run, report.layer_search))
    assert "noise" not in svg_texts(found["importance by layer"])


def test_configuration(whole, page):
    part = section(page, "Configuration")
    assert facts(part) == {"command": "train_kd.py --layers 1,2", "commit": "deadbeef"}
    saved = yaml.safe_load((whole / "config.yaml").read_text())
    del saved["_run"]
    assert yaml.safe_load(part.one("div", class_="text settings").text) == saved


def test_nothing_is_loaded_and_ids_are_unique(page):
    nodes = page.all("*")
    assert len(page.all("svg")) == 15  # or the checks below would say little
    loading = ("script", "img", "image", "link", "iframe", "object", "embed", "base", "form")
    assert not [n.tag for n in nodes if n.tag in loading]
    ids = [n.attrs["id"] for n in nodes if "id" in n.attrs]
    assert len(ids) == len(set(ids))
    for node in nodes:
        for name, value in node.attrs.items():
            assert not name.startswith("on"), (node.tag, name)
            if name in ("href", "xlink:href", "src", "srcset", "data", "poster", "action"):
                assert value[0] == "#" and value[1:] in ids, value
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target[0] == "#" and target[1:] in ids, target
    for style in page.all("style"):
        assert "url(" not in style.text and "@import" not in style.text
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert policy.attrs["content"].startswith("default-src 'none';")
    assert page.one("style").parent.tag == "head"  # none of matplotlib's, which would hold for all


def test_a_page_is_reproducible(whole, page, tmp_path, capsys):
    other = tmp_path / "other.html"
    report.main([str(whole), "--out", str(other)])
    found = capsys.readouterr()
    assert found.err == "" and f"-> {other}" in found.out
    assert other.read_bytes() == (whole / "report.html").read_bytes()


def test_a_run_that_has_only_begun(tmp_path, capsys):
    write_config(tmp_path, DistillConfig(teacher=str(tmp_path / "none")), {})
    page = make(tmp_path)
    assert capsys.readouterr().err == ""
    missing = {s.attrs["id"]: s.one("p", class_="note").text for s in page.all("section")}
    assert list(missing) == [
        "final-table", "curves", "alignment-by-layer", "throughput-and-memory", "samples",
        "evaluation", "layer-search", "configuration",
    ]  # fmt: skip
    files = ("table", "metrics", "metrics", "metrics", "samples", "eval", "layer_scores", "config")
    for text, file in zip(missing.values(), files, strict=True):
        assert text.startswith("No ") and f"{file}." in text
    assert not page.all("svg") and not page.all("ol")
    about = facts(page)
    assert about["stages"] == "none begun of align, distill" and about["tokens in all"] == "0"
    assert "not finished" in about["state"] and "No layer map" in page.text


def test_a_killed_run(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]))  # before its last evaluation
    assert facts(part(run, report.headline))["state"] == "not finished: last logged step 52"
    lines[10:10] = ["[1, 2]", '{"step": 9}', "\x00\x00", ""]
    cut = [*lines[: lines.index("") + 20], '{"step": 31, "stage": "ali']
    (run / "metrics.jsonl").write_text("\n".join(cut))
    with open(run / "samples.jsonl", "ab") as f:
        f.write(b'{"step": 60, "samples": [{"prompt": "\xff')
    page = part(run, report.headline)
    notes = [p.text for p in page.all("p", class_="note")]
    assert "metrics.jsonl: 4 unreadable lines skipped." in notes
    assert "samples.jsonl: 1 unreadable line skipped." in notes
    assert facts(page)["state"] == "not finished: last logged step 26"
    assert facts(page)["stages"] == "align: 26 steps, 26,000 tokens"
    assert len(figures(part(run, report.curves))) == 6  # distill never began
    assert "After step 52" in part(run, report.samples_of_run).text


@pytest.mark.parametrize(
    ("name", "text", "title", "says"),
    [
        ("eval.json", '{"model": "m"', "Evaluation", "eval.json is not JSON"),
        ("eval.json", '{"command": "c"}', "Evaluation", "KeyError('domains')"),
        ("layer_scores.json", "[]", "Layer search", "TypeError"),
        ("table.json", "3", "Final table", "TypeError"),
        ("samples.jsonl", '{"step": 1, "samples": [{}]}', "Samples", "KeyError('prompt')"),
    ],
)
def test_a_file_that_is_not_as_expected(run, capsys, name, text, title, says):
    """It costs its own section only, and both the page and stderr say so."""
    (run / "metrics.jsonl").unlink()  # its plots take long, and are not what is asked here
    (run / name).write_text(text)
    page = make(run)
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {title} left out: ") and says in err and err.count("\n") == 1
    (line,) = section(page, title).all("p", class_="note")
    assert line.text.startswith("Left out: ") and says in line.text
    assert not [p for p in page.all("p", class_="note") if p is not line and "Left out" in p.text]


@pytest.mark.parametrize(
    "kind", ["missing", "a file", "no run", "no settings", "not YAML", "no matplotlib", "bad out"]
)
def test_errors_are_one_line(run, tmp_path, capsys, monkeypatch, kind):
    path, flags, expected = run, [], "expected"
    if kind == "missing":
        path = tmp_path / "nowhere"
    elif kind == "a file":
        path = run / "config.yaml"
    elif kind == "no run":
        path = tmp_path
    elif kind in ("no settings", "not YAML"):
        (run / "config.yaml").write_text("[1, 2]" if kind == "no settings" else "a: [1\nb: }")
    elif kind == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        expected = 'package matplotlib not found, expected after pip install -e ".[plot]"'
    else:
        flags, expected = ["--out", str(tmp_path / "no" / "page.html")], "No such file"
    with pytest.raises(SystemExit) as stop:
        report.main([str(path), *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert expected in err
    if kind not in ("no matplotlib", "bad out"):
        assert str(path) in err


def test_real_runs(tiny_teacher, tiny_data, tmp_path, capsys):
    """Distilling and pretraining, as they write their folders today."""
    call_script(
        "train_kd", f"--teacher={tiny_teacher}", f"--data={tiny_data}", "--layers=1,2",
        f"--save_model_dir={tmp_path}", "--run_name=kd", "--config=tests/kd.yaml", "--device=cpu",
        "--eval_tokens=256", "--sample_tokens=3", "--max_steps=2", "--calibrate_tokens=64",
        "--mixer=gla,sliding_window",
    )  # fmt: skip
    call_script(
        "train", f"--data={tiny_data}", f"--save_model_dir={tmp_path}", "--run_name=pre",
        "--device=cpu", "--num_blocks=3", "--num_heads=2", "--embedding_dim=32", "--layers=1",
        "--context_len=32", "--batch_size=1", "--accumulation_steps=4", "--max_steps=2",
        "--eval_tokens=256", "--sample_tokens=0",
    )  # fmt: skip
    capsys.readouterr()
    page = make(tmp_path / "kd")
    assert letters(page.all("ol", class_="layers")[0]) == "FLSF"
    about = facts(page.all("dl")[0])
    assert about["state"] == "finished" and about["teacher"] == tiny_teacher
    assert about["stages"] == "align: 2 steps, 128 tokens; distill: 2 steps, 128 tokens"
    assert about["tokens in all"] == "256"
    assert about["device"] == "cpu" and about["dtype"] in ("float32", "bfloat16")
    rows = json.loads((tmp_path / "kd" / "table.json").read_text())
    shown = page.one("table", class_="final").rows()
    assert [r[0] for r in shown[1:]] == [r["model"] for r in rows]
    assert [float(r[3]) for r in shown[1:]] == [r["KL"] for r in rows]
    assert len(figures(section(page, "Curves"))) == 7
    last = json.loads((tmp_path / "kd" / "samples.jsonl").read_text().splitlines()[-1])["samples"]
    texts = section(page, "Samples").all("div", class_="text prompt")
    assert [node.text for node in texts] == [sample["prompt"] for sample in last]
    layers = section(page, "Alignment by layer").one("table", class_="layer-errors").rows()
    assert [row[0] for row in layers[1:]] == ["1", "2"]
    # Before there is a model: from the settings and the teacher.
    (tmp_path / "kd" / "model" / "config.json").unlink()
    assert letters(part(tmp_path / "kd", report.headline)) == "FLSF"

    page = make(tmp_path / "pre")
    about = facts(page.all("dl")[0])
    assert about["tokens in all"] == "256" and about["state"] == "finished"
    assert about["teacher"] == "none: pretraining"
    assert letters(page.all("ol", class_="layers")[0]) == "FLF"
    assert "No table.json" in section(page, "Final table").text
    held_out = figures(section(page, "Curves"))["held out: perplexity"]
    assert "unigram frequencies" in svg_texts(held_out)
    (tmp_path / "pre" / "model" / "config.json").unlink()
    assert letters(part(tmp_path / "pre", report.headline)) == "FLF"
    assert capsys.readouterr().err == ""


def test_pretraining_with_a_window(tmp_path):
    cfg = PretrainConfig(num_blocks=3, layers="2", mixer="gla", sliding_window=32)
    write_config(tmp_path, cfg, {"commit": None, "command": "train.py"})
    page = make(tmp_path)
    assert letters(page.one("ol", class_="layers")) == "SSL"
    assert facts(page.all("dl")[0])["commit"] == "not recorded"
