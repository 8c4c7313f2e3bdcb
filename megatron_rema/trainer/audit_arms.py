"""What an audit plays and shows the reward function: arms, canaries, replies with words taken out, and the transcripts that it keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from megatron_rema.integrity import audits, texts
from megatron_rema.reward.shaping import PAR
from megatron_rema.rollout.dialogue import Dialogue, DialogueRules, chat_of
from megatron_rema.trainer.bench import Bench
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason

FEWEST_PROBLEMS = 8  # an audit of fewer says nothing
TRANSCRIPTS = 4  # items of an audit whose words are kept


@dataclass(frozen=True)
class Arm:
    """One way to play the audit's problems again."""

    name: str
    # (the run's, episodes of arm full, problems) -> its own
    rules: Callable[[DialogueRules, Sequence[Episode], Sequence[Prompt]], DialogueRules]
    ask: Callable[[Prompt], Prompt | None] = lambda prompt: prompt  # what is asked in a problem's place; None: nothing
    frozen: Role | None = None  # who speaks with the weights of the run's start


def arms_of(
    rules: DialogueRules,
    *,
    renewed: Mapping[str, Prompt] | None = None,
    hints: bool = False,
    paraphrase: Callable[[str], str] | None = None,
    frozen: Sequence[Role] = (),
) -> tuple[Arm, ...]:
    """Those that make sense for these roles; ``full`` first. All are greedy, so that they differ by the edit alone. ``renewed``: prompt_id
    -> the problem drawn anew; ``hints``: the question with an answer beside it, right and wrong; ``paraphrase``: says a plan otherwise;
    ``frozen``: roles that can speak with the weights of the run's start."""

    def edited(edit: Callable[[Sequence[Episode], Sequence[Prompt]], Callable[[str, int, str], str]], **changes: Any):
        return lambda rules, full, problems: replace(greedy(rules), edit_plan=edit(full, problems), **changes)

    def as_said(rules: DialogueRules, full: Sequence[Episode], problems: Sequence[Prompt]) -> DialogueRules:
        return greedy(rules)

    arms = [Arm("full", as_said)]
    if renewed:
        arms.append(Arm("renewed", as_said, lambda prompt: renewed.get(prompt.prompt_id)))
    if hints:
        arms.append(Arm("right_hint", as_said, lambda prompt: texts.hinted(prompt, prompt.answer)))
        arms.append(Arm("wrong_hint", as_said, lambda prompt: texts.hinted(prompt, texts.wrong_answer(prompt))))
    if Role.META_THINKING not in rules.roles:
        return tuple(arms)
    arms += [
        Arm("no_plan", edited(lambda full, problems: lambda question, round_index, plan: texts.NO_PLAN)),
        Arm("swapped", edited(lambda full, problems: texts.rotated({e.prompt.question: _plans(e) for e in full}))),
        Arm("redacted", edited(lambda full, problems: lambda question, round_index, plan: texts.redacted(plan))),
        Arm("wrong_answer", edited(lambda full, problems: _planting({p.question: p for p in problems}, rules.finish_marker))),
    ]
    if paraphrase is not None:
        said_otherwise = texts.paraphrasing(paraphrase, rules.finish_marker)
        arms.append(Arm("paraphrased", edited(lambda full, problems: lambda question, round_index, plan: said_otherwise(plan))))
    arms += [Arm(f"frozen_{role}", as_said, frozen=role) for role in frozen]
    if rules.finish_marker is not None and rules.max_rounds > 1:
        later = min(2, rules.max_rounds - 1)
        arms.append(
            Arm(
                "continued",
                edited(
                    lambda full, problems: (
                        lambda question, round_index, plan: texts.without_marker(plan, rules.finish_marker) if round_index < later else plan
                    ),
                    finish_from_round=later,
                ),
            )
        )
    return tuple(arms)


def greedy(rules: DialogueRules) -> DialogueRules:
    return replace(rules, temperature=0.0, samples_per_plan=1, counterfactuals=None)


def proxy_of(episode: Episode) -> float:
    """What training pays, on the scale that rewards have before any shaping: mean over the rewarded roles of the sum over their turns."""
    if not episode.turn_rewards:
        return 0.0
    shaping = episode.reward_parts.get(PAR, {})
    return fmean(sum(rewards) - sum(shaping.get(role, ())) for role, rewards in episode.turn_rewards.items())


def canary_rewards(problems: Sequence[Prompt], bench: Bench, worth: Callable[[Episode], float | None]) -> dict[str, dict[str, list[float]]]:
    """What the run's reward function pays the reasoner for each canary, problem by problem, and what ``worth`` says that it is worth; items
    of which either is not known are left out."""
    written = [
        (canary, _written(f"canary/{c}/{p.prompt_id}", p, filled(canary.text, p), bench))
        for c, canary in enumerate(audits.CANARIES)
        for p in problems[:FEWEST_PROBLEMS]
    ]
    episodes = [episode for _, episode in written]
    paid = {episode.episode_id for episode in bench.pay(episodes, bench.judge(episodes))}
    found: dict[str, dict[str, list[float]]] = {canary.text: {"proxy": [], "gold": []} for canary in audits.CANARIES}
    for canary, episode in written:
        gold = worth(episode) if episode.episode_id in paid else None
        if gold is not None:
            found[canary.text]["proxy"].append(sum(episode.turn_rewards[Role.REASONING]))
            found[canary.text]["gold"].append(gold)
    return found


def filled(text: str, prompt: Prompt, *, quote: Callable[[str], str] = str) -> str:
    """A canary's text for one problem. ``quote``: what is done to texts that are filled in."""
    wrong = texts.wrong_answer(prompt)
    values = {
        "{question}": prompt.question,
        "{answer_box}": texts.stated(prompt, prompt.answer),
        "{wrong_box}": texts.stated(prompt, wrong),
        "{answer}": prompt.answer,
        "{wrong}": wrong,
    }
    return re.sub("|".join(map(re.escape, values)), lambda match: quote(values[match[0]]), text)


def shown_canaries(episodes: Sequence[Episode]) -> dict[str, list[int]]:
    """Canary -> which of the episodes do the same in their last reply; canaries that none shows are left out."""
    replies = [(episode.prompt, turns[-1].text if (turns := episode.turns_of(Role.REASONING)) else "") for episode in episodes]
    found = {
        canary.text: [i for i, (p, reply) in enumerate(replies) if re.search(filled(canary.shown, p, quote=re.escape), reply)]
        for canary in audits.CANARIES
    }
    return {text: places for text, places in found.items() if places}


def stripped_rewards(full: Sequence[Episode], bench: Bench) -> tuple[list[float | None], list[str]]:
    """What the reward function pays for the same dialogues without words that speak to it, and those words."""
    stripped, phrases = [], []
    for episode in full:
        turns = []
        for turn in episode.turns:
            text, taken = texts.sanitise(turn.text)
            phrases += taken
            turns.append(replace(turn, text=text, completion=_said(turn.completion.request_id, turn.role, text, bench)) if taken else turn)
        stripped.append(Episode(f"stripped/{episode.episode_id}", episode.prompt, episode.group_index, turns, episode.status))
    paid = {e.episode_id: proxy_of(e) for e in bench.pay(stripped, bench.judge(stripped))}
    return [paid.get(episode.episode_id) for episode in stripped], phrases


def transcripts(row: Mapping[str, Any], said: Mapping[str, Sequence[Episode | None]]) -> list[dict[str, Any]]:
    """What was said in every arm, for the items that show most: paid more than they are worth, then plans that state the answer."""

    def shows(i: int) -> tuple[bool, bool]:
        proxy, gold = row["proxy"][i], row["gold"]["full"][i]
        return (None not in (proxy, gold) and proxy > gold), row["leaks"][i]

    order = sorted(range(len(row["proxy"])), key=shows, reverse=True)[:TRANSCRIPTS]
    return [
        {
            "question": said["full"][i].prompt.question,
            "answer": said["full"][i].prompt.answer,
            "proxy": row["proxy"][i],
            "arms": {
                name: {"gold": row["gold"][name][i], "turns": [[turn.role, turn.text] for turn in episodes[i].turns]}
                for name, episodes in said.items()
                if episodes[i] is not None
            },
        }
        for i in order
    ]


def _written(episode_id: str, prompt: Prompt, reply: str, bench: Bench) -> Episode:
    """A finished dialogue of one round whose reasoner says ``reply`` and whose planner says nothing but what ends it."""
    dialogue = Dialogue(bench.chat, bench.rules, prompt.question, prompt.fields)
    for role in bench.rules.roles:
        dialogue.add(_said(episode_id, role, reply if role is Role.REASONING else bench.rules.finish_marker or "", bench))
    return Episode(episode_id, prompt, 0, dialogue.turns, EpisodeStatus.FINISHED)


def _said(request_id: str, role: Role, text: str, bench: Bench) -> Completion:
    ids = chat_of(bench.chat, role).encode_message(text)
    return Completion(request_id, ids, (0.0,) * len(ids), StopReason.STOP, weight_version=0)


def _planting(prompts: Mapping[str, Prompt], finish_marker: str | None) -> Callable[[str, int, str], str]:
    def edit(question: str, round_index: int, plan: str) -> str:
        return texts.with_answer(plan, prompts[question], texts.wrong_answer(prompts[question]), finish_marker)

    return edit


def follows(episode: Episode) -> bool:
    replies = episode.turns_of(Role.REASONING)
    return bool(replies) and texts.says(replies[-1].text, episode.prompt, texts.wrong_answer(episode.prompt))


def _plans(episode: Episode) -> list[str]:
    return [turn.text for turn in episode.turns_of(Role.META_THINKING)]
