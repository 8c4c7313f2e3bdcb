"""The nouns of the data path: every value that crosses a floor of the house has its type here.

Prompt -> TurnRequest -> Completion -> Turn -> Episode -> Trace (one per role) -> Batch (packed, one per microbatch).

Shapes: L tokens of one trace, T label positions of one packed batch, B traces, K turns of one trace, n tokens of one turn.
Nothing here imports torch at run time: front doors, the scheduler and the report read these types without it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class Role(StrEnum):
    """Who speaks. The two spellings used by conf/, metrics and files."""

    META_THINKING = "meta_thinking"
    REASONING = "reasoning"


class Action(StrEnum):
    """What a meta-thinker's message asks of the reasoner, where its messages are JSON actions. The spellings that it writes."""

    DECOMPOSE = "DECOMPOSE"  # solve these steps
    REWRITE = "REWRITE"  # solve the problem put like this
    EMPTY = "EMPTY"  # nothing: solve it alone


class StopReason(StrEnum):
    """Why the engine ended one turn."""

    STOP = "stop"  # a stop token was sampled; it is the last of token_ids
    LENGTH = "length"  # the token budget of the turn ran out; no stop token was sampled
    ABORT = "abort"  # the engine gave the request up


class EpisodeStatus(StrEnum):
    """Where an episode is, or how it ended."""

    RUNNING = "running"
    FINISHED = "finished"  # the meta-thinker wrote the finish marker and the reasoner answered (one role: its one turn ended)
    MAX_ROUNDS = "max_rounds"  # the rounds ran out before the finish marker
    TRUNCATED = "truncated"  # a turn hit its token budget, or the episode its own
    CONTEXT_OVERFLOW = "context_overflow"  # the next prompt leaves no room in the context window
    ABORTED = "aborted"  # the engine gave up; excluded from training

    @property
    def is_running(self) -> bool:
        return self is EpisodeStatus.RUNNING

    @property
    def is_finished(self) -> bool:
        """Ended as the protocol wants; every other end may have its reward masked."""
        return self is EpisodeStatus.FINISHED

    @property
    def is_cut(self) -> bool:
        return not (self.is_running or self.is_finished)


class Verdict(StrEnum):
    """What the verifier says of an answer. UNKNOWN (time-out, crash) is never silently WRONG."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNKNOWN = "unknown"


class AnswerFormat(StrEnum):
    """How an answer is written, and with that how it is judged."""

    BOXED = "boxed"  # \boxed{...}: mathematics
    LETTER = "letter"  # [[A]] or [[B]]: a judge's choice between two answers


LETTERS = ("A", "B")
JUDGED_FIELDS = ("answer_a", "answer_b")  # what the letters stand for, among a prompt's fields


@dataclass(frozen=True)
class Prompt:
    """One problem of a data set. ``answer`` is the gold answer: only verifiers read it.

    ``fields`` are further texts for the reasoner's first message (the answers that a judge compares): the meta-thinker never reads them.
    ``pair_id`` ties the two orders of one comparison: the prompt_id of the one as given.
    """

    prompt_id: str
    question: str
    answer: str
    level: int = 0
    subset: str = ""
    answer_format: AnswerFormat = AnswerFormat.BOXED
    fields: dict[str, str] = field(default_factory=dict)
    pair_id: str = ""

    @property
    def is_swapped(self) -> bool:
        """The other order of a comparison."""
        return self.pair_id not in ("", self.prompt_id)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Prompt:
        """Rows from before a field was there get its default."""
        return cls(**{**row, "answer_format": AnswerFormat(row.get("answer_format", AnswerFormat.BOXED))})


@dataclass(frozen=True)
class TurnRequest:
    """One turn to sample: what the scheduler asks of an engine. ``policy`` names the weights that speak for ``role``."""

    request_id: str
    policy: str
    role: Role
    token_ids: tuple[int, ...]  # the whole context of this role, generation prompt included
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    regex: str | None = None  # the turn's text up to its stop token must match: only tokens that can still lead there are sampled


@dataclass(frozen=True)
class Completion:
    """One sampled turn, exactly as sampled; never re-tokenised."""

    request_id: str
    token_ids: tuple[int, ...]  # [n], a sampled stop token included
    logprobs: tuple[float, ...]  # [n], log-probabilities (nats) under the sampling distribution (temperature and regex applied)
    stop_reason: StopReason
    weight_version: int


@dataclass(frozen=True)
class Turn:
    """One role's completion and the context that was put in front of it since this role's previous turn."""

    role: Role
    round_index: int
    context_token_ids: tuple[int, ...]  # unlabelled: system, question, the partner's message, template tokens
    completion: Completion
    text: str  # what was said, for the partner, humans and verifiers: stop token stripped, of a JSON action its output
    action: Action | None = None  # of a meta-thinker's turn that is a JSON action, whole and valid


@dataclass
class Episode:
    """A whole dialogue. Serialises to one JSON line (``to_json`` / ``from_json`` are inverse, floats exact)."""

    episode_id: str
    prompt: Prompt
    group_index: int  # 0..G-1 among the episodes of this prompt; counterfactual ones follow
    turns: list[Turn] = field(default_factory=list)
    status: EpisodeStatus = EpisodeStatus.RUNNING
    verdict: Verdict | None = None
    score: dict[str, float] = field(default_factory=dict)  # reward components, raw
    turn_rewards: dict[Role, list[float]] = field(default_factory=dict)  # [K] per role
    # What each component added to turn_rewards, as weighted and shaped: component -> role -> [K]. They sum to turn_rewards.
    reward_parts: dict[str, dict[Role, list[float]]] = field(default_factory=dict)
    advantages: dict[Role, list[float]] = field(default_factory=dict)  # [K] per role
    plan_of: str | None = None  # episode_id whose first meta-thinker turn this episode shares (several answers to one plan); None: its own
    # Without the plan under test: a baseline, never trained on. prompt_id: its plan is empty (not sampled); episode_id: the plan of
    # ``plan_of`` in place of that episode's. None: a real episode.
    counterfactual_of: str | None = None

    @property
    def is_counterfactual(self) -> bool:
        return self.counterfactual_of is not None

    def turns_of(self, role: Role) -> list[Turn]:
        return [turn for turn in self.turns if turn.role is role]

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    def add_reward(self, component: str, role: Role, amount: float, *, ceiling: float | None = None) -> None:
        """Add to the reward of the role's last turn. ``ceiling``: the most it may be then; what that takes away is component ``mask``."""
        rewards = self.turn_rewards.setdefault(role, [0.0] * len(self.turns_of(role)))
        before = rewards[-1]
        rewards[-1] = before + amount
        self._part(component, role)[-1] += amount
        if ceiling is not None and rewards[-1] > ceiling:
            self._part("mask", role)[-1] += ceiling - rewards[-1]
            rewards[-1] = ceiling

    def drop_reward(self, role: Role) -> None:
        """The role is not rewarded in this episode."""
        del self.turn_rewards[role]
        for part in self.reward_parts.values():
            part.pop(role, None)

    def _part(self, component: str, role: Role) -> list[float]:
        return self.reward_parts.setdefault(component, {}).setdefault(role, [0.0] * len(self.turn_rewards[role]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Episode:
        def turn(t: dict[str, Any]) -> Turn:
            c = t["completion"]
            completion = Completion(
                c["request_id"], tuple(c["token_ids"]), tuple(c["logprobs"]), StopReason(c["stop_reason"]), c["weight_version"]
            )
            action = None if t.get("action") is None else Action(t["action"])
            return Turn(Role(t["role"]), t["round_index"], tuple(t["context_token_ids"]), completion, t["text"], action)

        return cls(
            episode_id=row["episode_id"],
            prompt=Prompt.from_json(row["prompt"]),
            group_index=row["group_index"],
            turns=[turn(t) for t in row["turns"]],
            status=EpisodeStatus(row["status"]),
            verdict=None if row["verdict"] is None else Verdict(row["verdict"]),
            score=dict(row["score"]),
            turn_rewards={Role(role): list(v) for role, v in row["turn_rewards"].items()},
            reward_parts={name: {Role(role): list(v) for role, v in part.items()} for name, part in row.get("reward_parts", {}).items()},
            advantages={Role(role): list(v) for role, v in row["advantages"].items()},
            plan_of=row.get("plan_of"),
            counterfactual_of=row.get("counterfactual_of"),
        )


@dataclass(frozen=True)
class Trace:
    """One role's flat view of an episode: its contexts and its own turns, in order."""

    episode_id: str
    role: Role
    token_ids: tuple[int, ...]  # [L]
    loss_mask: tuple[bool, ...]  # [L], True on this role's own sampled tokens
    turn_ids: tuple[int, ...]  # [L], 0..K-1 on own tokens, -1 = not mine
    rollout_logprobs: tuple[float, ...]  # [L], 0.0 where not mine
    turn_rewards: tuple[float, ...]  # [K]
    advantages: tuple[float, ...] = ()  # [K], one per turn
    # [L], where the turns were sampled under a regex: the tokens that it allowed at that place, as bits of little-endian 32-bit words (bit
    # v % 32 of word v // 32: token v); None where any token was. () = nowhere constrained. Equal sets are one object.
    allowed: tuple[bytes | None, ...] = ()


@dataclass
class Batch:
    """A packed microbatch: B sequences laid end to end, then padding that forms a sequence of its own.

    Every per-token field is aligned with ``labels``: position t holds what belongs to predicting ``labels[t]`` from
    ``tokens[..t]``. ``turn_ids`` are dense over the batch (0..num_turns-1 in order, -1 = not trained), so one segment reduction
    serves all sequences. ``loss_weights`` already hold the global normaliser of the optimizer step.
    """

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, tokens shifted by one inside each sequence; 0 at each sequence's last position
    positions: Tensor  # [T] int64, restart at every sequence
    cu_seqlens: Tensor  # [B+1] int32, padding sequence included
    max_seqlen: int
    loss_mask: Tensor  # [T] bool
    turn_ids: Tensor  # [T] int64
    trace_ids: Tensor  # [T] int64, index of the sequence in this batch
    cu_turns: Tensor  # [num_turns+1] int64, where each turn begins, from 0 to T; what is nobody's belongs to the turn before
    loss_weights: Tensor | None = None  # [T] float32, 0.0 where loss_mask is False
    advantages: Tensor | None = None  # [T] float32
    rollout_logprobs: Tensor | None = None  # [T] float32
    old_logprobs: Tensor | None = None  # [T] float32
    ref_logprobs: Tensor | None = None  # [T] float32
    values: Tensor | None = None  # [T] float32, the critic's before the update
    returns: Tensor | None = None  # [T] float32
    # The distinct sets of tokens that labels were sampled from (S sets, W = ceil(V / 32) words: see Trace.allowed). None: all of V
    allowed_sets: Tensor | None = None  # [S, W] int32
    allowed_ids: Tensor | None = None  # [T] int64, 0..S-1

    @property
    def num_turns(self) -> int:
        """At least 1: a batch without a turn has one without a token."""
        return len(self.cu_turns) - 1


class Engine(Protocol):
    """What rollout needs of an inference engine. It knows tokens, not roles or rewards.

    All ranks of one engine's tensor-parallel group call every method in the same order with the same arguments.
    """

    @property
    def weight_version(self) -> int: ...

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet returned by ``step``."""

    def submit(self, request: TurnRequest) -> None:
        """Queue one request. Raises ValueError when it cannot fit the context window."""

    def step(self) -> list[Completion]:
        """Advance all running requests by one engine step; return those that ended, in a deterministic order."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Replace ALL weights in place (Hugging Face names, full tensors) and drop cached prefixes. Missing or unknown names raise."""

    def sleep(self) -> None:
        """Give device memory back between rollouts (no-op where the platform has none to give)."""

    def wake(self) -> None: ...

    def close(self) -> None: ...
