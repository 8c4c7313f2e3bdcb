"""The Bradley-Terry loss against hand-computed numbers. Shapes: N pairs, K heads."""

import math

import pytest
import torch

from megatron_rema.algorithm.preference import PreferenceStats, bootstrap_weights, bradley_terry

NAN = float("nan")


def sums(stats: PreferenceStats) -> dict[str, float]:
    return {name: value.item() for name, value in stats.as_dict().items()}


def test_the_loss_of_three_pairs_is_as_computed_by_hand():
    # gaps 1, 0, -2: log(1 + e^-1) = .313262, log 2 = .693147, log(1 + e^2) = 2.126928; weights .5, .25, .25
    chosen_N, rejected_N = torch.tensor([2.0, 0.5, -1.0], requires_grad=True), torch.tensor([1.0, 0.5, 1.0], requires_grad=True)
    loss, stats = bradley_terry(chosen_N, rejected_N, weights_N=torch.tensor([0.5, 0.25, 0.25]))
    loss.backward()
    assert loss.item() == pytest.approx(0.156631 + 0.173287 + 0.531732, abs=1e-5)
    # -weight * sigmoid(-gap): .268941, .5, .880797
    assert chosen_N.grad.tolist() == pytest.approx([-0.134471, -0.125, -0.220199], abs=1e-5)
    assert rejected_N.grad.tolist() == pytest.approx([0.134471, 0.125, 0.220199], abs=1e-5)
    metrics = PreferenceStats.means(sums(stats))
    assert metrics["accuracy"] == 0.5  # right, tie (half), wrong: 1.5 / 3
    assert metrics["chosen_score_mean"] == pytest.approx(0.5)  # 1.5 / 3
    assert metrics["rejected_score_mean"] == pytest.approx(2.5 / 3)
    assert metrics["score_gap_mean"] == pytest.approx(-1 / 3)
    assert metrics["loss"] == metrics["preference_loss"] == pytest.approx(loss.item())
    assert metrics["centering_loss"] == 0.0 and metrics["num_pairs"] == 3.0


def test_a_margin_is_asked_on_top_and_does_not_move_the_accuracy():
    # gap 1 with margin 1 costs what gap 0 costs: log 2. gap 1 without margin: .313262
    loss, stats = bradley_terry(
        torch.tensor([1.0, 1.0]), torch.zeros(2), margin_N=torch.tensor([1.0, 0.0]), weights_N=torch.tensor([1.0, 1.0])
    )
    assert loss.item() == pytest.approx(0.693147 + 0.313262, abs=1e-5)
    assert stats.correct_pairs.item() == 2.0


def test_centering_draws_the_sum_of_the_two_scores_to_zero():
    # preference: log 2 (gap 0); centering .01 * (3 + 3)^2 = .36; gradient of each score: -+.5 + .01 * 2 * 6
    chosen_N, rejected_N = torch.tensor([3.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    loss, stats = bradley_terry(chosen_N, rejected_N, centering=0.01, weights_N=torch.ones(1))
    loss.backward()
    assert loss.item() == pytest.approx(0.693147 + 0.36, abs=1e-5)
    assert chosen_N.grad.item() == pytest.approx(-0.5 + 0.12, abs=1e-6)
    assert rejected_N.grad.item() == pytest.approx(0.5 + 0.12, abs=1e-6)
    assert stats.preference_loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert stats.centering_loss.item() == pytest.approx(0.36, abs=1e-6)


def test_an_ensemble_has_the_mean_loss_of_its_heads_and_votes_by_mean_score():
    g = torch.Generator().manual_seed(0)
    chosen_NK, rejected_NK = torch.randn(2, 6, 3, generator=g)
    weights_N, margin_N = torch.rand(2, 6, generator=g)
    options = dict(margin_N=margin_N, centering=0.1, weights_N=weights_N)
    loss, _ = bradley_terry(chosen_NK, rejected_NK, **options)
    heads = [bradley_terry(chosen_NK[:, k], rejected_NK[:, k], **options)[0] for k in range(3)]
    torch.testing.assert_close(loss, sum(heads) / 3)
    # heads 2 of 3 prefer the rejected answer, the mean (4 - 1 - 1) / 3 the chosen one
    _, stats = bradley_terry(torch.tensor([[4.0, -1.0, -1.0]]), torch.zeros(1, 3), weights_N=torch.ones(1))
    assert stats.correct_pairs.item() == 1.0
    assert stats.chosen_scores_pairs.item() == pytest.approx(2 / 3)


def test_one_head_as_a_column_is_one_head():
    chosen_N, rejected_N, weights_N = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    flat, flat_stats = bradley_terry(chosen_N, rejected_N, weights_N=weights_N)
    column, column_stats = bradley_terry(chosen_N[:, None], rejected_N[:, None], weights_N=weights_N)
    assert flat.item() == column.item() and sums(flat_stats) == sums(column_stats)


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_the_gradient_is_that_of_the_definition(shape):
    g = torch.Generator().manual_seed(2)
    chosen_N, rejected_N = (torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights_N, margin_N = torch.rand(2, 5, generator=g, dtype=torch.float64)
    weights_N[3] = 0.0
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry(c, r, margin_N=margin_N, centering=0.3, weights_N=weights_N)[0], (chosen_N, rejected_N)
    )


def test_a_shift_of_all_scores_moves_only_the_centering():
    chosen_N, rejected_N = torch.tensor([0.5, -0.25]), torch.tensor([0.25, 0.5])
    plain = bradley_terry(chosen_N, rejected_N, weights_N=torch.ones(2))[0]
    assert bradley_terry(chosen_N + 4, rejected_N + 4, weights_N=torch.ones(2))[0].item() == plain.item()  # gaps exact in binary
    assert bradley_terry(chosen_N + 4, rejected_N + 4, centering=0.1, weights_N=torch.ones(2))[0] > plain + 1


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_gaps_stay_finite(gap):
    chosen_N = torch.tensor([gap], requires_grad=True)
    loss, _ = bradley_terry(chosen_N, torch.zeros(1), weights_N=torch.ones(1))
    loss.backward()
    assert loss.item() == max(-gap, 0.0)  # softplus(x) is x or 0 out there
    assert chosen_N.grad.item() == (0.0 if gap > 0 else -1.0)


def test_padding_pairs_are_not_read_and_no_pair_gives_zero():
    chosen_N = torch.tensor([1.0, NAN], requires_grad=True)
    margin_N = torch.tensor([0.0, NAN])
    loss, stats = bradley_terry(chosen_N, torch.tensor([0.0, NAN]), margin_N=margin_N, centering=0.0, weights_N=torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.313262, abs=1e-5) and stats.num_pairs.item() == 1.0
    assert chosen_N.grad.tolist() == pytest.approx([-0.268941, 0.0], abs=1e-5)
    for shape in ((0,), (0, 3), (2,), (2, 3)):
        scores_N = torch.full(shape, NAN, requires_grad=True)
        loss, stats = bradley_terry(scores_N, scores_N, centering=1.0, weights_N=torch.zeros(shape[0]))
        loss.backward()
        assert loss.item() == 0.0 and scores_N.grad.abs().sum().item() == 0.0
        assert set(PreferenceStats.means(sums(stats)).values()) == {0.0}


@pytest.mark.parametrize("place", ["chosen", "rejected", "margin", "weight"])
def test_a_nan_in_a_counted_pair_shows_in_the_loss(place):
    columns = {name: torch.ones(2) for name in ("chosen", "rejected", "margin", "weight")}
    columns[place][1] = NAN
    loss, _ = bradley_terry(columns["chosen"], columns["rejected"], margin_N=columns["margin"], weights_N=columns["weight"])
    assert math.isnan(loss.item())


def test_sums_over_microbatches_give_the_metrics_of_the_whole():
    g = torch.Generator().manual_seed(4)
    chosen_NK, rejected_NK = torch.randn(2, 7, 2, generator=g)
    weights_N = torch.full((7,), 1 / 7)  # the global normaliser: the mean pair
    whole = PreferenceStats.means(sums(bradley_terry(chosen_NK, rejected_NK, centering=0.1, weights_N=weights_N)[1]))
    parts = [
        sums(bradley_terry(chosen_NK[part], rejected_NK[part], centering=0.1, weights_N=weights_N[part])[1])
        for part in (slice(0, 2), slice(2, 7))
    ]
    # float32 sums of 7 numbers of size 1
    assert PreferenceStats.means({name: sum(p[name] for p in parts) for name in parts[0]}) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("centering", [-0.1, NAN])
def test_a_negative_centering_is_refused_with_its_value(centering):
    with pytest.raises(ValueError, match=f"got {centering}"):
        bradley_terry(torch.ones(1), torch.zeros(1), centering=centering, weights_N=torch.ones(1))


def test_a_head_sees_a_pair_as_often_as_its_bootstrap_says():
    # head 0 sees the pair of gap 1 twice (2 * .313262), head 1 never; head 0 never sees the pair of gap 0, head 1 once (log 2 = .693147)
    chosen_NK = torch.tensor([[1.0, 1.0], [0.5, 0.5]], requires_grad=True)
    rejected_NK = torch.tensor([[0.0, 0.0], [0.5, 0.5]])
    seen_NK = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    loss, stats = bradley_terry(chosen_NK, rejected_NK, weights_N=torch.tensor([0.5, 0.5]), head_weights_NK=seen_NK)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.626523 + 0.693147) / 2, abs=1e-5)  # mean over heads, then the weights
    assert chosen_NK.grad.tolist()[0][1] == chosen_NK.grad.tolist()[1][0] == 0.0
    assert stats.num_pairs.item() == 2.0 and stats.correct_pairs.item() == 1.5  # metrics count every pair once


def test_bootstrap_weights_are_poisson_and_a_function_of_the_pair_alone():
    seen_NK = bootstrap_weights(range(4000), num_heads=3, seed=0)
    assert seen_NK.shape == (4000, 3)
    # Poisson(1): mean 1, variance 1, P(0) = e^-1 = .368; 12,000 draws: standard errors .009, .016 and .0044, five of them allowed
    assert seen_NK.mean().item() == pytest.approx(1.0, abs=0.046)
    assert seen_NK.var().item() == pytest.approx(1.0, abs=0.08)
    assert (seen_NK == 0).float().mean().item() == pytest.approx(math.exp(-1), abs=0.022)
    assert abs(torch.corrcoef(seen_NK.T)[0, 1].item()) < 0.08, "heads draw independently"
    assert torch.equal(bootstrap_weights([17, 3], num_heads=3, seed=0), seen_NK[[17, 3]])
    assert not torch.equal(bootstrap_weights([17, 3], num_heads=3, seed=1), seen_NK[[17, 3]])
