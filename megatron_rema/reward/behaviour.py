"""How the two agents behave: counters over episodes that show gaming long before the reward does. Pure functions -> named metrics.

Every rate declares its denominator; a rate over nothing is left out. Words are split at white space; n-grams are of 4 words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from megatron_rema.reward.answers import last_box, last_letter
from megatron_rema.reward.components import final_answer
from megatron_rema.types import LETTERS, Action, AnswerFormat, Episode, EpisodeStatus, Role, Turn, Verdict

NGRAM = 4


def states_answer(text: str, gold: str, answer_format: AnswerFormat = AnswerFormat.BOXED) -> bool:
    """The gold answer stands in the text on its own (42, not the 42 of 142, 42.5 or x42), or the text holds a box.

    Of a judge: the text holds a letter in brackets, right or wrong. A plan that does dictates a choice between answers it has not seen;
    the bare letter is also a word, and says nothing.
    """
    if answer_format is AnswerFormat.LETTER:
        return last_letter(text) is not None
    gold = gold.strip()
    return last_box(text) is not None or re.search(rf"(?<![\w.]){re.escape(gold)}(?!\w|\.\d)", text) is not None


def leak_round(episode: Episode) -> int | None:
    """Round of the first meta-thinker message that states an answer (see `states_answer`); None when none does."""
    leaks = (turn.round_index for turn in episode.turns_of(Role.META_THINKING) if _states(episode, turn.text))
    return next(leaks, None)


def leaks_first(episode: Episode) -> bool:
    """The meta-thinker leaks what neither the question nor an earlier reasoner message says: it solves instead of planning."""
    if _states(episode, episode.prompt.question):
        return False
    for turn in episode.turns:
        if _states(episode, turn.text):
            return turn.role is Role.META_THINKING
    return False


def _states(episode: Episode, text: str) -> bool:
    return states_answer(text, episode.prompt.answer, episode.prompt.answer_format)


def copy_ratio(text: str, source: str) -> float | None:
    """Fraction of the n-grams of ``text`` that stand in ``source``; a text shorter than n words is one n-gram. None for no words."""
    words, source_words = text.split(), source.split()
    n = min(NGRAM, len(words))
    if n == 0:
        return None
    known = set(_ngrams(source_words, n))
    grams = _ngrams(words, n)
    return sum(gram in known for gram in grams) / len(grams)


def repetition(text: str) -> float | None:
    """Fraction of the n-grams of ``text`` that repeat an earlier one of it. None for fewer than n words."""
    grams = _ngrams(text.split(), NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else None


def behaviour_metrics(episodes: Sequence[Episode], finish_marker: str | None, *, json_actions: bool = False) -> dict[str, float]:
    """All counters, as ``behaviour/...`` metrics.

    Over episodes: end/*, finish_round*, meta_thinking/leak_*, reasoning/marker_rate (an end, a round, a leak, a marker in it).
    Over episodes that end in a judge's letter: reasoning/chose_a_rate (one half where the better answer, not the first one, is chosen).
    Over messages of the role: empty_rate, copy_ratio (against the partner's message just heard), repetition, tokens_per_turn.
    Over messages of the meta-thinker, with ``json_actions``: action_*_frac (invalid: cut before the action was whole), which sum to 1.
    """
    metrics: dict[str, float] = {}

    def mean(name: str, values: Sequence[float | None]) -> None:
        known = [value for value in values if value is not None]
        if known:
            metrics[f"behaviour/{name}"] = sum(known) / len(known)

    mean("turns_per_episode", [len(e.turns) for e in episodes])
    for status in EpisodeStatus:
        if not status.is_running:
            mean(f"end/{status}_frac", [e.status is status for e in episodes])
    finish_rounds = [e.turns[-1].round_index for e in episodes if e.status.is_finished]
    mean("finish_round_mean", finish_rounds)
    for round_index, count in sorted(Counter(finish_rounds).items()):
        metrics[f"behaviour/finish_round/{round_index}_frac"] = count / len(finish_rounds)

    planned = [e for e in episodes if e.turns_of(Role.META_THINKING)]
    leaks = [leak_round(e) for e in planned]
    mean("meta_thinking/leak_rate", [leak is not None for leak in leaks])
    mean("meta_thinking/leak_first_rate", [leaks_first(e) for e in planned])
    mean("meta_thinking/leak_round_mean", leaks)
    for name, leaked in (("accuracy_given_leak", True), ("accuracy_given_no_leak", False)):
        alike = [e.verdict for e, leak in zip(planned, leaks, strict=True) if (leak is not None) is leaked]
        mean(f"meta_thinking/{name}", [verdict is Verdict.CORRECT for verdict in alike if verdict in (Verdict.CORRECT, Verdict.WRONG)])
    letters = [final_answer(e) for e in episodes if e.prompt.answer_format is AnswerFormat.LETTER]
    mean("reasoning/chose_a_rate", [letter == LETTERS[0] for letter in letters if letter is not None])
    if finish_marker is not None:
        answered = [e for e in planned if e.turns_of(Role.REASONING)]
        mean("reasoning/marker_rate", [any(finish_marker in t.text for t in e.turns_of(Role.REASONING)) for e in answered])

    if json_actions:
        actions = [turn.action for e in planned for turn in e.turns_of(Role.META_THINKING)]
        for action in (*Action, None):
            mean(f"action_{'invalid' if action is None else action.lower()}_frac", [said is action for said in actions])

    for role in Role:
        turns = [turn for e in episodes for turn in e.turns_of(role)]
        texts = [turn.text.replace(finish_marker, "") if finish_marker else turn.text for turn in turns]
        mean(f"{role}/empty_rate", [not text.strip() for text in texts])
        mean(f"{role}/repetition", [repetition(text) for text in texts])
        mean(f"{role}/tokens_per_turn", [len(turn.completion.token_ids) for turn in turns])
        mean(f"{role}/copy_ratio", [copy_ratio(turn.text, heard.text) for e in episodes for heard, turn in _replies(e, role)])
    return metrics


def _replies(episode: Episode, role: Role) -> list[tuple[Turn, Turn]]:
    """(the partner's message just heard, the role's message) of each of the role's replies."""
    pairs = zip(episode.turns, episode.turns[1:], strict=False)
    return [(heard, turn) for heard, turn in pairs if turn.role is role and heard.role is not role]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
