"""Against repositories that no package index has, each run from a check-out in the folder MEGATRON_REMA_ORACLES; skipped without it.

    git clone https://github.com/ziyuwan/ReMA-public     # the paper's code: turn-level ratio and returns (24b5b47)
    git clone https://github.com/THUDM/slime             # token PPO, GSPO, GAE (624b824)
    git clone https://github.com/RAGEN-AI/RAGEN          # bi-level GAE (5eb79b8)

Their single files run on the verl of requirements/golden.txt, of which they use masked means only.
"""

import pytest
import torch

from megatron_rema.algorithm.advantage import turn_returns
from megatron_rema.algorithm.gae import gae
from megatron_rema.algorithm.kl import kl_estimate
from megatron_rema.algorithm.losses import aggregation_weights, policy_loss
from tests.golden.batches import Batch, PolicyInputs, random_batch, random_policy_inputs
from tests.golden.oracles import agree, agree_gradients, load, repository

SEEDS = range(5)
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-6}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.fixture(scope="module")
def rema():
    return load("rema_core_algos", repository("ReMA-public") / "src/verl/verl/rema_trainer/ppo/core_algos.py")


@pytest.fixture(scope="module")
def slime():
    """Its functions are compiled on first use: here they run as they are written."""
    torch.compiler.set_stance("force_eager")
    yield load("slime_ppo_utils", repository("slime") / "slime/utils/ppo_utils.py")
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def ragen():
    """Its names torch and verl_F came from a star import of a verl that exported them."""
    import verl.utils.torch_functional as verl_F

    return load("ragen_core_algos", repository("RAGEN") / "ragen/trainer/core_algos.py", torch=torch, verl_F=verl_F)


def step_ids(batch: Batch) -> torch.Tensor:
    """ReMA's ``step_id``: the turn inside the trace, -100 where nothing is trained."""
    first_B = torch.where(batch.mask_BL, batch.turn_ids_BL, batch.num_turns).min(1, keepdim=True).values
    return torch.where(batch.mask_BL, batch.turn_ids_BL - first_B, -100)


def rema_loss(rema, batch: Batch, inputs: PolicyInputs, clip_mode: str, agg_mode: str) -> tuple[torch.Tensor, ...]:
    return rema.compute_policy_loss(
        old_log_prob=inputs.old_logprobs_BL, log_prob=inputs.logprobs_BL, advantages=inputs.advantages_BL, eos_mask=batch.mask_BL,
        step_id=step_ids(batch), cliprange_low=0.2, cliprange_high=0.28, clip_ratio_c=1.5, log_ratio_clip_c=1.0,
        agg_mode=agg_mode, clip_mode=clip_mode,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("clip_mode", "agg_mode", "level", "aggregation"),
    [
        ("turn", "turn", "turn", "turn"),
        ("turn", "trajectory", "turn", "episode"),
        ("token", "token", "token", "token"),
        ("token", "turn", "token", "turn"),
    ],
)
def test_the_papers_own_loss(rema, clip_mode, agg_mode, level, aggregation, seed, dtype):
    """A dual clip of 1.5 and a cap of 1 nat, so that the draws reach both. Clipped fractions are compared as well."""
    batch = random_batch(seed)
    inputs = random_policy_inputs(batch, seed, dtype)
    weights_T = aggregation_weights(
        **batch.ids(), num_turns=batch.num_turns, aggregation=aggregation, max_turns=1,
        num_tokens_global=int(batch.mask_BL.sum()), num_turns_global=batch.num_turns, num_traces_global=len(batch.valid_BL),
    )  # fmt: skip
    loss, stats = policy_loss(
        batch.pack(inputs.logprobs_BL), batch.pack(inputs.old_logprobs_BL), batch.pack(inputs.advantages_BL), weights_T, **batch.ids(),
        num_turns=batch.num_turns, level=level, **CLIP, dual_clip=1.5, log_ratio_cap=1.0,
    )  # fmt: skip
    theirs, clipped, _, dual_clipped, capped = rema_loss(rema, batch, inputs, clip_mode, agg_mode)
    assert clipped > 0 and dual_clipped > 0 and capped > 0, "the draw must take every branch"
    name = f"ReMA-public compute_policy_loss {clip_mode}/{agg_mode}"
    agree(f"policy_loss {level}, {aggregation}", name, loss, theirs, tolerance=TOLERANCE[dtype])
    grads = (torch.autograd.grad(x, inputs.logprobs_BL)[0] for x in (loss, theirs))
    agree_gradients(f"policy_loss {level}, {aggregation}", name, *grads, tolerance=TOLERANCE[dtype])
    assert (stats.clipped_units / stats.num_units).item() == pytest.approx(clipped.item(), rel=1e-5)
    assert (stats.dual_clipped_units / stats.num_units).item() == pytest.approx(dual_clipped.item(), rel=1e-5)


def test_traces_without_a_trained_token_break_the_papers_loss_and_not_ours(rema):
    """One such trace: NaN. Nothing else in the microbatch: a range of negative length."""
    batch = random_batch(0)
    inputs = random_policy_inputs(batch, 0, torch.float32)
    turn_ids_BL = batch.turn_ids_BL.clone()
    turn_ids_BL[3] = -1
    assert rema_loss(rema, Batch(turn_ids_BL, batch.valid_BL, batch.num_turns), inputs, "token", "trajectory")[0].isnan()
    batch = Batch(torch.full_like(turn_ids_BL, -1), batch.valid_BL, batch.num_turns)
    with pytest.raises(RuntimeError):
        rema_loss(rema, batch, inputs, "turn", "turn")
    packed = [batch.pack(x) for x in (inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages_BL, torch.ones(batch.valid_BL.shape))]
    loss, _ = policy_loss(*packed, **batch.ids(), num_turns=batch.num_turns, level="turn", **CLIP)
    assert loss.item() == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_turn_returns(rema, slime, seed):
    """Turns of each trace as a row, padded at the end."""
    batch = random_batch(seed, max_turns=7)
    rewards_K = torch.randn(batch.num_turns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rewards_BK = torch.nn.utils.rnn.pad_sequence(
        [rewards_K[batch.trace_ids_K == trace] for trace in range(len(batch.valid_BL))], batch_first=True
    )
    count_B = batch.trace_ids_K.bincount()
    mask_BK = torch.arange(rewards_BK.shape[1]) < count_B[:, None]
    ours_K = turn_returns(rewards_K, batch.trace_ids_K, turn_discount=0.9)
    theirs_BK = rema.compute_turn_level_return(rewards_BK, mask_BK, 0.9)
    agree("turn_returns", "ReMA-public compute_turn_level_return", ours_K, theirs_BK[mask_BK], tolerance=1e-6)
    theirs_BK = slime.chunked_discounted_returns(rewards_BK, 0.9)
    agree("turn_returns", "slime chunked_discounted_returns", ours_K, theirs_BK[mask_BK], tolerance=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", ["token", "trace"])
def test_slime_policy_loss(slime, level, seed, dtype):
    """It returns a loss a token, without aggregation: compared as the sum of weights 1 over own tokens."""
    batch = random_batch(seed)
    inputs = random_policy_inputs(batch, seed, dtype)
    packed = [batch.pack(x) for x in (inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages_BL, torch.ones(batch.valid_BL.shape))]
    loss, stats = policy_loss(*packed, **batch.ids(), num_turns=batch.num_turns, level=level, **CLIP, dual_clip=1.5, log_ratio_cap=20.0)
    assert stats.clipped_units > 0
    if level == "token":
        kl_T = (inputs.old_logprobs_BL - inputs.logprobs_BL).flatten()
    else:
        kl_T = slime.compute_gspo_kl(
            list(inputs.logprobs_BL), list(inputs.old_logprobs_BL), list(inputs.logprobs_BL), list(batch.mask_BL.to(dtype))
        )
    loss_T, _ = slime.compute_policy_loss(kl_T, inputs.advantages_BL.flatten(), 0.2, 0.28, 1.5)
    theirs, name = loss_T[batch.mask_BL.flatten()].sum(), "slime compute_policy_loss"
    agree(f"policy_loss {level}", name, loss, theirs, tolerance=TOLERANCE[dtype])
    grads = (torch.autograd.grad(x, inputs.logprobs_BL)[0] for x in (loss, theirs))
    agree_gradients(f"policy_loss {level}", name, *grads, tolerance=TOLERANCE[dtype])


def test_slime_kl(slime):
    logprobs_T, ref_T = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) - 2.0
    for estimator in ("k1", "k2", "k3"):
        ours_T = kl_estimate(logprobs_T, ref_T, estimator=estimator)
        theirs_T = slime.compute_approx_kl(logprobs_T, ref_T, estimator)
        agree(f"kl_estimate {estimator}", "slime compute_approx_kl", ours_T, theirs_T, tolerance=5e-6)


def values_and_mask(batch: Batch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    values_BL = torch.randn(batch.valid_BL.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values_BL * batch.mask_BL, batch.mask_BL.double()


@pytest.mark.parametrize("seed", SEEDS)
def test_slime_gae(slime, seed):
    """It knows no observed tokens: traces without any."""
    batch = random_batch(seed, max_observed=0, max_tokens=80)
    values_BL, mask_BL = values_and_mask(batch, seed)
    rewards_BL, _ = values_and_mask(batch, seed + 100)
    _, ours_T = gae(
        batch.pack(rewards_BL), batch.pack(values_BL), **batch.ids(), discount=0.98, gae_lambda=0.9, turn_discount=0.98, turn_lambda=0.9
    )
    for name in ("vanilla_gae", "chunked_gae"):
        _, theirs_BL = getattr(slime, name)(rewards_BL, values_BL, 0.98, 0.9)
        agree("gae returns", f"slime {name}", batch.unpack(ours_T), theirs_BL * mask_BL, tolerance=2e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_bi_level_gae_is_ours_run_twice(ragen, seed):
    """RAGEN's first pass goes over the last tokens of the turns only and its second inside each turn, from the first one's return.
    Ours is ONE recursion over tokens, in which a turn's last token looks at the value of the next turn's FIRST token, not its last:
    other numbers by design. Each pass of theirs is a case of ours: turns of one token; then turns that are episodes (turn_discount 0).

    RAGEN takes a token for a turn's end where its reward is not 0 (so a turn without reward has no end): rewards here are never 0.
    """
    batch = random_batch(seed)
    values_BL, mask_BL = values_and_mask(batch, seed)
    ends_BL = batch.is_last_of_turn()
    rewards_BL = (torch.rand(batch.valid_BL.shape, generator=torch.Generator().manual_seed(seed)) + 0.5) * ends_BL
    _, theirs_BL = ragen.compute_bi_level_gae_advantage_return(rewards_BL, values_BL.float(), mask_BL, 0.97, 0.9, 0.8)

    ends = Batch(batch.turn_ids_BL.masked_fill(~ends_BL, -1), batch.valid_BL, batch.num_turns)
    _, of_turns_T = gae(
        ends.pack(rewards_BL), ends.pack(values_BL), **ends.ids(), discount=0.97, gae_lambda=0.9, turn_discount=0.8, turn_lambda=0.9
    )
    _, ours_T = gae(
        batch.pack(ends.unpack(of_turns_T)), batch.pack(values_BL), **batch.ids(),
        discount=0.97, gae_lambda=0.9, turn_discount=0.0, turn_lambda=1.0,
    )  # fmt: skip
    name = "RAGEN compute_bi_level_gae_advantage_return"
    agree("gae returns, two passes", name, batch.unpack(ours_T), theirs_BL * batch.mask_BL, tolerance=2e-6)


def test_a_wrong_answer_breaks_bi_level_gae_and_not_ours(ragen):
    """A last reward of 0 is no end of a turn to RAGEN, which then looks for a token after the last."""
    rewards_BL, values_BL, mask_BL = torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.zeros(1, 4), torch.ones(1, 4)
    with pytest.raises(IndexError):
        ragen.compute_bi_level_gae_advantage_return(rewards_BL, values_BL, mask_BL, 1.0, 1.0, 0.95)
    turn_ids_T, ids_T = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long)
    _, returns_T = gae(
        rewards_BL[0], values_BL[0], turn_ids_T, ids_T, mask_BL[0].bool(), discount=1.0, gae_lambda=1.0, turn_discount=0.95, turn_lambda=1.0
    )
    assert returns_T.tolist() == [1.0, 1.0, 0.0, 0.0]
