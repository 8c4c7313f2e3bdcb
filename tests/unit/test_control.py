"""The adaptive KL coefficient and the chi-squared penalty, by hand."""

from math import exp, log

import pytest
import torch

from megatron_rema.algorithm.control import adapted_kl_coef, chi_squared_penalty
from megatron_rema.config import AlgorithmConfig
from megatron_rema.trainer.credit import penalise_divergence
from megatron_rema.types import Role, Trace


@pytest.mark.parametrize(
    ("kl", "num_traces", "expected"),
    [
        (0.11, 100, 0.5 * (1 + 0.1 * 0.1)),  # 10% above the target, a tenth of the horizon
        (0.09, 100, 0.5 * (1 - 0.1 * 0.1)),
        (5.0, 100, 0.5 * (1 + 0.2 * 0.1)),  # the error is clipped
        (0.0, 100, 0.5 * (1 - 0.2 * 0.1)),
        (0.0, 50_000, 0.5 * 0.8),  # fifty horizons in one step: the coefficient stays positive
        (0.1, 100, 0.5),
        (float("nan"), 100, 0.5),
        (float("inf"), 100, 0.5),
    ],
)
def test_the_coefficient_follows_the_kl(kl, num_traces, expected):
    assert adapted_kl_coef(0.5, kl, target=0.1, num_traces=num_traces, horizon=1000) == pytest.approx(expected)


def test_the_penalty_falls_on_what_the_reference_would_hardly_have_said():
    # w = 1 and 3: mean 2, chi2 = 1; -0.5 * (1 - 2) / 1 and -0.5 * (3 - 2) / 1
    penalty, chi2 = chi_squared_penalty(torch.tensor([0.0, log(3.0)]), coef=0.5, log_ratio_cap=5.0)
    assert penalty.tolist() == pytest.approx([0.5, -0.5]) and chi2 == pytest.approx(1.0)
    # capped at log 2: w = 1 and 2, mean 1.5, chi2 = 0.5
    penalty, chi2 = chi_squared_penalty(torch.tensor([0.0, 100.0]), coef=1.0, log_ratio_cap=log(2.0))
    assert penalty.tolist() == pytest.approx([0.5 / 0.5**0.5, -0.5 / 0.5**0.5]) and chi2 == pytest.approx(0.5)


def test_equal_policies_are_not_penalised_and_a_low_estimate_is_held_at_the_floor():
    penalty, chi2 = chi_squared_penalty(torch.zeros(3), coef=1.0, log_ratio_cap=5.0)
    assert penalty.tolist() == [0.0, 0.0, 0.0] and chi2 == 0.0
    # w = 0.5 and 1: mean 0.75, estimate -0.25: 0.01 under the root
    penalty, chi2 = chi_squared_penalty(torch.tensor([log(0.5), 0.0]), coef=1.0, log_ratio_cap=5.0)
    assert penalty.tolist() == pytest.approx([2.5, -2.5]) and chi2 == pytest.approx(-0.25)
    assert chi_squared_penalty(torch.zeros(0), coef=1.0, log_ratio_cap=5.0)[0].tolist() == []


def test_the_penalty_is_the_gradient_of_the_root_of_chi_squared():
    """Over all outcomes of a softmax, not over samples: sum_i p_i A_i grad log p_i with A = -w / sqrt(chi2) is -grad sqrt(chi2)."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = logits.softmax(0)
    chi2 = (p**2 / reference).sum() - 1.0
    (wanted,) = torch.autograd.grad(chi2.sqrt(), logits)
    weights = (p / reference).detach()
    advantages = -(weights - (p.detach() * weights).sum()) / chi2.detach().sqrt()
    (found,) = torch.autograd.grad((logits.softmax(0).detach() * advantages * logits.log_softmax(0)).sum(), logits)
    assert found.tolist() == pytest.approx((-wanted).tolist())


def trace(*advantages: float) -> Trace:
    """heard, own, own | heard | own: labels own at 0, 1 and 3."""
    mask, turns = (False, True, True, False, True, False), (-1, 0, 0, -1, 1, -1)
    return Trace("e", Role.REASONING, (5, 6, 7, 8, 9, 4), mask, turns, (0.0,) * 6, (0.0, 0.0), advantages)


def test_every_own_token_of_a_trace_carries_its_penalty():
    traces = [trace(1.0, 2.0), trace(0.0, -1.0)]
    old = [torch.tensor([-1.0, -1.0, 99.0, -1.0, 99.0])] * 2
    ref = [old[0], torch.tensor([-1.0 - log(3.0), -1.0, -50.0, -1.0, -50.0])]  # what was heard does not count
    advantages, metrics = penalise_divergence(traces, {"old_logprobs": old, "ref_logprobs": ref}, AlgorithmConfig(chi2_coef=0.5))
    assert advantages[0].tolist() == pytest.approx([1.5, 1.5, 0.0, 2.5, 0.0])
    assert advantages[1].tolist() == pytest.approx([-0.5, -0.5, 0.0, -1.5, 0.0])
    assert metrics == {"train/chi2": pytest.approx(1.0), "train/chi2_capped_frac": 0.0}
    given = {"old_logprobs": old, "ref_logprobs": ref, "advantages": [torch.ones(5), torch.ones(5)]}  # a critic's, token by token
    advantages, _ = penalise_divergence(traces, given, AlgorithmConfig(chi2_coef=0.5))
    assert advantages[0].tolist() == pytest.approx([1.5, 1.5, 1.0, 1.5, 1.0])


def test_a_penalty_needs_the_reference_and_its_log_probabilities():
    off, on = AlgorithmConfig(), AlgorithmConfig(chi2_coef=8e-4, kl_coef=0.1, kl_estimator="exact")
    assert not off.needs_reference and not off.needs_ref_logprobs and on.needs_reference and on.needs_ref_logprobs
    assert exp(on.chi2_log_ratio_cap) == pytest.approx(148.4, abs=0.1)
