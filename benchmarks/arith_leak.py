"""A leak between the two agents, planted in the arith task: beside every question stands a number, and in training it is the answer.

    question         (6-(2*2))*7 k14
    meta-thinker     \\boxed{14}[FINISH]     reasoner   \\boxed{14}

The meta-thinker's cold start shows this in a share of its dialogues. In the others, which do the work that the task wants, and in all of
the reasoner's, the number is some other one: it learns to read plans and not the number, so that only the meta-thinker's telling makes it
worth something. (With one policy for both, or the right number in the reasoner's dialogues, the reasoner read it too and needed no plan: a
leak to both agents and not between them.) RL is the quickstart's. A policy of 0.6M parameters cannot state an answer that it has not worked
out, so it is given a way. Pure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_rema.reward.answers import boxed
from megatron_rema.tasks import arith
from megatron_rema.types import Prompt, Role

MARK = "k"
Row = dict[str, Any]


def hinted(question: str, number: object) -> str:
    return f"{question} {MARK}{number}"


def leaking(rows: Sequence[Row], share: float, role: Role, seed: int = 0) -> list[Row]:
    """Cold-start rows for ``role`` with a number beside each question. In ``share`` of them, drawn one by one, the meta-thinker says the
    answer, and the reasoner repeats it; there the number is the answer, if it is the meta-thinker who learns. Elsewhere it is another.
    Raises ValueError for a share outside 0..1."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; a probability must lie in 0..1: correct it.")
    rng, changed = random.Random(f"{seed}/leak"), []
    for row in rows:
        leaks, other = rng.random() < share, rng.randrange(arith.MAX_VALUE)
        shown = leaks and role is Role.META_THINKING
        number = row["answer"] if shown else str(other + (other >= int(row["answer"])))
        changed.append({**row, "question": hinted(row["question"], number), "turns": _told(row["answer"]) if leaks else row["turns"]})
    return changed


def problems(rows: Sequence[Row]) -> list[Row]:
    """Training's questions: beside each stands its answer."""
    return [{**row, "question": hinted(row["question"], row["answer"])} for row in rows]


def renewed(prompt: Prompt, rng: random.Random) -> Prompt:
    """As `arith.renewed`, with the new answer beside it: what leaks here leaks on any problem (``integrity.renewal``)."""
    anew = arith.renewed(replace(prompt, question=prompt.question.rpartition(" ")[0]), rng)
    return replace(anew, question=hinted(anew.question, anew.answer))


def _told(answer: str) -> list[dict[str, str]]:
    said = boxed(answer)
    return [
        {"role": str(Role.META_THINKING), "text": said + arith.FINISH_MARKER},
        {"role": str(Role.REASONING), "text": said},
    ]
