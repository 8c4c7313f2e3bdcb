"""The fused policy loss against algorithm/losses.py in float64: loss, both gradients (incoming gradient not 1) and every sum.

Error rule as in test_logits.py: at most twice that of plain torch in float32, plus a floor of a few roundings. Shapes: T label positions.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_rema.algorithm.losses import PolicyLossStats
from megatron_rema.algorithm.losses import policy_loss as loss_of_algorithm
from megatron_rema.kernels.library import using
from megatron_rema.kernels.policy import policy_loss

NAN = float("nan")
OPTIONS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "log_ratio_cap": 3.0}
ALL_TERMS = OPTIONS | {"kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.02}
LEVELS = list(itertools.product(["token", "turn", "trace"], ["geometric", "arithmetic"]))
COLUMNS = ("logprobs_T", "old_logprobs_T", "advantages_T", "loss_weights_T", "ref_logprobs_T", "entropy_T")


def packed(turns_of_traces, *, moved=0.3, seed=0):
    """Columns of a batch: traces of turns of so many own tokens, each behind a few tokens of others, then padding. Nobody's values: NaN."""
    generator = torch.Generator().manual_seed(seed)
    turn_ids, trace_ids, turn = [], [], 0
    cu_turns, cu_seqlens = [0], [0]
    for trace, turns in enumerate(turns_of_traces):
        for length in turns:
            turn_ids += [-1] * int(torch.randint(0, 9, (), generator=generator))
            cu_turns += [len(turn_ids)] if turn else []
            turn_ids += [turn] * length
            turn += 1
        trace_ids += [trace] * (len(turn_ids) - len(trace_ids))
        cu_seqlens.append(len(turn_ids))
    total = len(turn_ids) + 5
    turn_ids_T = torch.tensor(turn_ids + [-1] * 5)
    mask_T = (turn_ids_T >= 0) & (torch.rand(total, generator=generator) < 0.95)  # an own token may be left out of the loss
    columns = {name: torch.randn(total, generator=generator, dtype=torch.float64) for name in COLUMNS}
    columns["old_logprobs_T"] = columns["logprobs_T"] - moved * torch.randn(total, generator=generator, dtype=torch.float64)
    columns["loss_weights_T"] = columns["loss_weights_T"].abs() / total
    columns["entropy_T"] = columns["entropy_T"].abs()
    # float32 values, so that both precisions start from the same numbers
    columns = {name: column.float().masked_fill(~mask_T, NAN) for name, column in columns.items()}
    ids = {
        "turn_ids_T": turn_ids_T,
        "trace_ids_T": torch.tensor(trace_ids + [len(turns_of_traces)] * 5),
        "loss_mask_T": mask_T,
        "cu_turns": torch.tensor([*cu_turns, total]),
        "cu_seqlens": torch.tensor([*cu_seqlens, total], dtype=torch.int32),
    }
    return columns | ids


def outcome(batch, options, *, dtype=torch.float32, device="cpu"):
    """loss, gradients of log-probabilities and entropy (of 1.7 times the loss), and the sums; by the chosen mode."""
    batch = {name: (value.to(dtype) if value.is_floating_point() else value).to(device) for name, value in batch.items()}
    leaves = {name: batch[name].clone().requires_grad_() for name in ("logprobs_T", "kl_T", "entropy_T") if name in batch}
    loss, stats = policy_loss(**batch | leaves, **options)
    (1.7 * loss).backward()
    grads = [(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).cpu() for leaf in leaves.values()]
    return loss.detach().cpu(), grads, {name: float(value) for name, value in stats.as_dict().items()}


def exact_outcome(batch, options):
    with using("reference"):
        return outcome(batch, options, dtype=torch.float64)


def plain_outcome(batch, options):
    with using("reference"):
        return outcome(batch, options)


def assert_like_algorithm(batch, options, device, floor=2e-7):
    ours, plain, exact = outcome(batch, options, device=device), plain_outcome(batch, options), exact_outcome(batch, options)
    size = max(1.0, *(abs(value) for value in exact[2].values()))
    assert abs(ours[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + floor * size
    for mine, theirs, true in zip(ours[1], plain[1], exact[1], strict=True):
        assert mine.dtype == torch.float32 and mine.shape == true.shape
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + floor * true.abs().max()
    assert ours[2].keys() == exact[2].keys()
    for name, value in exact[2].items():
        assert ours[2][name] == pytest.approx(value, rel=2e-6, abs=2e-6 * size), name
    return exact


# a turn of one token, turns of none, a trace of one turn; a unit shorter and longer than a block of threads (256), and than its 4 rounds
BATCHES = {"one token": [[1]], "short": [[3, 1, 7], [2], [5, 4]], "long": [[300, 1, 1500], [257], [40] * 9], "no tokens": [[]]}


@pytest.mark.parametrize("turns", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize(("level", "mean"), LEVELS)
def test_loss_gradients_and_sums_err_at_most_twice_as_much_as_plain_torch(device, turns, level, mean):
    assert_like_algorithm(packed(turns), ALL_TERMS | {"level": level, "mean": mean}, device)


@pytest.mark.parametrize("moved", [0.0, 1e-4, 1.5, 30.0])
@pytest.mark.parametrize(("level", "mean"), LEVELS)
def test_clips_and_caps_act_as_in_algorithm_however_far_the_policy_moved(device, moved, level, mean):
    exact = assert_like_algorithm(packed([[40, 3], [90]] * 4, moved=moved, seed=1), ALL_TERMS | {"level": level, "mean": mean}, device)
    assert (moved < 1.0 or exact[2]["clipped_units"] > 0) and (moved < 30.0 or exact[2]["dual_clipped_units"] > 0)


@pytest.mark.parametrize(
    "change",
    [{"dual_clip": None}, {"kl_estimator": "k2"}, {"kl_coef": 0.0}, {"kl_coef": 0.0, "kl_estimator": "k1"}, {"entropy_coef": 0.0}]
    + [{"clip_low": 1.0, "clip_high": 0.0}, {"log_ratio_cap": 0.0}],
    ids=str,
)
def test_every_option_is_that_of_algorithm(device, change):
    assert_like_algorithm(packed([[30, 8], [5]], moved=1.0), ALL_TERMS | {"level": "turn"} | change, device)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "turn"])
def test_an_exact_kl_is_weighted_and_has_its_own_gradient(device, level, kl_coef):
    batch = packed([[30, 8], [5]])
    batch["kl_T"] = batch.pop("ref_logprobs_T").square()
    options = ALL_TERMS | {"level": level, "kl_estimator": "exact", "kl_coef": kl_coef}
    assert_like_algorithm(batch, options, device)
    kl_gradient_T = outcome(batch, options, device=device)[1][1]
    expected_T = (1.7 * kl_coef * batch["loss_weights_T"]).masked_fill(~batch["loss_mask_T"], 0.0)
    torch.testing.assert_close(kl_gradient_T, expected_T)


def test_terms_that_are_not_asked_for_are_not_there(device):
    batch = packed([[30, 8], [5]]) | {"ref_logprobs_T": None, "entropy_T": None}
    tensors = {name: value if value is None else value.to(device) for name, value in batch.items()}
    logprobs_T = tensors["logprobs_T"].clone().requires_grad_()
    loss, stats = policy_loss(**tensors | {"logprobs_T": logprobs_T}, **OPTIONS, level="turn")
    loss.backward()
    expected, _ = loss_of_algorithm(**{n: batch[n] for n in batch if not n.startswith("cu_")}, num_turns=3, **OPTIONS, level="turn")
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert stats.kl_ref_nats_tokens is None and stats.entropy_nats_tokens is None
    assert logprobs_T.grad.isfinite().all() and logprobs_T.grad.abs().max() > 0


def two_tokens(device, **changes):
    """One turn of two tokens, advantage 2, weights 1/2, log-ratios 0.1 and 0.3, old log-probabilities -1."""
    numbers = {
        "logprobs_T": [-0.9, -0.7],
        "old_logprobs_T": [-1.0, -1.0],
        "advantages_T": [2.0, 2.0],
        "loss_weights_T": [0.5, 0.5],
    } | changes
    zeros_T, starts = torch.zeros(2, dtype=torch.long, device=device), torch.tensor([0, 2], device=device)
    return {name: torch.tensor(values, device=device) for name, values in numbers.items()} | {
        "turn_ids_T": zeros_T, "trace_ids_T": zeros_T, "loss_mask_T": zeros_T == 0, "cu_turns": starts, "cu_seqlens": starts,
    }  # fmt: skip


def test_a_hand_computed_turn(device):
    """Geometric ratio exp(0.2) = 1.2214 inside 1.3: loss -2 * 1.2214, gradient of each token 1.2214 / 2 * (0.5 + 0.5) * -2.

    With clip_high 0.1: loss -2 * 1.1, no gradient. By token: ratios exp(0.1), exp(0.3) = 1.1052, 1.3499, the second held at 1.3.
    """
    cases = {
        ("turn", 0.3): (-2 * 1.2214028, [-1.2214028, -1.2214028]),
        ("turn", 0.1): (-2.2, [0.0, 0.0]),
        ("token", 0.3): (-1.1051709 - 1.3, [-1.1051709, 0.0]),
    }
    for (level, clip_high), (expected, gradient) in cases.items():
        batch = two_tokens(device)
        batch["logprobs_T"].requires_grad_()
        loss, stats = policy_loss(**batch, level=level, clip_low=0.2, clip_high=clip_high)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-6), level
        assert batch["logprobs_T"].grad.tolist() == pytest.approx(gradient, rel=1e-6), level
        metrics = PolicyLossStats.means({name: value.item() for name, value in stats.as_dict().items()}, level=level)
        assert metrics[f"{level}_ratio_clipped_frac"] == {("turn", 0.3): 0.0, ("turn", 0.1): 1.0, ("token", 0.3): 0.5}[level, clip_high]
        # k3 of the move, x = log-ratio: e^x - 1 - x = 0.0051709 and 0.0498588
        assert metrics["kl_old_k3_nats"] == pytest.approx((0.0051709 + 0.0498588) / 2, rel=1e-5)


def test_log_ratios_of_80_neither_overflow_nor_pull(device):
    for level in ("token", "turn", "trace"):
        batch = two_tokens(device, logprobs_T=[79.0, -81.0], advantages_T=[-1.0, -1.0])
        batch["logprobs_T"].requires_grad_()
        loss, _ = policy_loss(**batch, level=level, **OPTIONS)
        loss.backward()
        assert loss.isfinite() and batch["logprobs_T"].grad.isfinite().all()
        assert batch["logprobs_T"].grad[0] == 0.0 or level != "token", "beyond the cap there is no gradient"


@pytest.mark.parametrize("name", [*COLUMNS])
@pytest.mark.parametrize("level", ["token", "turn", "trace"])
def test_a_nan_on_a_trained_token_reaches_the_loss(device, name, level):
    batch = packed([[30, 8], [5]])
    batch[name][int(batch["loss_mask_T"].nonzero()[3])] = NAN
    assert outcome(batch, ALL_TERMS | {"level": level}, device=device)[0].isnan()


@pytest.mark.parametrize("level", ["token", "turn", "trace"])
def test_a_nan_stays_in_the_gradient_of_its_unit(device, level):
    batch = packed([[30, 8], [5]])
    place = int(batch["loss_mask_T"].nonzero()[3])
    batch["logprobs_T"][place] = NAN
    _, (gradient_T, _), _ = outcome(batch, OPTIONS | {"level": level}, device=device)
    ids_T = {"token": torch.arange(len(gradient_T)), "turn": batch["turn_ids_T"], "trace": batch["trace_ids_T"]}[level]
    assert torch.equal(gradient_T.isnan(), (ids_T == ids_T[place]) & batch["loss_mask_T"])
    assert (gradient_T[~batch["loss_mask_T"]] == 0).all()


@pytest.mark.parametrize("level", ["token", "turn", "trace"])
def test_nothing_to_train_on_is_a_loss_of_zero(device, level):
    nobody = packed([[30, 8], [5]])
    nobody["loss_mask_T"][:] = False
    for batch in (
        nobody,
        {name: value[:0] for name, value in nobody.items()} | {n: torch.zeros(2).long() for n in ("cu_turns", "cu_seqlens")},
    ):
        loss, gradients, sums = outcome(batch, ALL_TERMS | {"level": level}, device=device)
        assert loss == 0 and set(sums.values()) == {0.0} and all((gradient == 0).all() for gradient in gradients)


def test_units_do_not_depend_on_threads_and_runs_repeat(on_cpu):
    batch, options = packed([[300, 20], [1000]] * 10, moved=1.0), ALL_TERMS | {"level": "turn"}
    alone, before = outcome(batch, options), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = outcome(batch, options)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0]) and alone[2] == together[2]
    assert all(torch.equal(*pair) for pair in zip(alone[1], together[1], strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "word"}, "level must be one of"),
        ({"mean": "harmonic"}, "mean must be one of"),
        ({"clip_low": -0.1}, "clip_low must be in"),
        ({"dual_clip": 1.1}, "dual_clip must exceed"),
        ({"log_ratio_cap": -1.0}, "log_ratio_cap must be at least 0"),
        ({"kl_estimator": "k1"}, "k1 has an expected gradient of 0"),
        ({"kl_estimator": "exact"}, "exact takes kl_T"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of"),
    ],
)
def test_bad_options_are_refused_like_in_algorithm(on_cpu, change, message):
    for mode in ("fused", "reference"):
        with pytest.raises(ValueError, match=message), using(mode):
            policy_loss(**packed([[3]]), **ALL_TERMS | {"level": "turn"} | change)


def test_the_operator_keeps_torchs_contract(on_cpu):
    batch = {n: v.nan_to_num(0.0) if v.is_floating_point() else v for n, v in packed([[30, 8], [5]]).items()}
    columns = [batch[name] for name in COLUMNS]
    columns[0], columns[5] = columns[0].requires_grad_(), columns[5].requires_grad_()
    for kl_estimator in (3, 4):
        numbers = (False, 0.2, 0.3, 3.0, 3.0, kl_estimator, 0.1, 0.02)
        columns[4] = columns[4].requires_grad_(kl_estimator == 4)
        torch.library.opcheck(torch.ops.megatron_rema.policy_loss.default, (*columns, batch["loss_mask_T"], batch["cu_turns"], *numbers))
