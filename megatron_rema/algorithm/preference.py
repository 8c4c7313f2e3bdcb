"""The Bradley-Terry loss of a reward model over pairs of which one answer is preferred. Pure: no process groups.

Shapes: N pairs of one microbatch, K heads of an ensemble on one trunk.
As in losses.py the loss is a plain SUM; ``weights_N`` holds the GLOBAL normaliser of the optimizer step (1 / pairs of all
microbatches and data-parallel ranks for the mean pair).
Sources: pairwise loss arXiv:2203.02155 eq. 1; margin arXiv:2307.09288 eq. 2; centering arXiv:2312.09244.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import softplus

from megatron_rema.algorithm.masked import masked_sum


@dataclass(frozen=True)
class PreferenceStats:
    """Sums over one microbatch, detached float32 scalars. Add them over microbatches and data-parallel ranks, then ``means``.

    A pair's score is the mean over the heads.
    """

    loss: Tensor  # the objective: preference_loss + centering_loss
    preference_loss: Tensor  # sum of weights * mean over heads of -log sigmoid(chosen - rejected - margin)
    centering_loss: Tensor  # sum of weights * mean over heads of centering * (chosen + rejected)^2
    num_pairs: Tensor  # pairs of weight other than 0: the denominator of *_pairs
    correct_pairs: Tensor  # pairs whose chosen answer scores higher (no margin asked); a tie counts half
    chosen_scores_pairs: Tensor
    rejected_scores_pairs: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """Every sum by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def means(sums: Mapping[str, float]) -> dict[str, float]:
        """Reduced sums -> metrics, each divided by its own denominator (0.0 where that is 0)."""

        def mean(name: str) -> float:
            return sums[name] / sums["num_pairs"] if sums["num_pairs"] else 0.0

        chosen, rejected = mean("chosen_scores_pairs"), mean("rejected_scores_pairs")
        return {
            "loss": sums["loss"],
            "preference_loss": sums["preference_loss"],
            "centering_loss": sums["centering_loss"],
            "num_pairs": sums["num_pairs"],
            "accuracy": mean("correct_pairs"),
            "chosen_score_mean": chosen,
            "rejected_score_mean": rejected,
            "score_gap_mean": chosen - rejected,
        }


def bradley_terry(
    chosen_N: Tensor,
    rejected_N: Tensor,
    *,
    margin_N: Tensor | None = None,
    centering: float = 0.0,
    weights_N: Tensor,
    head_weights_NK: Tensor | None = None,
) -> tuple[Tensor, PreferenceStats]:
    """Scalar loss (a SUM, see the file's head) and its detached sums. Scores are [N], or [N, K] for an ensemble of K heads.

    L = mean over heads of  -log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2

    A margin (>= 0, per pair, in units of score) asks a clearly better answer to score that much higher. The preferences leave
    the scores' origin free; centering (0.01 is usual) draws it to 0. Every head sees every pair, and heads differ by their
    initialisation alone, unless ``head_weights_NK`` says how often each head sees each pair (`bootstrap_weights`); metrics count every
    pair once. Pairs of weight 0 are padding and are not read. No pair: loss 0 with gradient 0. Gradient flows to the scores.
    """
    if not centering >= 0.0:
        raise ValueError(f"centering must be >= 0, got {centering}; 0 switches it off.")
    assert chosen_N.shape == rejected_N.shape and chosen_N.dim() in (1, 2), (chosen_N.shape, rejected_N.shape)
    assert weights_N.shape == chosen_N.shape[:1], (weights_N.shape, chosen_N.shape)
    assert head_weights_NK is None or head_weights_NK.shape == chosen_N.shape, (head_weights_NK.shape, chosen_N.shape)
    assert margin_N is None or margin_N.shape == weights_N.shape, (margin_N.shape, weights_N.shape)
    weights_N = weights_N.detach()
    counted_N = weights_N != 0  # a NaN weight counts, and shows

    def counted(scores_N: Tensor) -> Tensor:
        scores_NK = scores_N if scores_N.dim() == 2 else scores_N[:, None]
        return scores_NK.masked_fill(~counted_N[:, None], 0.0)  # first of all, so that padding meets no gradient either

    chosen_NK, rejected_NK = counted(chosen_N), counted(rejected_N)
    gap_NK = chosen_NK - rejected_NK
    asked_NK = gap_NK if margin_N is None else gap_NK - counted(margin_N.detach())

    def weighted(values_NK: Tensor) -> Tensor:
        seen_NK = values_NK if head_weights_NK is None else head_weights_NK * values_NK
        return masked_sum(weights_N * seen_NK.mean(1), counted_N)

    preference = weighted(softplus(-asked_NK))
    centred = centering * weighted((chosen_NK + rejected_NK).square())
    loss = preference + centred if centering else preference

    with torch.no_grad():

        def over_pairs(values_NK: Tensor) -> Tensor:
            return masked_sum(values_NK.float().mean(1), counted_N)

        gap_N1 = gap_NK.float().mean(1, keepdim=True)
        stats = PreferenceStats(
            loss=loss.detach().float(),
            preference_loss=preference.detach().float(),
            centering_loss=centred.detach().float(),
            num_pairs=counted_N.sum().float(),
            correct_pairs=over_pairs(torch.heaviside(gap_N1, gap_N1.new_tensor(0.5))),
            chosen_scores_pairs=over_pairs(chosen_NK),
            rejected_scores_pairs=over_pairs(rejected_NK),
        )
    return loss, stats


def bootstrap_weights(pair_ids: Sequence[int], *, num_heads: int, seed: int) -> Tensor:
    """How often each head of an ensemble sees each pair: independent Poisson(1) draws, float32 [N, K].

    The online form of resampling the pairs with replacement for every head (Oza and Russell 2001; deep ensembles on bootstrapped data
    arXiv:1602.04621): each head misses about 37% of the pairs, so that heads disagree where the data say little. A draw is a function of
    (seed, pair, head): it is the same in every epoch, on every rank and after a resume.
    """
    return torch.stack([_poisson_draws(f"{seed}/{pair_id}", num_heads) for pair_id in pair_ids]) if pair_ids else torch.empty(0, num_heads)


def _poisson_draws(key: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest()))
    return torch.poisson(torch.ones(count), generator=generator)
