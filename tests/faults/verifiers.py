"""A judge that misbehaves once, inside a verifier process: what it does and the file that says it did are in the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_rema.reward.answers import verify
from megatron_rema.types import Verdict


def judge(answer: str, gold: str) -> Verdict:
    what, _, marker = os.environ["MEGATRON_REMA_BEWITCHED"].partition(" ")
    if not Path(marker).exists():
        Path(marker).touch()
        if what == "forks":
            for _ in range(3):
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        if what == "dies":
            os._exit(3)
        time.sleep(300)
    return verify(answer, gold)
