"""The judge's prompts: which of two answers to a question is better? Each comparison can be asked in both orders of its answers.

The meta-thinker reads the question alone and writes how to evaluate; the reasoner reads question, answers and plan and says [[A]] or [[B]].
A judge that prefers a place, not an answer, is right in one order and wrong in the other. Source: ReMA arXiv:2503.09501 section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from megatron_rema.rollout.dataset import read_prompts
from megatron_rema.types import JUDGED_FIELDS, LETTERS, AnswerFormat, Prompt


def read_comparisons(
    path: str | Path, *, question_key: str = "question", label_key: str = "label", limit: int | None = None
) -> list[Prompt]:
    """Rows {QUESTION_KEY, "answer_a", "answer_b", LABEL_KEY: "A" or "B", the better answer}, in the order given; ``limit`` counts rows.

    "level" and "subset" as for any problem. A bad row is a ValueError that names file, line and field.
    """
    rows = read_prompts(path, question_key=question_key, answer_key=label_key, field_keys=JUDGED_FIELDS, answers=LETTERS, limit=limit)
    return [replace(row, answer_format=AnswerFormat.LETTER, pair_id=row.prompt_id) for row in rows]


def swapped(prompt: Prompt) -> Prompt:
    """The same comparison with its answers exchanged, and the label with them."""
    first, second = (prompt.fields[name] for name in JUDGED_FIELDS)
    return replace(
        prompt,
        prompt_id=f"{prompt.prompt_id}-swapped",
        answer=LETTERS[1 - LETTERS.index(prompt.answer)],
        fields=dict(zip(JUDGED_FIELDS, (second, first), strict=True)),
    )


def in_both_orders(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each comparison as given and, right after it, swapped."""
    return [order for prompt in prompts for order in (prompt, swapped(prompt))]
