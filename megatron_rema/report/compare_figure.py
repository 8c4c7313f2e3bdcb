"""The curves of several runs in one figure: a line a run; of runs that differ in their seed alone, the mean and its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rema.report.compare import Comparison, Entry, evaluation_label, markdown, write_csv
from megatron_rema.report.plots import COLORS, Panel, moving_average, write_figure

Points = tuple[list[float], list[float]]  # x ascending, y; no NaN
STYLES = ("-", "--", ":", "-.")
_GRID = 80  # points of a mean over seeds whose own points do not coincide
_LABEL_CHARACTERS = 60


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """comparison.md, .csv, .png and .svg in ``folder``; the last two only where there is a curve. Returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    table, numbers, *figures = (folder / f"comparison.{suffix}" for suffix in ("md", "csv", "png", "svg"))
    table.write_text(markdown(comparison), encoding="utf-8")
    write_csv(comparison, numbers)
    panels = curves(comparison)
    if panels:
        write_figure(panels, *figures)
    return [table, numbers, *(figures if panels else [])]


def curves(comparison: Comparison) -> list[Panel]:
    """Reward over steps and over tokens, or a supervised run's loss; accuracy on each set."""
    several = frozenset(name.rsplit(" (temperature ", 1)[0] for name in comparison.sets if " (temperature " in name)
    chosen: list[tuple[str, str, str, Callable[[Entry], Points], bool]] = [
        ("reward over steps", "step", "mean reward", lambda entry: _metric(entry, "reward/mean"), False),
        ("reward over tokens", "sampled tokens", "mean reward", lambda entry: _over_tokens(entry, "reward/mean"), False),
    ]
    if not comparison.has("reward"):
        chosen = [("loss over steps", "step", "loss", _loss, False)]
    for name in comparison.sets:
        chosen.append((f"accuracy: {name}", "step", "accuracy", lambda entry, name=name: _evaluated(entry, name, several), True))
    panels = (_panel(comparison, *panel, with_legend=index == 0) for index, panel in enumerate(chosen))
    return [panel for panel in panels if panel is not None]


def _panel(
    comparison: Comparison, title: str, unit: str, quantity: str, points: Callable[[Entry], Points], is_marked: bool, *, with_legend: bool
) -> Panel | None:
    lines = [(group, [own for own in map(points, group) if own[0]]) for group in comparison.groups]
    if not any(own for _, own in lines):
        return None

    def draw(axes: Any) -> None:
        for index, (group, own) in enumerate(lines):
            if not own:
                continue
            style = {
                "color": COLORS[index % len(COLORS)],
                "linestyle": STYLES[index // len(COLORS) % len(STYLES)],
                "marker": "o" if is_marked else "",
                "markersize": 3.5,
                "linewidth": 1.6,
            }
            label = group[0].label[:_LABEL_CHARACTERS] + (f" ({len(group)} seeds)" if len(group) > 1 else "")
            x, lowest, mean, highest = spread(own)
            axes.plot(x, mean, label=label, **style)
            if len(own) > 1:
                axes.fill_between(x, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)
        if with_legend:  # the same lines in every panel
            axes.legend()
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.set_ylabel(quantity)

    return draw


def spread(lines: Sequence[Points]) -> tuple[list[float], list[float], list[float], list[float]]:
    """(x, lowest, mean, highest) where all lines have values: at their own places if these are the same, else between them."""
    first = lines[0][0]
    if all(x == first for x, _ in lines):
        at = np.asarray(first, dtype=float)
    else:
        begin, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
        if begin > end:
            return [], [], [], []
        at = np.linspace(begin, end, _GRID)
    values = np.array([np.interp(at, x, y) for x, y in lines])
    return at.tolist(), values.min(0).tolist(), values.mean(0).tolist(), values.max(0).tolist()


def _metric(entry: Entry, name: str) -> Points:
    """Smoothed as the run's own report smooths it."""
    series = entry.run.series(name)
    if series is None:
        return [], []
    smooth = moving_average(series.values, max(1, min(20, len(series.values) // 5)))
    kept = [(float(step), value) for step, value in zip(series.steps, smooth, strict=True) if math.isfinite(value)]
    return [x for x, _ in kept], [y for _, y in kept]


def _over_tokens(entry: Entry, name: str) -> Points:
    steps, values = _metric(entry, name)
    totals = entry.run.series("rollout/sampled_tokens_total")
    known = dict(zip(totals.steps, totals.values, strict=True)) if totals else {}
    kept = [(known[step], value) for step, value in zip(steps, values, strict=True) if step in known]
    return [x for x, _ in kept], [y for _, y in kept]


def _loss(entry: Entry) -> Points:
    """Of several policies the first."""
    names = [name for name in entry.run.metric_names if name.startswith("train/") and name.endswith("loss")]
    return _metric(entry, names[0]) if names else ([], [])


def _evaluated(entry: Entry, name: str, several: frozenset[str]) -> Points:
    rows = {row["step"]: row["accuracy"] for row in entry.run.evaluations if evaluation_label(row, several) == name}
    return [float(step) for step in sorted(rows)], [rows[step] for step in sorted(rows)]
