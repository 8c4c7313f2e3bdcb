"""The cold-start set repaired: views paired, the marker moved, contamination and wrong answers out, planners' answers as chosen."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rema.reward.answers import last_box, quick_verdict
from megatron_rema.reward.behaviour import states_answer
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dataset import WrittenDialogue, read_dialogues
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.repair import (
    CONTAMINATION,
    FAULTS,
    AnswerRules,
    PlannerAnswers,
    key_of,
    pair_views,
    read_gold_answers,
    read_role_views,
    repair,
    sentences,
)
from megatron_rema.rollout.traces import traces_of_dialogue
from megatron_rema.types import Role
from tests.real_data import math_file
from tests.unit.tiny_tokenizer import tiny_tokenizer

META, REASONING = Role.META_THINKING, Role.REASONING
ROOT = Path(__file__).parents[2]
ANSWERS = AnswerRules(last_box, states_answer, quick_verdict)


def dialogue(*texts: str, question: str = "What is 6 * 7?") -> WrittenDialogue:
    return WrittenDialogue(question, "", tuple(((META, REASONING)[i % 2], text) for i, text in enumerate(texts)))


def repaired(*dialogues: WrittenDialogue, **options):
    return repair(dialogues, **{"answers": ANSWERS, "finish_marker": "[FINISH]", **options})


def texts_of(dialogue: WrittenDialogue) -> list[str]:
    return [text for _, text in dialogue.turns]


def views_of(question: str, *texts: str) -> tuple[dict, dict]:
    """A dialogue as the published files tell it: one row for each role."""
    first = f"Question:\n{question}\n\nInstruction:\n{texts[0]}"
    pairs = ([question, *texts[:-1]], [first, *texts[1:]])
    return tuple(
        {"instruction": m[-2], "input": None, "output": m[-1], "system": s, "history": [m[i : i + 2] for i in range(0, len(m) - 2, 2)]}
        for m, s in zip(pairs, ("You think.", "You solve."), strict=True)
    )


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_views(folder: Path, *told: tuple[str, ...]) -> tuple[Path, Path]:
    metas, reasoners = zip(*(views_of(*one) for one in told), strict=True)
    return write(folder / "meta.jsonl", *metas), write(folder / "reasoner.jsonl", *reasoners)


PLAIN = ("What is 6 * 7?", "Multiply.", "6 * 7 = 42", "It is done. [FINISH]", "\\boxed{42} [FINISH]")
BRACES = ("A set {question} {instruction}?", "Use {question}.", "no", "Go on.", "\\boxed{1} [FINISH]")


def test_two_views_are_paired_into_the_dialogue_that_they_tell(tmp_path):
    meta, reasoner = write_views(tmp_path, PLAIN, BRACES)
    one, two = pair_views(read_role_views(meta), read_role_views(reasoner))
    assert (one.question, texts_of(one)) == (PLAIN[0], list(PLAIN[1:]))
    assert (two.question, texts_of(two)) == (BRACES[0], list(BRACES[1:]))
    assert [role for role, _ in one.turns] == [META, REASONING] * 2


def test_a_pair_that_differs_is_named_by_file_line_and_field(tmp_path):
    other = (PLAIN[0], "Multiply.", "6 * 7 = 41", *PLAIN[3:])
    longer = (PLAIN[0], "Look.", "ok", *PLAIN[1:])
    meta, reasoner = write_views(tmp_path, BRACES, PLAIN)
    metas, reasoners = read_role_views(meta), read_role_views(reasoner)
    for told, message in (
        (other, r"reasoner\.jsonl line 2: field 'history\[0\]\[1\]' is '6 \* 7 = 41' where .*meta\.jsonl line 2 makes it '6 \* 7 = 42'"),
        (("Another?", *PLAIN[1:]), r"reasoner\.jsonl line 2: field 'history\[0\]\[0\]' is 'Question:\\nAnother"),
        ((*PLAIN[:3], "Go.", PLAIN[4]), r"reasoner\.jsonl line 2: field 'instruction' is 'Go\.'"),
        (longer, r"meta\.jsonl line 2 has 2 rounds, .*reasoner\.jsonl line 2 has 3: field 'history'"),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        reasoner = write(tmp_path / "other" / "reasoner.jsonl", views_of(*BRACES)[1], views_of(*told)[1])
        with pytest.raises(ValueError, match=message):
            pair_views(metas, read_role_views(reasoner))
    with pytest.raises(ValueError, match=r"meta\.jsonl line 2 is the last of 2 rows, .*reasoner\.jsonl line 1 the last of 1"):
        pair_views(metas, reasoners[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, r"line 2: field 'output' must be text, got None"),
        ({"system": 3}, r"line 2: field 'system' must be text, got 3"),
        ({"history": "x"}, r"line 2: field 'history' must be a list of \[heard, said\] pairs, got 'x'"),
        ({"history": [["a", "b"], ["c"]]}, r"line 2: field 'history\[1\]' must be a pair of texts"),
        ({"history": [["a", 1]]}, r"line 2: field 'history\[0\]' must be a pair of texts"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, change, message):
    good = views_of(*PLAIN)[0]
    with pytest.raises(ValueError, match=rf"m\.jsonl {message}"):
        read_role_views(write(tmp_path / "m.jsonl", good, {**good, **change}))
    with pytest.raises(ValueError, match=r"line 2: field 'instruction' must be text, got None"):
        read_role_views(write(tmp_path / "m.jsonl", good, {k: v for k, v in good.items() if k != "instruction"}))
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_role_views(write(tmp_path / "m.jsonl", "{"))
    with pytest.raises(ValueError, match="no rows"):
        read_role_views(write(tmp_path / "m.jsonl"))


@pytest.mark.parametrize(
    ("last_plan", "expected", "change"),
    [
        ("All checked. [FINISH]", "All checked. [FINISH]", {}),
        ("[FINISH]", "[FINISH]", {}),
        ("All checked.", "All checked. [FINISH]", {"markers_added": 1}),
        ("[FINISH] All checked.", "All checked. [FINISH]", {"markers_moved_to_the_end": 1}),
        ("All checked.\nSo it is \\([FINISH]\\).", "All checked. [FINISH]", {"markers_moved_to_the_end": 1}),
        ("So [FINISH], [FINISH]", "So, [FINISH]", {}),
    ],
)
def test_the_marker_ends_the_planners_last_message_and_stands_nowhere_else(last_plan, expected, change):
    one = dialogue("Plan [FINISH] now.", "six [FINISH]", last_plan, "\\boxed{42} [FINISH]")
    result = repaired(one)
    assert texts_of(result.dialogues[0]) == ["Plan now.", "six", expected, "\\boxed{42}"]
    assert result.changes == Counter({"markers_removed/meta_thinking": 1, "markers_removed/reasoning": 2, **change})
    lacks = "[FINISH]" not in last_plan
    assert result.before["planner_last_lacks_marker"] == lacks
    assert result.before["planner_last_does_not_end_with_marker"] == (lacks or not last_plan.endswith("[FINISH]"))
    assert (result.before["planner_marker_too_early"], result.before["reasoner_says_marker"]) == (1, 1)
    assert result.after == Counter(dialogues=1)


def test_a_message_that_was_the_marker_alone_costs_the_dialogue_but_for_the_planners_last():
    result = repaired(dialogue("Plan.", "[FINISH]", "[FINISH]", "\\boxed{1}"), dialogue("Plan.", "six", "[FINISH]", "\\boxed{1}"))
    assert result.dropped == Counter(blank_message=1) and len(result.dialogues) == 1


CONTAMINATED = {
    "rewriting_task": [
        "Alright, let me classify the reasoning process into Meta-Thinking Agent (MTA) and Reasoning Agent (RA) roles.",
        "I must classify each of these reasoning steps.",
        "Let me categorize the solution's thought process.",
        "**Reasoning Agent** (`<reasoning>`), adhering to the rules.\n<meta_think",
        "Let me split the reasoning into the appropriate agents.",
    ],
    "unseen_solution": [
        "Let me analyze the given solution.",
        "Alright, let me carefully analyze the solution provided.",
        "Okay, this solution is lengthy and contains multiple steps attempting to resolve the problem.",
        "Okay, let's break down the solution step by step.",
        "Now for the puzzle. The solution appears to be long and detailed.",
    ],
}
CLEAN = [
    "Let me think about the meta structure: classify the triangles by their angles.",
    "Let us find each solution of the equation; this solution set is finite.",
    "We categorize the cases by parity, then reason about each.",
    "The solution of x + 1 = 2 is what we want. Break the problem into steps.",
    "Analyze the equation and solve it.",
    "The magenta and agenda items are counted twice.",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in CONTAMINATED.items() for text in texts])
def test_contaminated_dialogues_are_dropped_by_kind(kind, text):
    result = repaired(dialogue(text, "six", "Done.", "\\boxed{42}"), dialogue("Plan.", "six", "Done.", "\\boxed{42}"))
    assert result.dropped == {f"contaminated/{kind}": 1} and len(result.dialogues) == 1
    assert (result.before[f"contaminated/{kind}"], result.after[f"contaminated/{kind}"]) == (1, 0)
    others = [other for other in CONTAMINATION if other != kind]
    assert repaired(dialogue(text, "six", "Done.", "\\boxed{42}"), drop_contaminated=others).dropped == {}


@pytest.mark.parametrize("text", CLEAN)
def test_talk_about_the_problem_is_no_contamination(text):
    assert repaired(dialogue(text, "six", "Done.", "\\boxed{42}")).dropped == {}


def test_a_later_planner_may_speak_of_the_solution_but_nobody_of_the_rewriting_task():
    later = dialogue("Plan.", "6 * 7 = 42", "Let me review the solution.", "\\boxed{42}")
    assert repaired(later).dropped == {}
    reasoner = dialogue("Plan.", "As the Reasoning Agent, I multiply.", "Done.", "\\boxed{42}")
    assert repaired(reasoner).dropped == {"contaminated/rewriting_task": 1}


def test_the_answer_is_the_problems_own_where_known_else_the_last_box():
    told = [dialogue("Plan.", "\\boxed{41}", "Done.", f"So \\boxed{{{box}}}.") for box in ("42", "43")] + [dialogue("P.", "no box")]
    result = repaired(*told)
    assert [d.answer for d in result.dialogues] == ["42", "43"] and result.dropped == {"no_box_at_the_end": 1}
    result = repaired(*told, gold_answers={key_of("what is 6*7"): "42"})
    assert [d.answer for d in result.dialogues] == ["42"] and result.dropped == {"no_box_at_the_end": 1, "wrong_answer": 1}
    # \frac{84}{2} against 42 takes algebra, which is not asked for: kept, with the problem's own answer
    (kept,) = repaired(dialogue("Plan.", "\\boxed{\\frac{84}{2}}"), gold_answers={key_of("What is 6 * 7?"): "42"}).dialogues
    assert kept.answer == "42"


def test_gold_answers_leave_out_blank_and_contradicting_rows(tmp_path):
    rows = [("a?", "1"), ("b?", ""), ("c?", "2"), ("C ?", " 2 "), ("d?", "3"), ("D?", "4"), ("e?", 5)]
    path = write(tmp_path / "p.jsonl", *({"q": q, "a": a} for q, a in rows))
    assert read_gold_answers(path, question_key="q", answer_key="a") == {"a": "1", "c": "2", "e": "5"}
    with pytest.raises(ValueError, match=r"p\.jsonl line 1: field 'answer' is missing"):
        read_gold_answers(path, question_key="q", answer_key="answer")


LEAKY = dialogue(
    "Multiply. I guess that it is 42.",
    "6 * 7 = 42",
    "Check: \\[ 6 \\cdot 7\n = 42 \\] holds.\nThe rest, 142, is irrelevant! So 42. [FINISH]",
    "\\boxed{42}",
)


def test_planner_answers_are_reported_dropped_or_rewritten():
    kept = repaired(LEAKY)
    assert len(kept.dialogues) == 1 and texts_of(kept.dialogues[0])[0] == "Multiply. I guess that it is 42."
    for counts in (kept.before, kept.after):
        assert counts["planner_last_states_answer"] == counts["planner_states_answer_before_reasoner"] == 1
    assert repaired(LEAKY, planner_answers=PlannerAnswers.DROP).dropped == {"planner_states_answer": 1}

    result = repaired(LEAKY, planner_answers=PlannerAnswers.REWRITE)
    # two of the last message's three sentences hold 42 (the formula is not cut at its line end); 142 is another number
    assert texts_of(result.dialogues[0]) == ["Multiply.", "6 * 7 = 42", "The rest, 142, is irrelevant! [FINISH]", "\\boxed{42}"]
    assert result.changes == {"dialogues_rewritten": 1, "sentences_removed": 3}
    assert result.after == {"dialogues": 1}


def test_a_last_message_that_only_states_the_answer_becomes_the_marker_and_an_earlier_one_costs_the_dialogue():
    result = repaired(dialogue("Plan.", "42", "It is 42.", "\\boxed{42}"), planner_answers=PlannerAnswers.REWRITE)
    assert texts_of(result.dialogues[0])[2] == "[FINISH]" and result.changes["last_messages_left_with_the_marker_alone"] == 1
    result = repaired(dialogue("Is it 42?", "42", "Done.", "\\boxed{42}"), planner_answers=PlannerAnswers.REWRITE)
    assert result.dialogues == () and result.dropped == {"blank_message": 1}


def test_an_answer_that_the_question_holds_is_not_given_away():
    one = dialogue("Take the 7.", "ok", "It is 7.", "\\boxed{7}")
    for choice in PlannerAnswers:
        (kept,) = repaired(one, planner_answers=choice).dialogues
        assert texts_of(kept)[0] == "Take the 7."
    counts = repaired(one).before
    assert (counts["planner_states_answer"], counts["planner_states_answer_not_in_question"]) == (1, 0)


def test_an_answer_that_only_joined_sentences_state_is_not_left_behind():
    one = dialogue("Plan.", "x", "Done: \\boxed{4\n2} it is.", "\\boxed{42}")  # no line of it holds a box
    assert repaired(one, planner_answers=PlannerAnswers.REWRITE).dropped == {"rewriting_failed": 1}


def test_planner_speaks_before_reasoner_only_if_nobody_said_it_earlier():
    after = dialogue("Plan.", "6 * 7 = 42", "So 42.", "\\boxed{42}")
    before = dialogue("Plan.", "hm", "So 42.", "\\boxed{42}")
    assert [repaired(d).before["planner_states_answer_before_reasoner"] for d in (after, before)] == [0, 1]


FORMULAS = ["\\[ a.\n b \\]", "\\( 3. 4 \\)", "$$ c!\n $$"]


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(["One. ", "two\n", "\n\n", "3.5", "Is it?! ", "x ", *FORMULAS])).map("".join))
def test_sentences_joined_are_the_text_and_no_formula_is_cut(text):
    parts = sentences(text)
    assert "".join(parts) == text
    assert all(sum(part.count(formula) for part in parts) == text.count(formula) for formula in FORMULAS)
    bare = [re.sub("|".join(map(re.escape, FORMULAS)), "", part) for part in parts]
    assert all("\n" not in part.strip() and ". " not in part.strip() for part in bare)  # and every other one is


def test_unusable_options_are_errors_that_say_what_to_do():
    with pytest.raises(ValueError, match="finish_marker must hold text"):
        repaired(LEAKY, finish_marker=" ")
    with pytest.raises(ValueError, match=r"drop_contaminated names 'chatter'; the kinds are \['rewriting_task', 'unseen_solution'\]"):
        repaired(LEAKY, drop_contaminated=["chatter"])


def run_tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "repair_dialogues.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_tool_writes_what_the_cold_start_reads_and_prints_both_counts(tmp_path):
    out = tmp_path / "out.jsonl"
    told = PLAIN, (*PLAIN[:3], "It is 42.", PLAIN[4]), ("?", "Let me analyze the given solution.", "\\boxed{1} [FINISH]")
    done = run_tool(*write_views(tmp_path, *told), out, "--planner-answers", "rewrite")
    assert done.returncode == 0, done.stderr
    first, second = read_dialogues(out)
    assert (first.question, first.answer, texts_of(first)[-2:]) == (PLAIN[0], "42", ["It is done. [FINISH]", "\\boxed{42}"])
    assert texts_of(second)[-2] == "[FINISH]"
    cells = {
        name: [int(n) for n in re.findall(rf"{re.escape(name)}\s+\S\s+(\d+)\s+\S\s+(\d+)", done.stdout)[0]] for name in ("(all)", *FAULTS)
    }
    assert cells["(all)"] == [3, 2] and cells["views_with_system_prompt"] == [6, 0] and cells["reasoner_says_marker"] == [3, 0]
    assert cells["planner_last_states_answer"] == [1, 0] and cells["contaminated/unseen_solution"] == [1, 0]


def test_the_tool_refuses_in_one_line_and_writes_nothing(tmp_path):
    meta, reasoner = write_views(tmp_path, PLAIN)
    out = tmp_path / "out.jsonl"
    write(reasoner, views_of(*BRACES)[1])
    for arguments, message in (
        ((meta, reasoner, out), "reasoner.jsonl line 1: field 'history[0][0]'"),
        ((meta, tmp_path / "none.jsonl", out), "none.jsonl: no such file"),
        ((meta, reasoner, meta), "meta.jsonl exists; nothing is overwritten"),
        ((meta, reasoner, tmp_path / "no" / "out.jsonl"), "there is no folder"),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not out.exists()


def test_repaired_dialogues_get_rl_s_system_prompts():
    chat = ChatFormat(tiny_tokenizer("chatml"))
    rules = DialogueRules(
        max_turn_tokens=9, max_episode_tokens=9, max_context_tokens=9, system_prompts={META: "RL plans.", REASONING: "RL solves."}
    )
    (kept,) = repaired(dialogue(*PLAIN[1:])).dialogues
    for trace, prompt in zip(traces_of_dialogue(chat, rules, kept.question, kept.turns), ("RL plans.", "RL solves."), strict=True):
        assert chat.tokenizer.decode(trace.token_ids).startswith(f"<|im_start|>system\n{prompt}<|im_end|>\n")


@pytest.mark.parametrize(("choice", "num_left"), [("keep", 688), ("drop", 118), ("rewrite", 648)])
def test_the_published_set_is_repaired(choice, num_left):
    views = [read_role_views(math_file(f"mamrp_{name}.jsonl")) for name in ("meta_thinking", "reasoning")]
    gold = read_gold_answers(math_file("math_train_lv3to5_8k.parquet"), question_key="question", answer_key="ground_truth_answer")
    result = repaired(*pair_views(*views), planner_answers=PlannerAnswers(choice), gold_answers=gold)
    # counted before this tool was written: 804 reasoners say the marker, 597 planners do, 799 dialogues end with a box
    before = {name: result.before[name] for name in ("dialogues", "planner_last_lacks_marker", "reasoner_says_marker", "no_box_at_the_end")}
    assert before == {"dialogues": 804, "planner_last_lacks_marker": 207, "reasoner_says_marker": 804, "no_box_at_the_end": 5}
    assert len(result.dialogues) == num_left == 804 - result.dropped.total() == result.after["dialogues"]
    for dialogue in result.dialogues:
        texts = texts_of(dialogue)
        assert [("[FINISH]" in text) for text in texts] == [False] * (len(texts) - 2) + [True, False]
        assert texts[-2].endswith("[FINISH]") and all(texts) and last_box(texts[-1])
        told = " ".join(texts).lower()
        assert "meta-think" not in told and "(mta)" not in told and "reasoning agent" not in told
        leaks = any(states_answer(text, dialogue.answer) for text in texts[::2])
        assert choice == "keep" or not leaks or states_answer(dialogue.question, dialogue.answer)
    assert {name for name, count in result.after.items() if count} - {"dialogues"} <= {n for n in FAULTS if n.startswith("planner_")}
