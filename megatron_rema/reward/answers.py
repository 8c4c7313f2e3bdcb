"""What counts as a correct answer. Pure functions of text; math_verify is imported only where it is needed (verifier processes).

strict    the last \\boxed{...} of the message, against the gold answer: the training reward
lenient   strict, or math_verify finds the gold answer in the whole message: a metric only (a reward with slack is a reward to be hacked)
"""

from __future__ import annotations

import re

from megatron_rema.types import Verdict

INTEGER = re.compile(r"[+-]?\d{1,1000}")


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...}, braces balanced (escaped braces do not count); None when there is no box or it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth, i = 1, begin
    while i < len(text):
        if text[i] == "\\":
            i += 1  # the escaped character
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:i]
        i += 1
    return None


def boxed(content: str) -> str:
    return f"\\boxed{{{content}}}"


def quick_verdict(text: str, gold: str) -> Verdict | None:
    """The strict verdict where it needs no algebra: no box, the same string, two integers. None: ask ``verify``."""
    box, gold = last_box(text), gold.strip()
    if box is None or not box.strip():
        return Verdict.WRONG
    box = box.strip()
    if box == gold:
        return Verdict.CORRECT
    if INTEGER.fullmatch(box) and INTEGER.fullmatch(gold):
        return Verdict.CORRECT if int(box) == int(gold) else Verdict.WRONG
    return None


def verify(answer: str, gold: str) -> Verdict:
    """math_verify's verdict on what it finds in ``answer``. May raise, hang or take the process down: runs in a verifier process.

    A gold answer that math_verify cannot read is UNKNOWN, not WRONG.
    """
    from math_verify import parse
    from math_verify import verify as is_equal

    # No inner time-outs (they would say "not equal"): the pool's own time-out ends the process, and the verdict is UNKNOWN.
    gold_parsed = parse(boxed(gold.strip()), parsing_timeout=None)
    if not gold_parsed:
        return Verdict.UNKNOWN
    equal = is_equal(gold_parsed, parse(answer, parsing_timeout=None), timeout_seconds=None, raise_on_error=True)
    return Verdict.CORRECT if equal else Verdict.WRONG
