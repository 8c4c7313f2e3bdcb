"""Counterfactual episodes: which episodes of a prompt play without the plan under test, and whose plan they follow instead.

Index arithmetic only. Symbols: G episodes of a prompt that plan, k samples, B = G + further episodes: one block of group indices.

ablated  G + j        follows no plan                         j in 0..k-1: one baseline for the whole group
swapped  G + i k + j  follows the plan of (i + 1 + j) mod G   in place of that of i, which has a baseline of its own

Sources: ablated is the difference reward of Wolpert and Tumer 2001 whose default action is to say nothing; swapped samples the sum over
u' ~ pi of COMA's baseline, arXiv:1705.08926 eq. 4, with the plans that the meta-thinker wrote for the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Counterfactuals:
    """Behind its G episodes a prompt plays ``num_per_group`` more. A prompt that is listed twice has two blocks of B indices."""

    kind: Literal["ablated", "swapped"]
    group_size: int  # G
    samples: int  # k: of a prompt (ablated), of an episode (swapped)

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.samples < 1:
            raise ValueError(f"group_size and samples must be at least 1, got {self.group_size} and {self.samples}.")
        if self.kind == "swapped" and self.samples >= self.group_size:
            raise ValueError(
                f"{self.samples} swapped plans for each of {self.group_size} episodes: a group holds {self.group_size - 1} other plans; "
                "lower samples."
            )

    @property
    def num_per_group(self) -> int:
        return self.samples if self.kind == "ablated" else self.group_size * self.samples

    def is_factual(self, group_index: int) -> bool:
        return self._split(group_index)[1] < self.group_size

    def plan_index(self, group_index: int) -> int | None:
        """Group index of the episode whose plan this one follows: its own when it is factual; None: it follows no plan."""
        first, offset = self._split(group_index)
        if offset < self.group_size:
            return group_index
        if self.kind == "ablated":
            return None
        episode, sample = divmod(offset - self.group_size, self.samples)
        return first + (episode + 1 + sample) % self.group_size

    def replaced_index(self, group_index: int) -> int | None:
        """Group index of the episode in place of whose plan this one was given another; None: of none in particular, or factual."""
        first, offset = self._split(group_index)
        if offset < self.group_size or self.kind == "ablated":
            return None
        return first + (offset - self.group_size) // self.samples

    def _split(self, group_index: int) -> tuple[int, int]:
        """First index of the block, and the offset in it."""
        offset = group_index % (self.group_size + self.num_per_group)
        return group_index - offset, offset
