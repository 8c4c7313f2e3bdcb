"""Prints what came of the fuzzed inputs, target by target."""

from __future__ import annotations

from typing import Any

from tests.fuzz import harness


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if harness.counts:
        terminalreporter.section("fuzzed inputs")
        for line in harness.table():
            terminalreporter.write_line(line)
