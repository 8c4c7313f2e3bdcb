"""Episode -> one trace per role: its contexts and its own turns laid end to end, only its own sampled tokens labelled.

A trace's tokens are the very ids that the engine read and sampled: each turn's context and completion, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_rema.reading import brief
from megatron_rema.rollout.dialogue import NO_FIELDS, Chats, Dialogue, DialogueRules, chat_of
from megatron_rema.types import Completion, Episode, Role, StopReason, Trace, Turn


def traces_of(episode: Episode) -> list[Trace]:
    """One trace for each role that spoke, meta-thinker first; rewards and advantages [K] are copied where the episode has them.

    A plan that several episodes share is labelled in the trace of its own episode only: in the others it is context, and a meta-thinker
    who said nothing else has no trace there. Likewise the plan that a counterfactual episode was given.
    """
    traces = []
    for role in Role:
        turns = episode.turns_of(role)
        shares_first = role is Role.META_THINKING and (episode.plan_of is not None or episode.is_counterfactual)
        if len(turns) > shares_first:
            rewards, advantages = episode.turn_rewards.get(role, ()), episode.advantages.get(role, ())
            for name, values in (("turn_rewards", rewards), ("advantages", advantages)):
                assert len(values) in (0, len(turns)), f"{episode.episode_id}: {len(values)} {name} for {len(turns)} turns of {role}."
            traces.append(_trace(episode.episode_id, role, turns, tuple(rewards), tuple(advantages), shares_first=shares_first))
    return traces


def traces_of_dialogue(
    chat: Chats,
    rules: DialogueRules,
    question: str,
    turns: Sequence[tuple[Role, str]],
    *,
    fields: Mapping[str, str] = NO_FIELDS,
    episode_id: str = "",
    where: str = "",
) -> list[Trace]:
    """Traces of a WRITTEN dialogue (cold start): each text and its end token count as sampled; the contexts are those of RL.

    Raises ValueError when the speakers are not those that ``rules`` ask for, in turn, and for a message that is not the JSON action
    which they ask for; it begins with ``where``, the file and line of the dialogue. Log-probabilities are 0.0.
    """
    dialogue, name = Dialogue(chat, rules, question, fields), where or f"dialogue {episode_id!r}"
    for number, (role, text) in enumerate(turns):
        if role is not dialogue.next_role:
            expected = str(dialogue.next_role)
            raise ValueError(
                f"{name}: turns[{number}].role is {str(role)!r} where {expected!r} speaks: turns must alternate as "
                "agents.policies gives out the roles."
            )
        ids = chat_of(chat, role).encode_message(text)
        turn = dialogue.add(Completion(f"{episode_id}/{number}", ids, (0.0,) * len(ids), StopReason.STOP, weight_version=0))
        if rules.regex_for(role) is not None and turn.action is None:
            raise ValueError(
                f"{name}: turns[{number}].text is {brief(text)}, not a JSON action; with task.json_actions=true "
                'a meta-thinker writes {"action": "DECOMPOSE", "output": "..."}, REWRITE, or EMPTY with an empty output, spaced like this.'
            )
    spoken = {role: [turn for turn in dialogue.turns if turn.role is role] for role in rules.roles}
    return [_trace(episode_id, role, own, (), ()) for role, own in spoken.items() if own]


def _trace(
    episode_id: str,
    role: Role,
    turns: Sequence[Turn],
    rewards: tuple[float, ...],
    advantages: tuple[float, ...],
    *,
    shares_first: bool = False,
) -> Trace:
    token_ids: list[int] = []
    turn_ids: list[int] = []
    logprobs: list[float] = []
    for k, turn in enumerate(turns):
        context, sampled = turn.context_token_ids, turn.completion
        token_ids += (*context, *sampled.token_ids)
        if shares_first and k == 0:
            turn_ids += [-1] * (len(context) + len(sampled.token_ids))
            logprobs += [0.0] * (len(context) + len(sampled.token_ids))
            continue
        turn_ids += [-1] * len(context) + [k] * len(sampled.token_ids)
        logprobs += [0.0] * len(context) + list(sampled.logprobs)
    loss_mask = tuple(k >= 0 for k in turn_ids)
    return Trace(episode_id, role, tuple(token_ids), loss_mask, tuple(turn_ids), tuple(logprobs), rewards, advantages)
