"""Verdicts on answers: strict extraction, equivalent forms, and verifier processes that hang or die."""

import os
import time

import pytest

from megatron_rema.reward.answers import equal_classes, last_box, majority_is_right, normalised, quick_verdict, verify
from megatron_rema.reward.math_verifier import Judgement, VerifierPool
from megatron_rema.types import Completion, Episode, Prompt, Role, StopReason, Turn, Verdict

CORRECT, WRONG, UNKNOWN = Verdict.CORRECT, Verdict.WRONG, Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{4} no, \\boxed{5}", "5"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} done}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),  # an escaped brace opens nothing
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{4} and \\boxed{5", None),  # the last box never closes: cut off, no answer
        ("\\boxed 5", None),
        ("boxed{5}", None),
        ("\\boxed{", None),
        ("\\boxed{\\", None),
        ("", None),
    ],
)
def test_the_last_box_is_found_with_balanced_braces(text, content):
    assert last_box(text) == content


def test_only_clear_cases_are_decided_without_algebra():
    assert quick_verdict("\\boxed{ x+1 }", "x+1 ") is CORRECT
    assert quick_verdict("\\boxed{+007}", "7") is CORRECT
    assert quick_verdict("\\boxed{8}", "7") is WRONG
    assert quick_verdict("7", "7") is WRONG  # no box
    assert quick_verdict("\\boxed{ }", "7") is WRONG
    assert quick_verdict("\\boxed{7.0}", "7") is None
    assert quick_verdict("\\boxed{1+x}", "x+1") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\left( 3, \\dfrac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("10,\\!080", "10,080"),
        ("1{,}000", "1,000"),
        ("\\text{June 20}.", "June 20"),
        ("$5\\,$", "5"),
        ("\\$5", "5"),
        ("1  2", "1 2"),
        ("x  =\n 5", "x=5"),
        ("\\mathrm{cm}^2", "cm^2"),
    ],
)
def test_looks_do_not_part_answers(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1 2", "12"), ("1  2", "12"), ("3\\ 4", "34"), ("x", "X"), ("\\leftarrow", "arrow"), ("1.5", "15"), ("-5", "5"), ("(1,2)", "1,2")],
)
def test_answers_that_may_differ_keep_different_texts(one, other):
    assert normalised(one) != normalised(other)


def test_a_blank_gold_answer_decides_nothing():
    assert quick_verdict("\\boxed{5}", " ") is UNKNOWN and quick_verdict("", "") is UNKNOWN
    with VerifierPool(1, lenient=True) as pool:
        pool.submit_answer("a", "\\boxed{5}", "")
        assert pool.collect()["a"] == Judgement(UNKNOWN, UNKNOWN, "quick")


def never(answer, other):
    raise AssertionError(f"no need to compare {answer} and {other}")


def test_equal_answers_share_a_class_and_each_text_is_asked_about_once():
    asked = []

    def same_parity(answer, other):
        asked.append((answer, other))
        return int(answer) % 2 == int(other) % 2

    assert equal_classes(["4", "1", " 4", "6", "3", "$6$"], same_parity) == [0, 1, 0, 0, 1, 0]
    assert asked == [("1", "4"), ("6", "4"), ("3", "4"), ("3", "1")]


def test_the_most_frequent_answer_is_the_majority():
    right, one, two = (True, "5"), (False, "1"), (False, "2")
    assert majority_is_right([one, right, right], never)  # 2 of 3, whatever the third says
    assert not majority_is_right([one, one, right], never)  # outvoted by one text
    assert not majority_is_right([(False, None), one], never) and not majority_is_right([], never)
    assert majority_is_right([(False, None), (False, None), right], never)  # without an answer there is no vote
    assert majority_is_right([one, right, two, right], lambda a, b: False)  # 2 : 1 : 1
    assert not majority_is_right([(False, "1"), right, right, (False, "1.0"), (False, "2/2")], lambda a, b: True)  # 2 : 3 equal ones
    # 1 : 1, the first seen wins
    assert majority_is_right([right, one], lambda a, b: False) and not majority_is_right([one, right], lambda a, b: False)


def test_the_pool_streams_in_order_and_groups_wrong_answers_by_value():
    texts = ["\\boxed{4}", "5", "\\boxed{\\frac{8}{2}}", "\\boxed{3}"] * 3
    read = []

    def items():
        for text in texts:
            read.append(text)
            yield text

    with VerifierPool(2, timeout_s=20.0, lenient=False) as pool:
        stream = pool.stream(items(), of=lambda text: (text, "4"), window=3)
        assert next(stream)[0] == texts[0] and len(read) == 3  # no more than the window is read ahead
        verdicts = [CORRECT, WRONG, CORRECT, WRONG] * 3
        assert [(text, judgement.verdict) for text, judgement in stream] == list(zip(texts, verdicts, strict=True))[1:]
        split = [(False, "1/2"), (True, "4"), (True, "4"), (False, "0.5"), (False, "\\frac{2}{4}")]
        found = list(pool.majorities(["a", "b"], of=lambda name: split if name == "a" else [(False, "1/3"), *split[1:4]]))
        assert found == [("a", False), ("b", True)]  # a: 3 equal wrong ones against 2; b: 1 and 1 against 2


STRICT = [
    ("\\boxed{5}", "5", CORRECT),
    ("\\boxed{0.5}", "\\frac{1}{2}", CORRECT),
    ("\\boxed{\\dfrac{2}{4}}", "1/2", CORRECT),
    ("\\boxed{1+x}", "x+1", CORRECT),
    ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", CORRECT),
    ("\\boxed{(3,\\pi/2)}", "(3,\\frac{\\pi}{2})", CORRECT),
    ("\\boxed{1,000}", "1000", CORRECT),
    ("\\boxed{0.5}", "\\frac{1}{3}", WRONG),
    ("\\boxed{(\\pi/2,3)}", "(3,\\frac{\\pi}{2})", WRONG),
    ("\\boxed{3 or 4}", "3", WRONG),
    ("\\boxed{3,4,5}", "3", WRONG),
    ("\\boxed{\\frac{}{}^^((}", "3", WRONG),
    ("The answer is 3.", "3", WRONG),
    ("\\boxed{1/3} or rather 1/2", "1/2", WRONG),
    ("\\boxed{East}", "\\text{east}", CORRECT),
    ("\\boxed{salt}", "last", WRONG),  # math_verify alone: s a l t = l a s t
    ("\\boxed{4210_5}", "4210_{5}", CORRECT),
    ("\\boxed{4210_6}", "4210_{5}", WRONG),  # math_verify alone drops the base
    ("\\boxed{6.72 \\times 10^{-5}}", "0.0000672", CORRECT),
    ("\\boxed{0.0000671}", "0.0000672", WRONG),  # equal when rounded to 6 decimals
    ("\\boxed{5 \\times 10^{-34}}", "6.63 \\times 10^{-34}", WRONG),  # and these to 15
    ("\\boxed{0.000000663 \\times 10^{-27}}", "6.63 \\times 10^{-34}", CORRECT),
    ("\\boxed{0.142857}", "\\frac{1}{7}", CORRECT),
    ("\\boxed{0.1428}", "\\frac{1}{7}", WRONG),
    ("\\boxed{70\\%}", "70", CORRECT),
    ("\\boxed{70}", "70\\%", CORRECT),
    ("\\boxed{\\frac{7}{10}}", "70\\%", CORRECT),
    ("\\boxed{70.0\\%}", "70\\%", CORRECT),
    ("\\boxed{0.7\\%}", "70\\%", WRONG),
    ("\\boxed{7}", "70\\%", WRONG),
    ("\\boxed{18.50.}", "18.5", CORRECT),
    ("\\boxed{05:00}", "05\\!:\\!00", CORRECT),
]


def test_strict_verdicts_of_equivalent_and_different_forms():
    with VerifierPool(1, timeout_s=20.0) as pool:
        for i, (text, gold, _) in enumerate(STRICT):
            pool.submit_answer(str(i), text, gold)
        judged = pool.collect()
        assert [(text, judged[str(i)].verdict) for i, (text, _, _) in enumerate(STRICT)] == [(text, verdict) for text, _, verdict in STRICT]
        assert judged["12"] == Judgement(WRONG, CORRECT, "quick")  # no box: wrong, but the lenient metric finds it
        assert judged["0"].how == "quick" and judged["1"] == Judgement(CORRECT, CORRECT, "verified")
        assert pool.collect() == {}  # handed out once


def test_a_gold_answer_that_cannot_be_read_is_unknown():
    with VerifierPool(1, timeout_s=20.0, lenient=False) as pool:
        pool.submit_answer("a", "\\boxed{3.5}", "\\text{}")
        assert pool.collect()["a"] == Judgement(UNKNOWN, None, "verified")


def faulty(num_workers=1, timeout_s=1.5, lenient=False) -> VerifierPool:
    return VerifierPool(num_workers, timeout_s, lenient=lenient, function="tests.unit.verifier_faults:judge")


def test_hangs_crashes_and_exceptions_are_unknown_and_the_pool_recovers():
    words = ["yes", "hang", "yes", "die", "no", "raise", "print yes", "hang", "yes"]
    with faulty() as pool:
        for i, word in enumerate(words):
            pool.submit_answer(str(i), f"say \\boxed{{{word}}}", "gold")
        started = time.monotonic()
        judged = [(j.verdict, j.how) for j in pool.collect().values()]
        assert time.monotonic() - started < 30  # two hangs of 60 s were cut at 1.5 s each
        yes = (CORRECT, "verified")
        assert judged == [
            yes, (UNKNOWN, "timeout"), yes, (UNKNOWN, "crash"), (WRONG, "verified"), (UNKNOWN, "crash"), yes, (UNKNOWN, "timeout"), yes,
        ]  # fmt: skip
        pool.submit_answer("again", "say \\boxed{yes}", "gold")
        assert pool.collect()["again"].verdict is CORRECT


def test_a_hang_of_the_lenient_metric_leaves_the_strict_verdict():
    with faulty(lenient=True) as pool:
        pool.submit_answer("a", "say lenient \\boxed{no}", "gold")
        assert pool.collect()["a"] == Judgement(WRONG, UNKNOWN, "verified")


def test_verification_runs_beside_the_caller_and_close_does_not_wait_for_hangs():
    started = time.monotonic()
    pool = faulty(num_workers=2, timeout_s=60.0)
    for i in range(4):
        pool.submit_answer(str(i), "say \\boxed{hang}", "gold")
    assert time.monotonic() - started < 1.0  # submit returns at once
    while len(pool._processes) < 2:  # both threads have a process, starting or hanging
        time.sleep(0.05)
    pids = [process._process.pid for process in pool._processes]
    pool.close()
    assert time.monotonic() - started < 20
    assert pids and all(not os.path.exists(f"/proc/{pid}") for pid in pids)  # no orphan is left behind


def test_a_verifier_that_cannot_start_is_an_error_and_not_a_verdict():
    with VerifierPool(1, function="tests.unit.verifier_faults:absent") as pool:
        pool.submit_answer("a", "\\boxed{1/2}", "0.5")
        with pytest.raises(RuntimeError, match="did not start"):
            pool.collect()


def test_the_answer_is_read_from_the_reasoners_last_message():
    def turn(role, text):
        return Turn(role, 0, (), Completion("", (), (), StopReason.STOP, 0), text)

    prompt = Prompt("p", "?", "5")
    first, plan, last = turn(Role.REASONING, "\\boxed{4}"), turn(Role.META_THINKING, "\\boxed{9}"), turn(Role.REASONING, "\\boxed{5}")
    right = Episode("right", prompt, 0, [first, plan, last])
    early = Episode("early", prompt, 1, [turn(Role.REASONING, "\\boxed{5}"), turn(Role.REASONING, "yes")])
    silent = Episode("silent", prompt, 2, [turn(Role.META_THINKING, "\\boxed{5}")])
    with VerifierPool(1, lenient=False) as pool:
        for episode in (right, early, silent):
            pool.submit(episode)
        assert {key: j.verdict for key, j in pool.collect().items()} == {"right": CORRECT, "early": WRONG, "silent": WRONG}
        pool.submit(right)
        with pytest.raises(ValueError, match="'right' was submitted before"):
            pool.submit(right)


def test_impossible_pool_settings_are_errors():
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        VerifierPool(0)


def test_an_exception_inside_the_comparison_is_raised_and_not_taken_for_wrong(monkeypatch):
    import math_verify.grader

    def too_deep(*_args, **_kwargs):
        raise RecursionError("too deep")

    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", too_deep)
    with pytest.raises(RecursionError, match="too deep"):
        verify("\\boxed{1+x}", "x+1")
