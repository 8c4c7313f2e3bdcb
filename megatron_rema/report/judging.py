"""What a judge's choices say when every comparison was put to it in both orders of its answers. Pure numbers: no torch, no verifier.

A judge that looks at the answers alone chooses the same answer, hence the other letter, when they are exchanged; one that prefers a place
says the same letter twice. The unit is the pair: its two orders, and the samples of each, are not independent.
With several samples an order, a pair's figure is the mean over every pairing of one sample as given with one swapped.
Sources: position bias arXiv:2306.05685 section 3.4; strict accuracy, right in both orders, as for the judge task of ReMA arXiv:2503.09501.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from megatron_rema.report.accuracy import interval
from megatron_rema.types import LETTERS

# as a reader is told -> field of Judging
FIGURES = {
    "right as given": "as_given",
    "right swapped": "swapped",
    "right in both orders": "strict",
    "same letter in both": "same_letter",
    "chose A": "chose_a",
}


@dataclass(frozen=True)
class Pair:
    """One comparison: the letters said in each order, one a sample, None where a dialogue came to none. ``label``: right as given."""

    label: str
    as_given: Sequence[str | None]
    swapped: Sequence[str | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs and the bounds of its 95% interval (bootstrap over pairs)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Judging:
    """Of the pairs with a sample in both orders. The last two count what has a letter only, and are None where nothing has."""

    num_pairs: int
    answered_frac: float  # of the dialogues, mean over pairs: came to a letter
    as_given: Estimate  # accuracy in the order of the file; no letter is wrong
    swapped: Estimate  # accuracy in the other order
    strict: Estimate  # right in both orders
    same_letter: Estimate | None  # the same letter in both orders: 0.0 for a judge without position bias, 1.0 for one that has nothing else
    chose_a: Estimate | None  # letters that are A: 0.5 without position bias


def judging(pairs: Sequence[Pair]) -> Judging | None:
    """None where no pair has a sample in both orders."""
    pairs = [pair for pair in pairs if pair.as_given and pair.swapped]
    if not pairs:
        return None
    right = [([said == pair.label for said in pair.as_given], [said == _other(pair.label) for said in pair.swapped]) for pair in pairs]
    letters = [([x for x in pair.as_given if x is not None], [x for x in pair.swapped if x is not None]) for pair in pairs]
    return Judging(
        num_pairs=len(pairs),
        answered_frac=fmean(_rate([said is not None for said in (*pair.as_given, *pair.swapped)]) for pair in pairs),
        as_given=_estimate([_rate(given) for given, _ in right]),
        swapped=_estimate([_rate(swapped) for _, swapped in right]),
        strict=_estimate([_rate([x and y for x, y in product(*both)]) for both in right]),
        same_letter=_estimate([_rate([x == y for x, y in product(*both)]) for both in letters if all(both)]),
        chose_a=_estimate([_rate([x == LETTERS[0] for x in (*given, *swapped)]) for given, swapped in letters if given or swapped]),
    )


def _other(letter: str) -> str:
    return LETTERS[1 - LETTERS.index(letter)]


def _rate(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _estimate(pair_means: Sequence[float]) -> Estimate | None:
    return Estimate(fmean(pair_means), *interval(pair_means)) if pair_means else None
