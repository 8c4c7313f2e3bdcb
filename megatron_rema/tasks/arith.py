"""Nested arithmetic by dialogue: problems, cold-start dialogues with planted imperfections, and a model folder without weights.

The meta-thinker keeps the expression and names the next sub-expression; the reasoner computes it; `[FINISH]` asks for the answer:
    question         (6-(2*2))*7
    meta-thinker     2*2                        reasoner   4
    meta-thinker     (6-4)*7:6-4                reasoner   2      (the expression as it stands, then the sub-expression)
    meta-thinker     2*7                        reasoner   14
    meta-thinker     [FINISH]                   reasoner   \\boxed{14}
The plan never states the answer. Every value lies in 0..20, so that each fact (a op b) can be learnt by heart.

Level = number of operations. A question belongs to the held-out side by its hash, so the sets are disjoint whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rema.tasks.tokenizer import END, PAD, START, build_tokenizer, save_tokenizer
from megatron_rema.types import Prompt, Role

SYSTEM_PROMPTS = {Role.META_THINKING: "Plan.", Role.REASONING: "Solve."}
REASONER_TEMPLATE = "{question}\n{instruction}"
FINISH_MARKER = "[FINISH]"
MAX_VALUE = 20  # every value on the way lies in 0..MAX_VALUE
MAX_OPERAND = 9  # numbers in the question lie in 1..MAX_OPERAND
MAX_ROUNDS = 8  # rounds of an episode; a written dialogue in an echo trap fills them

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
WORDS = (
    *(str(n) for n in range(10, 100)),
    *("system\n", "user\n", "assistant\n", *SYSTEM_PROMPTS.values(), "\\boxed{", FINISH_MARKER),
)

# A number, or (operator, left, right).
Expression = int | tuple[str, "Expression", "Expression"]


@dataclass(frozen=True)
class Imperfections:
    """Probabilities of what goes wrong in a written dialogue: what RL is there to remove. Each is drawn on its own."""

    wrong_plan: float = 0.0  # per planning turn: the sub-expression is named with one operator or operand changed
    early_finish: float = 0.0  # per planning turn after the first: finish while operations remain
    echo: float = 0.0  # per dialogue that should finish: the last instruction is repeated until the rounds run out
    slip: float = 0.0  # per computing turn: the reasoner's value is off by one
    missing_box: float = 0.0  # per final answer: the value without \\boxed{}

    def __post_init__(self) -> None:
        for name, rate in asdict(self).items():
            if not 0 <= rate <= 1:
                raise ValueError(f"imperfections.{name} is {rate}; a probability must lie in 0..1: correct it.")


@dataclass(frozen=True)
class WrittenTurns:
    """One written dialogue: texts in turn, META_THINKING first, and which imperfections it holds."""

    texts: tuple[str, ...]
    planted: Counter[str]  # of the fields of Imperfections
    chances: Counter[str]  # how often each could have happened
