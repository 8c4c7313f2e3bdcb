"""The exact KL term of an update: the value and gradient of a plain log_softmax, at any tensor size, under a grammar and with logits in
chunks too; and it holds.

Shapes: T label positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_rema.config import AlgorithmConfig
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.parallel.pipeline import reduce_stats
from megatron_rema.trainer.experience import pack_for_rank
from megatron_rema.trainer.update import update_policy
from megatron_rema.types import Trace
from tests.distributed.test_parallel_parity import QWEN2_TIED, gather
from tests.distributed.test_update_parity import traces

EXACT = AlgorithmConfig(kl_coef=0.5, kl_estimator="exact", aggregation="token")
TOKENS, TEMPERATURE = 128, 0.7
WORDS = 3  # of 32 bits for a vocabulary of 70


def constrained(trace: Trace) -> Trace:
    """Own tokens were sampled from those of their own parity."""
    even, odd = (int(digits * 8 * WORDS, 16).to_bytes(4 * WORDS, "little") for digits in ("5", "a"))
    allowed = [(odd if token % 2 else even) if own else None for token, own in zip(trace.token_ids, trace.loss_mask, strict=True)]
    return replace(trace, allowed=tuple(allowed))


def prepare(tensor: int, is_constrained: bool, advantages: float = 0.0, **options):
    groups = build_groups(tensor=tensor, pipeline=1)
    model = build_policy(QWEN2_TIED, groups=groups, seed=1, **options)
    reference = build_policy(QWEN2_TIED, groups=groups, seed=2, trainable=False, offload=True, **options)
    step = [replace(trace, advantages=tuple(advantages * a for a in trace.advantages)) for trace in traces()]
    step = [constrained(trace) for trace in step] if is_constrained else step
    batches = pack_for_rank(step, groups=groups, aggregation="token", max_turns=4, microbatch_tokens=TOKENS)
    assert len(batches) > 1 and all((batch.allowed_sets is not None) == is_constrained for batch in batches)
    return model, reference, batches


def by_the_trainer(tensor: int, is_constrained: bool, chunk_tokens: int):
    """Metrics and every gradient of an update whose advantages are 0: what is left is the KL term."""
    model, reference, batches = prepare(tensor, is_constrained, logits_chunk_tokens=chunk_tokens)
    optimizer = build_optimizer(model, lr=0.0, total_steps=1, grad_clip=0.0)
    metrics = update_policy(model, optimizer, batches, algorithm=EXACT, temperature=TEMPERATURE, reference=reference)
    assert reference.offload.is_resting
    return metrics, gather(model, lambda param: param.main_grad)


def by_plain_torch(is_constrained: bool):
    """The same by torch's log_softmax over whole logits, differentiated by autograd."""
    model, reference, batches = prepare(1, is_constrained)

    def logp_TV(logits_TV, batch):
        logits_TV = logits_TV[:, : QWEN2_TIED.vocab_size] / TEMPERATURE
        if is_constrained:
            tokens_V = torch.arange(QWEN2_TIED.vocab_size)
            bits_SV = (batch.allowed_sets[:, tokens_V // 32].long() >> (tokens_V % 32)) & 1
            logits_TV = logits_TV.masked_fill(bits_SV[batch.allowed_ids] == 0, -1e30)
        return logits_TV.log_softmax(-1)

    with reference.resident():
        keep = reference.forward_backward(batches, lambda x, b: (x.sum(), {"logq": logp_TV(x.detach(), b)}), forward_only=True)
    remaining = iter(keep)

    def loss(logits_TV, batch):
        policy_TV, logq_TV = logp_TV(logits_TV, batch), next(remaining)["logq"]
        kl_T = (policy_TV.exp() * (policy_TV - logq_TV)).sum(-1)
        return EXACT.kl_coef * (batch.loss_weights * kl_T).sum(), {"kl": kl_T[batch.loss_mask].sum(), "tokens": batch.loss_mask.sum()}

    stats = reduce_stats(model.forward_backward(batches, loss), model.groups)
    return stats["kl"] / stats["tokens"], gather(model, lambda param: param.main_grad)


@pytest.mark.parametrize("is_constrained", [False, True], ids=["free", "grammar"])
def test_value_and_gradients_are_those_of_plain_log_softmax_at_any_tensor_size(run_ranks, is_constrained):
    ((kl, gradients),) = run_ranks(1, by_plain_torch, is_constrained)
    assert kl > 1e-3, "far enough from the reference to be seen"
    for tensor, chunk_tokens in ((1, 0), (2, 0), (1, 30), (2, 30)):
        for metrics, ours in run_ranks(tensor, by_the_trainer, tensor, is_constrained, chunk_tokens):
            assert metrics["train/kl_ref_nats"] == pytest.approx(kl, rel=1e-4)  # sums of 70 terms, float32
            assert metrics["train/loss"] == pytest.approx(EXACT.kl_coef * kl, rel=1e-4), "a mean over tokens, advantages 0"
            assert ours.keys() == gradients.keys()
            for name, gradient in gradients.items():
                largest = np.abs(gradient).max()
                np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-5 * largest + 1e-8, err_msg=name)


def kl_along(kl_coef: float, advantages: float) -> list[float]:
    model, reference, batches = prepare(1, False, advantages)
    optimizer = build_optimizer(model, lr=3e-3, total_steps=6, eps=1e-3)
    algorithm = replace(EXACT, kl_coef=kl_coef)
    steps = [update_policy(model, optimizer, batches, algorithm=algorithm, temperature=TEMPERATURE, reference=reference) for _ in range(6)]
    return [metrics["train/kl_ref_nats"] for metrics in steps]


def test_the_term_holds_the_policy_back(run_ranks):
    """Alone it brings the policy nearer to the reference with every step; against advantages the policy ends nearer than without it."""
    (alone,) = run_ranks(1, kl_along, 1.0, 0.0)
    assert all(after < before for before, after in pairwise(alone)), alone
    (held,), (free,) = run_ranks(1, kl_along, 10.0, 1.0), run_ranks(1, kl_along, 0.0, 1.0)
    assert held[0] == free[0] and held[-1] < free[-1], (held, free)
