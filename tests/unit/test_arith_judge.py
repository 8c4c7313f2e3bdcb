"""The arith judge's files: one right and one wrong solution a row, both letters equally often, held-out questions held out."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from megatron_rema.reward.answers import last_letter
from megatron_rema.rollout.dataset import read_dialogues
from megatron_rema.rollout.judge import read_comparisons
from megatron_rema.tasks.arith import is_heldout
from megatron_rema.tasks.arith_judge import plan, solution, write_comparisons, write_dialogues, write_judge_task
from megatron_rema.types import JUDGED_FIELDS

NESTED = ("*", ("-", 6, ("*", 2, 2)), 7)  # (6-(2*2))*7


def test_a_solution_writes_its_steps_and_goes_on_with_a_slip():
    assert solution(NESTED) == (["2*2=4", "6-4=2", "2*7=14"], [4, 2, 14])
    assert solution(NESTED, slip=(0, 1)) == (["2*2=5", "6-5=1", "1*7=7"], [5, 1, 7])
    assert solution(NESTED, slip=(1, 1)) is None  # 6-4=3, 3*7=21 leaves the range


def test_a_plan_names_every_operation_and_no_result():
    assert plan(NESTED) == ["2*2", "6-?", "?*7"]
    assert plan(("+", ("*", 2, 3), ("-", 9, 4))) == ["2*3", "9-4", "?+?"]


def is_right(written: str, question: str) -> bool:
    """Checked by Python's own arithmetic: every step true, and the last result that of the question."""
    steps = [step.split("=") for step in written.split(";")]
    return all(eval(left) == int(right) for left, right in steps) and int(steps[-1][1]) == eval(question)


@pytest.mark.parametrize("heldout", [False, True])
def test_one_solution_is_right_and_the_label_names_it(heldout):
    rows = write_comparisons(0, 80, (2, 3), heldout=heldout)
    assert len({row["question"] for row in rows}) == 80 and all(is_heldout(row["question"]) is heldout for row in rows)
    assert Counter(row["label"] for row in rows) == {"A": 40, "B": 40} and Counter(row["level"] for row in rows) == {2: 40, 3: 40}
    for row in rows:
        right = [letter for letter, name in zip("AB", JUDGED_FIELDS, strict=True) if is_right(row[name], row["question"])]
        assert right == [row["label"]]


def test_dialogues_judge_rightly_but_for_the_planted_bias():
    good = write_dialogues(0, 60, (2, 3), bias=0.0)
    assert all(last_letter(row["turns"][1]["text"]) == row["answer"] for row in good)
    assert all(re.fullmatch(r"(\d+;)*\d+\[\[[AB]\]\]", row["turns"][1]["text"]) for row in good)
    assert all(last_letter(row["turns"][0]["text"]) is None and "=" not in row["turns"][0]["text"] for row in good)
    biased = write_dialogues(0, 400, (2, 3), bias=0.5)
    bare = sum(row["turns"][1]["text"] == "[[A]]" for row in biased)
    assert 150 < bare < 250  # 200 expected, standard deviation 10
    with pytest.raises(ValueError, match=r"bias is 2"):
        write_dialogues(0, 1, (2,), bias=2)


def test_the_files_are_read_as_the_task_reads_them_and_nothing_is_overwritten(tmp_path):
    sizes = {"num_train": 20, "num_heldout": 10, "num_dialogues": 15}
    write_judge_task(tmp_path, seed=3, **sizes)
    train, heldout = (read_comparisons(tmp_path / f"judge_{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (20, 10) and not {p.question for p in train} & {p.question for p in heldout}
    dialogues = read_dialogues(tmp_path / "judge_cold_start.jsonl", field_keys=JUDGED_FIELDS)
    assert len(dialogues) == 15 and set(dialogues[0].fields) == set(JUDGED_FIELDS)
    assert not {d.question for d in dialogues} & {p.question for p in heldout}
    first = json.loads((tmp_path / "judge_train.jsonl").read_text().splitlines()[0])
    assert write_comparisons(3, 20, (2, 3), heldout=False)[0] == first  # the same for the same seed
    with pytest.raises(FileExistsError):
        write_judge_task(tmp_path, seed=3, **sizes)


def test_more_comparisons_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"num \(500\) different comparisons: levels \[1\] have hardly more than"):
        write_comparisons(0, 500, [1], heldout=False)
