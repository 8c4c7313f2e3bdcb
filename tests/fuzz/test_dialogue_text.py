"""Dialogue text: whatever a policy samples, the dialogue goes on, the verdict is no gift, and the answer comes in time."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rema.reward.answers import last_box, letter_verdict, normalised, quick_verdict
from megatron_rema.reward.behaviour import behaviour_metrics, copy_ratio, repetition, states_answer
from megatron_rema.reward.components import final_answer
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.rollout.actions import action_regex, parse_action
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dataset import WrittenDialogue
from megatron_rema.rollout.dialogue import Dialogue, DialogueRules
from megatron_rema.rollout.repair import AnswerRules, PlannerAnswers, faults, repair, sentences
from megatron_rema.rollout.traces import traces_of
from megatron_rema.types import Action, AnswerFormat, Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn, Verdict
from tests.fuzz.harness import fuzzed, judged, limited
from tests.fuzz.inputs import NASTY_TEXTS
from tests.unit.tiny_tokenizer import KINDS, tiny_tokenizer

FRAGMENTS = (
    *(
        "\\boxed{",
        "}",
        "{",
        "\\boxed{2}",
        "\\boxed{\\boxed{3}}",
        "\\{",
        "\\}",
        "\\",
        "\\\\",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "%",
        "\\%",
    ),
    *(
        "9^{9^{9^{9}}}",
        "9**9**9",
        "10^{100000000}",
        "2^2^2^2^2^2",
        "(((((",
        ")))))",
        "\\frac{",
        "\\frac{2}{3}",
        "\\sqrt",
        "\\sqrt[",
        "!",
        "!!!!",
    ),
    *(
        "3!!!!!!",
        "\\binom{1000000}{500000}",
        "\\int_0^5 x dx",
        "\\sum_{n=1}^{\\infty}",
        "\\infty",
        "\\pm 2",
        "\\text{",
        "\\text{two}",
        "\\mathrm",
    ),
    *(
        "2,333",
        "2.5e333",
        "1e999999999",
        "0x2f",
        "2_5",
        "0/0",
        "2/0",
        "\u0663",
        "\u00b2",
        "\u00bd",
        "\u2212 3",
        "[2,3)",
        "\\{2,3\\}",
        "x=2",
        "x^2",
    ),
    *(
        "[FINISH]",
        "[FINISH",
        "FINISH]",
        "[[A]]",
        "[[B]]",
        "[[C]]",
        "[[a]]",
        "[A]",
        "[[",
        "]]",
        ". ",
        "! ",
        "\n",
        "\n\n",
        "\t",
        "   ",
        "\r\n",
    ),
    *(
        '{"action": "DECOMPOSE", "output": "x"}',
        '{"action": "EMPTY", "output": ""}',
        '{"action": "REWRITE", "output": "\\u0041"}',
        '"',
        "\\n",
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>system\n",
        "<|eot_id|>",
        "</s>",
        "<s>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<|user|>",
        "[gMASK]",
    ),
    *(
        "<think>",
        "</think>",
        "<|turn|>",
        "<|stop|>",
        "<eos>",
        "<|endoftext|>",
        "PLACEHOLDERUSER",
        "{question}",
        "{instruction}",
        "the answer is 2",
    ),
    *("__import__('os').system('true')", "exec('2')", "lambda: 2", "2 if 3 else 5", "\\x41", "import os", "True", "None", "print(2)"),
    *(text for text in NASTY_TEXTS if len(text) < 1000),
)
fragment = st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(codec="utf-8"), max_size=5), st.sampled_from("2356+-*/^=()., "))
said = st.lists(fragment, max_size=12).map("".join)
repeated = st.tuples(st.lists(fragment, min_size=1, max_size=3).map("".join), st.sampled_from([30, 300, 3000, 30_000])).map(
    lambda drawn: (drawn[0] * drawn[1])[:100_000]
)
any_text = st.one_of(said, said, said, st.tuples(said, repeated, said).map("".join))
whole_text = any_text.filter(lambda text: text.isascii() or not re.search("[\ud800-\udfff]", text))  # what a tokenizer decodes to
golds = st.one_of(st.sampled_from(["3", "-1/2", "\\frac{2}{3}", "(1, 2)", "yes", "", " ", "\\boxed{3}", "x", "50\\%"]), said)


@fuzzed(ci=60, share=0.10)
@given(any_text, golds, st.sampled_from(list(AnswerFormat)))
def test_whatever_is_said_is_read_in_time(text, gold, answer_format):
    with limited():
        box = last_box(text)
        assert box is None or f"\\boxed{{{box}}}" in text
        normalised(text)
        verdict = quick_verdict(text, gold)
        assert verdict is not Verdict.CORRECT or box is not None
        assert letter_verdict(text, "A") is (Verdict.CORRECT if re.findall(r"\[\[([AB])\]\]", text)[-1:] == ["A"] else Verdict.WRONG)
        states_answer(text, gold, answer_format)
        copy_ratio(text, gold), repetition(text)
        assert "".join(sentences(text)) == text
        action = parse_action(text, "[FINISH]")
        assert action is None or (action[0] in Action and isinstance(action[1], str))
    judged("text: readers", "read")


@fuzzed(ci=40, share=0.03)
@given(st.lists(st.tuples(any_text, any_text), min_size=1, max_size=3), golds, st.sampled_from(list(PlannerAnswers)))
def test_whatever_is_written_is_repaired_or_dropped_in_time(rounds, gold, planner_answers):
    turns = tuple(turn for plan, answer in rounds for turn in ((Role.META_THINKING, plan), (Role.REASONING, answer)))
    dialogues = [WrittenDialogue("What is 2 + 3?", gold, turns)]
    answers = AnswerRules(last_box, states_answer, quick_verdict)
    with limited():
        faults(dialogues, answers, "[FINISH]")
        repaired = repair(dialogues, answers=answers, finish_marker="[FINISH]", planner_answers=planner_answers)
        for dialogue in repaired.dialogues:
            assert dialogue.turns[-2][1].endswith("[FINISH]") and all(text for _, text in dialogue.turns)
    judged("text: repair", "repaired" if repaired.dialogues else "dropped")


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(1, timeout_s=2.0, lenient=False) as pool:
        yield pool


GOLD = "\\frac{7919}{6271}"  # two primes: no fragment holds their digits, nothing made of the fragments has this value
CLOSE = ("7919", "6271", "\\frac{6271}{7919}", "-\\frac{7919}{6271}", "\\frac{7919}{6272}", "1.2628", "7919/6271 + 2", "\\frac{7919}{627}1")


def test_a_right_answer_is_right(pool):  # or the next test could not fail
    pool.submit_answer("right", f"so \\boxed{{{GOLD}}}", GOLD)
    pool.submit_answer("too", "so \\boxed{7919/6271}", GOLD)
    assert [judgement.verdict for judgement in pool.collect().values()] == [Verdict.CORRECT, Verdict.CORRECT]


def test_no_text_without_the_answer_is_right(pool):
    @fuzzed(ci=25, share=0.04)
    @given(st.lists(st.one_of(fragment, st.sampled_from(CLOSE)), max_size=6).map("".join), st.booleans())
    def holds(text: str, in_box: bool) -> None:
        pool.submit_answer("text", f"\\boxed{{{text}}}" if in_box else text, GOLD)
        judgement = pool.collect()["text"]
        assert judgement.verdict is not Verdict.CORRECT
        judged("text: verdicts", f"{judgement.verdict} ({judgement.how})")

    holds()


def test_an_answer_outside_the_box_is_never_right(pool):
    @fuzzed(ci=10, share=0.005)
    @given(said.filter(lambda text: "boxed" not in text), said.filter(lambda text: "boxed" not in text))
    def holds(before: str, after: str) -> None:
        pool.submit_answer("text", f"{before}{GOLD}{after}", GOLD)
        assert pool.collect()["text"].verdict is Verdict.WRONG
        judged("text: verdicts", "wrong (no box)")

    holds()


CHATS = {kind: ChatFormat(tiny_tokenizer(kind)) for kind in KINDS}
RULES = DialogueRules(max_turn_tokens=8, max_episode_tokens=64, max_context_tokens=512, max_rounds=3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_control_token_and_every_message_comes_back(kind):
    chat = CHATS[kind]

    @fuzzed(ci=10, share=0.005)
    @given(whole_text)
    def holds(text: str) -> None:
        with limited():
            ids = chat.encode_text(text)
            assert chat._control_token_ids.isdisjoint(ids)
            assert chat.text_of(chat.encode_message(text)) == text
        judged("text: chat formats", "encoded")

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dialogue_goes_on_whatever_tokens_are_sampled(kind):
    chat = CHATS[kind]
    control = sorted(chat._control_token_ids)
    token = st.one_of(st.integers(0, len(chat.tokenizer) - 1), st.sampled_from(control), st.integers(len(chat.tokenizer), 2**20))

    @fuzzed(ci=5, share=0.0025)
    @given(whole_text, st.lists(st.lists(token, max_size=8), min_size=1, max_size=5), st.booleans())
    def holds(question: str, turns: list[list[int]], json_actions: bool) -> None:
        rules = DialogueRules(**{**vars(RULES), "json_actions": json_actions})
        with limited():
            dialogue = Dialogue(chat, rules, question)
            for ids in turns:
                dialogue.prompt()
                dialogue.add(Completion("r", tuple(ids), (-0.5,) * len(ids), StopReason.LENGTH, 0))
            dialogue.prompt()
            episode = Episode("e", Prompt("p", question, "3"), 0, dialogue.turns, EpisodeStatus.TRUNCATED)
            assert Episode.from_json(json.loads(json.dumps(episode.to_json()))) == episode
            for trace in traces_of(episode):
                assert [i for i, mine in zip(trace.token_ids, trace.loss_mask, strict=True) if mine] == [
                    i for turn in episode.turns_of(trace.role) for i in turn.completion.token_ids
                ]
            behaviour_metrics([episode], "[FINISH]", json_actions=json_actions)
            final_answer(episode)
        judged("text: dialogues", "played")

    holds()


numbers = st.floats(allow_nan=False)


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    def turn(index: int) -> Turn:
        ids = tuple(draw(st.lists(st.integers(0, 2**31), max_size=4)))
        completion = Completion(
            draw(any_text), ids, tuple(draw(numbers) for _ in ids), draw(st.sampled_from(list(StopReason))), draw(st.integers(0, 2**40))
        )
        role = list(Role)[index % 2]
        return Turn(role, index // 2, (1, 2), completion, draw(any_text), draw(st.sampled_from([None, *Action])))

    by_role = st.dictionaries(st.sampled_from(list(Role)), st.lists(numbers, max_size=3))
    status = draw(st.sampled_from(list(EpisodeStatus)))
    return Episode(
        draw(any_text),
        Prompt(draw(said), draw(any_text), draw(golds), draw(st.integers(0, 9)), draw(said), draw(st.sampled_from(list(AnswerFormat)))),
        draw(st.integers(0, 8)),
        [turn(index) for index in range(draw(st.integers(int(status.is_finished), 4)))],  # who said nothing has not finished
        status,
        draw(st.sampled_from([None, *Verdict])),
        draw(st.dictionaries(said, numbers, max_size=3)),
        turn_rewards=draw(by_role),
        reward_parts=draw(st.dictionaries(said, by_role, max_size=2)),
        advantages=draw(by_role),
        plan_of=draw(st.sampled_from([None, "0/p/1"])),
    )


@fuzzed(ci=20, share=0.02)
@given(episodes())
def test_every_episode_comes_back_from_its_json_line_and_is_counted(episode):
    line = json.dumps(episode.to_json())
    assert "\n" not in line and Episode.from_json(json.loads(line)) == episode
    with limited():
        behaviour_metrics([episode], "[FINISH]")
        final_answer(episode)
    judged("text: episodes", "came back")


MARKERS = st.one_of(st.none(), st.sampled_from(FRAGMENTS), said).filter(lambda marker: marker is None or marker.strip())


@fuzzed(ci=20, share=0.02)
@given(MARKERS, whole_text, st.sampled_from(list(Action)))
def test_a_json_action_is_exactly_what_its_grammar_says(marker, text, action):
    regex = action_regex(marker)
    message = json.dumps({"action": str(action), "output": text}, ensure_ascii=False)
    with limited():
        parsed = parse_action(message, marker)
        assert (parsed is not None) == (re.fullmatch(regex, message) is not None)
        assert parsed is None or parsed == (action, text)
    judged("text: actions", "parsed" if parsed else "no action")
