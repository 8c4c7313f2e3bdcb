"""A whole tiny task on disk: problems, dialogues, a random model with a tokenizer. Small enough to train for a few steps in a test."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny_models import save_tiny_model
from tests.unit.tiny_tokenizer import tiny_tokenizer


def save_tiny_task(folder: Path) -> list[str]:
    """Writes the task below ``folder``; returns the overrides that make any front door use it."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = [{"question": f"{a} + {b}", "answer": str(a + b), "level": 1} for a in range(6) for b in range(6)]
    _write(folder / "train.jsonl", problems)
    _write(folder / "heldout.jsonl", problems[:6])
    _write(folder / "dialogues.jsonl", [{**p, "turns": dialogue(p["answer"])} for p in problems])
    _write(folder / "preferences.jsonl", [pair(p, wrong) for p in problems for wrong in range(11) if str(wrong) != p["answer"]])
    _write(folder / "preferences_heldout.jsonl", [pair(p, int(p["answer"]) + off) for p in problems for off in (1, 2, 3)])
    return [
        *_files(folder),
        "~task.evaluation_files.ood",
        f"task.preference_file={folder}/preferences.jsonl",
        f"task.preference_heldout_file={folder}/preferences_heldout.jsonl",
        *_model(folder),
    ]


def save_tiny_judge_task(folder: Path) -> list[str]:
    """The judge's task about the same sums; its answers spell their numbers as WORDS do, which no question and no plan holds."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(a, b, "AB"[(a + b) % 2]) for a in range(6) for b in range(6)]
    rows = []
    for a, b, label in sums:
        right, wrong = WORDS[a + b], WORDS[(a + b + 1) % len(WORDS)]
        first, second = (right, wrong) if label == "A" else (wrong, right)
        rows.append({"question": f"{a} + {b}", "answer_a": first, "answer_b": second, "label": label, "level": 1})
    _write(folder / "train.jsonl", rows)
    _write(folder / "heldout.jsonl", rows[:6])
    turns = [[{"role": "meta_thinking", "text": "add"}, {"role": "reasoning", "text": f"[[{letter}]]"}] for letter in "AB"]
    _write(folder / "dialogues.jsonl", [{**row, "answer": row["label"], "turns": turns[row["label"] == "B"]} for row in rows])
    return [
        "task=judge",
        *_files(folder),
        *_model(folder),
        "rollout.max_rounds=1",
        "task.system_prompts={meta_thinking:Plan,reasoning:Judge}",
    ]


WORDS = ("nil", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


def _files(folder: Path) -> list[str]:
    return [
        f"task.train_file={folder}/train.jsonl",
        f"task.evaluation_files.heldout={folder}/heldout.jsonl",
        f"task.cold_start_file={folder}/dialogues.jsonl",
    ]


def _model(folder: Path) -> list[str]:
    """A random model, and budgets that a test can pay."""
    save_tiny_model(folder / "model", tokenizer=tiny_tokenizer("chatml"))
    return [
        f"model.path={folder}/model",
        "model.dtype=float32",
        "rollout.prompts_per_step=4",
        "rollout.episodes_per_prompt=4",
        "rollout.max_rounds=2",
        "rollout.max_turn_tokens=8",
        "rollout.max_context_tokens=256",
        "trainer.microbatch_tokens=1024",
        "trainer.evaluation_samples=1",
        "engine.max_num_seqs=16",
        "engine.kv_cache_mib=16",
    ]


def dialogue(answer: str) -> list[dict]:
    return [{"role": "meta_thinking", "text": "add [FINISH]"}, {"role": "reasoning", "text": f"\\boxed{{{answer}}}"}]


def pair(problem: dict, wrong: int) -> dict:
    """A preference: the right answer over a wrong one."""
    return {"question": problem["question"], "chosen": dialogue(problem["answer"]), "rejected": dialogue(str(wrong))}


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
