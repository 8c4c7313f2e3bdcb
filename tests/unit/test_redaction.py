"""Plans that a reasoner hears without their numbers, in a fraction of episodes drawn by hash."""

from pathlib import Path

import pytest

from megatron_rema.rollout.redaction import is_redacted, redacted
from megatron_rema.rollout.scheduler import TurnScheduler
from megatron_rema.trainer.state import Position, position_of
from megatron_rema.types import Episode, Prompt, Role
from tests.unit.test_scheduler import CHAT, rules, said

PLAN = r"It is 6 - 1, so \boxed{5}. [FINISH]"
IDS = [f"3/p{i}/0" for i in range(2000)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\text{cat}} and \boxed{x + y}", r"so \boxed{\text{cat}} and \boxed{_}"),  # braces inside stay: they hold no number
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{_}{_}}"),
        ("1,000 of 3.14 [[B]]", "_ of _ [[_]]"),
        ("no number", "no number"),
    ],
)
def test_what_is_masked(text, expected):
    assert redacted(text) == expected


def test_the_draw_is_the_episodes_own():
    drawn = [is_redacted(1, episode_id, 0.2) for episode_id in IDS]
    assert drawn == [is_redacted(1, episode_id, 0.2) for episode_id in IDS]
    assert 0.17 < sum(drawn) / len(drawn) < 0.23  # a standard deviation is 0.009
    assert drawn != [is_redacted(2, episode_id, 0.2) for episode_id in IDS]
    assert all(is_redacted(1, episode_id, 1.0) for episode_id in IDS) and not any(is_redacted(1, episode_id, 0.0) for episode_id in IDS)
    assert all(is_redacted(1, episode_id, 0.6) for episode_id, hidden in zip(IDS, drawn, strict=True) if hidden), "more of the same"


def heard(probability: float, prompt: Prompt) -> tuple[Episode, str]:
    """One played episode, and what stood in the context of its reasoner's first turn."""
    game = TurnScheduler([(prompt, 0)], rules=rules(redact_plan_prob=probability), chat=CHAT, seed=1, step=3)
    for text in (PLAN, "done"):
        (request,) = game.next_requests()
        episode = game.accept(said(request, text))
    return episode, CHAT.tokenizer.decode(list(request.token_ids))


def test_the_reasoner_hears_less_and_everything_else_stays():
    hidden, open_ = (next(i for i in range(50) if is_redacted(1, f"3/p{i}/0", 0.5) is want) for want in (True, False))
    episode, context = heard(0.5, Prompt(f"p{hidden}", "What is 2 + 3?", "5"))
    assert r"It is _ - _, so \boxed{_}. [FINISH]" in context and PLAN not in context and "2 + 3" in context
    assert episode.turns_of(Role.META_THINKING)[0].text == PLAN, "what was said is kept, for verifiers, gates and readers"
    assert episode.status.is_finished
    assert PLAN in heard(0.5, Prompt(f"p{open_}", "What is 2 + 3?", "5"))[1]
    assert PLAN in heard(0.0, Prompt(f"p{hidden}", "What is 2 + 3?", "5"))[1]


def test_redaction_where_nobody_plans_or_plans_are_edited_otherwise_is_refused():
    with pytest.raises(ValueError, match="where nobody plans"):
        rules(redact_plan_prob=0.2, roles=(Role.REASONING,))
    with pytest.raises(ValueError, match="edited otherwise"):
        rules(redact_plan_prob=0.2, edit_plan=lambda question, round_index, plan: plan)


def test_a_checkpoint_from_before_the_mitigations_still_has_a_position():
    old = {"step": 4, "prompts_taken": 8, "sampled_tokens": 9, "weight_version": 4, "data": "x", "baselines": {}}
    assert position_of(Path("c"), old) == Position(step=4, prompts_taken=8, sampled_tokens=9, weight_version=4, data="x")
    for strange in ({**old, "mood": 1}, {key: value for key, value in old.items() if key != "data"}):
        with pytest.raises(ValueError, match=r"has, or misses, (mood|data): another version"):
            position_of(Path("c"), strange)
