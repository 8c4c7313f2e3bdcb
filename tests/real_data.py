"""Published data that is not part of the repository: a folder beside the clone. Tests that want it skip, with a reason, where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

MATH = Path(__file__).resolve().parents[2] / "shared" / "data" / "math"  # the clone's sibling


def math_file(name: str) -> Path:
    """Path of one file, or the test is skipped."""
    path = MATH / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/math/{name} beside the clone, which is not there")
    return path
