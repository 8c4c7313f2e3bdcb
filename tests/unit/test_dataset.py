"""Problems and dialogues from files; every bad row is named by file, line and field. The prompt stream is stateless."""

import json

import pytest

from megatron_rema.rollout.dataset import PromptStream, read_dialogues, read_pairs, read_prompts
from megatron_rema.types import Prompt, Role


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_jsonl_rows_become_prompts(tmp_path):
    rows = [{"question": "1+1?", "answer": "2"}, "", {"question": "h\u00e9?", "answer": 3, "level": "Level 4", "subset": "algebra"}]
    assert read_prompts(write(tmp_path / "a.jsonl", *rows)) == [
        Prompt("a-1", "1+1?", "2"), Prompt("a-3", "h\u00e9?", "3", level=4, subset="algebra"),
    ]  # fmt: skip


def test_keys_ids_and_limit_are_options(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "x", "gold": "1", "id": "one", "d": 3}, {"q": "y", "gold": "2", "id": "two"}, "broken")
    prompts = read_prompts(path, question_key="q", answer_key="gold", id_key="id", level_key="d", limit=2)
    assert [(p.prompt_id, p.question, p.level) for p in prompts] == [("one", "x", 3), ("two", "y", 0)]


def test_parquet_reads_like_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "1+1?", "answer": "2", "level": 1}, {"question": "2+2?", "answer": "4", "level": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet") == read_prompts(write(tmp_path / "a.jsonl", *rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"question": None, "answer": "1", "level": 1}]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet row 3: field 'question' must be text that is not blank, got None"):
        read_prompts(tmp_path / "b.parquet")


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"a\.jsonl line 2: not JSON"),
        ('"text"', r"line 2: must be a JSON object, got 'text'"),
        ({"question": "q"}, r"line 2: field 'answer' is missing; the row has \['question'\]"),
        ({"question": " ", "answer": "a"}, r"line 2: field 'question' must be text that is not blank, got ' '"),
        ({"question": ["q"], "answer": "a"}, r"line 2: field 'question' must be text"),
        ({"question": "q", "answer": True}, r"line 2: field 'answer' must be text"),
        ({**GOOD, "level": "hard"}, r"line 2: field 'level' must be a whole number, got 'hard'"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / "a.jsonl", GOOD, row))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "q", "answer": "a"}\n{"question": "\xff\xfe", "answer": "a"}\n')
    with pytest.raises(ValueError, match=r"line 2: not JSON"):
        read_prompts(tmp_path / "a.jsonl")


def test_missing_empty_and_unknown_files_and_double_ids_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no rows"):
        read_prompts(write(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"cannot read files that end in '\.csv'"):
        read_prompts(write(tmp_path / "a.csv", "x"))
    with pytest.raises(ValueError, match=r"line 2: field 'id' is 'x' as in .*a\.jsonl line 1: ids must be unique"):
        read_prompts(write(tmp_path / "a.jsonl", {**GOOD, "id": "x"}, {**GOOD, "id": "x"}), id_key="id")


def turn(role, text="hm"):
    return {"role": role, "text": text}


def test_dialogues_are_read_with_their_roles(tmp_path):
    row = {**GOOD, "turns": [turn("meta_thinking", "plan"), turn("reasoning", "do")]}
    solo = {**GOOD, "turns": [turn("reasoning", "solve")]}
    two, one = read_dialogues(write(tmp_path / "d.jsonl", row, solo))
    assert two.turns == ((Role.META_THINKING, "plan"), (Role.REASONING, "do")) and one.turns == ((Role.REASONING, "solve"),)
    assert (two.question, two.answer) == ("q", "a")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, r"d\.jsonl line 2: field 'turns' must be a list with at least one turn, got None"),
        ([], r"'turns' must be a list"),
        (["hi"], r"'turns\[0\]' must be an object"),
        ([turn("planner")], r"'turns\[0\]\.role' must be one of \['meta_thinking', 'reasoning'\], got 'planner'"),
        ([turn(["x"])], r"'turns\[0\]\.role' must be one of"),
        ([turn("meta_thinking"), turn("meta_thinking")], r"'turns\[1\]\.role' is 'meta_thinking' where 'reasoning' must speak"),
        ([turn("reasoning"), turn("meta_thinking")], r"'turns\[0\]\.role' is 'reasoning' where 'meta_thinking' must speak"),
        ([turn("meta_thinking"), turn("reasoning", "")], r"'turns\[1\]\.text' must be text that is not blank"),
        ([{"role": "reasoning"}], r"'turns\[0\]\.text' is missing"),
    ],
)
def test_a_bad_dialogue_is_named_by_file_line_and_field(tmp_path, turns, message):
    good = {**GOOD, "turns": [turn("reasoning")]}
    with pytest.raises(ValueError, match=message):
        read_dialogues(write(tmp_path / "d.jsonl", good, {**GOOD, "turns": turns}))


PROMPTS = [Prompt(str(i), "q", "a") for i in range(7)]


def test_every_epoch_holds_every_prompt_once_in_another_order():
    stream = PromptStream(PROMPTS, seed=0)
    epochs = [[p.prompt_id for p in stream.take(7 * e, 7)] for e in range(4)]
    assert all(sorted(epoch) == sorted(p.prompt_id for p in PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_stream_depends_on_seed_and_position_alone():
    straight = PromptStream(PROMPTS, seed=3).take(0, 30)
    resumed = PromptStream(PROMPTS, seed=3)
    assert resumed.take(19, 11) + resumed.take(5, 4) == straight[19:30] + straight[5:9]
    assert PromptStream(PROMPTS, seed=4).take(0, 30) != straight
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([], seed=0)


def test_pairs_hold_both_dialogues_and_a_bad_one_is_named(tmp_path):
    turns = [{"role": "meta_thinking", "text": "plan"}, {"role": "reasoning", "text": "do"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"question": "q", "chosen": turns, "rejected": turns[::-1][:1], "margin": 2}) + "\n")
    (pair,) = read_pairs(file)
    assert pair.chosen == ((Role.META_THINKING, "plan"), (Role.REASONING, "do"))
    assert pair.rejected == ((Role.REASONING, "do"),) and pair.margin == 2.0
    file.write_text(json.dumps({"question": "q", "chosen": turns, "rejected": turns[::-1]}) + "\n")
    with pytest.raises(ValueError, match=r"pairs.jsonl line 1: field 'rejected\[0\].role'"):
        read_pairs(file)
    file.write_text(json.dumps({"question": "q", "chosen": turns, "rejected": turns, "margin": "big"}) + "\n")
    with pytest.raises(ValueError, match="'margin' must be a number"):
        read_pairs(file)
