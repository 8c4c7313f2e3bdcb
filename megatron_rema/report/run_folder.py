"""Reads a run folder: config, metrics, evaluations, alerts, and the episodes of one step at a time.

A run may have been killed while it wrote: the last line of a JSONL file is skipped when it is torn (no line end and no whole
JSON object). Any other line that does not hold what it should is an error naming file and line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_rema.reading import brief, parse, read_bytes
from megatron_rema.report.judging import FIGURES
from megatron_rema.types import Episode

Row = dict[str, Any]
_EPISODE = TypeAdapter(Episode)


@dataclass(frozen=True)
class Series:
    """One metric along the run: ``values[i]`` at ``steps[i]``. NaN where the run wrote a number that is not finite."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """What a run left behind. Rows are in the order of their file; episodes stay on disk until asked for."""

    path: Path
    config_text: str
    config: Row
    metrics: list[Row]
    evaluations: list[Row]
    alerts: list[Row]
    audits: list[Row]
    episode_files: dict[int, Path]  # step -> file, in step order

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def metric_names(self) -> list[str]:
        """Every metric that is a number somewhere, in order of appearance."""
        return list(dict.fromkeys(name for row in self.metrics for name, value in row.items() if name != "step" and _is_number(value)))

    def series(self, name: str) -> Series | None:
        """One metric over the steps that have it; None when no step has a finite value of it."""
        points = [(row["step"], float(row[name])) for row in self.metrics if _is_number(row.get(name))]
        if not any(math.isfinite(value) for _, value in points):
            return None
        return Series([step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points])

    def series_by_owner(self, name: str) -> dict[str, Series]:
        """``place/quantity`` may stand once (owner "") or once for each policy or role: ``place/OWNER/quantity``."""
        place, quantity = name.split("/", 1)
        found = {}
        for candidate in self.metric_names:
            parts = candidate.split("/")
            owner = "" if candidate == name else parts[1] if len(parts) > 2 else None
            if owner is None or (owner and f"{parts[0]}/{'/'.join(parts[2:])}" != f"{place}/{quantity}"):
                continue
            if (series := self.series(candidate)) is not None:
                found[owner] = series
        return found

    def evaluations_by_set(self) -> dict[str, list[Row]]:
        """Rows that may be compared with each other, by step: one set at one temperature (named only where a set has several)."""
        keys = dict.fromkeys((str(row["set"]), row.get("temperature")) for row in self.evaluations)
        names = [name for name, _ in keys]
        grouped = {}
        for name, temperature in keys:
            rows = [row for row in self.evaluations if str(row["set"]) == name and row.get("temperature") == temperature]
            label = name if names.count(name) == 1 else f"{name} (temperature {temperature})"
            grouped[label] = sorted(rows, key=lambda row: row["step"])
        return grouped

    def episodes(self, step: int) -> list[Episode]:
        """The whole dialogues of one step."""
        file = self.episode_files[step]
        episodes = []
        for number, row in _numbered_rows(file):
            try:
                episodes.append(_EPISODE.validate_python(row))
            except ValidationError as error:
                first = error.errors()[0]
                said = f"{'.'.join(map(str, first['loc']))} is {brief(first['input'])}: {first['msg']}"
                raise ValueError(f"{file}, line {number}: not an episode ({said}); repair or remove the line.") from error
            for turn in episodes[-1].turns:
                if not all(0 <= token_id < 2**31 for token_id in turn.completion.token_ids):
                    raise ValueError(f"{file}, line {number}: not an episode (token_ids are no token ids); repair or remove the line.")
        return episodes

    def num_episodes(self) -> int:
        """Episodes on disk, counted without parsing them."""
        return sum(file.read_bytes().count(b"\n") for file in self.episode_files.values())


def read_run(path: str | Path) -> Run:
    """Raises ValueError for a folder that no run has written, and for a bad line in one of its files."""
    path = Path(path)
    if not any((path / name).is_file() for name in ("metrics.jsonl", "evaluations.jsonl")):
        raise ValueError(f"{path} is not a run folder: it has neither metrics.jsonl nor evaluations.jsonl; give the run_dir of a run.")
    config_file = path / "config.yaml"
    try:
        config_text = read_bytes(config_file).decode("utf-8") if config_file.is_file() else ""
        config = yaml.safe_load(config_text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that there is not is a ValueError
        raise ValueError(f"{config_file}: not YAML ({brief(str(error), 300)}); restore it from the run's command line.") from error
    files = {_step_of(file): file for file in (path / "episodes").glob("step_*.jsonl")}
    return Run(
        path=path,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        metrics=read_rows(path / "metrics.jsonl", required=("step",)),
        evaluations=read_rows(path / "evaluations.jsonl", required=("step", "set", "accuracy")),
        alerts=read_rows(path / "alerts.jsonl", required=()),
        audits=read_rows(path / "audits.jsonl", required=("step",)),
        episode_files={step: files[step] for step in sorted(files)},
    )


def flat(mapping: Row, prefix: str = "") -> Row:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists and empty mappings are values."""
    found: Row = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_rows(file: Path, *, required: tuple[str, ...]) -> list[Row]:
    """The objects of a JSONL file, [] when there is no such file. Every row has the ``required`` keys, all numbers but ``set``."""
    if not file.is_file():
        return []
    rows = []
    for number, row in _numbered_rows(file):
        for key in required:
            if key not in row:
                raise ValueError(f"{file}, line {number}: no {key!r}; every row needs {', '.join(required)}.")
            if key != "set" and not _is_number(row[key]):
                raise ValueError(f"{file}, line {number}: {key!r} is {brief(row[key])}; it must be a number.")
        for key, (is_right, rule) in _OPTIONAL.items():
            if required and key in row and not is_right(row[key]):
                raise ValueError(f"{file}, line {number}: {key!r} is {brief(row[key])}; it must be {rule}: repair or remove the line.")
        rows.append(row)
    return rows


def _numbered_rows(file: Path) -> list[tuple[int, Row]]:
    """(line number from 1, object). Lines end at \\n only: texts may hold other line separators, and a torn line half a character."""
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse(line, f"{file}, line {number}", "Repair or remove the line.")
        except ValueError:
            if number == len(lines):  # nothing ended this line: the run was killed while writing it
                continue
            raise
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: holds {type(row).__name__}, not an object; repair or remove the line.")
        rows.append((number, row))
    return rows


def _step_of(file: Path) -> int:
    digits = file.stem.removeprefix("step_")
    if not digits.isdecimal():
        raise ValueError(f"{file}: episode files are named step_NNNNNN.jsonl; rename or remove it.")
    return int(digits)


def _is_number(value: Any) -> bool:
    """One that a float holds: NaN and infinity are among them."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)


def _numbers(value: Any) -> bool:
    """Of an object, or nothing in its place."""
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


def _estimates(value: Any) -> bool:
    found = [value.get(name) for name in FIGURES.values()] if isinstance(value, dict) else [value]
    return all(one is None or (_numbers(one) and {"mean", "low", "high"} <= one.keys()) for one in found)


# What rows of metrics and evaluations may hold, and what it must be then.
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("low", "high"), (_is_number, "a number")),
    "temperature": (lambda value: value is None or _is_number(value), "a number"),
    "level_accuracy": (_numbers, "an object of numbers"),
    "judging": (_estimates, "an object of estimates, each with mean, low and high"),
}
