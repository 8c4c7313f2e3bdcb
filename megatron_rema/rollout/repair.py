"""Repair of the published cold-start set: two files of role views in, our own dialogues and counts before and after out.

A row of either file is one dialogue as one role saw it: {"instruction", "output", "system", "history": [[heard, said], ...]}.
    meta-thinker   hears the question, then the reasoner                says m_1, m_2, ..., m_K
    reasoner       hears question and m_1 in one, then m_2, ...         says y_1, y_2, ..., y_K

What the set teaches wrongly, and what is done about it:
    marker           the reasoner learns to say it, a quarter of the planners do not: it ends the planner's last message, no other
    system prompts   others than those of RL: dialogues carry none, both the cold start and RL take theirs from the configuration
    contamination    talk about the task that the set was made by (CONTAMINATION): the dialogue is dropped
    answers          no box at the end, or another answer than the problem's own where that is known: the dialogue is dropped
    planner answers  the planner says what the reasoner is there to find: reported, and by choice dropped or rewritten

The gold answer of a dialogue is its problem's own where a file of problems holds the question, else the reasoner's last box: that is
what the training reward reads. What counts as an answer is asked of functions (``AnswerRules``), so that it is what the reward says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_rema.reading import brief, whole_text
from megatron_rema.rollout.dataset import WrittenDialogue, rows_of, text_field
from megatron_rema.types import Role, Verdict

# Talk about making the set, by kind: what was asked of the rewriter, in any message; and, in the planner's first message, a finished
# solution that nobody has shown to it (in RL there is none to "analyze"). Later a planner may well speak of "the solution".
_REWRITER = re.compile(
    r"meta[-_ ]?think|\bMTA\b|\bagents?\b"
    r"|\b(?:classify|classifying|categoriz(?:e|ing))\W+(?:\w+\W+){0,6}?(?:reasoning|thought|thinking)",
    re.IGNORECASE,
)
_SOURCE_SOLUTION = re.compile(
    r"\b(?:this|provided|given|above|lengthy|original) (?:\w+ )?solution\b(?! set)"
    r"|\bsolution (?:provided|given|presented)\b"
    r"|\b(?:analy[sz]\w+|break\w*(?: down)?|dissect\w*|(?:go|step) through|review\w*) (?:and \w+ (?:down )?)?"
    r"(?:the|this) (?:\w+ )?(?:solution|reasoning process)\b"
    r"|\bthe solution (?:appears|seems|suggests|was|is lengthy|is quite|starts|uses|contains)\b",
    re.IGNORECASE,
)
CONTAMINATION: Mapping[str, Callable[[WrittenDialogue], bool]] = {
    "rewriting_task": lambda dialogue: any(_REWRITER.search(text) for _, text in dialogue.turns),
    "unseen_solution": lambda dialogue: _SOURCE_SOLUTION.search(dialogue.turns[0][1]) is not None,
}


class PlannerAnswers(StrEnum):
    """What to do with a dialogue in which a planner's message states the answer that its question does not."""

    KEEP = "keep"
    DROP = "drop"
    REWRITE = "rewrite"  # the sentences that state it are removed


@dataclass(frozen=True)
class AnswerRules:
    """What an answer is, as the reward sees it."""

    box_of: Callable[[str], str | None]  # content of a message's last box
    states: Callable[[str, str], bool]  # (text, answer): the text gives the answer away
    judge: Callable[[str, str], Verdict | None]  # (message, gold answer): None when it takes more than a comparison


@dataclass(frozen=True)
class RoleView:
    """One dialogue as one role saw it: ``messages`` are heard, said, heard, said, ..."""

    where: str  # file and line, for errors
    system: str
    messages: tuple[str, ...]

    @property
    def heard(self) -> tuple[str, ...]:
        return self.messages[::2]

    @property
    def said(self) -> tuple[str, ...]:
        return self.messages[1::2]


@dataclass(frozen=True)
class Repaired:
    """``before`` and ``after`` count the same faults, by the same functions; ``dropped`` gives each lost dialogue one reason."""

    dialogues: tuple[WrittenDialogue, ...]
    before: Counter[str]
    after: Counter[str]
    dropped: Counter[str]
    changes: Counter[str]


def read_role_views(path: str | Path) -> list[RoleView]:
    """One of the two files. A bad row is a ValueError that names file, line and field."""
    views = [RoleView(where, _string(row, "system", where), _messages(row, where)) for where, _, row in rows_of(path)]
    if not views:
        raise ValueError(f"{path}: no rows. Give a file with at least one dialogue.")
    return views


def read_gold_answers(path: str | Path, *, question_key: str, answer_key: str) -> dict[str, str]:
    """Answers of a file of problems by the ``key_of`` their question. Rows with a blank answer, and questions with two, say nothing."""
    found: dict[str, set[str]] = {}
    for where, _, row in rows_of(path):
        if not (isinstance(row.get(answer_key), str) and not row[answer_key].strip()):
            found.setdefault(key_of(text_field(row, question_key, where)), set()).add(text_field(row, answer_key, where).strip())
    return {key: next(iter(answers)) for key, answers in found.items() if len(answers) == 1}


def pair_views(meta_thinking: Sequence[RoleView], reasoning: Sequence[RoleView]) -> list[WrittenDialogue]:
    """One dialogue for each pair of rows, the answer not yet known (""). Both files must tell the same dialogues in the same order."""
    if len(meta_thinking) != len(reasoning):
        raise ValueError(
            f"{meta_thinking[-1].where} is the last of {len(meta_thinking)} rows, {reasoning[-1].where} the last of {len(reasoning)}: "
            "both files must hold one row for each dialogue; give two files of one set."
        )
    return [_pair(meta, reasoner) for meta, reasoner in zip(meta_thinking, reasoning, strict=True)]


def repair(
    dialogues: Sequence[WrittenDialogue],
    *,
    answers: AnswerRules,
    finish_marker: str,
    planner_answers: PlannerAnswers = PlannerAnswers.KEEP,
    gold_answers: Mapping[str, str] | None = None,
    drop_contaminated: Sequence[str] = tuple(CONTAMINATION),
    num_system_prompts: int = 0,
) -> Repaired:
    """Repaired dialogues in their order. ``gold_answers``: by ``key_of`` the question.

    ``num_system_prompts``: role views that came with a system prompt of their own; no dialogue keeps one.
    """
    if not finish_marker.strip():
        raise ValueError(f"finish_marker must hold text, got {finish_marker!r}: give the marker of the task, [FINISH] for instance.")
    if unknown := sorted(set(drop_contaminated) - set(CONTAMINATION)):
        raise ValueError(f"drop_contaminated names {unknown[0]!r}; the kinds are {sorted(CONTAMINATION)}.")
    gold_answers = gold_answers or {}
    known = [_with_answer(dialogue, answers, gold_answers) for dialogue in dialogues]
    kept: list[WrittenDialogue] = []
    dropped, changes = Counter[str](), Counter[str]()
    for dialogue in known:
        reason = _reason_to_drop(dialogue, answers, drop_contaminated)
        if reason is None:
            changed, steps = _place_marker(dialogue, finish_marker)
            if planner_answers is not PlannerAnswers.KEEP and _gives_away(changed, answers):
                if planner_answers is PlannerAnswers.DROP:
                    reason = "planner_states_answer"
                else:
                    changed, more = _without_answers(changed, answers, finish_marker)
                    steps += more
                    reason = "rewriting_failed" if _gives_away(changed, answers) else None
            reason = reason or ("blank_message" if any(not text for _, text in changed.turns) else None)
        if reason is None:
            kept.append(changed)
            changes += steps
        else:
            dropped[reason] += 1
    before = faults(known, answers, finish_marker) + Counter(views_with_system_prompt=num_system_prompts)
    return Repaired(tuple(kept), before, faults(kept, answers, finish_marker), dropped, changes)


def faults(dialogues: Sequence[WrittenDialogue], answers: AnswerRules, finish_marker: str) -> Counter[str]:
    """How many dialogues hold each fault, by name; "dialogues" is how many there are. An answer of "" is not known."""
    counts = Counter(dialogues=len(dialogues))
    for dialogue in dialogues:
        counts.update(name for name, has in _FAULTS.items() if has(dialogue, answers, finish_marker))
        counts.update(f"contaminated/{kind}" for kind, is_contaminated in CONTAMINATION.items() if is_contaminated(dialogue))
    return counts


def key_of(question: str) -> str:
    """The same for two spellings of a question that differ in case, white space and punctuation only."""
    return re.sub(r"[\W_]+", "", question.lower())


def _said(dialogue: WrittenDialogue, role: Role) -> list[str]:
    return [text for speaker, text in dialogue.turns if speaker is role]


def _planner_states(dialogue: WrittenDialogue, answers: AnswerRules, messages: Sequence[str]) -> bool:
    return bool(dialogue.answer) and any(answers.states(text, dialogue.answer) for text in messages)


def _states_before_reasoner(dialogue: WrittenDialogue, answers: AnswerRules) -> bool:
    """The planner solved instead of planning: its message is the first that holds an answer which the question does not."""
    if not _gives_away(dialogue, answers):
        return False
    return next(role for role, text in dialogue.turns if answers.states(text, dialogue.answer)) is Role.META_THINKING


def _gives_away(dialogue: WrittenDialogue, answers: AnswerRules) -> bool:
    """A planner's message states the answer, the question does not. What the question holds already nobody gives away."""
    said = _said(dialogue, Role.META_THINKING)
    return _planner_states(dialogue, answers, said) and not answers.states(dialogue.question, dialogue.answer)


_FAULTS: Mapping[str, Callable[[WrittenDialogue, AnswerRules, str], bool]] = {
    "planner_last_lacks_marker": lambda d, _, marker: marker not in d.turns[-2][1],
    "planner_last_does_not_end_with_marker": lambda d, _, marker: not d.turns[-2][1].rstrip().endswith(marker),
    "planner_marker_too_early": lambda d, _, marker: any(marker in text for text in _said(d, Role.META_THINKING)[:-1]),
    "reasoner_says_marker": lambda d, _, marker: any(marker in text for text in _said(d, Role.REASONING)),
    "no_box_at_the_end": lambda d, answers, _: answers.box_of(d.turns[-1][1]) is None,
    "wrong_answer": lambda d, answers, _: bool(d.answer) and answers.judge(d.turns[-1][1], d.answer) is Verdict.WRONG,
    "planner_last_states_answer": lambda d, answers, _: _planner_states(d, answers, [d.turns[-2][1]]),
    "planner_states_answer": lambda d, answers, _: _planner_states(d, answers, _said(d, Role.META_THINKING)),
    "planner_states_answer_not_in_question": lambda d, answers, _: _gives_away(d, answers),
    "planner_states_answer_before_reasoner": lambda d, answers, _: _states_before_reasoner(d, answers),
}
FAULTS = ("views_with_system_prompt", *_FAULTS, *(f"contaminated/{kind}" for kind in CONTAMINATION))  # rows of a table, in order


def _with_answer(dialogue: WrittenDialogue, answers: AnswerRules, gold_answers: Mapping[str, str]) -> WrittenDialogue:
    box = (answers.box_of(dialogue.turns[-1][1]) or "").strip()
    return replace(dialogue, answer=gold_answers.get(key_of(dialogue.question), box))


def _reason_to_drop(dialogue: WrittenDialogue, answers: AnswerRules, kinds: Sequence[str]) -> str | None:
    final = dialogue.turns[-1][1]
    if not (answers.box_of(final) or "").strip():
        return "no_box_at_the_end"
    if answers.judge(final, dialogue.answer) is Verdict.WRONG:
        return "wrong_answer"
    return next((f"contaminated/{kind}" for kind in kinds if CONTAMINATION[kind](dialogue)), None)


def _place_marker(dialogue: WrittenDialogue, marker: str) -> tuple[WrittenDialogue, Counter[str]]:
    """The marker ends the planner's last message, on its own if nothing else is left of it, and stands nowhere else."""
    counts = Counter[str]()
    turns: list[tuple[Role, str]] = []
    last_plan = len(dialogue.turns) - 2
    for number, (role, text) in enumerate(dialogue.turns):
        plain = _without_marker(text, marker)
        if number == last_plan:
            if marker not in text:
                counts["markers_added"] += 1
            elif not text.rstrip().endswith(marker):
                counts["markers_moved_to_the_end"] += 1
            plain = f"{plain} {marker}".lstrip()
        elif marker in text:
            counts[f"markers_removed/{role}"] += 1
        turns.append((role, plain))
    return replace(dialogue, turns=tuple(turns)), counts


def _without_marker(text: str, marker: str) -> str:
    """A sentence that has the marker for its formula ("the answer is \\([FINISH]\\).") goes with it."""
    literal = re.escape(marker)
    text = "".join(s for s in sentences(text) if not re.search(rf"\\\(\s*{literal}\s*\\\)|\$\s*{literal}\s*\$", s))
    *before, rest = text.split(marker)
    return "".join([*(part.rstrip(" \t") for part in before), rest]).strip()


def _without_answers(dialogue: WrittenDialogue, answers: AnswerRules, marker: str) -> tuple[WrittenDialogue, Counter[str]]:
    """Planner sentences that state the answer are removed; an earlier message of which nothing is left is "", the last keeps the marker."""
    counts = Counter[str](dialogues_rewritten=1)
    turns: list[tuple[Role, str]] = []
    last_plan = len(dialogue.turns) - 2
    for number, (role, text) in enumerate(dialogue.turns):
        if role is Role.META_THINKING and answers.states(text, dialogue.answer):
            said = sentences(_without_marker(text, marker))
            kept = [sentence for sentence in said if not answers.states(sentence, dialogue.answer)]
            counts["sentences_removed"] += len(said) - len(kept)
            text = "".join(kept).strip()
            if number == last_plan:
                counts["last_messages_left_with_the_marker_alone"] += not text
                text = f"{text} {marker}".lstrip()
        turns.append((role, text))
    return replace(dialogue, turns=tuple(turns)), counts


_FORMULAS = {"\\[": "\\]", "\\(": "\\)", "$$": "$$"}
_MARK = re.compile(r"\\\[|\\\(|\$\$|([.!?]+)(\s*)|\n+")  # where a formula may begin or a sentence end


def sentences(text: str) -> list[str]:
    """Sentences with the white space after them; joined they are the text. Lines end one too, but no formula is cut.

    One pass, however many formulas are opened and never closed: the text is a model's.
    """
    found: list[str] = []
    start = place = 0
    never_closed: set[str] = set()
    while (mark := _MARK.search(text, place)) is not None:
        opener = mark[0]
        if opener in _FORMULAS:
            end = -1 if opener in never_closed else text.find(_FORMULAS[opener], mark.end())
            if end < 0:
                never_closed.add(opener)
            place = mark.start() + 1 if end < 0 else end + len(_FORMULAS[opener])
            continue
        stops, space = mark[1], mark[2]
        ends = stops is None or bool(space) or mark.end() == len(text)
        if ends and (mark.start() > start or len(stops or opener) > 1):  # a sentence is more than the sign that ends it
            found.append(text[start : mark.end()])
            start = place = mark.end()
        else:
            place = mark.start() + 1 if ends else mark.end()
    return [*found, text[start:]] if start < len(text) else found


def _pair(meta: RoleView, reasoner: RoleView) -> WrittenDialogue:
    if len(meta.messages) != len(reasoner.messages):
        raise ValueError(
            f"{meta.where} has {len(meta.said)} rounds, {reasoner.where} has {len(reasoner.said)}: field 'history' must tell the same "
            "dialogue in both files, in the same order; give two files of one set."
        )
    question, *answered = meta.heard
    first = f"Question:\n{question}\n\nInstruction:\n{meta.said[0]}"  # as the published file has it, whatever RL uses
    expected = ((first, *meta.said[1:]), (*answered, reasoner.said[-1]))
    for got, want, side in ((reasoner.heard, expected[0], 0), (reasoner.said, expected[1], 1)):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if a != b:
                raise ValueError(
                    f"{reasoner.where}: field {_field(i, side, len(got))!r} is {brief(a)} where {meta.where} makes it {brief(b)}: "
                    "both files must tell the same dialogues in the same order; give two files of one set."
                )
    turns = [turn for m, y in zip(meta.said, reasoner.said, strict=True) for turn in ((Role.META_THINKING, m), (Role.REASONING, y))]
    return WrittenDialogue(question, "", tuple(turns))


def _field(round_index: int, side: int, num_rounds: int) -> str:
    return ("instruction", "output")[side] if round_index == num_rounds - 1 else f"history[{round_index}][{side}]"


def _messages(row: dict[str, Any], where: str) -> tuple[str, ...]:
    history = row.get("history")
    if not isinstance(history, list):
        raise ValueError(f"{where}: field 'history' must be a list of [heard, said] pairs, got {brief(history)}.")
    messages: list[str] = []
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"{where}: field 'history[{i}]' must be a pair of texts [heard, said], got {brief(pair)}.")
        messages += (whole_text(text, where, f"history[{i}]") for text in pair)
    return (*messages, _string(row, "instruction", where), _string(row, "output", where))


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(
            f"{where}: field {key!r} must be text, got {brief(row.get(key))}; a row has instruction, output, system and history."
        )
    return whole_text(row[key], where, key)
