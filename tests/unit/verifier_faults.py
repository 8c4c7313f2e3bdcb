"""Judges that misbehave on demand, run inside verifier processes by test_verifier.py."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from megatron_rema.types import Verdict


def judge(answer: str, gold: str) -> Verdict:
    """Does what the box says; the lenient question is the whole message, which starts with "say"."""
    if answer.startswith("say lenient"):
        time.sleep(60)
    if "eat" in answer:
        bytearray(6 << 30)
    if "start" in answer:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(answer.split("start ")[1].split()[0]).write_text(str(child.pid))
    if "limits" in answer:  # 3 s an answer: 2 * 3 + 1 s by the clock, and a second more of processor time
        soft, _ = resource.getrlimit(resource.RLIMIT_CPU)
        return Verdict.CORRECT if 0 < soft - time.process_time() <= 9 else Verdict.WRONG
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
