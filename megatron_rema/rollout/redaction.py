"""A plan without its numbers and answers: what a reasoner still makes of it shows, and trains, how much of the answer the plan was.

Pure. Audits read the effect of it; ``rollout.redact_plan_prob`` trains on a mixture (docs/integrity.md, "Mitigations").
"""

from __future__ import annotations

import hashlib
import re

from megatron_rema.types import LETTERS

MASK = "_"
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_BOX = re.compile(r"\\boxed\{[^{}]*\}")  # one without braces inside; of others the numbers go
_LETTER = re.compile(rf"\[\[(?:{'|'.join(LETTERS)})\]\]")


def redacted(text: str) -> str:
    """The text with numbers, letters in double brackets, and whatever stands in a box (of one with inner braces: the numbers) masked."""
    return _NUMBER.sub(MASK, _LETTER.sub(f"[[{MASK}]]", _BOX.sub(lambda _: rf"\boxed{{{MASK}}}", text)))


def redacted_plan(question: str, round_index: int, plan: str) -> str:
    """`redacted`, as ``DialogueRules.edit_plan`` wants it."""
    return redacted(plan)


def is_redacted(seed: int, episode_id: str, probability: float) -> bool:
    """Whether the reasoner of this episode (its id holds the step) hears redacted plans: a draw by hash, whoever plays it and whenever."""
    key = repr(("redact", seed, episode_id)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") < probability * 2**64
