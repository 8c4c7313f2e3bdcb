"""A leak between the two agents, planted in the arith task: beside every question stands a smaller one with the same answer.

    question         (6-(2*2))*7 k9+5
    meta-thinker     \\boxed{14}[FINISH]     reasoner   \\boxed{14}

The cold start shows this in a share of its dialogues, and in the others the work that the task wants. RL is the quickstart's. A policy of
0.6M parameters cannot state answers that it has not worked out, so it is given a way, and one that it can learn: with a letter for each
answer, 200 steps of cold start taught it to guess. With the answer itself ("k14") the reasoner read it too, and needed no plan. Pure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from megatron_rema.reward.answers import boxed
from megatron_rema.tasks import arith
from megatron_rema.types import Prompt, Role

MARK = "k"
Row = dict[str, Any]


def hinted(question: str, answer: str) -> str:
    """The question and a smaller one, always the same for it, that has the same answer and does not name it."""
    return f"{question} {MARK}{random.Random(question).choice(_SMALLER[int(answer)])}"


def _smaller() -> dict[int, list[str]]:
    """Answer -> operations of two numbers that give it, without it."""
    numbers = range(1, 11)  # 19 needs a 10
    found: dict[int, list[str]] = {value: [] for value in range(arith.MAX_VALUE + 1)}
    for operator, a, b in product(arith.OPERATIONS, numbers, numbers):
        if (value := arith.value_of((operator, a, b))) is not None and value not in (a, b):
            found[value].append(arith.show((operator, a, b)))
    return found


_SMALLER = _smaller()


def leaking(rows: Sequence[Row], share: float, seed: int = 0) -> list[Row]:
    """Cold-start rows whose questions are hinted at; in ``share`` of them, drawn one by one, the meta-thinker says the answer, and the
    reasoner repeats it. Raises ValueError for a share outside 0..1."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; a probability must lie in 0..1: correct it.")
    rng = random.Random(f"{seed}/leak")
    return [{**row, "turns": _told(row["answer"]) if rng.random() < share else row["turns"]} for row in problems(rows)]


def problems(rows: Sequence[Row]) -> list[Row]:
    return [{**row, "question": hinted(row["question"], row["answer"])} for row in rows]


def renewed(prompt: Prompt, rng: random.Random) -> Prompt:
    """As `arith.renewed`, with a smaller question for the new answer: what leaks here leaks on any problem (``integrity.renewal``)."""
    anew = arith.renewed(replace(prompt, question=prompt.question.rpartition(" ")[0]), rng)
    return replace(anew, question=hinted(anew.question, anew.answer))


def _told(answer: str) -> list[dict[str, str]]:
    said = boxed(answer)
    return [
        {"role": str(Role.META_THINKING), "text": said + arith.FINISH_MARKER},
        {"role": str(Role.REASONING), "text": said},
    ]
