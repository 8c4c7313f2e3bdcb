"""Score components of an episode, and the named schemes that make each role's reward of them.

A component is a fact in [0, 1]; a scheme is a judgement of worth. Sources: ReMA arXiv:2503.09501 sections 3-4 and appendix.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_rema.reward.answers import last_answer
from megatron_rema.reward.math_verifier import Judgement
from megatron_rema.types import Episode, Role, Turn, Verdict

Scheme = Callable[[dict[str, float]], dict[Role, float]]


def final_answer(episode: Episode) -> str | None:
    """What the last answer of the reasoner's last message says, in the prompt's format; None when it says nothing."""
    messages = episode.turns_of(Role.REASONING)
    answer = last_answer(messages[-1].text, episode.prompt.answer_format) if messages else None
    return answer if answer is not None and answer.strip() else None


def components_of(episode: Episode, judgement: Judgement) -> dict[str, float]:
    """1.0 or 0.0 each. correct: strict verdict; lenient_correct: only if it was asked for and known; finished: ended as the protocol wants;
    answer_format: the reasoner's last message holds an answer in the prompt's format (a box, a judge's letter);
    plan_has_answer_format: some meta-thinker's message does."""

    def in_format(turn: Turn) -> bool:
        return last_answer(turn.text, episode.prompt.answer_format) is not None

    answers = episode.turns_of(Role.REASONING)
    score = {
        "correct": float(judgement.verdict is Verdict.CORRECT),
        "finished": float(episode.status.is_finished),
        "answer_format": float(bool(answers) and in_format(answers[-1])),
        "plan_has_answer_format": float(any(map(in_format, episode.turns_of(Role.META_THINKING)))),
    }
    if judgement.lenient not in (None, Verdict.UNKNOWN):
        score["lenient_correct"] = float(judgement.lenient is Verdict.CORRECT)
    return score


def outcome(score: dict[str, float]) -> dict[Role, float]:
    """Both roles get 1.0 for a correct answer, else 0.0 (the multi-turn reward)."""
    return dict.fromkeys(Role, score["correct"])


def base(score: dict[str, float]) -> dict[Role, float]:
    """Single turn. Reasoner: 1.0 correct, -0.5 wrong in the answer format, -1.0 wrong without it.
    Meta-thinker: correctness of the reasoner's answer, but -1.0 if it writes the answer format itself."""
    wrong = -0.5 if score["answer_format"] else -1.0
    return {
        Role.META_THINKING: -1.0 if score["plan_has_answer_format"] else score["correct"],
        Role.REASONING: 1.0 if score["correct"] else wrong,
    }


def consistency(score: dict[str, float]) -> dict[Role, float]:
    """Single turn. Reasoner: 1.0 for a correct answer. Meta-thinker: 0.0 here; what its answers agree on is known once all are in."""
    return {Role.META_THINKING: 0.0, Role.REASONING: score["correct"]}


SCHEMES: dict[str, Scheme] = {"outcome": outcome, "base": base, "consistency": consistency}
