"""Verification in processes of its own, overlapped with generation. A time-out or a crash is UNKNOWN, never silently WRONG.

Each pool thread owns one verifier process (this module run as a script: it imports math_verify but no torch, and is started afresh,
not forked). They exchange one JSON line per answer. A process that hangs or dies is replaced; only its own answer is lost.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_rema.reward.answers import boxed, last_box, letter_verdict, majority_is_right, quick_verdict
from megatron_rema.types import AnswerFormat, Episode, Role, Verdict

START_TIMEOUT_S = 120.0
MEMORY_LIMIT_BYTES = 4 << 30  # 9^{9^{9^9}} must not take the machine down

Item = TypeVar("Item")
Problem = TypeVar("Problem")
Votes = Sequence[tuple[bool, str | None]]  # of a problem's samples: right, and the answer (None: it gives none)


@dataclass(frozen=True)
class Judgement:
    """``verdict`` is the strict one. ``lenient`` is None when it was not asked for. ``how`` (of the strict
    one): quick, verified, timeout or crash. UNKNOWN and quick: the gold answer is blank (a judge's: no letter); and verified: it cannot be
    read."""

    verdict: Verdict
    lenient: Verdict | None
    how: str


class VerifierPool:
    """submit(episode) as episodes end, collect() once. ``function`` names what judges, "module:function" of (answer, gold) -> Verdict."""

    def __init__(
        self, num_workers: int = 2, timeout_s: float = 10.0, *, lenient: bool = True, function: str = "megatron_rema.reward.answers:verify"
    ):
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(f"num_workers must be at least 1 and timeout_s above 0, got {num_workers} and {timeout_s}.")
        self._timeout_s, self._lenient, self._function = timeout_s, lenient, function
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="verifier")
        self._own = threading.local()
        self._lock, self._is_closed = threading.Lock(), False  # of the list of processes: close() must miss none
        self._processes: list[_VerifierProcess] = []
        self._pending: dict[str, Judgement | Future[Judgement]] = {}

    def submit(self, episode: Episode) -> None:
        """Judge the reasoner's LAST message; without one the answer is empty."""
        messages = episode.turns_of(Role.REASONING)
        prompt = episode.prompt
        self.submit_answer(episode.episode_id, messages[-1].text if messages else "", prompt.answer, prompt.answer_format)

    def submit_answer(self, key: str, text: str, gold: str, answer_format: AnswerFormat = AnswerFormat.BOXED) -> None:
        if key in self._pending:
            raise ValueError(f"{key!r} was submitted before: every answer needs a key of its own until collect().")
        self._pending[key] = self._start(text, gold, answer_format)

    def stream(
        self, items: Iterable[Item], of: Callable[[Item], tuple[str, str] | tuple[str, str, AnswerFormat]], *, window: int = 1024
    ) -> Iterator[tuple[Item, Judgement]]:
        """(item, judgement of its ``of(item)`` = (text, gold), or (text, gold, answer format)) in the order of ``items``, which are read at
        most ``window`` ahead."""
        return self._ahead(items, lambda item: self._start(*of(item)), window)

    def majorities(
        self, problems: Iterable[Problem], of: Callable[[Problem], Votes], *, window: int = 64
    ) -> Iterator[tuple[Problem, bool]]:
        """(problem, ``majority_is_right`` of its votes) in the order of ``problems``. Two wrong answers of which no verdict comes
        (time-out, crash) count as different."""
        return self._ahead(problems, lambda problem: self._threads.submit(majority_is_right, of(problem), self._is_equal), window)

    def collect(self, on_progress: Callable[[int], None] | None = None) -> dict[str, Judgement]:
        """All judgements since the last collect, by episode_id (or key), in the order of submission; waits for them.

        ``on_progress(num_judged)`` is called after each.
        """
        pending, self._pending = self._pending, {}
        judged = {}
        for key, judgement in pending.items():
            judged[key] = _result(judgement)
            if on_progress is not None:
                on_progress(len(judged))
        return judged

    def close(self) -> None:
        """End all processes, hanging ones too; answers not yet judged are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._is_closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, text: str, gold: str, answer_format: AnswerFormat = AnswerFormat.BOXED) -> Judgement | Future[Judgement]:
        if answer_format is AnswerFormat.LETTER:  # a letter is right or wrong: nothing to compute, nothing to be lenient about
            return Judgement(letter_verdict(text, gold), None, "quick")
        quick = quick_verdict(text, gold)
        needs_lenient = self._lenient and quick is Verdict.WRONG and text.strip()
        if quick is None or needs_lenient:
            return self._threads.submit(self._judge, text, gold, quick)
        return Judgement(quick, quick if self._lenient else None, "quick")

    @staticmethod
    def _ahead(items: Iterable[Item], start: Callable[[Item], Any], window: int) -> Iterator[tuple[Item, Any]]:
        waiting: deque[tuple[Item, Any]] = deque()
        for item in items:
            waiting.append((item, start(item)))
            if len(waiting) >= window:
                first, started = waiting.popleft()
                yield first, _result(started)
        for item, started in waiting:
            yield item, _result(started)

    def _is_equal(self, answer: str, other: str) -> bool:
        """Of two contents of boxes. Asked by a pool thread."""
        verdict = quick_verdict(boxed(answer), other)
        if verdict is None:
            verdict, _ = self._ask(boxed(answer), other)
        return verdict is Verdict.CORRECT

    def _judge(self, text: str, gold: str, quick: Verdict | None) -> Judgement:
        """The lenient metric is a question of its own, asked second: whatever befalls it, the strict verdict stands."""
        strict, how = (quick, "quick") if quick is not None else self._ask(boxed(last_box(text) or ""), gold)
        lenient = None
        if self._lenient:
            lenient = self._ask(text, gold)[0] if strict is Verdict.WRONG else strict
        return Judgement(strict, lenient, how)

    def _ask(self, answer: str, gold: str) -> tuple[Verdict, str]:
        process: _VerifierProcess | None = getattr(self._own, "process", None)
        if process is None or not process.is_alive:
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the verifier pool was closed with answers still to judge.")
                process = self._own.process = _VerifierProcess(self._function, self._timeout_s)
                self._processes = [p for p in self._processes if p.is_alive] + [process]
            process.wait_until_ready()
        return process.ask(answer, gold, self._timeout_s)


def _result(started: Any) -> Any:
    return started.result() if isinstance(started, Future) else started


class _VerifierProcess:
    """One process that judges one answer at a time."""

    def __init__(self, function: str, timeout_s: float):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rema.reward.math_verifier", function, str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a group of its own: whatever it starts ends with it
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def wait_until_ready(self) -> None:
        if not self._read(START_TIMEOUT_S):
            self.kill()
            raise RuntimeError(f"a verifier process did not start within {START_TIMEOUT_S:.0f} s or failed; what it printed is above.")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, answer: str, gold: str, timeout_s: float) -> tuple[Verdict, str]:
        """The verdict and "verified", or UNKNOWN and why. After a time-out or a death the process is gone."""
        try:
            self._process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read(timeout_s)
        except BrokenPipeError:
            line = b""
        if line:
            reply = json.loads(line)
            return (Verdict(reply), "verified") if reply is not None else (Verdict.UNKNOWN, "crash")
        self.kill()
        return Verdict.UNKNOWN, "timeout" if line is None else "crash"

    def kill(self) -> None:
        """With all that it started. Not where it was waited for before: its number may be another's by now."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self, timeout_s: float) -> bytes | None:
        """One line; empty when the process ended, None when time ran out."""
        return self._process.stdout.readline() if self._selector.select(timeout_s) else None


def _serve(function: str, timeout_s: float) -> None:
    """The life of a verifier process: a line when ready, then a reply for each job until stdin closes."""
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may pass for a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, name = function.partition(":")
    judge = getattr(importlib.import_module(module), name)
    importlib.import_module("math_verify")  # before "ready": the time-out of an answer must not pay for the import
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time-outs are off
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        limit_s = int(2 * timeout_s) + 1
        signal.alarm(limit_s)  # if the parent died in the meantime, nobody else would end a hang
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limit_s + 1, resource.RLIM_INFINITY))  # nor one in threads
        try:
            reply = judge(*json.loads(line))
        except Exception:  # of any kind: no verdict, counted as a crash by the parent
            reply = None
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
