"""What scripts/report.py builds its page of: tables, layer cells, heat maps, plots as inline SVG.

Everything that comes from a file is escaped here. The page loads nothing and runs nothing, and says
so in its content security policy. Tested by tests/test_report.py.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
MOST_POINTS = 600  # of one curve; longer ones are drawn by the extremes of each stretch
PLOT_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "retort", "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"], "font.size": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip

CSS = f"""
:root {{ color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --line: #ccc; --page: #f6f6f4;
  --card: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --soft: #a5a5a5; --line: #444;
  --page: #151515; --card: #202020; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }}
main {{ max-width: 1200px; margin: auto; padding: 1rem; }}
h1, h2, h3, h4, dd, .text {{ overflow-wrap: anywhere; }}
h2 {{ margin: 2.2rem 0 .8rem; border-bottom: 1px solid var(--line); }}
h4 {{ margin: .6rem 0 .2rem; }}
nav a {{ margin-right: 1rem; color: inherit; display: inline-block; }}
.note, dt, summary, .sides h4 {{ color: var(--soft); }}
dl {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .6rem; }}
dl.wide {{ grid-template-columns: 100%; }} dt {{ font-size: 13px; }} dd {{ margin: 0; }}
.layers {{ display: flex; flex-wrap: wrap; gap: 3px; padding: 0; margin: .5rem 0;
  list-style: none; }}
.layers li {{ width: 1.7rem; text-align: center; border-radius: 3px; font-weight: 600;
  background: #fff; color: #000; }}
.layers .F {{ background: {SKY}; }} .layers .L {{ background: {ORANGE}; }}
.layers .S {{ background: {GREEN}; }}
.scroll {{ overflow-x: auto; margin: .5rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }}
td:first-child, th:first-child, .texts td, .texts th {{ text-align: left; }}
.texts td {{ overflow-wrap: anywhere; white-space: pre-wrap; vertical-align: top; }}
.texts td:first-child {{ white-space: nowrap; }}
.heat td {{ min-width: 3.4rem; border: 1px solid var(--card); text-align: center; }}
.heat caption {{ text-align: left; }} .maps {{ display: flex; flex-wrap: wrap; gap: .5rem 2rem; }}
.maps .scroll {{ max-width: 100%; }}
.grid {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
  minmax(min(340px, 100%), 1fr)); }}
figure {{ margin: 0; padding: .6rem; background: #fff; border-radius: 6px; }}
figcaption {{ font-weight: 600; color: #333; }} svg {{ width: 100%; height: auto; display: block; }}
.sample {{ background: var(--card); border-radius: 6px; padding: .8rem; margin: .8rem 0; }}
.sides {{ display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit,
  minmax(min(20rem, 100%), 1fr)); }}
.text {{ white-space: pre-wrap; font-family: ui-monospace, "DejaVu Sans Mono", monospace;
  font-size: 13px; }}
.prompt {{ font-weight: 700; }} summary {{ cursor: pointer; margin: .4rem 0; }}
@media (max-width: 600px) {{ table {{ font-size: 13px; }} td, th {{ padding: .25rem .35rem; }} }}
@media print {{ :root {{ --page: #fff; --card: #fff; --ink: #000; }} nav {{ display: none; }}
  figure, .sides, tr, .heat {{ break-inside: avoid; }} h2, h3, h4 {{ break-after: avoid; }}
  table {{ font-size: 11px; }} td, th {{ padding: .1rem .3rem; }} .heat td {{ min-width: 2.5rem; }}
  * {{ print-color-adjust: exact; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }} }}
"""


# ---- HTML


def esc(value) -> str:
    return html.escape(str(value), quote=True)


def note(text: str) -> str:
    return f'<p class="note">{esc(text)}</p>'


def table(rows: list[dict], kind: str = "") -> str:
    """Columns are the rows' keys, in the order of first use; all floats of one have as many
    places as the one with most."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{esc(name)}</th>" for name in columns)
    places = {}
    for name in columns:
        floats = [row[name] for row in rows if isinstance(row.get(name), float)]
        digits = [repr(v).partition(".")[2].rstrip("0") for v in floats]
        places[name] = max((len(d) for d in digits if "e" not in d), default=0)

    def cell(row: dict, name: str) -> str:
        value = row.get(name)
        if isinstance(value, float):
            digits = f"{value:,.{places[name]}f}"
            value = digits if value == 0 or re.search("[1-9]", digits) else f"{value:.3g}"
        elif type(value) is int:
            value = f"{value:,}"
        return f"<td>{'-' if value is None else esc(value)}</td>"

    body = "".join("<tr>" + "".join(cell(r, name) for name in columns) + "</tr>\n" for r in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>\n{body}</table></div>'


def facts(items: dict, kind: str = "") -> str:
    """Names with their values."""
    pairs = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in items.items())
    return f'<dl class="{kind}">{pairs}</dl>'


def details(summary: str, inner: str) -> str:
    return f"<details><summary>{esc(summary)}</summary>{inner}</details>"


def grid(figures: list[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else ""


def layer_cells(letters: str, names: list[str]) -> str:
    """One coloured cell per layer; index and name are shown on hover."""
    cells = "".join(
        f'<li class="{letter}" title="layer {i}: {esc(name)}">{letter}</li>'
        for i, (letter, name) in enumerate(zip(letters, names, strict=True))
    )
    return f'<ol class="layers">{cells}</ol>'


def sample(row: dict, more: str = "") -> str:
    """A prompt, and what each model makes of it, side by side."""
    sides = "".join(
        f'<div><h4>{who}</h4><div class="text">{esc(row[who])}</div></div>'
        for who in ("teacher", "student") if who in row
    )  # fmt: skip
    prompt = f'<div class="text prompt">{esc(row["prompt"])}</div>'
    return f'<div class="sample">{prompt}<div class="sides">{sides}</div>{more}</div>'


def heat_map(task: str, rows: list[dict], who: str) -> str:
    """Depths x lengths as a table whose colours run from 0 to 1; "" if `who` was not asked."""
    import matplotlib

    values = {(row["depth"], row["length"]): row for row in rows if who in row}
    if not values:
        return ""
    lengths = sorted({length for _, length in values})
    body = ""
    for depth in sorted({d for d, _ in values}, key=lambda d: -1 if d is None else d):
        body += f"<tr><th>{'all' if depth is None else esc(depth)}</th>"
        for length in lengths:
            row = values.get((depth, length))
            if row is None:
                body += "<td>-</td>"
                continue
            r, g, b, _ = matplotlib.colormaps["cividis"](float(row[who]), bytes=True)
            ink = "#000" if 0.299 * r + 0.587 * g + 0.114 * b > 120 else "#fff"
            body += (
                f'<td style="background:rgb({r},{g},{b});color:{ink}" '
                f'title="{esc(row.get("samples", "?"))} samples">{row[who]:.3g}</td>'
            )
        body += "</tr>\n"
    head = "".join(f"<th>{esc(length)}</th>" for length in lengths)
    return (
        f'<div class="scroll"><table class="heat" data-map="{esc(f"{task}, {who}")}">'
        f"<caption>{who}</caption><tr><th>depth</th>{head}</tr>\n{body}</table></div>"
    )


def document(name: str, sections: dict[str, str]) -> str:
    """The page: what stands under "" first, then a section for each title."""
    parts, links = [], []
    for title, inner in sections.items():
        anchor = title.lower().replace(" ", "-")
        if title:
            links.append(f'<a href="#{anchor}">{esc(title)}</a>')
            inner = f'<section id="{anchor}"><h2>{esc(title)}</h2>{inner}</section>'
        parts.append(inner)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return own_ids(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(name)}</title><style>{CSS}</style></head>\n<body><main><h1>{esc(name)}</h1>"
        f"<nav>{''.join(links)}</nav>{''.join(parts)}</main></body></html>\n"
    )


def own_ids(page: str) -> str:
    """The page with the ids of every SVG made its own: matplotlib uses the same in each."""
    count = itertools.count(1)

    def rename(found: re.Match) -> str:
        prefix = f"p{next(count)}-"
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", found[0])

    return re.sub(r"<svg.*?</svg>", rename, page, flags=re.DOTALL)


# ---- plots


class Curve(NamedTuple):
    label: str  # in the legend; empty = not there
    xs: list[float]
    ys: list[float]
    colour: str | tuple


class Line(NamedTuple):
    """A value to compare with, drawn across the plot."""

    value: float
    label: str
    colour: str
    style: str


def thin(c: Curve, most: int = MOST_POINTS) -> Curve:
    """About `most` points at most: the lowest and the highest of each stretch, and both ends."""
    if len(c.xs) <= most:
        return c
    size = math.ceil(2 * len(c.xs) / most)
    kept = {0, len(c.xs) - 1}
    for start in range(0, len(c.xs), size):
        stretch = range(start, min(start + size, len(c.xs)))
        kept |= {min(stretch, key=c.ys.__getitem__), max(stretch, key=c.ys.__getitem__)}
    order = sorted(kept)
    return c._replace(xs=[c.xs[i] for i in order], ys=[c.ys[i] for i in order])


def means(c: Curve, most: int) -> Curve:
    """The means of `most` stretches at most: for many noisy curves in one plot."""
    size = math.ceil(len(c.xs) / most) if c.xs else 1
    starts = range(0, len(c.xs), size)
    mean = lambda values: [statistics.fmean(values[i : i + size]) for i in starts]  # noqa: E731
    return c._replace(xs=mean(c.xs), ys=mean(c.ys))


def tick(value: float, _=None) -> str:
    """An axis label: 0.002, 1500, 20k, 3.5M."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def figure(caption: str, unit: str, paint: Callable) -> str:
    """A card with what paint(axes) draws."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with matplotlib.rc_context(PLOT_STYLE):
        fig = Figure((4.8, 3.2), layout="constrained")
        ax = fig.subplots()
        paint(ax)
        ax.set_ylabel(unit)
        ax.xaxis.set_major_formatter(FuncFormatter(tick))
        ax.yaxis.set_major_formatter(FuncFormatter(tick))
        labels = ax.get_legend_handles_labels()[1]
        if labels:
            room = 46 // (5 + max(map(len, labels)))  # letters beside each other, about
            columns = max(1, min(room, len(labels)))
            fig.legend(
                loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.2
            )
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        fig.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    # The file's own style element would hold for the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{esc(caption)}"', 1)
    return f"<figure><figcaption>{esc(caption)}</figcaption>{svg}</figure>"


def line_chart(
    caption: str, unit: str, curves: list[Curve], *, lines: Sequence[Line] = (),
    ends: Sequence[int] = (),
) -> str:  # fmt: skip
    """Curves over the optimizer step; "" if none has a point. ends: where stages ended.
    Logarithmic where all is positive and spans more than a factor of 20."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    curves = [thin(c) for c in curves if c.xs]
    if not curves:
        return ""

    def paint(ax) -> None:
        values = [y for c in curves for y in c.ys] + [line.value for line in lines]
        for x in ends:
            ax.axvline(x, color="#bbbbbb", linewidth=1)
        for c in curves:
            dots = "o" if len(c.xs) <= 30 else None
            ax.plot(
                c.xs, c.ys, color=c.colour, label=c.label, linewidth=1.4, marker=dots, markersize=4
            )
        for value, label, colour, style in lines:
            ax.axhline(value, color=colour, linestyle=style, linewidth=1.4, label=label)
        ax.set_xlabel("optimizer step")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if min(values) > 0 and max(values) > 20 * min(values):
            ax.set_yscale("log")
            close = max(values) < 300 * min(values)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if close else (1,)))
            ax.yaxis.set_minor_locator(NullLocator())
            if min(values) < 1e-5 * max(values):  # a learning rate on its way to 0
                ax.set_ylim(bottom=1e-5 * max(values))

    return figure(caption, unit, paint)


def bar_chart(
    caption: str, unit: str, groups: dict[str, tuple[str, dict[int, float]]], *,
    lines: Sequence[Line] = (),
) -> str:  # fmt: skip
    """A bar for each layer, by depth. groups: title -> (colour, layer -> value)."""
    from matplotlib.ticker import MaxNLocator

    def paint(ax) -> None:
        for title, (colour, values) in groups.items():
            if values:
                ax.bar(list(values), list(values.values()), color=colour, width=0.8, label=title)
        for value, label, colour, style in lines:
            ax.axhline(value, color=colour, linestyle=style, linewidth=1.4, label=label)
        ax.set_xlim(left=-0.7)
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        ax.grid(visible=False, axis="x")

    return figure(caption, unit, paint)
