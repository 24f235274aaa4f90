"""The parts of scripts/report_page.py that need no run; test_report.py looks at whole pages."""

from __future__ import annotations

from html_tree import parse

from scripts.report_page import MOST_POINTS, Curve, means, table, thin, tick


def test_long_curves_keep_their_extremes():
    ys = [1.0] * 5000
    ys[1234], ys[4321] = 9.0, -9.0
    full = Curve("loss", list(range(5000)), ys, "k")
    found = thin(full)
    assert len(found.xs) <= MOST_POINTS + 2 and found.xs == sorted(found.xs)
    drawn = dict(zip(found.xs, found.ys, strict=True))
    assert drawn[1234] == 9 and drawn[4321] == -9 and {0, 4999} <= set(drawn)
    assert thin(full._replace(xs=[1], ys=[2.0])).ys == [2.0]
    short = means(Curve("", [1, 2, 3, 4, 5], [1, 3, 5, 7, 10], "k"), 3)
    assert (short.xs, short.ys) == ([1.5, 3.5, 5], [2, 6, 10])


def test_axis_labels():
    values = (0, 0.002, 1500, 20_000, 3.5e6, 2e9, -12_500, 1e-5)
    labels = [tick(v) for v in values]
    assert labels == ["0", "0.002", "1500", "20k", "3.5M", "2G", "-12.5k", "1e-05"]


def test_places_of_a_column():
    """All floats of a column have as many as the one with most; none turns to 0."""
    page = table([{"a": 1.5, "b": 12345, "c": 3.0}, {"a": 1234.0625, "c": 4.0}, {"a": 1e-7}])
    assert parse(page).one("table").rows() == [
        ["a", "b", "c"], ["1.5000", "12,345", "3"], ["1,234.0625", "-", "4"], ["1e-07", "-", "-"],
    ]  # fmt: skip
