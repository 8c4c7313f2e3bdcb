"""Runs beside each other: which keys differ, what the figures are, groups over seeds, and texts that are not markup."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rema.report.compare import compare, differing, markdown, rich_tables, write_csv
from megatron_rema.report.compare_figure import curves, spread, write_comparison
from megatron_rema.report.run_folder import read_run
from megatron_rema.sweep.comparison import comparison_of

ROOT = Path(__file__).parents[2]
HOSTILE = "a|b [red]c[/red] $x_1$ <script>"


def tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "compare_runs.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_run(path: Path, *, lr: float, seed: int, rewards: list[float], accuracies: list[float], name: str = "heldout") -> Path:
    """100 tokens and 2 seconds a step; evaluated at steps 0, 5, 10, ..."""
    path.mkdir(parents=True)
    config = {"run_dir": str(path), "resume": False, "seed": seed, "optimizer": {"lr": lr, "beta1": 0.9}}
    (path / "config.yaml").write_text(json.dumps(config))
    steps = [
        {"step": s, "time_s": 2.0, "reward/mean": reward, "rollout/sampled_tokens_total": 100 * s}
        for s, reward in enumerate(rewards, start=1)
    ]
    sets = [
        {"step": 5 * index, "set": name, "temperature": 1.0, "accuracy": a, "low": a - 0.1, "high": a + 0.1}
        for index, a in enumerate(accuracies)
    ]
    for file, rows in (("metrics.jsonl", steps), ("evaluations.jsonl", sets)):
        (path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two learning rates, two seeds each."""
    found = []
    for lr in (0.1, 0.2):
        for seed in (0, 1):
            rewards = [lr + 0.01 * s + 0.1 * seed for s in range(10)]
            found.append(write_run(tmp_path / f"{lr}_{seed}", lr=lr, seed=seed, rewards=rewards, accuracies=[0.2, 0.9, 0.5 + lr]))
    return found


def test_the_table_holds_what_differs_and_what_was_reached(folders):
    comparison = compare([read_run(folder) for folder in folders])
    assert comparison.keys == ["seed", "lr"], "run_dir differs too and is no setting; beta1 does not differ"
    first, *_, last = comparison.entries
    # window(10 steps) = 2: the mean of 0.1 + 0.08 and 0.1 + 0.09
    assert (first.reward, first.tokens, first.time_s, first.steps) == (pytest.approx(0.185), 1000, 20.0, 10)
    evaluation = last.evaluations["heldout"]
    assert (evaluation.last, evaluation.best, evaluation.best_step) == (pytest.approx(0.7), 0.9, 5) and evaluation.low == pytest.approx(0.6)
    text = markdown(comparison)
    assert "| 0.1_0 | 0 | 0.1 | 0.600 [0.500, 0.700] | 0.900 (5) | 0.185 | 1,000 | 20.0 s | 10 |" in text
    # seeds 0 and 1 of lr 0.1: 0.185 and 0.285
    assert "| 0.1 | 0.600 [0.600, 0.600] | 0.235 [0.185, 0.285] | 1,000 [1,000, 1,000] | 0, 1 |" in text


def test_numbers_are_written_in_full(folders, tmp_path):
    write_csv(compare([read_run(folder) for folder in folders]), tmp_path / "c.csv")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert (
        len(rows) == 4 and rows[0]["heldout/last"] == "0.6" and rows[0]["loss"] == "" and float(rows[3]["reward"]) == pytest.approx(0.385)
    )


def test_lines_are_means_over_seeds_with_their_range():
    assert spread([([1, 2], [0.0, 1.0]), ([1, 2], [1.0, 3.0])]) == ([1, 2], [0.0, 1.0], [0.5, 2.0], [1.0, 3.0])
    x, low, mean, high = spread([([0, 10], [0.0, 10.0]), ([5, 20], [5.0, 20.0])])  # on both lines y = x, together from 5 to 10
    assert (x[0], x[-1]) == (5, 10) and low == pytest.approx(x) and mean == pytest.approx(x) and high == pytest.approx(x)
    assert spread([([0, 1], [0.0, 0.0]), ([2, 3], [0.0, 0.0])])[0] == [], "nowhere together"


def test_the_figure_and_the_tables_are_written(folders, tmp_path):
    comparison = compare([read_run(folder) for folder in folders])
    written = write_comparison(comparison, tmp_path / "out")
    assert [file.name for file in written] == ["comparison.md", "comparison.csv", "comparison.png", "comparison.svg"]
    assert len(curves(comparison)) == 3, "reward over steps, over tokens, accuracy"
    assert written[2].read_bytes().startswith(b"\x89PNG") and "(2 seeds)" in written[3].read_text()


def test_names_are_text_and_nothing_else(tmp_path):
    runs = [read_run(write_run(tmp_path / f"r{seed}", lr=0.1, seed=seed, rewards=[0.1], accuracies=[0.1], name=HOSTILE)) for seed in (0, 1)]
    comparison = compare(runs, [{"x": HOSTILE, "seed": str(seed)} for seed in (0, 1)])
    console = Console(width=400, record=True, file=(tmp_path / "out").open("w"))
    for table in rich_tables(comparison):
        console.print(table)
    assert HOSTILE in console.export_text()
    rows = markdown(comparison).split("\n")[:4]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1, "a bar in a name ends no cell"
    assert "<script>" not in markdown(comparison)
    svg = write_comparison(comparison, tmp_path)[-1].read_text()
    assert "<script>" not in svg


def test_policies_are_compared_by_name():
    shared = {"agents": {"policies": {"shared": {"roles": ["a", "b"], "path": None}}, "schedule": "simultaneous"}}
    separate = {"agents": {"policies": {n: {"roles": [n], "path": None} for n in ("meta_thinker", "reasoner")}, "schedule": "simultaneous"}}
    assert differing([shared, separate]) == [{"policies": "shared"}, {"policies": "meta_thinker + reasoner"}]
    assert differing([shared, shared]) == [{}, {}]
    assert differing([{"a": {"x": 1}, "b": {"x": 1}}, {"a": {"x": 2}, "b": {"x": 2}}, {}]) == [
        {"a.x": "1", "b.x": "1"}, {"a.x": "2", "b.x": "2"}, {"a.x": "-", "b.x": "-"},
    ]  # fmt: skip


def test_a_run_that_has_only_begun_is_no_obstacle(tmp_path, folders):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    comparison = compare([read_run(folder) for folder in (tmp_path / "begun", *folders)])
    assert math.isnan(comparison.entries[0].reward) and "| begun | - | - | - | - | - | - | - | 0 |" in markdown(comparison)
    write_comparison(comparison, tmp_path / "out")


def test_a_sweep_is_labelled_by_its_overrides_and_says_what_is_missing(folders, tmp_path):
    values = [("shared", 0), ("shared", 1), ("single", 0), ("single", 1)]
    names = [*(folder.name for folder in folders), "later"]
    overrides = [["task=arith", f"agents={agents}", f"seed={seed}"] for agents, seed in [*values, ("x", 9)]]
    jobs = [{"name": name, "overrides": own} for name, own in zip(names, overrides, strict=True)]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    comparison, missing = comparison_of([tmp_path])
    assert comparison.keys == ["agents", "seed"] and missing == ["later"] and [len(group) for group in comparison.groups] == [2, 2]
    assert comparison.entries[0].label == "agents shared"
    mixed, _ = comparison_of([tmp_path, folders[0]])
    assert mixed.keys == ["seed", "lr"], "a sweep among others is labelled as they are"


def test_the_tool_prints_and_writes_or_says_what_is_wrong(folders, tmp_path):
    said = tool(*folders, "--out", tmp_path / "out")
    assert said.returncode == 0 and "0.600 [0.500, 0.700]" in said.stdout and (tmp_path / "out" / "comparison.svg").exists(), said.stderr
    wrong = tool(tmp_path / "nowhere")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "is not a run folder" in wrong.stderr
