"""An engine that reads from a script: no model, chosen latencies, faults on demand. For tests of everything upstairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rema.engine.contract import EngineCounters, check_request, complete
from megatron_rema.types import Completion, StopReason, TurnRequest

if TYPE_CHECKING:
    from torch import Tensor

Answer = Callable[[TurnRequest], tuple[Sequence[int], StopReason]]


@dataclass
class _Pending:
    request: TurnRequest
    completion: Completion
    steps_left: int


class ScriptedEngine:
    """Answers ``request -> (token_ids, stop_reason)`` after ``latency(request)`` steps, one step per token by default.

    ``answer`` must depend on the request only, so that the script is the same whatever order requests come in. It may return
    StopReason.ABORT, or raise to play an engine that dies. At most ``max_num_seqs`` requests run, the rest wait in line.
    Every token gets the log-probability ``logprob``. With ``expected_names``, load_weights checks completeness.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        latency: Callable[[TurnRequest], int] | None = None,
        max_model_len: int = 1 << 20,
        max_num_seqs: int = 1 << 20,
        logprob: float = -1.0,
        expected_names: Iterable[str] | None = None,
    ) -> None:
        self.counters = EngineCounters()
        self.requests: list[TurnRequest] = []  # every request ever submitted, in order
        self.is_asleep = False
        self._answer, self._latency, self._logprob = answer, latency, logprob
        self._max_model_len, self._max_num_seqs = max_model_len, max_num_seqs
        self._expected = None if expected_names is None else frozenset(expected_names)
        self._pending: dict[str, _Pending] = {}  # in order of submission
        self._weight_version = 0

    @property
    def weight_version(self) -> int:
        return self._weight_version

    @property
    def num_unfinished(self) -> int:
        return len(self._pending)

    def submit(self, request: TurnRequest) -> None:
        assert not self.is_asleep, "submit to a sleeping engine: call wake() first"
        check_request(request, max_model_len=self._max_model_len, known_ids=self._pending, constrained=True)
        token_ids, stop_reason = self._answer(request)
        assert len(token_ids) <= request.max_tokens, f"the script answers {len(token_ids)} tokens, max_tokens is {request.max_tokens}"
        completion = Completion(request.request_id, tuple(token_ids), (self._logprob,) * len(token_ids), stop_reason, self._weight_version)
        steps = len(token_ids) if self._latency is None else self._latency(request)
        self.requests.append(request)
        self._pending[request.request_id] = _Pending(request, completion, max(steps, 1))

    def step(self) -> list[Completion]:
        assert not self.is_asleep, "step of a sleeping engine: call wake() first"
        if not self._pending:
            return []
        self.counters.num_steps += 1
        ended = []
        for pending in list(self._pending.values())[: self._max_num_seqs]:
            pending.steps_left -= 1
            if pending.steps_left == 0:
                del self._pending[pending.request.request_id]
                ended.append(pending.completion)
                self.counters.count(
                    prompt_tokens=len(pending.request.token_ids), cached_tokens=0, sampled_tokens=len(pending.completion.token_ids)
                )
        return ended

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        for _ in named_tensors if self._expected is None else complete(named_tensors, self._expected):
            pass
        self._weight_version = weight_version

    def sleep(self) -> None:
        assert not self._pending, f"sleep with {len(self._pending)} unfinished requests"
        self.is_asleep = True

    def wake(self) -> None:
        self.is_asleep = False

    def close(self) -> None:
        self._pending.clear()
