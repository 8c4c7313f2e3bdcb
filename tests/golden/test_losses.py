"""Policy losses, value loss and KL against verl, TRL and OpenRLHF: value, gradient and clipped fractions.

How ours become theirs. A turn-level ratio is nobody else's, but where every turn is a row of its own, a sequence-level loss (GSPO) IS the
turn-level loss; `Batch.turn_rows` makes those rows. verl caps a token's log ratio at 20 and GSPO's at 10, so ours is given that cap (its
own default is 3). TRL's two-sided clip ``delta`` is the dual clip: it differs from it only where the ordinary clip holds already.
The weights of ours are float32, hence 1e-6 where the rest is float64; verl adds 1e-8 to its denominators.
"""

import pytest
import torch
from torch import Tensor

from megatron_rema.algorithm.kl import kl_estimate
from megatron_rema.algorithm.losses import PolicyLossStats, aggregation_weights, policy_loss
from megatron_rema.algorithm.ratio import importance_ratio
from megatron_rema.algorithm.value import value_loss
from tests.golden import oracles
from tests.golden.batches import Batch, PolicyInputs, random_batch, random_policy_inputs
from tests.golden.oracles import agree, agree_gradients

SEEDS = range(5)
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-6}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
VERL_CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


@pytest.fixture(scope="module")
def verl():
    from verl.trainer.ppo import core_algos

    return core_algos


@pytest.fixture(scope="module")
def openrlhf():
    return oracles.openrlhf()


def weights(batch: Batch, aggregation: str, *, max_turns: int = 1) -> Tensor:
    return aggregation_weights(
        **batch.ids(), num_turns=batch.num_turns, aggregation=aggregation, max_turns=max_turns,
        num_tokens_global=int(batch.mask_BL.sum()), num_turns_global=batch.num_turns, num_traces_global=len(batch.valid_BL),
    )  # fmt: skip


def ours(batch: Batch, inputs: PolicyInputs, weights_T: Tensor, **settings) -> tuple[Tensor, Tensor, PolicyLossStats]:
    """Loss, its gradient by logprobs [B, L], stats. Observed tokens are NaN in all that it reads."""
    loss, stats = policy_loss(
        batch.pack(inputs.logprobs_BL), batch.pack(inputs.old_logprobs_BL), batch.pack(inputs.advantages_BL), weights_T, **batch.ids(),
        num_turns=batch.num_turns, **CLIP, **settings,
    )  # fmt: skip
    return loss, gradient(loss, inputs), stats


def gradient(loss: Tensor, inputs: PolicyInputs) -> Tensor:
    return torch.autograd.grad(loss, inputs.logprobs_BL, retain_graph=True)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_token_ratio_and_dual_clip(verl, openrlhf, seed, dtype):
    batch = random_batch(seed)
    inputs, mask_BL = random_policy_inputs(batch, seed, dtype), batch.mask_BL.to(dtype)
    loss, grad_BL, stats = ours(batch, inputs, weights(batch, "token"), level="token", dual_clip=3.0, log_ratio_cap=20.0)
    assert stats.clipped_units > 0 and stats.dual_clipped_units > 0, "the draw must take every branch"

    config = oracles.verl_actor_config(**VERL_CLIP, clip_ratio_c=3.0)
    args = inputs.old_logprobs_BL, inputs.logprobs_BL, inputs.advantages_BL, mask_BL
    theirs, metrics = verl.compute_policy_loss_vanilla(*args, loss_agg_mode="token-mean", config=config)
    agree("policy_loss token", "verl compute_policy_loss_vanilla", loss, theirs, tolerance=TOLERANCE[dtype])
    agree_gradients("policy_loss token", "verl compute_policy_loss_vanilla", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])
    assert (stats.clipped_units / stats.num_units).item() == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-6)
    assert (stats.dual_clipped_units / stats.num_units).item() == pytest.approx(metrics["actor/pg_clipfrac_lower"], rel=1e-6)

    opponent = openrlhf[0].PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=3.0)
    theirs, *_ = opponent(inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages_BL, mask_BL)
    agree("policy_loss token", "OpenRLHF PolicyLoss", loss, theirs, tolerance=TOLERANCE[dtype])
    agree_gradients("policy_loss token", "OpenRLHF PolicyLoss", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])

    theirs = oracles.trl_grpo_loss(
        inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages_BL, mask_BL, level="token", loss_type="bnpo", dual_clip=3.0, **CLIP
    )
    agree("policy_loss token", "trl GRPOTrainer bnpo", loss, theirs, tolerance=TOLERANCE[dtype])
    agree_gradients("policy_loss token", "trl GRPOTrainer bnpo", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_trace_ratio_is_gspo(verl, openrlhf, seed, dtype):
    """GSPO has one ratio a sequence over all its own tokens, turns or not, and the mean over sequences: weights 1 / (n_i N).

    verl's token form of it (ratio's value of the sequence, gradient of the token) has the same gradient for advantages that are equal
    inside a sequence. None of the three has a dual clip by default; OpenRLHF's and TRL's is tried as well.
    """
    batch = random_batch(seed)
    inputs, mask_BL = random_policy_inputs(batch, seed, dtype), batch.mask_BL.to(dtype)
    per_trace_BL = (1.0 / (mask_BL.sum(1, keepdim=True) * len(mask_BL))).expand(mask_BL.shape)
    weights_T = batch.pack(per_trace_BL)
    loss, grad_BL, stats = ours(batch, inputs, weights_T, level="trace", dual_clip=None, log_ratio_cap=10.0)
    assert stats.clipped_units > 0
    config = oracles.verl_actor_config(**VERL_CLIP)
    args = inputs.old_logprobs_BL, inputs.logprobs_BL, inputs.advantages_BL, mask_BL
    theirs, _ = verl.compute_policy_loss_gspo(*args, loss_agg_mode="seq-mean-token-mean", config=config)
    agree("policy_loss trace", "verl compute_policy_loss_gspo", loss, theirs, tolerance=TOLERANCE[dtype])
    agree_gradients("policy_loss trace", "verl compute_policy_loss_gspo", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])

    for dual_clip in (None, 1.5):
        loss, grad_BL, stats = ours(batch, inputs, weights_T, level="trace", dual_clip=dual_clip, log_ratio_cap=10.0)
        opponent = openrlhf[0].PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=dual_clip, policy_loss_type="gspo")
        theirs, *_ = opponent(inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages_BL, mask_BL)
        agree("policy_loss trace", "OpenRLHF PolicyLoss gspo", loss, theirs, tolerance=TOLERANCE[dtype])
        agree_gradients("policy_loss trace", "OpenRLHF PolicyLoss gspo", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])
        theirs = oracles.trl_grpo_loss(
            inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages_BL, mask_BL,
            level="sequence", loss_type="grpo", dual_clip=dual_clip, **CLIP,
        )  # fmt: skip
        agree("policy_loss trace", "trl GRPOTrainer sequence", loss, theirs, tolerance=TOLERANCE[dtype])
        agree_gradients("policy_loss trace", "trl GRPOTrainer sequence", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_turn_ratio_is_gspo_where_every_turn_is_a_sequence(verl, seed, dtype):
    """Geometric mean, aggregation "turn". The opponent sees K rows; its gradient comes back to the traces through `turn_rows`."""
    batch = random_batch(seed)
    inputs = random_policy_inputs(batch, seed, dtype)
    rows = [batch.turn_rows(x) for x in (inputs.old_logprobs_BL, inputs.logprobs_BL, inputs.advantages_BL, batch.mask_BL.to(dtype))]
    loss, grad_BL, stats = ours(batch, inputs, weights(batch, "turn"), level="turn", dual_clip=None, log_ratio_cap=10.0)
    assert stats.clipped_units > 0 and stats.num_units == batch.num_turns
    theirs, _ = verl.compute_policy_loss_gspo(*rows, loss_agg_mode="seq-mean-token-mean", config=oracles.verl_actor_config(**VERL_CLIP))
    agree("policy_loss turn", "verl compute_policy_loss_gspo", loss, theirs, tolerance=TOLERANCE[dtype])
    agree_gradients("policy_loss turn", "verl compute_policy_loss_gspo", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])

    loss, grad_BL, stats = ours(batch, inputs, weights(batch, "turn"), level="turn", dual_clip=1.5, log_ratio_cap=10.0)
    assert stats.dual_clipped_units > 0
    theirs = oracles.trl_grpo_loss(rows[1], rows[0], rows[2], rows[3].bool(), level="sequence", loss_type="grpo", dual_clip=1.5, **CLIP)
    agree("policy_loss turn, dual clip", "trl GRPOTrainer sequence", loss, theirs, tolerance=TOLERANCE[dtype])
    agree_gradients("policy_loss turn", "trl GRPOTrainer sequence", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_episode_aggregation_is_the_mean_of_each_traces_turn_loss(verl, seed, dtype):
    """Paper eq. 12: mean over traces of (1 / T_i) sum of turn losses. verl is called once a trace, its turns as rows."""
    batch = random_batch(seed)
    inputs = random_policy_inputs(batch, seed, dtype)
    rows = [batch.turn_rows(x) for x in (inputs.old_logprobs_BL, inputs.logprobs_BL, inputs.advantages_BL, batch.mask_BL.to(dtype))]
    config = oracles.verl_actor_config(**VERL_CLIP)
    per_trace = []
    for trace in range(len(batch.valid_BL)):
        of_trace = [row[batch.trace_ids_K == trace] for row in rows]
        per_trace.append(verl.compute_policy_loss_gspo(*of_trace, loss_agg_mode="seq-mean-token-mean", config=config)[0])
    theirs = torch.stack(per_trace).mean()
    loss, grad_BL, _ = ours(batch, inputs, weights(batch, "episode"), level="turn", dual_clip=None, log_ratio_cap=10.0)
    agree("policy_loss turn, episode", "verl compute_policy_loss_gspo", loss, theirs, tolerance=TOLERANCE[dtype])
    agree_gradients("policy_loss turn", "verl compute_policy_loss_gspo", grad_BL, gradient(theirs, inputs), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_geometric_and_arithmetic_ratios_of_a_turn(verl, seed, dtype):
    """An unclipped loss with advantage -1 and one turn a call IS that turn's ratio: GSPO's the geometric, the token ratios' mean the
    arithmetic one (paper eq. 13), which nobody clips as a whole."""
    batch = random_batch(seed)
    inputs = random_policy_inputs(batch, seed, dtype)
    old_KM, new_KM, mask_KM = (batch.turn_rows(x) for x in (inputs.old_logprobs_BL, inputs.logprobs_BL, batch.mask_BL.to(dtype)))
    config = oracles.verl_actor_config(clip_ratio_low=1.0, clip_ratio_high=1e9, clip_ratio_c=1e9)
    weights_BL = batch.spread(torch.randn(batch.num_turns, generator=torch.Generator().manual_seed(seed)).to(dtype))
    for mean, function, cap in (
        ("geometric", "compute_policy_loss_gspo", 10.0),
        ("arithmetic", "compute_policy_loss_vanilla", 20.0),
    ):
        theirs_K = torch.stack(
            [
                getattr(verl, function)(
                    old_KM[k : k + 1], new_KM[k : k + 1], -torch.ones_like(old_KM[:1]), mask_KM[k : k + 1],
                    loss_agg_mode="seq-mean-token-mean", config=config,
                )[0]
                for k in range(batch.num_turns)
            ]
        )  # fmt: skip
        ratio_T = importance_ratio(
            batch.pack(inputs.logprobs_BL), batch.pack(inputs.old_logprobs_BL), **batch.ids(),
            num_turns=batch.num_turns, level="turn", mean=mean, log_ratio_cap=cap,
        )  # fmt: skip
        assert (ratio_T[~batch.ids()["loss_mask_T"]] == 1.0).all()
        ratio_BL, theirs_BL = batch.unpack(ratio_T), batch.spread(theirs_K)
        agree(f"importance_ratio turn {mean}", f"verl {function}", ratio_BL, theirs_BL, tolerance=TOLERANCE[dtype])
        grad_BL, their_grad_BL = (gradient((weights_BL * x).sum(), inputs) for x in (ratio_BL, theirs_BL))
        agree_gradients(f"importance_ratio turn {mean}", f"verl {function}", grad_BL, their_grad_BL, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_and_entropy_terms(seed, dtype):
    """TRL's k3 has no cap (log ratios here stay far below ours); its entropy bonus is a mean over tokens, as our "token" aggregation."""
    batch = random_batch(seed)
    inputs = random_policy_inputs(batch, seed, dtype)
    terms = {"kl_coef": 0.07, "entropy_coef": 0.02}
    loss, _ = policy_loss(
        batch.pack(inputs.logprobs_BL), batch.pack(inputs.old_logprobs_BL), batch.pack(inputs.advantages_BL), weights(batch, "token"),
        **batch.ids(), num_turns=batch.num_turns, level="token", **CLIP, dual_clip=None, log_ratio_cap=20.0,
        ref_logprobs_T=batch.pack(inputs.ref_logprobs_BL), entropy_T=batch.pack(inputs.entropy_BL), **terms,
    )  # fmt: skip
    theirs = oracles.trl_grpo_loss(
        inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages_BL, batch.mask_BL, level="token", loss_type="bnpo", dual_clip=None,
        ref_logprobs_BL=inputs.ref_logprobs_BL, entropy_BL=inputs.entropy_BL, **CLIP, **terms,
    )  # fmt: skip
    agree("policy_loss with KL and entropy", "trl GRPOTrainer bnpo", loss, theirs, tolerance=TOLERANCE[dtype])
    leaves = inputs.logprobs_BL, inputs.entropy_BL
    for grad_BL, their_grad_BL in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        agree_gradients("policy_loss with KL and entropy", "trl GRPOTrainer bnpo", grad_BL, their_grad_BL, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aggregation", ["token", "turn", "episode", "constant"])
def test_aggregation_weights(verl, seed, aggregation):
    """The weighted sum of any per-token loss. "constant" divides by the turns a dialogue may have and by each turn's tokens: for turns of
    one token this is Dr.GRPO's constant (verl's loss_scale_factor, TRL's max_completion_length). Ours are float32."""
    max_turns = 5
    batch = random_batch(seed, max_tokens=1 if aggregation == "constant" else 6, max_turns=max_turns)
    loss_BL = torch.randn(batch.valid_BL.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask_BL = batch.mask_BL.double()
    if aggregation == "token":
        theirs = verl.agg_loss(loss_BL, mask_BL, "token-mean")
    elif aggregation == "turn":
        theirs = verl.agg_loss(batch.turn_rows(loss_BL), batch.turn_rows(mask_BL), "seq-mean-token-mean")
    elif aggregation == "constant":
        theirs = verl.agg_loss(loss_BL, mask_BL, "seq-mean-token-sum-norm", loss_scale_factor=max_turns)
    else:
        turns_KM, mask_KM = batch.turn_rows(loss_BL), batch.turn_rows(mask_BL)
        of_trace = [batch.trace_ids_K == trace for trace in range(len(mask_BL))]
        theirs = torch.stack([verl.agg_loss(turns_KM[k], mask_KM[k], "seq-mean-token-mean") for k in of_trace]).mean()
    weights_T = weights(batch, aggregation, max_turns=max_turns)
    value = (weights_T.double() * batch.unpack(torch.ones_like(weights_T))[batch.valid_BL] * loss_BL[batch.valid_BL]).sum()
    agree(f"aggregation_weights {aggregation}", "verl agg_loss", value, theirs, tolerance=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_cut_into_microbatches_has_the_loss_of_the_whole(verl, openrlhf, seed):
    """Three microbatches of four traces, one of them without a trained token, under global counts: verl's and OpenRLHF's agree when
    they are told the global number of tokens."""
    batch = random_batch(seed)
    loss_BL = torch.randn(batch.valid_BL.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn_ids_BL = batch.turn_ids_BL.clone()
    turn_ids_BL[4:8] = -1
    batch = Batch(turn_ids_BL, batch.valid_BL, batch.num_turns)
    num_tokens = int(batch.mask_BL.sum())
    totals = torch.zeros(3, dtype=torch.float64)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        part = Batch(batch.turn_ids_BL[rows], batch.valid_BL[rows], batch.num_turns)
        weights_T = aggregation_weights(
            **part.ids(), num_turns=part.num_turns, aggregation="token",
            num_tokens_global=num_tokens, num_turns_global=1, num_traces_global=1, max_turns=1,
        )  # fmt: skip
        mask_BL = part.mask_BL.double()
        totals += torch.stack(
            [
                (weights_T.double() * loss_BL[rows][part.valid_BL]).sum(),
                verl.agg_loss(loss_BL[rows], mask_BL, "token-mean", batch_num_tokens=num_tokens),
                openrlhf[0].aggregate_loss(loss_BL[rows], mask_BL, batch_num_tokens=num_tokens),
            ]
        )
    agree("aggregation_weights, microbatches", "verl agg_loss", totals[0], totals[1], tolerance=1e-6)
    agree("aggregation_weights, microbatches", "OpenRLHF aggregate_loss", totals[0], totals[2], tolerance=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip", [0.3, None])
def test_value_loss(verl, openrlhf, seed, dtype, clip):
    """verl always clips: without a clip it gets one that never binds."""
    batch = random_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    values_BL, returns_BL, old_BL = torch.randn(3, *batch.valid_BL.shape, generator=generator, dtype=torch.float64).to(dtype)
    values_BL, mask_BL = values_BL.clone().requires_grad_(), batch.mask_BL.to(dtype)
    packed = (batch.pack(x) for x in (values_BL, returns_BL, old_BL))
    loss, stats = value_loss(*packed, weights(batch, "token"), batch.ids()["loss_mask_T"], clip=clip)
    (grad_BL,) = torch.autograd.grad(loss, values_BL)
    theirs, clipped = verl.compute_value_loss(values_BL, returns_BL, old_BL, mask_BL, cliprange_value=clip or 1e9)
    opponent = openrlhf[0].ValueLoss(clip_eps=clip)
    for name, value in (("verl compute_value_loss", theirs), ("OpenRLHF ValueLoss", opponent(values_BL, old_BL, returns_BL, mask_BL))):
        agree("value_loss", name, loss, value, tolerance=TOLERANCE[dtype])
        agree_gradients("value_loss", name, grad_BL, torch.autograd.grad(value, values_BL)[0], tolerance=TOLERANCE[dtype])
    if clip:
        assert stats.clipped_tokens > 0
        assert (stats.clipped_tokens / stats.num_tokens).item() == pytest.approx(clipped.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(verl, openrlhf, estimator, dtype):
    """Log ratios within 2 nats: both opponents cap k3's VALUE at 10, which takes the gradient away from 2.6 nats on."""
    generator = torch.Generator().manual_seed(0)
    x_T = 4.0 * torch.rand(500, generator=generator, dtype=torch.float64) - 2.0
    ref_T = (-torch.rand(500, generator=generator, dtype=torch.float64)).to(dtype)
    logprobs_T = (ref_T - x_T.to(dtype)).requires_grad_()
    estimate_T = kl_estimate(logprobs_T, ref_T, estimator=estimator)
    (grad_T,) = torch.autograd.grad(estimate_T.sum(), logprobs_T)
    opponents = {"verl kl_penalty": verl.kl_penalty(logprobs_T, ref_T, estimator)}
    if dtype == torch.float32:  # it computes in float32
        opponents["OpenRLHF compute_approx_kl"] = openrlhf[1].compute_approx_kl(logprobs_T, ref_T, kl_estimator=estimator)
    for name, theirs_T in opponents.items():
        agree(f"kl_estimate {estimator}", name, estimate_T, theirs_T, tolerance=TOLERANCE[dtype])
        (their_grad_T,) = torch.autograd.grad(theirs_T.sum(), logprobs_T)
        agree_gradients(f"kl_estimate {estimator}", name, grad_T, their_grad_T, tolerance=TOLERANCE[dtype])
