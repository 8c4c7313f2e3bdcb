"""How an input is fuzzed: the counts, the limit of processor time, and what may come of bad input.

CI runs a few inputs of every target, always the same ones. MEGATRON_REMA_FUZZ=20000 runs that many over all targets, each target its
``share``; with --hypothesis-seed=N the same ones each time. What came of them stands at the end of the output.
"""

from __future__ import annotations

import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings

TOTAL = int(os.environ.get("MEGATRON_REMA_FUZZ", "0"))
LIMIT_S = 20.0  # of processor time for one input: a busy machine does not count, a loop does
REFUSALS = (ValueError,)  # what the front door turns into one message and exit code 2

counts: dict[str, Counter[str]] = defaultdict(Counter)


class TookTooLong(BaseException):
    """Not an Exception: nothing on the way may swallow it."""


def fuzzed(*, ci: int, share: float) -> Callable:
    """Run a test over ``ci`` inputs, or over ``share`` of MEGATRON_REMA_FUZZ."""
    return settings(
        max_examples=max(1, round(share * TOTAL)) if TOTAL else ci,
        derandomize=not TOTAL,
        database=None,
        deadline=None,  # of wall time, which tells nothing on a busy machine
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong(f"one input took more than {LIMIT_S:.0f} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def message_of(target: str, call: Callable[[], Any], *, names: Iterable[str] = ()) -> str | None:
    """The message of a refusal, None where the input is taken. Whatever else is raised is a traceback in the user's face and fails.

    The message must be text that a terminal can show, and hold one of ``names`` (all of them where it is a tuple).
    """
    with limited():
        try:
            call()
        except REFUSALS as error:
            message = " ".join(str(error).split())
        else:
            counts[target]["accepted"] += 1
            return None
    counts[target]["refused"] += 1
    assert message, "a refusal without a word"
    wanted = list(names)
    assert not wanted or any(all(word in message for word in ([one] if isinstance(one, str) else one)) for one in wanted), (
        f"the message names none of {wanted[:20]}: {message[:500]}"
    )
    return message


def judged(target: str, outcome: object) -> None:
    """Count an input that is not refused or accepted but answered."""
    counts[target][str(outcome)] += 1


def table() -> list[str]:
    lines = []
    for target, outcomes in sorted(counts.items()):
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
        lines.append(f"{target:<28} {sum(outcomes.values()):>7,}   {told}")
    total = sum(sum(outcomes.values()) for outcomes in counts.values())
    return [*lines, f"{'all':<28} {total:>7,}"]
