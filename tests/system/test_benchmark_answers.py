"""The verifier and ``evaluate score_file`` on the gold answers of four public benchmarks (gsm8k, MATH500, amc23, aime24).

The data is no part of this repository: the tests are skipped where ``shared/data/math`` does not lie beside it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import defaultdict

import pyarrow.parquet as parquet
import pytest

from megatron_rema.reward.answers import boxed
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.types import Verdict
from tests.real_data import math_file

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in math_file("benchmarks.jsonl").read_text().splitlines()]


def accuracy(file, rows, answers):
    """What ``evaluate`` prints for these answers in a box: (accuracy, scored, unknown, its error stream)."""
    file.write_text(
        "".join(json.dumps({**row, "response": f"It is {boxed(said)}."}) + "\n" for row, said in zip(rows, answers, strict=True))
    )
    command = [sys.executable, "-m", "megatron_rema.evaluate", f"score_file={file}", "reward.verifier_processes=2"]
    # a busy machine is no fault of an answer: ample time each
    result = subprocess.run(
        [*command, "reward.verifier_timeout_s=30"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()[0].replace("(", "").split()
    assert words[0] == "accuracy:" and words[3] == "scored,", result.stdout
    return float(words[1]), int(words[2]), int(words[4]), result.stderr


def value(answer):
    """The number that an answer plainly is, else its text: two answers of one value are right for each other's question."""
    try:
        return float(answer.replace(",", ""))
    except ValueError:
        return answer.strip()


def permuted(answers, seed):
    """The same answers in another order, such that no question gets one of its own answer's value.

    Answers are laid out value by value (values shuffled) and rotated by the size of the largest value: nobody meets its own.
    """
    places = defaultdict(list)
    for place, answer in enumerate(answers):
        places[value(answer)].append(place)
    values = list(places)
    random.Random(seed).shuffle(values)
    order = [place for name in values for place in places[name]]
    shift = max(map(len, places.values()))
    assert 2 * shift <= len(order), "one value has more than half of all answers"
    result = [""] * len(answers)
    for place, source in zip(order, order[shift:] + order[:shift], strict=True):
        result[place] = answers[source]
    assert sorted(result) == sorted(answers) and all(value(said) != value(gold) for said, gold in zip(result, answers, strict=True))
    return result


def test_gold_answers_in_a_box_are_right(rows, tmp_path):
    score, scored, unknown, errors = accuracy(tmp_path / "gold.jsonl", rows, [row["answer"] for row in rows])
    blank = [number for number, row in enumerate(rows, 1) if not row["answer"].strip()]
    assert score >= 0.99
    # a question without a gold answer is named and excluded, neither right nor wrong
    assert (scored, unknown) == (len(rows) - len(blank), len(blank))
    for number in blank:
        assert f"line {number}: the gold answer is blank" in errors


def test_answers_permuted_between_questions_are_wrong(rows, tmp_path):
    rows = [row for row in rows if row["answer"].strip()]
    score, scored, unknown, _ = accuracy(tmp_path / "permuted.jsonl", rows, permuted([row["answer"] for row in rows], seed=0))
    assert score < 0.01 and scored >= 0.99 * len(rows), (score, scored, unknown)


def test_every_gold_answer_equals_itself_by_mathematics(rows):
    # "0 + x" is never the same text and never an integer, so that algebra must decide; a comma between digits is no algebra
    numbers = sorted({row["answer"] for row in rows if isinstance(value(row["answer"]), float)})
    with VerifierPool(2, timeout_s=30.0, lenient=False) as pool:
        judged = list(pool.stream(numbers, of=lambda gold: (boxed(f"0 + {gold.replace(',', '')}"), gold)))
    assert len(numbers) > 300
    wrong = [(gold, judgement) for gold, judgement in judged if judgement.verdict is not Verdict.CORRECT or judgement.how != "verified"]
    assert len(wrong) <= 0.01 * len(numbers), wrong


def test_another_edition_of_the_same_answers_is_right(rows):
    """The parquet file writes MATH500's answers as their authors did (spaces, \\text, \\mbox); the JSONL file is another edition."""
    math500 = math_file("math500_test.parquet")
    gold = {row["question"].strip(): row["answer"] for row in rows if row["dataset"] == "MATH500" and row["answer"].strip()}
    said = {row["question"].strip(): row["answer"] for row in parquet.read_table(math500).to_pylist()}
    pairs = [(said[question], gold[question]) for question in gold if question in said]
    assert len(pairs) > 450 and sum(ours != theirs for ours, theirs in pairs) > 50  # there is something to be told equal
    with VerifierPool(2, timeout_s=30.0, lenient=False) as pool:
        judged = list(pool.stream(pairs, of=lambda pair: (boxed(pair[0]), pair[1])))
    differ = [pair for pair, judgement in judged if judgement.verdict is not Verdict.CORRECT]
    # the JSONL edition lost signs in a few answers ((+5)(b+2) for (a+5)(b+2)): those are not equal, and must not be told so
    assert len(differ) <= 0.02 * len(pairs), differ
