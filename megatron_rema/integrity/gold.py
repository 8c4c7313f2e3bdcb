"""What an oracle says of an episode, in a type that nothing which trains can use.

A gold score is read by audits alone. It has no arithmetic and no conversion to a number, a tensor or text that holds its value, and no
module of the reward, advantage and loss path may import this one (the import contract "gold stays apart" in pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NoReturn


class Access(StrEnum):
    """What a signal or an audit must see. Whoever reads a verdict can tell how much it rests on."""

    STATISTICS = "statistics"  # numbers that training has anyway
    TEXT = "text"  # what the agents said
    EVALUATOR = "evaluator"  # calls of the reward function on texts of the audit's own
    POLICY = "policy"  # samples of the policies that training did not ask for
    WEIGHTS = "weights"  # activations or log-probabilities of a model
    ORACLE = "oracle"  # gold scores, or inputs whose right answer is known and withheld from training


class Gold:
    """One gold score. ``source``: which oracle said so."""

    __slots__ = ("_value", "source")

    def __init__(self, value: float, source: str) -> None:
        object.__setattr__(self, "_value", float(value))
        object.__setattr__(self, "source", source)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a gold score cannot be changed.")

    def __repr__(self) -> str:
        return f"Gold(source={self.source!r})"

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("a gold score is for audits only: it is neither a reward nor a number. Compare policies with integrity.audits.")

    __float__ = __int__ = __index__ = __bool__ = __complex__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __hash__ = _refuse  # type: ignore[assignment]
    __array__ = __reduce__ = __getstate__ = _refuse  # type: ignore[assignment]


def opened(scores: Sequence[Gold]) -> list[float]:
    """The values: inside audits, and nowhere else (tests/unit/test_integrity_gold.py reads the sources for callers)."""
    return [score._value for score in scores]
