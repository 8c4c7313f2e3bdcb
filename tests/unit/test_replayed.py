"""Dialogues played and replayed with one thing changed."""

from __future__ import annotations

from megatron_rema.rollout.dialogue import replayed
from megatron_rema.rollout.traces import traces_of
from megatron_rema.types import EpisodeStatus, Role
from tests.unit.test_scheduler import CHAT, META, REASONING, rules, talk


def decoded(token_ids) -> str:
    return CHAT.tokenizer.decode(token_ids)


def shout(question: str, round_index: int, plan: str) -> str:
    assert question == "What is 2 + 3?"
    return f"{round_index}: {plan.upper()}"


def test_the_reasoner_hears_the_edited_plan_and_the_planner_keeps_its_own():
    episode, requests = talk(rules(edit_plan=shout), "Add them.", "It is 5.", "Right. [FINISH]", "\\boxed{5}")
    assert "Instruction:\n0: ADD THEM.<|im_end|>" in decoded(requests[1].token_ids) and "Add them." not in decoded(requests[1].token_ids)
    assert "1: RIGHT. [FINISH]" in decoded(requests[3].token_ids)
    assert "assistant\nAdd them.<|im_end|>\n<|im_start|>user\nIt is 5." in decoded(requests[2].token_ids)
    assert [turn.text for turn in episode.turns_of(META)] == ["Add them.", "Right. [FINISH]"]
    assert episode.status is EpisodeStatus.FINISHED, "the marker counts as it was said"


def test_a_finish_marker_may_be_ignored_for_some_rounds():
    episode, _ = talk(rules(finish_from_round=1), "[FINISH]", "4", "[FINISH]", "5")
    assert episode.status is EpisodeStatus.FINISHED and len(episode.turns) == 4
    episode, _ = talk(rules(), "[FINISH]", "4")
    assert episode.status is EpisodeStatus.FINISHED and len(episode.turns) == 2


def test_replaying_under_the_same_rules_changes_nothing_and_under_others_the_contexts_only():
    episode, _ = talk(rules(), "Add them.", "It is 5.", "Right. [FINISH]", "\\boxed{5}")
    assert replayed(CHAT, rules(), episode).turns == episode.turns
    other = replayed(CHAT, rules(edit_plan=shout), episode)
    assert [turn.completion for turn in other.turns] == [turn.completion for turn in episode.turns]
    (trace,) = [trace for trace in traces_of(other) if trace.role is REASONING]
    (before,) = [trace for trace in traces_of(episode) if trace.role is Role.REASONING]
    assert "0: ADD THEM." in decoded(trace.token_ids)

    def own(t):
        return [token for token, mine in zip(t.token_ids, t.loss_mask, strict=True) if mine]

    assert own(trace) == own(before)
