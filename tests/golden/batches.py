"""Random traces in two layouts: padded rows [B, L] as the public implementations want them, one packed row [T] as ours.

Shapes: B traces (rows), L padded length, T positions of all traces without padding, K turns of all traces, M tokens of the longest turn.
A trace is turns of own tokens with observed tokens before, between and after them; both kinds have ragged lengths.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    turn_ids_BL: Tensor  # turn of each own token, 0..K-1 over the whole batch; -1 for observed tokens and padding
    valid_BL: Tensor  # False for padding
    num_turns: int

    @property
    def mask_BL(self) -> Tensor:
        return self.turn_ids_BL >= 0

    @property
    def trace_ids_BL(self) -> Tensor:
        return torch.arange(len(self.valid_BL))[:, None].expand(self.valid_BL.shape)

    @property
    def trace_ids_K(self) -> Tensor:
        """The trace of each turn."""
        trace_ids_K = torch.empty(self.num_turns, dtype=torch.long)
        trace_ids_K[self.turn_ids_BL[self.mask_BL]] = self.trace_ids_BL[self.mask_BL]
        return trace_ids_K

    @property
    def num_tokens_K(self) -> Tensor:
        return self.turn_ids_BL[self.mask_BL].bincount(minlength=self.num_turns)

    def pack(self, values_BL: Tensor) -> Tensor:
        """[T]: padding left out; positions that are not own tokens hold NaN, which ours must not read."""
        return values_BL.masked_fill(~self.mask_BL, torch.nan)[self.valid_BL]

    def unpack(self, values_T: Tensor) -> Tensor:
        """[B, L], 0 where there is no own token."""
        values_BL = values_T.new_zeros(self.valid_BL.shape)
        values_BL[self.valid_BL] = values_T
        return values_BL.masked_fill(~self.mask_BL, 0.0)

    def ids(self) -> dict[str, Tensor]:
        """The id and mask arguments of our functions."""
        return {
            "turn_ids_T": self.turn_ids_BL[self.valid_BL],
            "trace_ids_T": self.trace_ids_BL[self.valid_BL],
            "loss_mask_T": self.mask_BL[self.valid_BL],
        }

    def spread(self, values_K: Tensor) -> Tensor:
        """[B, L] each own token gets its turn's value, 0 elsewhere."""
        return values_K[self.turn_ids_BL.clamp(min=0)].masked_fill(~self.mask_BL, 0.0)

    def turn_rows(self, values_BL: Tensor) -> Tensor:
        """[K, M]: every turn as a row of its own, padded with 0. With these a sequence-level opponent is a turn-level one."""
        tokens = [(self.turn_ids_BL == turn).flatten().nonzero()[:, 0] for turn in range(self.num_turns)]
        return torch.nn.utils.rnn.pad_sequence([values_BL.flatten()[index] for index in tokens], batch_first=True)

    def is_last_of_turn(self) -> Tensor:
        """[B, L] True at the last token of each turn."""
        follows_BL = torch.cat([self.turn_ids_BL[:, 1:], torch.full_like(self.turn_ids_BL[:, :1], -1)], dim=1)
        return self.mask_BL & (self.turn_ids_BL != follows_BL)


def random_batch(seed: int, *, num_traces: int = 12, max_turns: int = 4, max_tokens: int = 6, max_observed: int = 3) -> Batch:
    """1..max_turns turns of 1..max_tokens own tokens a trace, 0..max_observed observed tokens around each."""
    draw = random.Random(seed)
    rows, num_turns = [], 0
    for _ in range(num_traces):
        row: list[int] = []
        for _ in range(draw.randint(1, max_turns)):
            row += [-1] * draw.randint(0, max_observed) + [num_turns] * draw.randint(1, max_tokens)
            num_turns += 1
        rows.append(torch.tensor(row + [-1] * draw.randint(0, max_observed)))
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        turn_ids_BL=pad(rows, batch_first=True, padding_value=-1),
        valid_BL=pad([torch.ones_like(row) for row in rows], batch_first=True).bool(),
        num_turns=num_turns,
    )


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy loss reads, [B, L]. ``logprobs_BL`` is a leaf."""

    logprobs_BL: Tensor
    old_logprobs_BL: Tensor
    ref_logprobs_BL: Tensor
    entropy_BL: Tensor
    advantages_BL: Tensor  # equal inside a trace


def random_policy_inputs(batch: Batch, seed: int, dtype: torch.dtype) -> PolicyInputs:
    """Log ratios of about 0.6 in the mean of a turn and 0.9 a token: at clip 0.2 and dual clip 3 every branch is taken."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = batch.valid_BL.shape
    old_BL = normal(*shape) - 2.0
    logprobs_BL = old_BL + 0.6 * batch.spread(normal(batch.num_turns)) + 0.7 * normal(*shape)
    return PolicyInputs(
        logprobs_BL=logprobs_BL.to(dtype).requires_grad_(),
        old_logprobs_BL=old_BL.to(dtype),
        ref_logprobs_BL=(old_BL + 0.3 * normal(*shape)).to(dtype),
        entropy_BL=normal(*shape).abs().to(dtype).requires_grad_(),
        advantages_BL=normal(shape[0], 1).expand(shape).to(dtype),
    )
