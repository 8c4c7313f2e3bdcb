"""The arith task: problems, written dialogues and tokenizer. Values are checked by an evaluator of their own (Python's parser)."""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rema.tasks import arith
from megatron_rema.tasks.arith import FINISH_MARKER, MAX_VALUE, PLANTED, Imperfections, draw, generate, show, write_dialogue, write_task
from megatron_rema.tasks.tokenizer import build_tokenizer
from megatron_rema.types import Role

BINARY = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b}
SIZES = {"num_train": 60, "num_heldout": 30, "num_ood": 10, "num_dialogues": 60, "levels": (2, 3)}


def values_in(text: str) -> list[int]:
    """Values of all sub-expressions, the whole one last."""

    def visit(node: ast.expr) -> list[int]:
        if isinstance(node, ast.Constant):
            return [node.value]
        assert isinstance(node, ast.BinOp)
        left, right = visit(node.left), visit(node.right)
        return [*left, *right, BINARY[type(node.op)](left[-1], right[-1])]

    return visit(ast.parse(text, mode="eval").body)


def num_operations(text: str) -> int:
    return sum(text.count(operator) for operator in "+-*")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arith") / "task"
    write_task(folder, seed=3, **SIZES)
    return folder


@pytest.fixture(scope="module")
def tokenizer(task):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(task / "model")


@pytest.mark.parametrize("level", [1, 2, 3, 5])
def test_answers_are_right_and_every_value_on_the_way_is_in_range(level):
    for prompt in generate(0, 15, [level]):
        values = values_in(prompt.question)
        assert prompt.answer == str(values[-1])
        assert all(0 <= value <= MAX_VALUE for value in values)
        assert num_operations(prompt.question) == prompt.level == level


def test_the_same_seed_gives_the_same_files_and_another_seed_other_problems(task, tmp_path):
    write_task(tmp_path / "again", seed=3, **SIZES)
    write_task(tmp_path / "other", seed=4, **SIZES)
    files = [str(path.relative_to(task)) for path in sorted(task.rglob("*")) if path.is_file()]
    assert {"train.jsonl", "heldout.jsonl", "ood.jsonl", "cold_start.jsonl", "manifest.json", "model/tokenizer.json"} < set(files)
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (task / file).read_bytes(), file
    assert read(tmp_path / "other" / "train.jsonl") != read(task / "train.jsonl")


def test_evaluation_questions_are_in_no_training_file_whatever_the_seeds(task, tmp_path):
    write_task(tmp_path / "other", seed=9, **SIZES)
    folders = (task, tmp_path / "other")
    trained = {row["question"] for folder in folders for name in ("train", "cold_start") for row in read(folder / f"{name}.jsonl")}
    evaluated = [row["question"] for name in ("heldout", "ood") for row in read(task / f"{name}.jsonl")]
    assert len(set(evaluated)) == len(evaluated) == 40
    assert trained.isdisjoint(evaluated)


def test_problems_of_a_set_differ_and_levels_take_turns(task):
    rows = read(task / "train.jsonl")
    assert len({row["question"] for row in rows}) == 60
    assert Counter(row["level"] for row in rows) == {2: 30, 3: 30}


def test_asking_for_more_problems_than_a_level_has_is_an_error_that_names_the_level():
    with pytest.raises(ValueError, match="level 1 has hardly more than"):  # held out: a tenth of the 168 expressions a op b in range
        generate(0, 100, [1], heldout=True)


@given(seed=st.integers(0, 10**6), level=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_dialogue_without_imperfections_computes_the_answer_step_by_step(seed, level):
    expression = draw(random.Random(seed), level)
    dialogue = write_dialogue(random.Random(seed), expression)
    plans, values = dialogue.texts[::2], dialogue.texts[1::2]
    assert len(plans) == level + 1 and plans[-1] == FINISH_MARKER
    answer = values_in(show(expression))[-1]
    for i, (plan, value) in enumerate(zip(plans[:-1], values[:-1], strict=True)):
        whole, _, operation = plan.rpartition(":")
        assert values_in(operation)[-1] == int(value) and num_operations(operation) == 1
        if whole:  # the expression as it stands: one operation fewer each round, the value unchanged
            assert num_operations(whole) == level - i and values_in(whole)[-1] == answer and operation in whole
    assert values[-1] == f"\\boxed{{{answer}}}"
    assert not +dialogue.planted


def test_one_agent_writes_the_same_dialogue_as_one_message():
    texts = ["2*2", "4", "(6-4)*7:6-4", "2", "2*7", "14", FINISH_MARKER, "\\boxed{14}"]
    assert arith.as_chain(texts) == "2*2=4\n(6-4)*7:6-4=2\n2*7=14\n\\boxed{14}"
    assert arith.as_plan_and_chain(texts) == "*-*\n2*2=4\n(6-4)*7:6-4=2\n2*7=14\n\\boxed{14}"
    echo = ["2*2", "4", "2*2", "4"]  # never finishes
    assert arith.as_chain(echo) == "2*2=4\n2*2=4" and arith.as_plan_and_chain(echo) == "**\n2*2=4\n2*2=4"


@pytest.mark.parametrize("name", [*asdict(PLANTED)])
def test_each_imperfection_happens_at_the_stated_rate_and_alone(name):
    only = replace(arith.NONE, **{name: 0.3})
    rng = random.Random(0)
    planted, chances = Counter(), Counter()
    for i in range(5500):
        dialogue = write_dialogue(rng, draw(rng, 1 + i % 3), only)
        planted, chances = planted + dialogue.planted, chances + dialogue.chances
    assert set(planted) == {name}
    # Binomial: at least 1000 chances, so one standard deviation is at most sqrt(0.21 / 1000) = 0.0145; 4 of them.
    assert chances[name] >= 1000
    assert planted[name] / chances[name] == pytest.approx(0.3, abs=0.058)


@pytest.mark.parametrize(
    ("name", "what_it_does"),
    [
        ("wrong_plan", lambda right, wrong: wrong[0] != right[0] and num_operations(wrong[0]) == 1),
        ("early_finish", lambda right, wrong: wrong == (*right[:2], FINISH_MARKER, f"\\boxed{{{right[1]}}}")),
        (
            "short_stop",  # right ends: value before, a-b, its value, finish, answer
            lambda right, wrong: wrong == ((*right[:-4], FINISH_MARKER, f"\\boxed{{{right[-5]}}}") if "-" in right[-4] else right),
        ),
        ("echo", lambda right, wrong: len(wrong) == 2 * arith.MAX_ROUNDS and FINISH_MARKER not in wrong and wrong[-2:] == right[-4:-2]),
        ("slip", lambda right, wrong: wrong[0] == right[0] and abs(int(wrong[1]) - int(right[1])) == 1),
        ("missing_box", lambda right, wrong: wrong[:-1] == right[:-1] and f"\\boxed{{{wrong[-1]}}}" == right[-1]),
    ],
)
def test_an_imperfection_at_rate_one_spoils_the_dialogue_as_described(name, what_it_does):
    for seed in range(30):
        expression = draw(random.Random(seed), 3)
        right = write_dialogue(random.Random(seed), expression).texts
        wrong = write_dialogue(random.Random(seed), expression, Imperfections(**{name: 1.0})).texts
        assert what_it_does(right, wrong), (right, wrong)


def test_the_manifest_counts_what_the_files_hold(task):
    manifest, rows = json.loads((task / "manifest.json").read_text()), read(task / "cold_start.jsonl")
    correct = [row["turns"][-2]["text"] == FINISH_MARKER and row["turns"][-1]["text"] == f"\\boxed{{{row['answer']}}}" for row in rows]
    echoes = [FINISH_MARKER not in row["turns"][-2]["text"] for row in rows]
    assert manifest["sets"]["train"] == {"level_2": 30, "level_3": 30}
    assert manifest["cold_start"]["dialogues"] == len(rows) == 60
    assert manifest["cold_start"]["correct"] == sum(correct)
    assert manifest["cold_start"]["echo"]["planted"] == sum(echoes)
    assert all([turn["role"] for turn in row["turns"]] == [*map(str, Role)] * (len(row["turns"]) // 2) for row in rows)


def test_the_command_writes_the_default_task_and_refuses_to_write_it_again(tmp_path):
    command = [sys.executable, str(Path(__file__).parents[2] / "tools" / "make_arith.py"), str(tmp_path / "arith"), "--num-dialogues", "30"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    manifest = json.loads((tmp_path / "arith" / "manifest.json").read_text())
    assert sum(manifest["sets"]["train"].values()) == len(read(tmp_path / "arith" / "train.jsonl")) == 2000
    assert manifest["imperfections"] == asdict(PLANTED)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "not empty" in again.stderr and "Traceback" not in again.stderr


def test_nothing_is_overwritten(task):
    before = (task / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        write_task(task, seed=5, **SIZES)
    assert (task / "manifest.json").read_bytes() == before


def test_a_rate_that_is_no_probability_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"imperfections\.slip is 1\.5"):
        Imperfections(slip=1.5)


def test_every_number_and_word_of_the_task_is_one_token(tokenizer):
    for text in [*map(str, range(100)), *arith.WORDS]:
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1, text
    assert tokenizer.tokenize("17*(2-10):2-10") == ["17", "*", "(", "2", "-", "10", ")", ":", "2", "-", "10"]
    assert tokenizer.tokenize("\\boxed{14}") == ["\\boxed{", "14", "}"]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_survives_the_saved_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_that_tear_each_other_apart_are_refused():
    with pytest.raises(ValueError, match="'bcd'"):  # "cd" merges first and leaves b alone: "bc" never forms
        build_tokenizer(["cd", "bcd"])


def test_the_chat_template_adds_the_tokens_it_says_and_no_more(tokenizer):
    messages = [
        {"role": "system", "content": "Plan."},
        {"role": "user", "content": "3+4"},
        {"role": "assistant", "content": "3+4"},
        {"role": "user", "content": "7"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.tokenize(text)
    start, end = "<|im_start|>", "<|im_end|>"
    question = ["3", "+", "4"]
    assert [token.replace("Ċ", "\n") for token in tokens] == [
        *(start, "system\n", "Plan.", end, start, "user\n", *question, end, start, "assistant\n", *question, end),
        *(start, "user\n", "7", end, start, "assistant\n"),
    ]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (end, "<|endoftext|>")


def test_the_model_folder_is_a_qwen3_that_transformers_reads_and_that_two_by_two_ranks_can_share(task, tokenizer):
    from transformers import AutoConfig

    from megatron_rema.architecture import Architecture

    config, arch = AutoConfig.from_pretrained(task / "model"), Architecture.from_pretrained(task / "model")
    arch.check_layout(tensor=2, pipeline=2)
    assert (config.model_type, arch.head_dim, arch.tied) == ("qwen3", 32, True)  # vLLM's CPU attention wants head_dim 32 or more
    assert config.vocab_size == len(tokenizer)
    assert arch.eos_token_ids == (tokenizer.eos_token_id,)
    assert config.pad_token_id == tokenizer.pad_token_id


def test_a_problem_drawn_anew_has_the_same_operations_on_other_numbers():
    old = generate(0, 30, (1, 2, 3, 4))
    anew = [arith.renewed(prompt, random.Random(i)) for i, prompt in enumerate(old)]
    assert all(re.sub(r"\d+", "n", a.question) == re.sub(r"\d+", "n", g.question) for a, g in zip(anew, old, strict=True))
    assert all(arith.is_heldout(a.question) and a.answer == str(arith.value_of(arith.parse(a.question))) for a in anew)
    assert arith.renewed(old[3], random.Random(5)) == arith.renewed(old[3], random.Random(5))
    assert arith.parse("(6-(2*2))*7") == ("*", ("-", 6, ("*", 2, 2)), 7)
    assert [arith.parse(text) for text in ("6 - 2", "6/2", "x-1", "6-", "-6", "1.5+2", "(" * 500)] == [None] * 7
