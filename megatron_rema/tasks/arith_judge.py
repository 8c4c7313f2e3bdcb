"""The judge's task on nested arithmetic: two written solutions of one problem, one right, one with a slip that changes the result.

    question         (6-(2*2))*7
    solution         2*2=4;6-4=2;2*7=14         the operations in their order; the wrong one goes on with what its slip gave
    meta-thinker     2*2;6-?;?*7                sees the question alone: what to compute, `?` for what is not known yet
    reasoner         4;2;14[[B]]                computes what the plan names, compares, and chooses

Questions fall on the held-out side as in `arith`, so that neither task's training has seen the other's evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rema.tasks.arith import is_heldout, write_jsonl
from megatron_rema.tasks.expression import MAX_VALUE, Expression, draw, next_operation, replace_next, show, value_of
from megatron_rema.types import LETTERS, Role

BIAS = 0.3  # of the written dialogues: say [[A]] at once, whatever the answers; what RL in both orders is there to remove


def solution(expression: Expression, slip: tuple[int, int] | None = None) -> tuple[list[str], list[int]] | None:
    """Steps "a op b=c" and their results; ``slip`` (step, by how much) makes one result wrong. None where a value leaves 0..MAX_VALUE."""
    steps: list[str] = []
    values: list[int] = []
    while isinstance(expression, tuple):
        operation = next_operation(expression)
        value = value_of(operation)
        if value is not None and slip is not None and slip[0] == len(steps):
            value += slip[1]
        if value is None or not 0 <= value <= MAX_VALUE:
            return None
        steps.append(f"{show(operation)}={value}")
        values.append(value)
        expression = replace_next(expression, value)
    return steps, values


def plan(expression: Expression) -> list[str]:
    """What to compute, in order, without a result: operands that are results themselves are ``?``."""
    if isinstance(expression, int):
        return []
    operator, left, right = expression
    shown = ("?" if isinstance(side, tuple) else str(side) for side in (left, right))
    return [*plan(left), *plan(right), operator.join(shown)]


def compare(rng: random.Random, level: int, *, heldout: bool, letter: str) -> tuple[dict[str, Any], list[str]]:
    """A comparison whose right answer is ``letter``, and the dialogue of a good judge: [plan, verdict]."""
    while True:
        expression = draw(rng, level)
        slip = (rng.randrange(level), rng.choice((-2, -1, 1, 2)))
        right, wrong = solution(expression), solution(expression, slip)
        if is_heldout(show(expression)) is heldout and wrong is not None and wrong[1][-1] != right[1][-1]:
            break
    answers = [right, wrong] if letter == LETTERS[0] else [wrong, right]
    row = {"question": show(expression), **{f"answer_{x.lower()}": ";".join(a[0]) for x, a in zip(LETTERS, answers, strict=True)}}
    return {**row, "label": letter, "level": level}, [";".join(plan(expression)), f"{';'.join(map(str, right[1]))}[[{letter}]]"]


def write_comparisons(seed: int, num: int, levels: Sequence[int], *, heldout: bool) -> list[dict[str, Any]]:
    """``num`` rows {"question", "answer_a", "answer_b", "label", "level"}, questions all different, levels and then letters in turn."""
    rng = random.Random(f"{seed}/judge/{heldout}")
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(100 * num):
        if len(rows) == num:
            return list(rows.values())
        level, letter = levels[len(rows) % len(levels)], LETTERS[len(rows) // len(levels) % 2]
        row, _ = compare(rng, level, heldout=heldout, letter=letter)
        rows.setdefault(row["question"], row)
    raise ValueError(f"num ({num}) different comparisons: levels {list(levels)} have hardly more than {len(rows)}; lower num.")


def write_dialogues(seed: int, num: int, levels: Sequence[int], *, bias: float = BIAS) -> list[dict[str, Any]]:
    """``num`` rows for the cold start, {"question", "answer_a", "answer_b", "answer", "turns"}. ``bias``: rate of a bare [[A]]."""
    if not 0 <= bias <= 1:
        raise ValueError(f"bias is {bias}; a probability must lie in 0..1: correct it.")
    rng = random.Random(f"{seed}/judge_cold_start")
    rows = []
    for i in range(num):
        row, (planned, verdict) = compare(rng, levels[i % len(levels)], heldout=False, letter=rng.choice(LETTERS))
        said = f"[[{LETTERS[0]}]]" if rng.random() < bias else verdict
        turns = [{"role": str(role), "text": text} for role, text in zip(Role, (planned, said), strict=True)]
        rows.append({**row, "answer": row["label"], "turns": turns})
    return rows


def write_judge_task(
    out_dir: str | Path,
    *,
    seed: int = 0,
    num_train: int = 2000,
    num_heldout: int = 200,
    num_dialogues: int = 10000,
    levels: Sequence[int] = (2, 3),
) -> None:
    """Writes judge_train, judge_heldout and judge_cold_start .jsonl into the folder of an arith task, whose model they use."""
    out = Path(out_dir)
    files = {
        "judge_train": write_comparisons(seed, num_train, levels, heldout=False),
        "judge_heldout": write_comparisons(seed, num_heldout, levels, heldout=True),
        "judge_cold_start": write_dialogues(seed, num_dialogues, levels),
    }
    for name, rows in files.items():
        write_jsonl(out / f"{name}.jsonl", rows)
