"""``evaluate score_file=FILE``: scores saved responses with the training reward's verifier, without a model and without torch.

Input: JSONL, a row one or more responses to one problem.

question, answer     the problem and its gold answer (``task.question_key``, ``task.answer_key``); the question may be missing
response, responses  one text, or a list of texts: exactly one of the two
id                   optional: rows of one id are samples of one problem. Without it, rows of the same question and gold answer are
subset, dataset      optional, the first of the two that is there: figures are given for each subset and for all

A row that cannot be read is refused by file, line and field. A response without a verdict (blank or unreadable gold answer, time-out,
crash) is unknown: named, counted and excluded, never taken for wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_rema.config import ConfigError, RunConfig
from megatron_rema.reading import brief, is_file, parse, whole_text
from megatron_rema.report import accuracy
from megatron_rema.reward.answers import last_answer
from megatron_rema.reward.math_verifier import Judgement, VerifierPool
from megatron_rema.types import Verdict

NAMED_UNKNOWN = 10  # lines named on the console; the rest is counted
ALL = "all"

_WHY_UNKNOWN = {
    "quick": "the gold answer is blank, or no letter of a judge's",
    "verified": "the gold answer cannot be read as mathematics",
    "timeout": "the verifier did not answer within reward.verifier_timeout_s",
    "crash": "the verifier died or failed on this answer",
}


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    line: int
    problem: tuple[str, ...]  # what makes rows samples of one problem: subset and id, or subset, question and gold answer
    subset: str
    gold: str
    responses: tuple[str, ...]
    end: int  # byte of the file at which the line ends


@dataclass
class Scored:
    """One problem: its samples with a verdict, in the order of the file."""

    subset: str
    right: list[float] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)  # what the last box (or judge's letter) says; None: no answer
    majority_right: bool | None = None


def score_file(config: RunConfig) -> None:
    """Print ``accuracy: 0.987 (1888 scored, 1 unknown)``, the fraction of judged responses that are right, then a table by subset."""
    path = Path(config.score_file or "")
    if not is_file(path):
        raise ConfigError(f"score_file is {path}; no such file: give a JSONL file with answer and response in every row.")
    reward = config.reward
    unknown: list[tuple[Row, str]] = []
    with VerifierPool(reward.verifier_processes, reward.verifier_timeout_s, lenient=False) as verifier, _progress() as bar:
        judging = bar.add_task("judge", total=path.stat().st_size)
        problems: dict[tuple[str, ...], Scored] = {}
        samples = ((row, text) for row in read_rows(path, config.task.question_key, config.task.answer_key) for text in row.responses)
        form = config.task.answer_format
        for (row, text), judgement in verifier.stream(samples, of=lambda sample: (sample[1], sample[0].gold, form)):
            _add(problems, unknown, row, last_answer(text, form), judgement)
            bar.update(judging, completed=row.end)
        if not problems:
            raise ConfigError(f"score_file {path} has no rows: give a file with at least one response.")
        several = [problem for problem in problems.values() if len(problem.right) > 1]
        voting = bar.add_task("majority", total=len(several), visible=bool(several))
        for problem, is_right in verifier.majorities(several, of=_votes):
            problem.majority_right = is_right
            bar.advance(voting)
    right = [value for problem in problems.values() for value in problem.right]
    print(f"accuracy: {sum(right) / len(right) if right else nan:.3f} ({len(right)} scored, {len(unknown)} unknown)", flush=True)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(
        table(problems.values(), Counter(row.subset for row, _ in unknown), path.name)
    )
    _name_unknown(path, unknown)


def read_rows(path: Path, question_key: str, answer_key: str) -> Iterator[Row]:
    """Rows one by one, however long the file; blank lines are skipped."""
    gold_of: dict[tuple[str, ...], tuple[str, int]] = {}
    end = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            end += len(line)
            if not line.strip():
                continue
            where = f"{path} line {number}"
            row = parse(line, where, "Every line must be one JSON object.")
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: is {brief(row)}; every line must be one JSON object.")
            gold = _text(row, answer_key, where)
            subset = next((_name(row, key, where) for key in ("subset", "dataset") if row.get(key) is not None), "")
            if row.get("id") is not None:
                problem: tuple[str, ...] = (subset, _name(row, "id", where))
                first_gold, first_line = gold_of.setdefault(problem, (gold, number))
                if first_gold != gold:
                    raise ConfigError(
                        f"{where}: field {answer_key!r} is {brief(gold)} but was {brief(first_gold)} in line {first_line}, which has the "
                        f"same id {brief(row['id'])}; rows of one id are samples of one problem: correct the id or the answer."
                    )
            else:
                problem = (subset, _name(row, question_key, where) if question_key in row else "", gold)
            yield Row(number, problem, subset, gold, _responses(row, where), end)


def _responses(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if ("response" in row) == ("responses" in row):
        raise ConfigError(
            f"{where}: the row has {brief(sorted(row), 300)}; it must have either 'response' (text) or 'responses' (a list of texts)."
        )
    if "response" in row:
        return (_text(row, "response", where),)
    responses = row["responses"]
    if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
        raise ConfigError(f"{where}: field 'responses' is {brief(responses)}; it must be a list of at least one text.")
    return tuple(whole_text(text, where, "responses") for text in responses)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    """Text; a number counts as its digits. It may be blank: an empty response is wrong, an empty gold answer makes it unknown."""
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: field {key!r} is {brief(value)}; it must be text.")
    return whole_text(value, where, key)


def _name(row: Mapping[str, Any], key: str, where: str) -> str:
    """What a row says it belongs to: text, or whatever else, as text."""
    value = row[key]
    return whole_text(value if isinstance(value, str) else brief(value), where, key)


def _add(
    problems: dict[tuple[str, ...], Scored], unknown: list[tuple[Row, str]], row: Row, answer: str | None, judgement: Judgement
) -> None:
    problem = problems.setdefault(row.problem, Scored(row.subset))
    if judgement.verdict is Verdict.UNKNOWN:
        unknown.append((row, judgement.how))
        return
    problem.right.append(float(judgement.verdict is Verdict.CORRECT))
    problem.answers.append(answer if answer is not None and answer.strip() else None)


def _votes(problem: Scored) -> Sequence[tuple[bool, str | None]]:
    return [(bool(right), answer) for right, answer in zip(problem.right, problem.answers, strict=True)]


def table(problems: Iterable[Scored], unknown: Mapping[str, int], title: str) -> Table:
    """A line for each subset and one for all. avg@k and its 95% interval are over problems; pass@k over those with k judged samples."""
    problems = list(problems)
    subsets = list(dict.fromkeys(problem.subset for problem in problems))
    groups = {name: [p for p in problems if p.subset == name] for name in subsets} if len(subsets) > 1 else {}
    lines = [(name or "(none)", _summary(members), unknown.get(name, 0)) for name, members in groups.items()]
    lines.append((ALL, _summary(problems), sum(unknown.values())))
    all_sizes = sorted({k for _, found, _ in lines for k in found.pass_at})
    view = Table(title=escape(title))
    view.add_column("subset")
    with_majority = any(found.majority is not None for _, found, _ in lines)
    passes = [f"pass@{k}" for k in all_sizes]
    for name in ("problems", "samples", "avg@k", "95% interval", *passes, *(["majority@k"] if with_majority else []), "unknown"):
        view.add_column(name, justify="right")
    for name, found, num_unknown in lines:
        view.add_row(
            escape(name),
            str(found.num_problems),
            f"k = {found.most}" if found.fewest == found.most else f"k = {found.fewest}-{found.most}",
            f"{found.mean:.3f}",
            f"[{found.low:.3f}, {found.high:.3f}]",
            *(_pass(found, k) for k in all_sizes),
            *(["" if found.majority is None else f"{found.majority:.3f}"] if with_majority else []),
            str(num_unknown),
            end_section=name == subsets[-1],
        )
    return view


def _summary(problems: Sequence[Scored]) -> accuracy.Accuracy:
    several = any(len(problem.right) > 1 for problem in problems)
    return accuracy.summary(
        [
            # the majority of one sample is that sample
            accuracy.Problem(p.right, (bool(p.right[0]) if len(p.right) == 1 else p.majority_right) if several and p.right else None)
            for p in problems
        ]
    )


def _pass(found: accuracy.Accuracy, k: int) -> str:
    """pass@k, with the number of problems in brackets where not all of them have k samples."""
    if k not in found.pass_at:
        return ""
    count = found.pass_at_problems[k]
    return f"{found.pass_at[k]:.3f}" if count == found.num_problems else f"{found.pass_at[k]:.3f} ({count})"


def _name_unknown(path: Path, unknown: Sequence[tuple[Row, str]]) -> None:
    """The first lines by name, on the error stream."""
    lines = list(Counter((row.line, how) for row, how in unknown).items())
    for (line, how), count in lines[:NAMED_UNKNOWN]:
        print(f"unknown: {path} line {line}: {_WHY_UNKNOWN[how]}; {count} response(s) excluded.", file=sys.stderr)
    if len(lines) > NAMED_UNKNOWN:
        print(f"unknown: {len(lines) - NAMED_UNKNOWN} lines more.", file=sys.stderr)


def _progress() -> Progress:
    """On the error stream, so that what is printed can be read by a program; silent where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("eta"))
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)
