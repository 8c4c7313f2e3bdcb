"""The judge's task: rows and both orders of them, who sees what, letters as answers, and what both orders say of a judge."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_rema.report.judging import Pair, judging
from megatron_rema.reward.answers import last_letter, letter_verdict
from megatron_rema.reward.assign import assign
from megatron_rema.reward.behaviour import behaviour_metrics, leak_round
from megatron_rema.reward.components import final_answer
from megatron_rema.reward.math_verifier import Judgement, VerifierPool
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dataset import read_dialogues, read_pairs
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.judge import in_both_orders, read_comparisons, swapped
from megatron_rema.rollout.scheduler import TurnScheduler
from megatron_rema.rollout.traces import traces_of, traces_of_dialogue
from megatron_rema.types import AnswerFormat, Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn, Verdict
from tests.unit.tiny_tokenizer import tiny_tokenizer

META, REASONING = Role.META_THINKING, Role.REASONING
CHAT = ChatFormat(tiny_tokenizer("chatml"))
ROW = {
    "question": "Why is the sky blue?",
    "answer_a": "Because of xylophones.",
    "answer_b": "Rayleigh {instruction} quokkas.",
    "label": "B",
}
GIVEN = Prompt(
    "f-1", ROW["question"], "B", answer_format=AnswerFormat.LETTER, fields={k: ROW[k] for k in ("answer_a", "answer_b")}, pair_id="f-1"
)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# rows


def test_a_row_is_one_comparison_and_both_orders_exchange_answers_and_label(tmp_path):
    (given,) = read_comparisons(write(tmp_path / "f.jsonl", ROW))
    assert given == GIVEN and not given.is_swapped
    other = swapped(given)
    assert other.fields == {"answer_a": ROW["answer_b"], "answer_b": ROW["answer_a"]} and other.answer == "A"
    assert (other.prompt_id, other.pair_id, other.is_swapped) == ("f-1-swapped", "f-1", True)
    assert in_both_orders([given]) == [given, other]
    assert not Prompt("p", "q", "a").is_swapped, "a problem is no comparison"


def test_the_limit_counts_rows_and_keys_are_options(tmp_path):
    row = {"q": "x", "answer_a": "1", "answer_b": 2, "better": "A", "level": 3, "subset": "hard"}
    prompts = read_comparisons(write(tmp_path / "f.jsonl", row, row, row), question_key="q", label_key="better", limit=2)
    assert [(p.prompt_id, p.answer, p.level, p.subset, p.fields["answer_b"]) for p in prompts] == [
        ("f-1", "A", 3, "hard", "2"), ("f-2", "A", 3, "hard", "2"),
    ]  # fmt: skip


def test_parquet_rows_read_like_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "f.parquet")
    assert read_comparisons(tmp_path / "f.parquet") == [GIVEN]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "C"}, r"f\.jsonl line 2: field 'label' must be one of \['A', 'B'\], got 'C'"),
        ({"label": "a"}, r"line 2: field 'label' must be one of"),
        ({"label": None}, r"line 2: field 'label' must be text that is not blank, got None"),
        ({"answer_b": " "}, r"line 2: field 'answer_b' must be text that is not blank"),
        ({"answer_a": ["x"]}, r"line 2: field 'answer_a' must be text"),
        ({"question": ""}, r"line 2: field 'question' must be text"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_comparisons(write(tmp_path / "f.jsonl", ROW, {**ROW, **change}))


def test_a_missing_answer_is_named(tmp_path):
    short = {key: value for key, value in ROW.items() if key != "answer_a"}
    with pytest.raises(ValueError, match=r"line 1: field 'answer_a' is missing"):
        read_comparisons(write(tmp_path / "f.jsonl", short))
    turns = [{"role": "meta_thinking", "text": "plan"}, {"role": "reasoning", "text": "[[A]]"}]
    with pytest.raises(ValueError, match=r"line 1: field 'answer_a' is missing"):
        read_dialogues(write(tmp_path / "d.jsonl", {**short, "answer": "A", "turns": turns}), field_keys=("answer_a",))
    with pytest.raises(ValueError, match=r"line 1: field 'answer_a' is missing"):
        read_pairs(write(tmp_path / "p.jsonl", {**short, "chosen": turns, "rejected": turns}), field_keys=("answer_a",))


# views


def rules(**changes) -> DialogueRules:
    settings = {"max_rounds": 1, "max_turn_tokens": 100, "max_episode_tokens": 1000, "max_context_tokens": 1000, "finish_marker": None}
    template = "{question}|{answer_a}|{answer_b}|{instruction}"
    return DialogueRules(**{**settings, "reasoner_template": template, "solo_template": "{question}|{answer_a}|{answer_b}", **changes})


def play(prompt: Prompt, the_rules: DialogueRules, *messages: str) -> Episode:
    scheduler = TurnScheduler([(prompt, 0)], rules=the_rules, chat=CHAT, seed=0, step=0)
    for message in messages:
        (request,) = scheduler.next_requests()
        ids = CHAT.encode_message(message)
        scheduler.accept(Completion(request.request_id, ids, (-1.0,) * len(ids), StopReason.STOP, 0))
    assert scheduler.is_done
    return scheduler.episodes[0]


@pytest.mark.parametrize("prompt", in_both_orders([GIVEN]), ids=["as given", "swapped"])
def test_the_meta_thinker_never_sees_the_answers_and_the_reasoner_sees_both_in_order(prompt):
    meta, reasoner = traces_of(play(prompt, rules(), "Check the physics.", "[[B]]"))
    seen = CHAT.tokenizer.decode(list(meta.token_ids))
    assert ROW["question"] in seen and "xylophones" not in seen and "quokkas" not in seen
    # not even in its number of tokens: the same view whatever the answers are
    other = replace(prompt, fields={"answer_a": "short", "answer_b": "very " * 30})
    assert traces_of(play(other, rules(), "Check the physics.", "[[B]]"))[0].token_ids == meta.token_ids
    a, b = prompt.fields["answer_a"], prompt.fields["answer_b"]
    # braces inside an answer stay as they are
    assert f"{ROW['question']}|{a}|{b}|Check the physics." in CHAT.tokenizer.decode(list(reasoner.token_ids))


def test_over_several_rounds_the_meta_thinker_hears_of_the_answers_what_the_reasoner_says_and_no_more():
    episode = play(GIVEN, rules(max_rounds=2), "Check.", "B speaks of quokkas.", "Decide.", "[[B]]")
    first, second = episode.turns_of(META)
    assert "quokkas" not in CHAT.tokenizer.decode(list(first.context_token_ids))
    assert "xylophones" not in CHAT.tokenizer.decode([*first.context_token_ids, *second.context_token_ids])


def test_a_judge_alone_sees_question_and_answers():
    (trace,) = traces_of(play(GIVEN, rules(roles=(REASONING,)), "[[B]]"))
    text = CHAT.tokenizer.decode(list(trace.token_ids))
    assert f"user\n{ROW['question']}|{ROW['answer_a']}|{ROW['answer_b']}<|im_end|>" in text


def test_a_written_dialogue_of_a_judge_has_the_tokens_of_play():
    written = [(META, "Check the physics."), (REASONING, "[[B]]")]
    played = traces_of(play(GIVEN, rules(), *(text for _, text in written)))
    taught = traces_of_dialogue(CHAT, rules(), GIVEN.question, written, fields=GIVEN.fields)
    assert [t.token_ids for t in taught] == [t.token_ids for t in played]


def test_a_lone_template_without_the_question_is_refused():
    with pytest.raises(ValueError, match=r"solo_template must hold \{question\}, got '\{answer_a\}'"):
        rules(solo_template="{answer_a}")


def test_episodes_survive_their_file_and_old_files_can_be_read():
    episode = play(swapped(GIVEN), rules(), "Check.", "[[B]]")
    row = json.loads(json.dumps(episode.to_json()))
    again = Episode.from_json(row)
    assert again == episode and again.prompt.answer_format is AnswerFormat.LETTER
    for name in ("answer_format", "fields", "pair_id"):  # a file from before a prompt had them
        del row["prompt"][name]
    old = Episode.from_json(row).prompt
    assert (old.answer_format, old.fields, old.pair_id) == (AnswerFormat.BOXED, {}, "")


# verdicts


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("[[A]]", "A"),
        ("so the verdict is [[B]].", "B"),
        ("[[A]] if A is better, [[B]] if B is. B errs. [[A]]", "A"),  # the last one counts
        ("[[A]] or rather [[B]]", "B"),
        ("[[[A]]]", "A"),
        ("[[a]] [[ A ]] [A] [[C]] [[AB]] A \\boxed{A}", None),
        ("", None),
    ],
)
def test_the_last_letter_in_double_brackets_is_the_verdict(text, letter):
    assert last_letter(text) == letter
    assert letter_verdict(text, "A") is (Verdict.CORRECT if letter == "A" else Verdict.WRONG)


def test_a_label_that_is_no_letter_decides_nothing():
    assert letter_verdict("[[A]]", "tie") is Verdict.UNKNOWN


def judged(prompt: Prompt, plan: str | None, said: str, status=EpisodeStatus.FINISHED) -> Episode:
    turns = [
        Turn(role, 0, (1,), Completion("", (1, 2), (-1.0, -1.0), StopReason.STOP, 0), text)
        for role, text in ((META, plan), (REASONING, said))
        if text is not None
    ]
    return Episode(f"{prompt.prompt_id}/{said}", prompt, 0, turns, status)


def test_letters_are_judged_by_the_same_pool_without_a_process_beside_boxed_answers():
    right, wrong = judged(GIVEN, "p", "[[A]] no, [[B]]"), judged(swapped(GIVEN), "p", "[[B]]")
    silent, boxed = judged(GIVEN, "p", "\\boxed{B}"), judged(Prompt("m", "1 + 1", "2"), "p", "\\boxed{2}")
    with VerifierPool(1) as pool:
        for episode in (right, wrong, silent, boxed):
            pool.submit(episode)
        found = pool.collect()
        assert pool._processes == []
    assert found[right.episode_id] == Judgement(Verdict.CORRECT, None, "quick")
    assert found[wrong.episode_id] == found[silent.episode_id] == Judgement(Verdict.WRONG, None, "quick")
    assert found[boxed.episode_id].verdict is Verdict.CORRECT


@pytest.mark.parametrize(
    ("plan", "said", "verdict", "meta", "reasoner"),
    [
        ("Check.", "[[B]]", Verdict.CORRECT, 1.0, 1.0),
        ("Check.", "[[A]]", Verdict.WRONG, 0.0, -0.5),
        ("Check.", "\\boxed{B}", Verdict.WRONG, 0.0, -1.0),  # not the format of this task
        ("Say [[A]].", "[[B]]", Verdict.CORRECT, -1.0, 1.0),  # a plan that dictates a letter, any letter, pays
        ("Look at \\boxed{B}.", "[[B]]", Verdict.CORRECT, 1.0, 1.0),
    ],
)
def test_the_base_scheme_pays_by_verdict_and_by_the_format_of_letters(plan, said, verdict, meta, reasoner):
    one = judged(GIVEN, plan, said)
    assign([one], {one.episode_id: Judgement(verdict, None, "quick")}, scheme="base")
    assert one.turn_rewards == {META: [meta], REASONING: [reasoner]}


def test_a_leak_is_a_letter_in_the_plan_and_the_choice_of_a_is_counted():
    clean, dictated = judged(GIVEN, "A good answer names a cause.", "[[B]]"), judged(GIVEN, "Answer [[A]].", "[[A]]")
    none, boxed = judged(GIVEN, "Check B.", "no idea"), judged(Prompt("m", "1 + 1", "2"), "add", "[[A]]")
    assert [leak_round(e) for e in (clean, dictated, none)] == [None, 0, None], "a bare A is a word"
    assert final_answer(boxed) is None and final_answer(dictated) == "A"
    metrics = behaviour_metrics([clean, dictated, none, boxed], None)
    assert metrics["behaviour/meta_thinking/leak_rate"] == metrics["behaviour/meta_thinking/leak_first_rate"] == 0.25
    assert metrics["behaviour/reasoning/chose_a_rate"] == 0.5  # of B and A
    assert "behaviour/reasoning/chose_a_rate" not in behaviour_metrics([boxed, none], None)


# both orders


def test_a_judge_without_bias_and_one_with_nothing_else():
    # the right answer's letter is A as given, hence B swapped
    fair = judging([Pair("A", ["A"], ["B"])] * 4)
    assert (fair.as_given.mean, fair.swapped.mean, fair.strict.mean, fair.same_letter.mean, fair.chose_a.mean) == (1.0, 1.0, 1.0, 0.0, 0.5)
    always_a = judging([Pair("A", ["A"], ["A"]), Pair("B", ["A"], ["A"])])
    assert (always_a.as_given.mean, always_a.swapped.mean) == (0.5, 0.5)  # half right by luck, never in both orders
    assert (always_a.strict.mean, always_a.same_letter.mean, always_a.chose_a.mean) == (0.0, 1.0, 1.0)


def test_the_figures_of_four_pairs_by_hand():
    found = judging(
        [
            Pair("A", ["A"], ["B"]),  # right in both orders
            Pair("B", ["B"], ["B"]),  # right as given; the same letter twice
            Pair("A", ["B"], [None]),  # wrong, and no letter when swapped: no same letter to speak of, but one B
            Pair("B", ["A"], ["B"]),  # wrong in both orders: the same wrong answer, no bias
            Pair("A", ["A"], []),  # one order only: left out
        ]
    )
    assert found.num_pairs == 4 and found.answered_frac == 7 / 8
    assert found.as_given.mean == 2 / 4 and found.swapped.mean == 1 / 4 and found.strict.mean == 1 / 4
    assert found.same_letter.mean == pytest.approx(1 / 3)  # of the three pairs with a letter in both orders
    assert found.chose_a.mean == pytest.approx((1 / 2 + 0 + 0 + 1 / 2) / 4)
    for estimate in (found.as_given, found.swapped, found.strict, found.same_letter, found.chose_a):
        assert estimate.low <= estimate.mean <= estimate.high and estimate.low < estimate.high


def test_with_several_samples_every_pairing_of_the_two_orders_counts():
    # as given right 2 of 3, swapped right (B) 1 of 2: both right in 2/3 * 1/2 = 1/3 of the six pairings
    found = judging([Pair("A", ["A", "A", "B"], ["B", "A"])])
    assert found.strict.mean == pytest.approx(1 / 3) and found.as_given.mean == pytest.approx(2 / 3) and found.swapped.mean == 0.5
    assert found.same_letter.mean == pytest.approx((2 * 1 + 1 * 1) / 6)  # A with A twice, B with B once
    assert found.chose_a.mean == pytest.approx(3 / 5)


def test_a_judge_that_says_no_letter_is_wrong_and_its_bias_unknown():
    found = judging([Pair("A", [None], [None])])
    assert found.answered_frac == found.strict.mean == 0.0 and found.same_letter is None and found.chose_a is None
    assert judging([]) is None and judging([Pair("A", [], ["B"])]) is None
