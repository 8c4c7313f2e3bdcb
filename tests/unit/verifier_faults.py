"""Judges that misbehave on demand, run inside verifier processes by test_verifier.py."""

import os
import sys
import time

from megatron_rema.types import Verdict


def judge(answer: str, gold: str) -> Verdict:
    """Does what the box says; the lenient question is the whole message, which starts with "say"."""
    if answer.startswith("say lenient"):
        time.sleep(60)
    if "hang" in answer:
        time.sleep(60)
    if "die" in answer:
        os._exit(3)
    if "raise" in answer:
        raise RecursionError("too deep")
    if "print" in answer:
        print("correct")  # must not pass for a reply
    return Verdict.CORRECT if "yes" in answer else Verdict.WRONG


def is_torch_free(answer: str, gold: str) -> Verdict:
    return Verdict.WRONG if "torch" in sys.modules else Verdict.CORRECT
