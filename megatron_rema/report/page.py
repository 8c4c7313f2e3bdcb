"""One self-contained HTML page of a run: nothing is loaded from anywhere, so it opens offline and can be mailed.

The page's shape is page.html, its looks page.css, its filters page.js. What comes from the run is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from megatron_rema.report.judging import FIGURES
from megatron_rema.report.overoptimisation import overoptimisation_html
from megatron_rema.report.plots import draw_plots
from megatron_rema.report.run_folder import Row, Run, Series, read_run
from megatron_rema.report.transcript import SHADES, transcripts_html

WINDOW = 5  # steps at each end of the run that the headline compares
SPARK = (120, 22)  # width and height of a sparkline, pixels


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Draw the plots and write the page, RUN/report.html unless ``out`` names another file. Returns its path."""
    run = read_run(run_dir)
    file = Path(out) if out is not None else run.path / "report.html"
    page = page_html(run, draw_plots(run))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8", errors="backslashreplace")  # half a character is no reason to have no page
    return file


def page_html(run: Run, plots: Sequence[tuple[Path, str]]) -> str:
    """The page as text. A section without content is left out."""
    here = Path(__file__).parent
    transcripts = transcripts_html(run)
    sections = [
        ("Alerts", alerts_html(run.alerts)),
        *((title, figure_html(file, title)) for file, title in plots),
        ("Evidence of integrity alerts", evidence_html(run)),
        ("Gold and distance from the reference", overoptimisation_html(run)),
        ("Evaluations", evaluations_html(run)),
        ("Dialogues", FILTERS + legend_html() + transcripts if transcripts else ""),
        ("All metrics", metrics_html(run)),
        ("Configuration", _folded("config.yaml", f"<pre>{escape(run.config_text)}</pre>") if run.config_text else ""),
    ]
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(run.name),
        subtitle=escape(subtitle(run)),
        style=(here / "page.css").read_text(encoding="utf-8"),
        script=(here / "page.js").read_text(encoding="utf-8"),
        headlines="\n".join(_tile(*tile) for tile in headlines(run)),
        sections="\n".join(f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" for title, body in sections if body),
    )


def subtitle(run: Run) -> str:
    """Task, model and policies, as far as the configuration tells."""
    config = run.config

    def at(group: str, key: str) -> Any:
        return config[group].get(key) if isinstance(config.get(group), dict) else None

    policies = at("agents", "policies")
    parts = [at("task", "name"), Path(str(at("model", "path") or "")).name]
    parts.append("policies: " + ", ".join(map(str, policies)) if isinstance(policies, dict) else None)
    parts.append(f"seed {config['seed']}" if "seed" in config else None)
    return "  \u00b7  ".join(str(part) for part in parts if part)


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, note) of each headline number the run has."""
    tiles = []
    if (reward := run.series("reward/mean")) is not None:
        first, last, window = ends(reward)
        tiles.append(
            (
                "mean reward",
                _arrow(f"{first:.3f}", f"{last:.3f}"),
                f"first and last {window} steps" if window > 1 else "first and last step",
            )
        )
    for label, rows in run.evaluations_by_set().items():
        first, last = rows[0], rows[-1]
        note = f"step {first['step']}: {_interval(first)}"
        if len(rows) > 1:
            tiles.append(
                (
                    f"accuracy, {label}",
                    _arrow(_percent(first["accuracy"]), _percent(last["accuracy"])),
                    f"{note}; step {last['step']}: {_interval(last)}",
                )
            )
        else:
            tiles.append((f"accuracy, {label}", _percent(first["accuracy"]), note))
    if run.metrics:
        tiles.append(
            (
                "steps",
                f"{run.metrics[-1]['step']:,}",
                f"weight version {run.metrics[-1]['weight_version']}" if "weight_version" in run.metrics[-1] else "",
            )
        )
    if (count := _total(run, "rollout/episodes") or run.num_episodes()) > 0:
        tiles.append(("episodes", f"{count:,.0f}", "played in training"))
    if (tokens := _total(run, "rollout/sampled_tokens")) is not None:
        tiles.append(("sampled tokens", f"{tokens:,.0f}", f"{tokens / count:,.0f} per episode" if count else ""))
    if (seconds := _total(run, "time_s")) is not None:
        tiles.append(("time", duration(seconds), f"{seconds / len(run.metrics):.1f} s per step, evaluations not counted"))
    return tiles


def ends(series: Series) -> tuple[float, float, int]:
    """Mean over the first and over the last ``WINDOW`` finite values (fewer where the two would overlap), and how many."""
    values = [value for value in series.values if value == value]
    window = max(1, min(WINDOW, len(values) // 2))
    return sum(values[:window]) / window, sum(values[-window:]) / window, window


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def figure_html(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<img class="plot" alt="{escape(title)}" src="data:image/png;base64,{data}">'


def evaluations_html(run: Run) -> str:
    if not run.evaluations:
        return ""
    rows = [
        [
            label,
            row["step"],
            f"{row['accuracy']:.3f}",
            _interval(row),
            _optional(row, "answer_accuracy"),
            _optional(row, "finished_frac"),
            f"{row.get('num_problems', '?')} \u00d7 {row.get('samples_per_problem', '?')}",
            f"{row['temperature']:g}" if isinstance(row.get("temperature"), int | float) else "",
            *(_estimate(row, name) for name in FIGURES.values()),
            ", ".join(f"{level}: {value:.2f}" for level, value in (row.get("level_accuracy") or {}).items()),
        ]
        for label, rows in run.evaluations_by_set().items()
        for row in rows
    ]
    header = (
        "set",
        "step",
        "accuracy",
        "95% interval",
        "right, however ended",
        "finished",
        "problems \u00d7 samples",
        "temperature",
        *FIGURES,
        "accuracy by level",
    )
    filled = [index for index in range(len(header)) if any(row[index] not in ("", "no interval") for row in rows)]
    return _table([header[index] for index in filled], [[row[index] for index in filled] for row in rows])


def alerts_html(alerts: Sequence[Row]) -> str:
    if not alerts:
        return ""
    columns = list(dict.fromkeys(key for row in alerts for key in row))
    return _table(columns, [[_cell(row.get(column, "")) for column in columns] for row in alerts])


def evidence_html(run: Run) -> str:
    """What was said, arm by arm, in the audits whose verdict is not clean."""
    blocks = []
    for row in run.audits:
        if row.get("verdict") in (None, "clean"):
            continue
        dialogues = []
        for item in row.get("transcripts", ()):
            head = f"{item['question']} = {item['answer']}, paid {_cell(item['proxy'])}"
            rows = [
                [arm, _cell(played["gold"]), " | ".join(f"{role}: {text}" for role, text in played["turns"])]
                for arm, played in item["arms"].items()
            ]
            dialogues.append(f"<h4>{escape(head)}</h4>" + _table(("arm", "worth", "what was said"), rows))
        title = f"step {row['step']}: {row['verdict']}, {row.get('mechanism') or 'no mechanism known'}"
        blocks.append(_folded(title, "".join(dialogues)))
    return "".join(blocks)


def metrics_html(run: Run) -> str:
    """First, last, smallest and largest finite value of every metric, and its course."""
    rows = []
    for name in run.metric_names:
        last = next(row[name] for row in reversed(run.metrics) if name in row)
        if (series := run.series(name)) is None:
            rows.append(f"<tr><td>{escape(name)}</td><td></td><td>{escape(_cell(last))}</td><td></td><td></td><td></td></tr>")
            continue
        finite = [value for value in series.values if value == value]
        numbers = (finite[0], last, min(finite), max(finite))
        cells = "".join(f"<td>{escape(_cell(number))}</td>" for number in numbers)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}<td>{sparkline(series)}</td></tr>")
    if not rows:
        return ""
    head = "<tr><th>metric</th><th>first</th><th>last</th><th>min</th><th>max</th><th>course</th></tr>"
    body = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return _folded(f"{len(rows)} metrics, last values", body)


def sparkline(series: Series) -> str:
    """An inline SVG of the finite values, at most one point per pixel."""
    width, height = SPARK
    points = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if value == value]
    points = points[:: max(1, len(points) // width)]
    low, high = min(value for _, value in points), max(value for _, value in points)
    first, span = points[0][0], max(points[-1][0] - points[0][0], 1)
    place = [
        (1 + (width - 2) * (s - first) / span, 1 + (height - 2) * (0.5 if high == low else (high - v) / (high - low))) for s, v in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    return f'<svg class="spark" width="{width}" height="{height}" viewBox="0 0 {width} {height}"><polyline points="{line}"/></svg>'


FILTERS = """<div class="filters" id="filters">
<label>step <select data-filter="step"></select></label>
<label>verdict <select data-filter="verdict"></select></label>
<label>end <select data-filter="status"></select></label>
<label>role <select data-filter="role"></select></label>
<button type="button" id="fold">open all</button>
<span id="shown"></span>
</div>
"""


def legend_html() -> str:
    """What the shades of tokens mean, in the classes p1, p2, ... that page.css colours."""
    marks = "".join(f'<i class="p{shade}">{limit:g}</i>' for shade, limit in enumerate(SHADES, start=1))
    return (
        f'<p class="legend">Shaded tokens: how surprising the sampled token was, from {marks} nats on. Point at one for its numbers.</p>\n'
    )


def _tile(label: str, value: str, note: str) -> str:
    parts = (("label", label), ("value", value), ("note", note))
    return '<div class="tile">' + "".join(f'<div class="{kind}">{escape(text)}</div>' for kind, text in parts) + "</div>"


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _total(run: Run, name: str) -> float | None:
    series = run.series(name)
    return None if series is None else sum(value for value in series.values if value == value)


def _interval(row: Row) -> str:
    return f"[{row['low']:.3f}, {row['high']:.3f}]" if "low" in row and "high" in row else "no interval"


def _optional(row: Row, key: str) -> str:
    return f"{row[key]:.3f}" if isinstance(row.get(key), int | float) else ""


def _estimate(row: Row, name: str) -> str:
    """One of a judge's figures, with its interval."""
    found = (row.get("judging") or {}).get(name)
    return f"{found['mean']:.3f} {_interval(found)}" if found else ""


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def _arrow(before: str, after: str) -> str:
    return f"{before} \u2192 {after}"


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
