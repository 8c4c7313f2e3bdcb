"""Phrases of a text: its words and marks, up to three in a row. Pure."""

from __future__ import annotations

import re

LONGEST = 3
_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and single marks in order: ``t1=9`` is three of them, so that a phrase may leave out what varies."""
    return _WORD.findall(text)


def phrases_of(text: str) -> set[str]:
    """Every run of 1 to 3 words without a number, joined by spaces: which number is said depends on the problem."""
    words = words_of(text)
    runs = (words[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))
    return {" ".join(run) for run in runs if not any(word.isdigit() for word in run)}


def has_phrase(text: str, phrase: str) -> bool:
    """The words of ``phrase`` stand in ``text`` next to each other."""
    wanted, words = words_of(phrase), words_of(text)
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))
