"""KL estimators. Shapes: T label positions."""

import math

import pytest
import torch

from megatron_rema.algorithm.kl import kl_estimate


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [-0.5, 0.5, 0.0]),  # -(ref - logp)
        ("k2", [0.125, 0.125, 0.0]),  # 0.5^2 / 2
        ("k3", [math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5, 0.0]),
    ],
)
def test_estimates_of_three_tokens_are_as_computed_by_hand(estimator, expected):
    kl_T = kl_estimate(torch.tensor([-1.5, -1.0, -2.0]), torch.tensor([-1.0, -1.5, -2.0]), estimator=estimator)
    assert kl_T.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_have_the_exact_kl_as_expectation(estimator):
    p_V, q_V = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    exact = (p_V * (p_V.log() - q_V.log())).sum()
    estimated = (p_V * kl_estimate(p_V.log(), q_V.log(), estimator=estimator)).sum()
    torch.testing.assert_close(estimated, exact)


def test_k2_as_a_loss_has_the_gradient_of_the_kl_and_k1_has_none():
    logits_V = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    ref_logp_V = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64).log()

    def expected_gradient(loss_V):  # samples are weighted by p as a constant, as in training
        return torch.autograd.grad((logits_V.softmax(0).detach() * loss_V).sum(), logits_V)[0]

    logp_V = logits_V.log_softmax(0)
    (exact_V,) = torch.autograd.grad((logp_V.exp() * (logp_V - ref_logp_V)).sum(), logits_V, retain_graph=True)
    torch.testing.assert_close(expected_gradient(kl_estimate(logits_V.log_softmax(0), ref_logp_V, estimator="k2")), exact_V)
    none_V = expected_gradient(kl_estimate(logits_V.log_softmax(0), ref_logp_V, estimator="k1"))
    torch.testing.assert_close(none_V, torch.zeros_like(none_V))


def test_k3_is_never_negative_and_stays_finite_far_from_the_reference():
    x_T = torch.tensor([-80.0, -1e-4, 1e-4, 80.0, 1e4])
    kl_T = kl_estimate(torch.zeros(5), x_T, estimator="k3")
    assert (kl_T >= 0).all() and kl_T.isfinite().all()
    assert kl_T[0].item() == pytest.approx(79.0)  # exp(-80) - 1 + 80
    assert kl_T[3].item() == kl_T[4].item() == pytest.approx(math.exp(20) - 21, rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_match_finite_differences_and_nan_is_not_hidden(estimator):
    a_T, b_T = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([-1.5, -1.0, -3.0], [-1.0, -1.7, -2.0]))
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator=estimator), (a_T, b_T))
    assert kl_estimate(torch.tensor([float("nan")]), torch.zeros(1), estimator=estimator).isnan().all()


def test_an_unknown_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), estimator="k4")
