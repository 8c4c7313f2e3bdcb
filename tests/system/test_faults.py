"""Faults injected into running jobs: each ends as it must, and the run that continues is bitwise the uninterrupted one.

CI runs the short suite; `python -m tests.faults.campaign FOLDER` runs the whole campaign (docs/operations.md has its table).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.cases import LAYOUTS, STEPS, Case, all_cases, short_suite
from tests.faults.oracle import damaged_checkpoints, differences, results, rows
from tests.system.test_training import ENVIRONMENT

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]  # a minute on a quiet machine


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The short suite, in a process of its own that holds no threads when it forks."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults.campaign", str(folder), "--short"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    print(result.stdout)
    return folder


@pytest.mark.parametrize("case", short_suite(), ids=lambda case: case.name)
def test_a_fault_loses_nothing_but_the_step_in_flight(work, case: Case):
    (record,) = [row for row in rows(work / "cases.jsonl") if row["number"] == case.number]
    if record["outcome"].startswith("not run"):
        pytest.skip(record["outcome"])
    assert not record["wrong"], record
    assert record["outcome"] and (record["steps_again"] or 0) <= (2 if "async" in case.layout else 1)


def test_what_compares_the_runs_sees_a_single_difference(work, tmp_path):
    whole = work / "whole" / "TP2"
    expected = results(whole, STEPS)
    assert all(expected[name] for name in ("metrics", "evaluations", "weights", "exported", "step_000001"))
    assert not damaged_checkpoints(whole)
    changed = {**expected, "metrics": [expected["metrics"][0].replace('"step": 1', '"step": 2'), *expected["metrics"][1:]]}
    assert differences(changed, expected) == ["metrics"]
    assert differences({name: value for name, value in expected.items() if name != "weights"}, expected) == ["weights"]
    row = json.loads(json.dumps(expected["step_000002"]))
    row[0]["turns"][0]["completion"]["logprobs"][0] += 1e-7
    assert differences({**expected, "step_000002": row}, expected) == ["step_000002"]


def test_the_campaign_holds_every_kind_of_fault_at_every_layout():
    cases = all_cases()
    assert len(cases) >= 200 and len({case.name for case in cases}) > 190 and cases == all_cases()
    assert {case.fault for case in cases} >= {case.fault for case in short_suite()} and {case.layout for case in cases} == set(LAYOUTS)
