"""Data in: problems and written dialogues from JSONL or parquet, and a stateless shuffled stream of prompts.

A bad row is a ValueError that names file, line (row for parquet, both from 1) and field.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_rema.reading import brief, is_file, parse, whole_text
from megatron_rema.types import Prompt, Role


@dataclass(frozen=True)
class WrittenDialogue:
    """A dialogue given as texts, for the cold start. ``turns`` alternate as in an episode; ``fields`` are a Prompt's."""

    question: str
    answer: str
    turns: tuple[tuple[Role, str], ...]
    fields: dict[str, str] = field(default_factory=dict)
    where: str = field(default="", compare=False)  # file and line, for errors


def read_prompts(
    path: str | Path,
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    id_key: str | None = None,
    level_key: str = "level",
    subset_key: str = "subset",
    field_keys: Sequence[str] = (),
    answers: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Problems of one file. ``level_key`` and ``subset_key`` may be missing; without ``id_key`` ids are file name and line.

    ``field_keys``: further columns, for the prompt's ``fields``. ``answers``: what an answer may be; None: any text.
    """
    prompts: list[Prompt] = []
    first_line: dict[str, str] = {}
    for where, number, row in rows_of(path):
        prompt_id = text_field(row, id_key, where) if id_key else f"{Path(path).stem}-{number}"
        if prompt_id in first_line:
            raise ValueError(f"{where}: field {id_key!r} is {prompt_id!r} as in {first_line[prompt_id]}: ids must be unique in a file.")
        first_line[prompt_id] = where
        question, answer = text_field(row, question_key, where), text_field(row, answer_key, where)
        if answers is not None and answer not in answers:
            raise ValueError(f"{where}: field {answer_key!r} must be one of {list(answers)}, got {brief(answer)}.")
        subset = row.get(subset_key)
        subset = "" if subset is None else whole_text(subset if isinstance(subset, str) else brief(subset), where, subset_key)
        level = _level(row.get(level_key), level_key, where)
        fields = _fields(row, field_keys, where)
        prompts.append(Prompt(prompt_id, question, answer, level, subset, fields=fields))
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"{path}: no rows. Give a file with at least one problem.")
    return prompts


MAX_MARGIN = 1e6  # of scores that are a few units apart; NaN, infinity and integers beyond any float are none


@dataclass(frozen=True)
class WrittenPair:
    """Two dialogues about one question, one preferred. ``margin``: by how much its score should be larger, at least."""

    question: str
    chosen: tuple[tuple[Role, str], ...]
    rejected: tuple[tuple[Role, str], ...]
    margin: float = 0.0
    fields: dict[str, str] = field(default_factory=dict)
    where: str = field(default="", compare=False)  # file and line, for errors


def read_dialogues(path: str | Path, *, field_keys: Sequence[str] = ()) -> list[WrittenDialogue]:
    """Rows {"question", FIELD_KEYS..., "answer", "turns": [{"role", "text"}, ...]}: meta_thinking and reasoning in turn, or reasoning
    once."""
    dialogues = [
        WrittenDialogue(
            text_field(row, "question", where),
            text_field(row, "answer", where),
            _turns(row, "turns", where),
            _fields(row, field_keys, where),
            where,
        )
        for where, _, row in rows_of(path)
    ]
    if not dialogues:
        raise ValueError(f"{path}: no rows. Give a file with at least one dialogue.")
    return dialogues


def read_pairs(path: str | Path, *, field_keys: Sequence[str] = ()) -> list[WrittenPair]:
    """Rows {"question", FIELD_KEYS..., "chosen": [{"role", "text"}, ...], "rejected": [...]}, and optionally "margin"."""
    pairs = []
    for where, _, row in rows_of(path):
        margin = row.get("margin", 0.0)
        if not isinstance(margin, int | float) or isinstance(margin, bool) or not abs(margin) <= MAX_MARGIN:
            raise ValueError(f"{where}: field 'margin' must be a number from -{MAX_MARGIN:g} to {MAX_MARGIN:g}, got {brief(margin)}.")
        pairs.append(
            WrittenPair(
                text_field(row, "question", where),
                _turns(row, "chosen", where),
                _turns(row, "rejected", where),
                float(margin),
                _fields(row, field_keys, where),
                where,
            )
        )
    if not pairs:
        raise ValueError(f"{path}: no rows. Give a file with at least one pair.")
    return pairs


def _turns(row: dict[str, Any], key: str, where: str) -> tuple[tuple[Role, str], ...]:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: field {key!r} must be a list with at least one turn, got {brief(turns)}.")
    spoken: list[tuple[Role, str]] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: field '{key}[{i}]' must be an object with 'role' and 'text', got {brief(turn)}.")
        named = turn.get("role")
        if named not in list(Role):
            raise ValueError(f"{where}: field '{key}[{i}].role' must be one of {[str(r) for r in Role]}, got {brief(named)}.")
        role = Role(named)
        expected = Role.REASONING if len(turns) == 1 or i % 2 else Role.META_THINKING
        if role is not expected:
            raise ValueError(f"{where}: field '{key}[{i}].role' is {str(role)!r} where {str(expected)!r} must speak: roles alternate.")
        spoken.append((role, text_field(turn, "text", where, shown_as=f"{key}[{i}].text")))
    return tuple(spoken)


class PromptStream:
    """Endless prompts, shuffled anew each epoch. Its whole state is the position that the caller keeps (and checkpoints)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        if not prompts:
            raise ValueError("PromptStream needs at least one prompt, got none.")
        self.prompts, self.seed = tuple(prompts), seed
        self._cached: tuple[int, list[int]] = (-1, [])

    def take(self, position: int, n: int) -> list[Prompt]:
        """The ``n`` prompts from ``position`` on, counted over all epochs."""
        size = len(self.prompts)
        return [self.prompts[self._order(p // size)[p % size]] for p in range(position, position + n)]

    def _order(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)  # a string seed is hashed the same everywhere
            self._cached = (epoch, order)
        return self._cached[1]


def rows_of(path: str | Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(where, number, row) of each row; blank JSONL lines are skipped."""
    path = Path(path)
    if not is_file(path):
        raise ValueError(f"{path}: no such file. Give a .jsonl or .parquet file.")
    if path.suffix == ".parquet":
        for number, row in enumerate(_parquet_rows(path), start=1):
            yield f"{path} row {number}", number, row
    elif path.suffix in (".jsonl", ".json"):
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                row = parse(line, where, "Every line must be one JSON object.")
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: must be a JSON object, got {brief(row)}.")
                yield where, number, row
    else:
        raise ValueError(f"{path}: cannot read files that end in {path.suffix!r}. Give a .jsonl or .parquet file.")


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}. Correct its rights.") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    done = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            rows = batch.to_pylist()
            yield from rows
            done += len(rows)
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # not parquet, damaged, or a value that Python cannot hold
        said = brief(" ".join(str(error).split()), 300)
        raise ValueError(f"{path}: cannot be read as parquet after row {done}: {said}. Write the file again.") from None


def text_field(row: dict[str, Any], key: str, where: str, *, shown_as: str | None = None) -> str:
    name = shown_as or key
    if key not in row:
        found = brief(sorted(row), 300)
        raise ValueError(f"{where}: field {name!r} is missing; the row has {found}. Rename the column or set its key in the config.")
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value != value or value in (math.inf, -math.inf):
            raise ValueError(f"{where}: field {name!r} must be text or a finite number, got {value}.")
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {name!r} must be text that is not blank, got {brief(value)}.")
    return whole_text(value, where, name)


def _fields(row: dict[str, Any], keys: Sequence[str], where: str) -> dict[str, str]:
    return {key: text_field(row, key, where) for key in keys}


def _level(value: Any, key: str, where: str) -> int:
    """3, "3" and "Level 3" are 3; missing is 0."""
    if value is None:
        return 0
    match = re.fullmatch(r"(?:Level )?([0-9]{1,9})", value if isinstance(value, str) else brief(value))
    if isinstance(value, bool) or match is None:
        raise ValueError(f"{where}: field {key!r} must be a whole number, got {brief(value)}.")
    return int(match[1])
