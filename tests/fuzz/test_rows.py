"""Data rows: whatever a file of problems, dialogues, pairs, comparisons or responses holds, it is read, or refused by file and line."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rema.rollout.dataset import read_dialogues, read_pairs, read_prompts
from megatron_rema.rollout.judge import in_both_orders, read_comparisons
from megatron_rema.rollout.repair import read_gold_answers, read_role_views
from megatron_rema.trainer.score_file import read_rows
from tests.fuzz.harness import fuzzed, message_of
from tests.fuzz.inputs import files, mutated

META, REASONER = {"role": "meta_thinking", "text": "plan [FINISH]"}, {"role": "reasoning", "text": "\\boxed{3}"}
PROBLEM = {"question": "1 + 2", "answer": "3", "level": "Level 2", "subset": "sums", "id": "p1"}
COMPARISON = {"question": "1 + 2", "answer_a": "3", "answer_b": "4", "label": "A", "level": 1}
DIALOGUE = {"question": "1 + 2", "answer": "3", "turns": [META, REASONER]}
PAIR = {"question": "1 + 2", "chosen": [META, REASONER], "rejected": [REASONER], "margin": 0.5}
RESPONSE = {"question": "1 + 2", "answer": "3", "response": "so \\boxed{3}", "id": 7, "subset": "sums"}
RESPONSES = {"question": "1 + 2", "answer": 3, "responses": ["so \\boxed{3}", "\\boxed{4}"], "dataset": "sums"}
VIEW = {"instruction": "add them", "output": "\\boxed{3}", "system": "", "history": [["1 + 2", "plan"]]}


def sound(*texts: str) -> None:
    """Text that a tokenizer, a file and a page can take."""
    for text in texts:
        text.encode("utf-8")


def check_prompts(prompts) -> None:
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) > 0
    for prompt in prompts:
        sound(prompt.question, prompt.answer, prompt.subset, prompt.prompt_id, *prompt.fields.values())
        assert prompt.question.strip() and prompt.answer.strip() and prompt.level >= 0


def check_dialogues(dialogues) -> None:
    for dialogue in dialogues:
        sound(dialogue.question, dialogue.answer, *(text for _, text in dialogue.turns))


def check_pairs(pairs) -> None:
    for pair in pairs:
        sound(pair.question, *(text for _, text in pair.chosen + pair.rejected))
        assert math.isfinite(pair.margin)


def check_rows(rows) -> None:
    for row in rows:
        sound(row.subset, row.gold, *row.problem, *row.responses)


def check_views(views) -> None:
    for view in views:
        sound(view.system, *view.messages)


READERS = {
    "problems": (PROBLEM, lambda path: check_prompts(read_prompts(path, id_key="id")), 0.5),
    "problems without ids": (PROBLEM, lambda path: check_prompts(read_prompts(path)), 0.5),
    "comparisons": (COMPARISON, lambda path: check_prompts(in_both_orders(read_comparisons(path))), 1),
    "dialogues": (DIALOGUE, lambda path: check_dialogues(read_dialogues(path)), 1),
    "pairs": (PAIR, lambda path: check_pairs(read_pairs(path)), 1),
    "saved responses": (RESPONSE, lambda path: check_rows(read_rows(path, "question", "answer")), 0.5),
    "lists of responses": (RESPONSES, lambda path: check_rows(read_rows(path, "question", "answer")), 0.5),
    "role views": (VIEW, lambda path: check_views(read_role_views(path)), 0.6),
    "gold answers": (PROBLEM, lambda path: read_gold_answers(path, question_key="question", answer_key="answer"), 0.4),
}
WHOLE_FILE = re.compile(r"no rows|no such file|cannot read files|cannot be read|cannot be opened")


def named(message: str | None, path: Path) -> None:
    """A bad row is named by file, number and field, a bad file by its name."""
    if message is None:
        return
    assert str(path) in message, message
    assert WHOLE_FILE.search(message) or re.search(r" (line|row) \d+: ", message), message
    assert len(message) < 2000, len(message)


@pytest.mark.parametrize("name", READERS)
def test_a_jsonl_file_is_read_or_refused_by_file_and_line(name, tmp_path):
    row, read, share = READERS[name]

    @fuzzed(ci=40, share=0.045 * share)
    @given(files(row))
    def holds(data: bytes) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(data)
        named(message_of(f"rows: {name}", lambda: read(path)), path)

    holds()


@pytest.mark.parametrize("name", [name for name in READERS if "responses" not in name])
def test_a_parquet_file_is_read_or_refused_by_file_and_row(name, tmp_path):
    import pyarrow
    import pyarrow.parquet

    row, read, share = READERS[name]

    @fuzzed(ci=15, share=0.012 * share)
    @given(mutated(row), st.integers(1, 3), st.sampled_from([None, None, None, "cut", "flip", "garbage"]), st.integers(0, 4000))
    def holds(row: dict, count: int, damage: str | None, at: int) -> None:
        path = tmp_path / "rows.parquet"
        try:
            table = pyarrow.Table.from_pylist([row] * count)
            pyarrow.parquet.write_table(table, path)
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError, AttributeError, RecursionError):
            return  # not a table: nobody can have such a file
        data = bytearray(path.read_bytes())
        at %= len(data)
        if damage == "cut":
            del data[at:]
        elif damage == "flip":
            data[at] ^= 0x5A
        elif damage == "garbage":
            data[at : at + 16] = bytes(range(16))
        path.write_bytes(data)
        named(message_of(f"parquet: {name}", lambda: read(path)), path)

    holds()
