"""Prints the largest difference to every public implementation; docs/algorithms.md ("Checked against") quotes it."""

from __future__ import annotations

import sys


def pytest_terminal_summary(terminalreporter) -> None:
    oracles = sys.modules.get("tests.golden.oracles")
    if oracles is None or not getattr(oracles, "LARGEST", None):
        return
    terminalreporter.section("largest differences to public implementations")
    for (ours, theirs, dtype), difference in sorted(oracles.LARGEST.items()):
        terminalreporter.write_line(f"{difference:.1e}  {dtype:8} {ours:45} {theirs}")
