"""pass@k and majority@k of played dialogues, against hand-computed numbers and the same on every rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.trainer.evaluation import _accuracy, judging_table, majorities_everywhere, table
from megatron_rema.types import AnswerFormat, Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn


def dialogue(prompt: str, correct: float, said: str, finished: float = 1.0) -> Episode:
    completion = Completion("", (), (), StopReason.STOP, 0)
    turns = [Turn(Role.META_THINKING, 0, (), completion, "add [FINISH]"), Turn(Role.REASONING, 0, (), completion, said)]
    status = EpisodeStatus.FINISHED if finished else EpisodeStatus.MAX_ROUNDS
    score = {"correct": correct, "finished": finished}
    return Episode("", Prompt(prompt, "?", "4", level=1), 0, turns, status, score=score)


PLAYED = [
    # right 1 of 4; votes: 4, then 1/2 = 0.5 twice -> outvoted, if and only if the two are known to be equal
    dialogue("a", 1.0, "\\boxed{4}"),
    dialogue("a", 0.0, "\\boxed{\\frac{1}{2}}"),
    dialogue("a", 0.0, "\\boxed{0.5}"),
    dialogue("a", 0.0, "no idea"),
    # right 2 of 4 (the third is right, but did not finish: it neither counts nor votes); 2 : 1 for the right one
    dialogue("b", 1.0, "\\boxed{4}"),
    dialogue("b", 1.0, "\\boxed{4}"),
    dialogue("b", 1.0, "\\boxed{4}", finished=0.0),
    dialogue("b", 0.0, "\\boxed{5}"),
    # right 0 of 3: one dialogue had no verdict
    dialogue("c", 0.0, "\\boxed{5}"),
    dialogue("c", 0.0, "\\boxed{6}"),
    dialogue("c", 0.0, ""),
]


def majorities():
    with VerifierPool(1, timeout_s=30.0) as verifier:
        return dist.get_rank(), majorities_everywhere(PLAYED, verifier)


def test_majorities_are_shared_out_and_the_same_on_every_rank(run_ranks):
    expected = {"a": False, "b": True, "c": False}
    assert run_ranks(2, majorities) == [(0, expected), (1, expected)]


def test_an_evaluation_reports_pass_at_k_and_majority_beside_the_accuracy():
    found = _accuracy(PLAYED, {"a": False, "b": True, "c": False})
    assert found["num_problems"] == 3
    assert found["accuracy"] == pytest.approx((1 / 4 + 2 / 4 + 0 / 3) / 3)
    # pass@2: a 1 - C(3,2)/C(4,2) = 1/2, b 1 - C(2,2)/C(4,2) = 5/6, c 0 -> 4/9; pass@4: a and b alone
    assert found["pass_at_k"] == pytest.approx({"1": 1 / 4, "2": 4 / 9, "4": 1.0})
    assert found["majority_accuracy"] == pytest.approx(1 / 3)
    assert found["answer_accuracy"] == pytest.approx(4 / 11) and found["finished_frac"] == pytest.approx(10 / 11)


def test_one_sample_a_problem_has_neither():
    found = _accuracy(PLAYED[:1], {})
    assert found["pass_at_k"] == {} and found["majority_accuracy"] is None and found["accuracy"] == 1.0


def test_an_evaluation_without_a_verdict_claims_nothing():
    found = _accuracy([], {})
    assert (found["num_problems"], found["accuracy"], found["low"], found["high"]) == (0, 0.0, 0.0, 1.0)


def test_the_table_takes_rows_with_and_without_the_new_figures():
    row = {"step": 0, "set": "s", "accuracy": 0.5, "low": 0.4, "high": 0.6, "finished_frac": 1.0, "num_problems": 3,
           "samples_per_problem": 1, "temperature": 0.0}  # fmt: skip
    several = {**row, "samples_per_problem": 12, "pass_at_k": {"1": 0.5, "8": 0.8, "12": 0.9}, "majority_accuracy": 0.7}
    names = [column.header for column in table([row], "t").columns]
    assert "pass@k" not in names and len(names) == 7  # a run from before they were reported
    columns = {column.header: list(column.cells) for column in table([row, several], "t").columns}
    assert columns["pass@k"] == ["", "0.900"] and columns["majority@k"] == ["", "0.700"]


def verdict(pair: str, label: str, said: str, *, swapped: bool, finished: float = 1.0) -> Episode:
    """A judge's dialogue; ``label`` is right in this order."""
    episode = dialogue(pair, float(f"[[{label}]]" in said), said, finished)
    name = f"{pair}-swapped" if swapped else pair
    episode.prompt = Prompt(name, "?", label, level=1, answer_format=AnswerFormat.LETTER, pair_id=pair)
    return episode


JUDGED = [
    verdict("x", "A", "[[A]]", swapped=False),
    verdict("x", "B", "[[B]]", swapped=True),
    verdict("y", "B", "[[A]]", swapped=False),
    verdict("y", "A", "[[A]]", swapped=True),
    verdict("z", "A", "[[A]]", swapped=False),
    verdict("z", "B", "[[B]]", swapped=True, finished=0.0),  # right, but cut: came to no letter
]


def test_a_judge_is_evaluated_by_order_and_by_pair():
    found = _accuracy(JUDGED, {})
    assert found["num_problems"] == 6 and found["accuracy"] == pytest.approx(4 / 6)
    judged = found["judging"]
    assert (judged.num_pairs, judged.as_given.mean, judged.swapped.mean) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert judged.strict.mean == pytest.approx(1 / 3) and judged.same_letter.mean == 0.5 and judged.answered_frac == pytest.approx(5 / 6)
    assert judged.chose_a.mean == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert _accuracy(PLAYED, {})["judging"] is None


def test_the_interval_of_a_judge_is_over_pairs():
    """40 pairs, each right in one order: 80 problems half of them right would give 0.5 -+ 0.11; all 40 pairs being alike, nothing varies
    but what the exact interval of 20 of 40 allows."""
    pairs = [verdict(str(i), "AB"[swapped], "[[A]]", swapped=bool(swapped)) for i in range(40) for swapped in (0, 1)]
    found = _accuracy(pairs, {})
    from scipy.stats import binomtest

    exact = binomtest(20, 40).proportion_ci(0.95)
    assert (found["accuracy"], found["low"], found["high"]) == (0.5, pytest.approx(exact.low), pytest.approx(exact.high))


def test_the_table_of_both_orders_is_there_for_judges_only():
    from dataclasses import asdict

    row = {"step": 0, "set": "s", "temperature": 0.0}
    assert judging_table([row, {**row, "judging": None}]) is None
    judged = _accuracy(JUDGED, {})["judging"]
    columns = {c.header: list(c.cells) for c in judging_table([row, {**row, "judging": asdict(judged)}]).columns}
    means = dict(zip(columns["figure"], columns["mean"], strict=True))
    assert means["right in both orders"] == "0.333" and means["came to a letter"] == "0.833"
    assert columns["step"] == ["0", *[""] * 5], "one evaluation, a line a figure"
