"""``evaluate score_file``: what makes rows samples of one problem, the figures by hand, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.trainer.score_file import Scored, read_rows, table
from megatron_rema.types import Verdict


def write(file, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def evaluate(*arguments, code=None):
    command = ["-c", code] if code else ["-m", "megatron_rema.evaluate"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, env=env, timeout=120)


def boxed(*answers):
    return [f"so \\boxed{{{answer}}}" for answer in answers]


def cells(view):
    return [list(row) for row in zip(*(column._cells for column in view.columns), strict=True)]


def test_a_file_of_several_samples_is_scored_by_subset(tmp_path):
    rows = [
        {
            "subset": "easy",
            "id": 1,
            "question": "1 + 1",
            "answer": "2",
            "responses": boxed(2, 3, "3.0", "4/2"),
        },  # 2 right, 2 wrong but equal
        {"subset": "easy", "id": 2, "question": "1 + 2", "answer": 3, "responses": boxed(4, 4, 3)},
        {"subset": "easy", "id": 2, "question": "1 + 2", "answer": 3, "response": "I do not know."},  # the fourth sample of problem 2
        "",
        {"dataset": "hard", "question": "north or south?", "answer": "\\text{east}", "response": boxed("east")[0]},
        {"dataset": "hard", "question": "which way?", "answer": " ", "response": boxed("east")[0]},
    ]
    result = evaluate(f"score_file={write(tmp_path / 'r.jsonl', rows)}")
    # right: 2 of 4, 1 of 4, 1 of 1 = 4 of 9 responses
    assert result.returncode == 0 and result.stdout.startswith("accuracy: 0.444 (9 scored, 1 unknown)\n"), result.stdout + result.stderr
    lines = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in result.stdout.splitlines() if "│" in line
    }
    # easy: avg (1/2 + 1/4) / 2 = 0.375; pass@2 (1 - 1/6 + 1 - 3/6) / 2 = (5/6 + 1/2) / 2 = 0.667; majority: problem 1 right 2 : wrong 2
    # (3 = 3.0), the right one came first; problem 2 is outvoted by the two 4s -> 1 of 2
    assert lines["easy"][:3] == ["2", "k = 4", "0.375"] and lines["easy"][4:] == ["0.375", "0.667", "1.000", "0.500", "0"]
    assert lines["hard"][:3] == ["1", "k = 1", "1.000"] and lines["hard"][4:] == ["1.000", "", "", "", "1"]
    # all: avg (1/2 + 1/4 + 1) / 3 = 0.583; pass@2 of the two problems that have two samples
    assert lines["all"][:3] == ["3", "k = 1-4", "0.583"] and lines["all"][4:] == ["0.583", "0.667 (2)", "1.000 (2)", "0.667", "1"]
    assert "line 6: the gold answer is blank" in result.stderr


def test_scoring_never_loads_torch(tmp_path):
    file = write(tmp_path / "r.jsonl", [{"question": "?", "answer": "0.5", "responses": boxed("\\frac{1}{2}", "1", "1.0")}])
    code = (
        "import sys; from megatron_rema.front_door import enter; from megatron_rema.evaluate import run; enter('evaluate', run); "
        "print('loaded:', sorted({'torch', 'vllm', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    result = evaluate(f"score_file={file}", code=code)
    assert result.stdout.startswith("accuracy: 0.333 (3 scored, 0 unknown)") and result.stdout.endswith("loaded: []\n"), (
        result.stdout + result.stderr
    )


def test_a_verifier_process_never_loads_torch():
    with VerifierPool(1, timeout_s=20.0, lenient=False, function="tests.unit.verifier_faults:is_torch_free") as pool:
        pool.submit_answer("a", "\\boxed{x}", "y")
        assert pool.collect()["a"].verdict is Verdict.CORRECT


def test_rows_of_one_id_or_of_one_question_and_answer_are_one_problem(tmp_path):
    rows = [
        {"question": "q", "answer": "1", "response": "a"},
        {"question": "q", "answer": "1", "response": "b"},
        {"question": "q", "answer": "2", "response": "c"},  # another gold answer: another problem
        {"question": "q", "answer": "1", "response": "d", "subset": "s"},  # another subset
        {"question": "q", "answer": "1", "response": "e", "id": 7},
        {"question": "r", "answer": "1", "response": "f", "id": "7"},  # same id
    ]
    found = list(read_rows(write(tmp_path / "r.jsonl", rows), "question", "answer"))
    keys = [row.problem for row in found]
    assert [keys.index(key) for key in keys] == [0, 0, 2, 3, 4, 4]
    assert found[-1].end == (tmp_path / "r.jsonl").stat().st_size  # the bar ends at the file's end


BAD_ROWS = {  # name: (row, what the message must hold)
    "not JSON": ("{", ["not JSON"]),
    "not an object": ("[1]", ["[1]", "JSON object"]),
    "no answer": ({"question": "q", "response": "5"}, ["'answer'", "None", "must be text"]),
    "answer of another type": ({"answer": ["5"], "response": "5"}, ["'answer'", "['5']"]),
    "no response": ({"answer": "5"}, ["'response'", "'responses'", "['answer']"]),
    "both": ({"answer": "5", "response": "5", "responses": ["5"]}, ["either 'response'"]),
    "response of another type": ({"answer": "5", "response": None}, ["'response'", "None"]),
    "responses that are none": ({"answer": "5", "responses": []}, ["'responses'", "[]", "at least one"]),
    "a response that is no text": ({"answer": "5", "responses": ["5", 5]}, ["'responses'", "5]"]),
    "one id, two gold answers": ({"id": 1, "answer": "5", "response": "5"}, ["'answer'", "'5'", "'4'", "line 1", "id 1"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_by_file_line_and_field(case, tmp_path):
    row, words = BAD_ROWS[case]
    file = write(tmp_path / "bad.jsonl", [{"id": 1, "answer": "4", "response": "4"}, row])
    with pytest.raises(ValueError) as error:
        list(read_rows(file, "question", "answer"))
    for word in (f"{file} line 2: ", *words):
        assert word in str(error.value)


def test_a_bad_row_ends_the_command_with_one_message(tmp_path):
    file = write(tmp_path / "bad.jsonl", [{"answer": "4", "response": "4"}, {"answer": "4"}])
    result = evaluate(f"score_file={file}")
    assert result.returncode == 2 and result.stderr.startswith(f"error: {file} line 2:") and "accuracy" not in result.stdout, result.stderr
    empty = evaluate(f"score_file={write(tmp_path / 'empty.jsonl', [])}")
    assert empty.returncode == 2 and "no rows" in empty.stderr


def test_a_table_of_one_subset_has_one_line_and_says_where_nothing_was_judged():
    (line,) = cells(table([Scored("s", [1.0], ["4"]), Scored("s", [], [])], {"s": 1}, "t"))
    assert line[:4] == ["all", "1", "k = 1", "1.000"] and line[-1] == "1"
    (line,) = cells(table([Scored("s", [], [])], {"s": 1}, "t"))
    assert line[:4] == ["all", "0", "k = 0", "nan"]
