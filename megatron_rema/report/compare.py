"""Several runs beside each other: what they were set to, what they reached, and how they got there.

Runs that differ in nothing but their seed form a group: its row and its line are the mean and the range over seeds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_rema.report.run_folder import Run, flat

# Where a run lies and how it came to be is not what it was set to.
NOT_COMPARED = ("run_dir", "resume", "resume_from", "private_run_dir")
SEED = "seed"
NONE = "-"


@dataclass(frozen=True)
class Evaluation:
    """Of one set at one temperature: its last row and the best one, which of many is the luckiest too."""

    last: float
    low: float  # 95% interval of ``last``; NaN: the run wrote none
    high: float
    best: float
    best_step: int


@dataclass(frozen=True)
class Entry:
    """One run in the comparison. NaN, or no entry of ``evaluations``: the run does not have it."""

    run: Run
    name: str
    settings: Mapping[str, str]  # of the keys that differ between the runs
    steps: int
    time_s: float  # in steps
    tokens: float  # sampled in training
    reward: float  # mean of the last ``window(steps)`` steps
    loss: float  # the same of a supervised run
    evaluations: Mapping[str, Evaluation]

    @property
    def without_seed(self) -> tuple[tuple[str, str], ...]:
        return tuple((key, value) for key, value in self.settings.items() if key != SEED)

    @property
    def label(self) -> str:
        """The values, for a legend; of a run without any its name."""
        return ", ".join(f"{key} {value}" for key, value in self.without_seed) or self.name


@dataclass(frozen=True)
class Comparison:
    entries: Sequence[Entry]

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for entry in self.entries for key in entry.settings))

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.entries for name in entry.evaluations))

    @property
    def groups(self) -> list[list[Entry]]:
        """Runs that differ in their seed alone, in order of appearance. Runs without any difference are not of one group."""
        found: dict[Any, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.without_seed if SEED in entry.settings else (entry.without_seed, entry.name), []).append(entry)
        return list(found.values())

    def has(self, figure: str) -> bool:
        return any(math.isfinite(getattr(entry, figure)) for entry in self.entries)


def compare(runs: Sequence[Run], settings: Sequence[Mapping[str, str]] | None = None) -> Comparison:
    """``settings``: what differs, run by run, where the caller knows it better than the configurations (the overrides of a sweep)."""
    if not runs:
        raise ValueError("no run to compare; give at least one run folder.")
    names = _names(runs)
    chosen = differing([run.config for run in runs]) if settings is None else settings
    several = _temperatures(runs)
    return Comparison([_entry(*row, several) for row in zip(runs, names, chosen, strict=True)])


def differing(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of each configuration the keys that are not the same in all, keys joined by dots and as short as they can be."""
    flats = []
    for config in configs:
        values = flat({key: value for key, value in config.items() if key not in NOT_COMPARED})
        policies = config.get("agents", {}).get("policies") if isinstance(config.get("agents"), dict) else None
        flats.append(values | ({"agents.policies": " + ".join(map(str, policies))} if isinstance(policies, dict) else {}))
    policies_differ = len({values.get("agents.policies") for values in flats}) > 1
    keys = dict.fromkeys(key for values in flats for key in values)
    if policies_differ:  # their names say it; what belongs to a policy that others do not have says nothing
        keys = {key: None for key in keys if not key.startswith("agents.policies.")}
    known = [values for values in flats if values]  # a run without config.yaml differs in nothing that one could name
    found = [key for key in keys if any(values.get(key, NONE) != known[0].get(key, NONE) for values in known)]
    ends = [key.rsplit(".", 1)[-1] for key in found]
    labels = {key: end if ends.count(end) == 1 else key for key, end in zip(found, ends, strict=True)}
    return [{labels[key]: _value(values.get(key, NONE)) for key in found} for values in flats]


def window(steps: int) -> int:
    """Steps at the end of a run whose mean stands for the run's end."""
    return max(1, min(20, steps // 5))


def _entry(run: Run, name: str, settings: Mapping[str, str], several: frozenset[str]) -> Entry:
    evaluations = {}
    for row in run.evaluations:
        label = evaluation_label(row, several)
        before = evaluations.get(label)
        best, best_step = (
            (row["accuracy"], row["step"]) if before is None or row["accuracy"] > before.best else (before.best, before.best_step)
        )
        evaluations[label] = Evaluation(row["accuracy"], row.get("low", math.nan), row.get("high", math.nan), best, best_step)
    totals = run.series("rollout/sampled_tokens_total")
    times = run.series("time_s")
    return Entry(
        run=run,
        name=name,
        settings=settings,
        steps=run.metrics[-1]["step"] if run.metrics else 0,
        time_s=sum(value for value in times.values if math.isfinite(value)) if times else math.nan,
        tokens=totals.values[-1] if totals else math.nan,
        reward=_end(run, "reward/mean"),
        loss=_end(run, "train/loss") if run.series("reward/mean") is None else math.nan,
        evaluations=evaluations,
    )


def _end(run: Run, metric: str) -> float:
    """Mean over the last steps; with several policies the mean of theirs."""
    owners = [series.values[-window(len(series.values)) :] for series in run.series_by_owner(metric).values()]
    known = [value for values in owners for value in values if math.isfinite(value)]
    return fmean(known) if known else math.nan


def _temperatures(runs: Sequence[Run]) -> frozenset[str]:
    """Sets that were played at several temperatures."""
    pairs = {(str(row["set"]), row.get("temperature")) for run in runs for row in run.evaluations}
    names = [name for name, _ in pairs]
    return frozenset(name for name in names if names.count(name) > 1)


def evaluation_label(row: Mapping[str, Any], several: frozenset[str]) -> str:
    name = str(row["set"])
    return f"{name} (temperature {row.get('temperature')})" if name in several else name


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names; where two are equal, with the folder above."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{run.path.resolve().parent.name}/{name}" for run, name in zip(runs, names, strict=True)]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {entry}" for key, entry in value.items()) or "{}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- tables -----------------------------------------------------------------------------------------------------------

Column = tuple[str, Callable[[Entry], str]]


def columns(comparison: Comparison) -> list[Column]:
    """(title, how to show it) of every column; one that no run fills is left out."""
    found: list[Column] = [("run", lambda entry: entry.name)]
    found += [(key, lambda entry, key=key: entry.settings.get(key, NONE)) for key in comparison.keys]
    for name in comparison.sets:
        found.append((f"{name}: last [95%]", lambda entry, name=name: _accuracy(entry.evaluations.get(name))))
        found.append((f"{name}: best", lambda entry, name=name: _best(entry.evaluations.get(name))))
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("reward", "reward", lambda value: f"{value:.3f}"),
        ("loss", "loss", lambda value: f"{value:.4f}"),
        ("tokens", "tokens", lambda value: f"{value:,.0f}"),
        ("time_s", "time in steps", _duration),
    ]
    for figure, title, show in shown:
        if comparison.has(figure):
            found.append((title, lambda entry, figure=figure, show=show: _known(getattr(entry, figure), show)))
    found.append(("steps", lambda entry: str(entry.steps)))
    return found


def group_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table over seeds: mean and range of each figure. No rows where no group has two runs."""
    keys = [key for key in comparison.keys if key != SEED]
    figures: list[tuple[str, Callable[[Entry], float], str]] = [
        (f"{name}: last", lambda entry, name=name: entry.evaluations[name].last if name in entry.evaluations else math.nan, ".3f")
        for name in comparison.sets
    ]
    figures += [
        (title, lambda entry, title=title: getattr(entry, title), form)
        for title, form in (("reward", ".3f"), ("loss", ".4f"), ("tokens", ",.0f"))
        if comparison.has(title)
    ]
    rows = []
    for group in comparison.groups:
        cells = [group[0].settings.get(key, NONE) for key in keys] or ["all"]
        seeds = ", ".join(entry.settings.get(SEED, NONE) for entry in group)
        for _, figure, form in figures:
            values = [value for value in map(figure, group) if math.isfinite(value)]
            cells_of = f"{fmean(values):{form}} [{min(values):{form}}, {max(values):{form}}]" if values else NONE
            cells = [*cells, cells_of]
        rows.append([*cells, seeds])
    titles = [*(keys or ["runs"]), *(title for title, *_ in figures), "seeds"]
    return titles, rows if any(len(group) > 1 for group in comparison.groups) else []


def tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, titles, rows): the runs, then the groups over seeds where there are any."""
    chosen = columns(comparison)
    rows = [[show(entry) for _, show in chosen] for entry in comparison.entries]
    found = [(RUNS_CAPTION + BEST_CAPTION * bool(comparison.sets), [title for title, _ in chosen], rows)]
    titles, grouped = group_rows(comparison)
    return found + ([(SEEDS_CAPTION, titles, grouped)] if grouped else [])


RUNS_CAPTION = "Reward and loss: mean of the last fifth of the steps, at most 20."
BEST_CAPTION = " Best: the highest of all evaluations (its step), which flatters runs that were evaluated often."
SEEDS_CAPTION = "Over seeds: mean [lowest, highest]."


def rich_tables(comparison: Comparison) -> list[Table]:
    found = []
    for caption, titles, rows in tables(comparison):
        table = Table(caption=Text(caption), caption_justify="left")
        for index, title in enumerate(titles):
            table.add_column(Text(title), justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # Text: names are not markup
        found.append(table)
    return found


def markdown(comparison: Comparison) -> str:
    parts = []
    for caption, titles, rows in tables(comparison):
        lines = [_markdown_row(titles), "|" + "---|" * len(titles), *map(_markdown_row, rows)]
        parts.append("\n".join(lines) + f"\n\n{caption}\n")
    return "\n".join(parts)


def write_csv(comparison: Comparison, file: Path) -> None:
    """Numbers in full, one run a row."""
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        keys, sets = comparison.keys, comparison.sets
        parts = ("last", "low", "high", "best", "best_step")
        evaluated = [f"{name}/{part}" for name in sets for part in parts]
        writer.writerow(["run", "folder", *keys, *evaluated, "reward", "loss", "sampled_tokens", "time_s", "steps"])
        for entry in comparison.entries:
            figures = [
                _number(getattr(entry.evaluations[name], part)) if name in entry.evaluations else "" for name in sets for part in parts
            ]
            ends = [_number(value) for value in (entry.reward, entry.loss, entry.tokens, entry.time_s, entry.steps)]
            writer.writerow([entry.name, str(entry.run.path), *(entry.settings.get(key, "") for key in keys), *figures, *ends])


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _accuracy(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return NONE
    interval = f" [{evaluation.low:.3f}, {evaluation.high:.3f}]" if math.isfinite(evaluation.low) else ""
    return f"{evaluation.last:.3f}{interval}"


def _best(evaluation: Evaluation | None) -> str:
    return NONE if evaluation is None else f"{evaluation.best:.3f} ({evaluation.best_step})"


def _known(value: float, show: Callable[[float], str]) -> str:
    return show(value) if math.isfinite(value) else NONE


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
