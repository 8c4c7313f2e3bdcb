"""Prints what came of the fuzzed inputs, target by target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import harness


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Thousands of inputs take longer than a test may."""
    for item in items:
        if harness.TOTAL and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(7200))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if harness.counts:
        terminalreporter.section("fuzzed inputs")
        for line in harness.table():
            terminalreporter.write_line(line)
