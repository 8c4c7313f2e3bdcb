"""The policy loss against hand-computed numbers, a plain-Python reference, and other ways of dealing the same traces out.

Shapes: T label positions of one packed microbatch.
"""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from megatron_rema.algorithm.losses import PolicyLossStats, aggregation_weights, policy_loss

NAN = float("nan")
CLIP = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "log_ratio_cap": 3.0}


def one_turn_loss(delta: float, advantage: float, **kwargs):
    """Loss, its gradient and stats of one turn of one token with weight 1."""
    logprobs_T = torch.tensor([delta - 1.0], requires_grad=True)
    ids_T, one_T = torch.zeros(1, dtype=torch.long), torch.ones(1)
    loss, stats = policy_loss(
        logprobs_T, -one_T, advantage * one_T, one_T, ids_T, ids_T, one_T.bool(), num_turns=1, **{"level": "turn", **CLIP, **kwargs}
    )
    loss.backward()
    return loss.item(), logprobs_T.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad", "clipped", "dual"),
    [
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # inside: -A r, and d(-A r)/d logp = -A r
        (1.5, 2.0, -2.6, 0.0, 1, 0),  # above, A > 0: -2 * 1.3
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # below, A > 0: the worse branch is -2 * 0.5
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # below, A < 0: 2 * 0.8
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # above, A < 0: 2 * 1.5
        (5.0, -2.0, 6.0, 0.0, 0, 1),  # far above, A < 0: held at 2 * dual_clip 3
        (5.0, 2.0, -2.6, 0.0, 1, 0),  # the dual clip is for A < 0 only
        (1.0, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_clip_and_dual_clip_on_both_signs(ratio, advantage, loss, grad, clipped, dual):
    got_loss, got_grad, stats = one_turn_loss(math.log(ratio), advantage)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    assert got_grad == pytest.approx(grad, abs=1e-5)
    assert (stats.clipped_units.item(), stats.dual_clipped_units.item()) == (clipped, dual)


def test_without_dual_clip_a_negative_advantage_is_held_by_the_log_ratio_cap_alone():
    loss, grad, stats = one_turn_loss(80.0, -2.0, dual_clip=None)
    assert loss == pytest.approx(2 * math.exp(3.0), rel=1e-6)
    assert grad == 0.0 and stats.dual_clipped_units.item() == 0


@pytest.mark.parametrize("delta", [80.0, -80.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("level", ["token", "turn", "trace"])
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_extreme_log_ratios_stay_finite(delta, advantage, level, mean):
    loss, grad, stats = one_turn_loss(delta, advantage, level=level, mean=mean)
    # A > 0: -1.3 above, -exp(-80) below; A < 0: 3 above, 0.8 below
    expected = {(80.0, 1.0): -1.3, (-80.0, 1.0): 0.0, (80.0, -1.0): 3.0, (-80.0, -1.0): 0.8}[delta, advantage]
    assert loss == pytest.approx(expected, abs=1e-6)
    assert math.isfinite(grad) and all(v.isfinite() for v in stats.as_dict().values())


@dataclass
class Sequence:
    """One trace: per token its turn (-1 = context), and what the loss reads."""

    turn_ids: list[int]
    logprobs: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    entropy: torch.Tensor
    advantages: list[float]  # per turn

    @property
    def num_turns(self) -> int:
        return len(set(self.turn_ids) - {-1})

    @property
    def num_tokens(self) -> int:
        return sum(t >= 0 for t in self.turn_ids)


def random_sequences(seed: int) -> list[Sequence]:
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    sequences = []
    for _ in range(7):
        turn_ids = [-1] * integers(1, 4)
        for turn in range(integers(0, 4)):  # some traces have no trained token at all
            turn_ids += [turn] * integers(1, 6) + [-1] * integers(0, 3)
        n = len(turn_ids)
        old = -torch.rand(n, generator=g) * 3
        logprobs = old + torch.randn(n, generator=g) * 0.6
        ref = old + torch.randn(n, generator=g) * 0.3
        num_turns = len(set(turn_ids) - {-1})
        sequences.append(Sequence(turn_ids, logprobs, old, ref, torch.rand(n, generator=g), torch.randn(num_turns, generator=g).tolist()))
    return sequences


def packed_loss(sequences, microbatches, *, padding, aggregation, level, mean):
    """Sum over microbatches of losses and stats, and the gradient of each sequence's logprobs, with NaN wherever nothing is trained."""
    counts = dict(
        num_tokens_global=sum(s.num_tokens for s in sequences),
        num_turns_global=sum(s.num_turns for s in sequences),
        num_traces_global=sum(s.num_turns > 0 for s in sequences),
        max_turns=5,
    )
    total, sums, grads = 0.0, {}, {}
    for microbatch in microbatches:
        columns = {name: [] for name in ("turn_ids", "trace_ids", "logprobs", "old", "ref", "entropy", "advantages")}
        num_turns = 0
        for trace, index in enumerate(microbatch):
            s = sequences[index]
            for j, turn in enumerate(s.turn_ids):
                trained = turn >= 0
                columns["turn_ids"].append(num_turns + turn if trained else -1)
                columns["trace_ids"].append(trace)
                for name in ("logprobs", "old", "ref", "entropy"):
                    columns[name].append(getattr(s, name)[j].item() if trained else NAN)
                columns["advantages"].append(s.advantages[turn] if trained else NAN)
            num_turns += s.num_turns
        for name, values in columns.items():
            values += [{"turn_ids": -1, "trace_ids": len(microbatch)}.get(name, NAN)] * padding
        b = {name: torch.tensor(v, dtype=torch.long if name.endswith("ids") else torch.float32) for name, v in columns.items()}
        mask_T = b["turn_ids"] >= 0
        weights_T = aggregation_weights(b["turn_ids"], b["trace_ids"], mask_T, num_turns=num_turns, aggregation=aggregation, **counts)
        logprobs_T = b["logprobs"].requires_grad_()
        loss, stats = policy_loss(
            logprobs_T, b["old"], b["advantages"], weights_T, b["turn_ids"], b["trace_ids"], mask_T, num_turns=num_turns,
            level=level, mean=mean, **CLIP, ref_logprobs_T=b["ref"], kl_coef=0.1, entropy_T=b["entropy"], entropy_coef=0.01,
        )  # fmt: skip
        loss.backward()
        total += loss.item()
        for name, value in stats.as_dict().items():
            sums[name] = sums.get(name, 0.0) + value.item()
        start = 0
        for index in microbatch:
            grads[index] = logprobs_T.grad[start : start + len(sequences[index].turn_ids)]
            start += len(sequences[index].turn_ids)
        assert (logprobs_T.grad[start:] == 0).all()
    return total, sums, torch.cat([grads[i] for i in range(len(sequences))])


def loop_loss(sequences, *, aggregation, level, mean) -> float:
    """The formulas of the objective one by one, in Python floats."""
    num_tokens, num_turns = sum(s.num_tokens for s in sequences), sum(s.num_turns for s in sequences)
    num_traces = sum(s.num_turns > 0 for s in sequences)
    loss = 0.0
    for s in sequences:
        tokens = {t: [j for j, turn in enumerate(s.turn_ids) if turn == t] for t in range(s.num_turns)}
        delta = (s.logprobs.double() - s.old.double()).tolist()
        for t, turn in tokens.items():
            n = len(turn)
            weight = {
                "token": 1 / num_tokens,
                "turn": 1 / (n * num_turns),
                "episode": 1 / (n * s.num_turns * num_traces),
                "constant": 1 / (n * 5 * num_traces),
            }[aggregation]
            for j in turn:
                unit = {"token": [j], "turn": turn, "trace": [i for i, id_ in enumerate(s.turn_ids) if id_ >= 0]}[level]
                if mean == "geometric":
                    r = math.exp(min(sum(delta[i] for i in unit) / len(unit), 3.0))
                else:
                    r = sum(math.exp(min(delta[i], 3.0)) for i in unit) / len(unit)
                a = s.advantages[t]
                token_loss = max(-a * r, -a * min(max(r, 0.8), 1.3))
                if a < 0:
                    token_loss = min(token_loss, -a * 3.0)
                x = s.ref[j].item() - s.logprobs[j].item()
                loss += weight * (token_loss + 0.1 * (math.exp(x) - 1 - x) - 0.01 * s.entropy[j].item())
    return loss


VARIANTS = list(itertools.product(["token", "turn", "episode", "constant"], ["token", "turn", "trace"], ["geometric", "arithmetic"]))


@pytest.mark.parametrize(("aggregation", "level", "mean"), VARIANTS)
def test_every_variant_equals_the_formulas_written_as_loops(aggregation, level, mean):
    sequences = random_sequences(3)
    loss, _, _ = packed_loss(sequences, [range(7)], padding=0, aggregation=aggregation, level=level, mean=mean)
    # float32 inputs are differences of numbers near 3 (spacing 2e-7) and the loss is of order 1
    assert loss == pytest.approx(loop_loss(sequences, aggregation=aggregation, level=level, mean=mean), abs=1e-6)


@pytest.mark.parametrize(("aggregation", "level", "mean"), VARIANTS)
def test_loss_gradient_and_stats_do_not_change_with_packing_microbatches_or_padding(aggregation, level, mean):
    variant = dict(aggregation=aggregation, level=level, mean=mean)
    sequences = random_sequences(5)
    loss, sums, grad = packed_loss(sequences, [range(7)], padding=0, **variant)
    for microbatches, padding in ([[6, 2, 0, 5, 3, 1, 4]], 0), ([[i] for i in range(7)], 3), ([[4, 1], [6, 5, 2], [0, 3], []], 9):
        other_loss, other_sums, other_grad = packed_loss(sequences, microbatches, padding=padding, **variant)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert other_sums == pytest.approx(sums, rel=1e-5, abs=1e-6)  # counts up to 70 added in float32
        torch.testing.assert_close(other_grad, grad, atol=1e-6, rtol=1e-6)
    assert grad.abs().max() > 1e-3


def test_aggregation_weights_are_as_computed_by_hand():
    # trace 0: turn 0 with 2 tokens, turn 1 with 1; trace 1: turn 2 with 2 tokens; trace 2: nothing trained
    turn_ids_T = torch.tensor([-1, 0, 0, 1, -1, 2, 2, -1])
    trace_ids_T = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    counts = dict(num_turns=3, num_tokens_global=10, num_turns_global=6, num_traces_global=4, max_turns=8)
    expected = {
        "token": [0, 1 / 10, 1 / 10, 1 / 10, 0, 1 / 10, 1 / 10, 0],
        "turn": [0, 1 / 12, 1 / 12, 1 / 6, 0, 1 / 12, 1 / 12, 0],  # 1 / (2 * 6), 1 / (1 * 6)
        "episode": [0, 1 / 16, 1 / 16, 1 / 8, 0, 1 / 8, 1 / 8, 0],  # 1 / (2 * 2 * 4), 1 / (1 * 2 * 4), 1 / (2 * 1 * 4)
        "constant": [0, 1 / 64, 1 / 64, 1 / 32, 0, 1 / 64, 1 / 64, 0],  # 1 / (2 * 8 * 4), 1 / (1 * 8 * 4)
    }
    for aggregation, weights in expected.items():
        weights_T = aggregation_weights(turn_ids_T, trace_ids_T, turn_ids_T >= 0, aggregation=aggregation, **counts)
        assert weights_T.dtype == torch.float32
        assert weights_T.tolist() == pytest.approx(weights, rel=1e-6), aggregation


def test_a_trained_token_without_a_turn_is_caught():
    ids_T = torch.tensor([-1, 0])
    with pytest.raises(AssertionError, match="turn id"):
        aggregation_weights(
            ids_T, ids_T, torch.ones(2, dtype=torch.bool), num_turns=1, aggregation="turn",
            num_tokens_global=1, num_turns_global=1, num_traces_global=1, max_turns=1,
        )  # fmt: skip


@pytest.mark.parametrize("aggregation", ["token", "turn", "episode", "constant"])
@pytest.mark.parametrize("level", ["token", "turn", "trace"])
def test_a_batch_with_no_trained_token_has_loss_zero_and_gradient_zero(aggregation, level):
    none_T, ids_T = torch.full((4,), NAN), torch.full((4,), -1)
    logprobs_T, mask_T = none_T.clone().requires_grad_(), torch.zeros(4, dtype=torch.bool)
    weights_T = aggregation_weights(
        ids_T, ids_T, mask_T, num_turns=0, aggregation=aggregation,
        num_tokens_global=0, num_turns_global=0, num_traces_global=0, max_turns=1,
    )  # fmt: skip
    loss, stats = policy_loss(logprobs_T, none_T, none_T, weights_T, ids_T, ids_T, mask_T, num_turns=0, level=level, **CLIP)
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs_T.grad.tolist() == [0.0] * 4
    assert {v.item() for v in stats.as_dict().values()} == {0.0}
    assert set(PolicyLossStats.means({k: v.item() for k, v in stats.as_dict().items()}, level=level).values()) == {0.0}


@pytest.mark.parametrize("field", ["logprobs", "old", "advantages", "weights", "ref", "entropy"])
def test_a_nan_on_a_trained_token_reaches_the_loss(field):
    values = {name: torch.full((3,), 0.5) for name in ("logprobs", "old", "advantages", "weights", "ref", "entropy")}
    values[field][1] = NAN
    ids_T = torch.zeros(3, dtype=torch.long)
    loss, _ = policy_loss(
        values["logprobs"], values["old"], values["advantages"], values["weights"], ids_T, ids_T, ids_T == 0, num_turns=1,
        level="token", **CLIP, ref_logprobs_T=values["ref"], kl_coef=0.1, entropy_T=values["entropy"], entropy_coef=0.1,
    )  # fmt: skip
    assert loss.isnan()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_nan_on_an_untrained_token_reaches_neither_loss_nor_gradient(estimator):
    values_T, ids_T = torch.tensor([NAN, 0.5, 0.5]), torch.tensor([-1, 0, 0])
    logprobs_T, entropy_T = values_T.clone().requires_grad_(), values_T.clone().requires_grad_()
    loss, _ = policy_loss(
        logprobs_T, values_T, values_T, values_T, ids_T, ids_T, ids_T == 0, num_turns=1, level="turn", **CLIP,
        ref_logprobs_T=values_T, kl_coef=0.1, kl_estimator=estimator, entropy_T=entropy_T, entropy_coef=0.1,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(2 * 0.5 * (-0.5 * 1 - 0.1 * 0.5))  # two tokens of weight .5: -A r - .1 H, KL 0
    assert logprobs_T.grad.tolist() == pytest.approx([0.0, -0.25, -0.25])  # -A r w
    assert entropy_T.grad.tolist() == pytest.approx([0.0, -0.05, -0.05])  # -.1 w


@pytest.mark.parametrize(("level", "mean"), itertools.product(["token", "turn", "trace"], ["geometric", "arithmetic"]))
def test_gradients_match_finite_differences(level, mean):
    turn_ids_T = torch.tensor([-1, 0, 0, 0, -1, 1, 1, 2, 2, -1])
    trace_ids_T = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    generator = torch.Generator().manual_seed(11)
    old_T, ref_T, weights_T = (torch.rand(10, generator=generator, dtype=torch.float64) for _ in range(3))
    # turn 0 above the clip with A < 0, turn 1 held by the dual clip or near it, turn 2 below with A > 0
    delta_T = torch.tensor([0, 0.5, 0.6, 0.3, 0, 1.5, 1.2, -0.7, -0.1, 0], dtype=torch.float64)
    advantages_T = torch.tensor([0, -1, -1, -1, 0, -2, -2, 3, 3, 0], dtype=torch.float64)
    logprobs_T, entropy_T = (old_T + delta_T).requires_grad_(), (weights_T + 1).requires_grad_()

    def loss(logprobs_T, entropy_T):
        return policy_loss(
            logprobs_T, old_T, advantages_T, weights_T, turn_ids_T, trace_ids_T, turn_ids_T >= 0, num_turns=3, level=level, mean=mean,
            **CLIP, ref_logprobs_T=ref_T, kl_coef=0.5, entropy_T=entropy_T, entropy_coef=0.25,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (logprobs_T, entropy_T))


def test_an_exact_kl_is_weighted_as_it_is_and_keeps_its_gradient():
    """Two trained tokens of weight 0.5, advantages 0: loss = 0.1 (0.5 * 0.2 + 0.5 * 0.6) = 0.04, gradient 0.1 * 0.5 each."""
    ids_T, zeros_T = torch.tensor([0, 0, -1]), torch.zeros(3)
    kl_T, ref_T = torch.tensor([0.2, 0.6, NAN], requires_grad=True), torch.full((3,), 9.0)
    for unread in (None, ref_T):  # what a KL in the reward needs stays out of the loss
        loss, stats = policy_loss(
            zeros_T, zeros_T, zeros_T, zeros_T + 0.5, ids_T, ids_T, ids_T == 0, num_turns=1, level="turn", **CLIP,
            ref_logprobs_T=unread, kl_T=kl_T, kl_coef=0.1, kl_estimator="exact",
        )  # fmt: skip
        assert loss.item() == pytest.approx(0.04)
        assert PolicyLossStats.means(stats.as_dict(), level="turn")["kl_ref_nats"].item() == pytest.approx(0.4)
    loss.backward()
    assert kl_T.grad.tolist() == pytest.approx([0.05, 0.05, 0.0])


@pytest.mark.parametrize("level", ["token", "turn"])
def test_gradient_flows_to_logprobs_and_entropy_only(level):
    leaves = {name: torch.full((2,), 0.5, requires_grad=True) for name in ("logprobs", "old", "advantages", "weights", "ref", "entropy")}
    ids_T = torch.zeros(2, dtype=torch.long)
    loss, stats = policy_loss(
        leaves["logprobs"], leaves["old"], leaves["advantages"], leaves["weights"], ids_T, ids_T, ids_T == 0, num_turns=1, level=level,
        **CLIP, ref_logprobs_T=leaves["ref"], kl_coef=0.1, entropy_T=leaves["entropy"], entropy_coef=0.1,
    )  # fmt: skip
    loss.backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"logprobs", "entropy"}
    assert not any(value.requires_grad for value in stats.as_dict().values())


def test_on_policy_every_ratio_is_one_and_nothing_is_clipped():
    sequences = random_sequences(2)
    for s in sequences:
        s.old = s.logprobs
    _, sums, _ = packed_loss(sequences, [range(7)], padding=4, aggregation="turn", level="turn", mean="geometric")
    metrics = PolicyLossStats.means(sums, level="turn")
    assert metrics["turn_ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["turn_ratio_clipped_frac"] == metrics["turn_ratio_dual_clipped_frac"] == metrics["kl_old_k3_nats"] == 0.0
    assert metrics["num_turns"] == pytest.approx(sum(s.num_turns for s in sequences), rel=1e-6)


def test_the_clipped_fraction_counts_turns_not_tokens():
    # turn 0: 3 tokens at ratio e (A > 0: clipped); turn 1: 1 token at ratio 1 -> 1 of 2 turns, whatever their tokens
    turn_ids_T, zeros_T = torch.tensor([0, 0, 0, 1]), torch.zeros(4)
    logprobs_T = torch.tensor([1.0, 1.0, 1.0, 0.0])
    _, stats = policy_loss(
        logprobs_T, zeros_T, zeros_T + 1, zeros_T + 1, turn_ids_T, zeros_T.long(), turn_ids_T >= 0, num_turns=2, level="turn", **CLIP
    )
    metrics = PolicyLossStats.means({k: v.item() for k, v in stats.as_dict().items()}, level="turn")
    assert metrics["turn_ratio_clipped_frac"] == pytest.approx(0.5)
    assert metrics["turn_ratio_mean"] == pytest.approx((math.e + 1) / 2)
    # k3 of the move: x = logp - old, exp(x) - 1 - x under the old policy's samples, over 4 tokens
    assert metrics["kl_old_k3_nats"] == pytest.approx(3 * (math.e - 2) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"clip_low": 1.5}, "clip_low"),
        ({"dual_clip": 1.1}, "dual_clip"),
        ({"kl_coef": 0.1}, "reference"),
        ({"kl_coef": 0.1, "kl_estimator": "exact"}, "exact KL"),
        ({"kl_coef": 0.1, "kl_estimator": "k1", "ref_logprobs_T": torch.zeros(1)}, "k1"),
        ({"entropy_coef": 0.1}, "entropy_T"),
    ],
)
def test_coefficients_that_cannot_work_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        one_turn_loss(0.0, 1.0, **kwargs)
