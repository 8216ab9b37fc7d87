"""The drawings of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from tests.bench.measure import Figure

_OURS, _THEIRS = "#1f6feb", "#9aa4b2"
# Text stays text, and the same figures give the same bytes.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lucent",
    "font.size": 9,
    "axes.axisbelow": True,
}


def draw_peers(figures: Sequence[Figure], path: Path) -> None:
    """Draw what sealing and opening cost in each library."""
    groups = [name for name in _groups(figures) if name.startswith("Beside other libraries")]
    with mpl.rc_context(_STYLE):
        drawing = Drawing(figsize=(9, 2.4 * len(groups)), layout="constrained")
        for axes, group in zip(_axes(drawing, len(groups), 2), groups, strict=True):
            for part, what in zip(axes, ("sealed", "opened"), strict=True):
                rows = [f for f in figures if f.group == group and f.name == what]
                bars = {"sqlalchemy-lucent": rows[0].ours} | {f.against: f.reference for f in rows}
                _bars(part, bars, f"{group.rpartition(', ')[2]} document, {what}", "µs")
        _save(drawing, path)


def draw_rotation(figures: Sequence[Figure], path: Path) -> None:
    """Draw the rows a second of a rotation, and of each other way."""
    groups = [name for name in _groups(figures) if name.endswith("small")]
    with mpl.rc_context(_STYLE):
        drawing = Drawing(figsize=(8, 2.2 * len(groups)), layout="constrained")
        for (axes,), group in zip(_axes(drawing, len(groups), 1), groups, strict=True):
            rows = [f for f in figures if f.group == group]
            bars = {"rotate": rows[0].ours} | {f.against: f.reference for f in rows}
            _bars(axes, bars, group, "rows/s")
        _save(drawing, path)


def draw_growth(figures: Sequence[Figure], path: Path) -> None:
    """Draw the time per row over the rows of the table."""
    with mpl.rc_context(_STYLE):
        drawing = Drawing(figsize=(8, 4), layout="constrained")
        axes = drawing.subplots()
        for group in _groups(figures):
            rows = [f for f in figures if f.group == group]
            style = "--" if group.startswith("plain") else "-"
            axes.plot(
                [f.rows for f in rows], [f.ours for f in rows], style, marker="o", label=group
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rows in the table")
        axes.set_ylabel("µs a row")
        axes.grid(alpha=0.3)
        drawing.legend(loc="outside right upper")
        _save(drawing, path)


def _groups(figures: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(figure.group for figure in figures))


def _axes(drawing: Drawing, rows: int, columns: int) -> list[list[Axes]]:
    grid = drawing.subplots(rows, columns, squeeze=False, sharey="row")
    return [list(row) for row in grid]


def _bars(axes: Axes, bars: dict[str, float], title: str, unit: str) -> None:
    names = list(bars)[::-1]
    values = [bars[name] for name in names]
    colours = [_THEIRS] * (len(names) - 1) + [_OURS]
    drawn = axes.barh(names, values, color=colours)
    axes.bar_label(drawn, fmt="{:,.0f}" if max(values) > 1000 else "{:.1f}", padding=2)
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _save(drawing: Drawing, path: Path) -> None:
    drawing.savefig(path, format="svg", metadata={"Date": None})
    # matplotlib ends lines with a blank.
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))
