"""What a plan tells of the reply, and who listens, by the probabilities of a model whose weights are written by hand.

Its first layer attends evenly to all that was said and adds it to the residual stream: words that were heard become likely. With that
layer's output next to nothing it is deaf. fp32; log-probabilities of a reply are about -40 nats.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_rema.integrity.audits import Finding
from megatron_rema.integrity.gold import Access
from megatron_rema.models.policy import ParallelModel, build_policy, cut, full_name
from megatron_rema.parallel.groups import build_groups
from megatron_rema.rollout.dialogue import Dialogue
from megatron_rema.trainer.scoring import label_logprobs
from megatron_rema.trainer.whitebox import findings, white_box
from megatron_rema.types import Episode, EpisodeStatus, Prompt, Role
from tests.distributed.test_parallel_parity import LLAMA
from tests.unit.test_integrity_monitor import completion
from tests.unit.test_scheduler import CHAT, rules

HEARS, DEAF = 20.0, 1e-5
WORDS = ("compute the product", "add", "let us think", "question", "step by step", "special tokens", "plain text", "done", "the answer is")
ARCH = replace(
    LLAMA,
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=len(CHAT.tokenizer),
    rope_scaling_factor=None,
    tied=True,
    max_positions=512,
)
RULES = rules(max_rounds=2, max_context_tokens=400)


@torch.no_grad()
def by_hand(model: ParallelModel, loudness: float) -> None:
    same = torch.eye(ARCH.hidden_size)
    nothing = torch.zeros(ARCH.num_heads, 2 * ARCH.head_dim, ARCH.hidden_size)  # queries and keys: attention is even
    values = torch.cat([nothing, same.view(ARCH.num_heads, ARCH.head_dim, -1)], dim=1).flatten(0, 1)
    words = torch.randn(ARCH.padded_vocab_size(1), ARCH.hidden_size, generator=torch.Generator().manual_seed(0))
    for name, param in model.module.named_parameters():
        kind = full_name(name, model.module, ARCH)
        if kind.endswith("word_embeddings.weight"):
            whole = torch.zeros(ARCH.padded_vocab_size(model.groups.tensor_size), ARCH.hidden_size)
            whole[: ARCH.vocab_size] = words[: ARCH.vocab_size]
        elif kind.endswith("linear_qkv.weight"):
            whole = values
        elif kind == "decoder.layers.0.self_attention.linear_proj.weight":
            whole = loudness * same
        else:
            whole = torch.full_like(param, 0.1 if kind.endswith("final_layernorm.weight") else float(param.ndim == 1))
            param.copy_(whole)
            continue
        param.copy_(cut(whole, param, model.groups))


def copying(number: int, words: str) -> Episode:
    """Everybody repeats what was said."""
    dialogue = Dialogue(CHAT, RULES, f"{number} + {number}?")
    for _ in range(4):
        dialogue.add(completion(words))
    return Episode(f"e{number}", Prompt(f"p{number}", f"{number} + {number}?", ""), 0, dialogue.turns, EpisodeStatus.MAX_ROUNDS)


def measured(tensor: int, pipeline: int, loudness: float) -> dict:
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(ARCH, groups=groups, seed=0, trainable=False)
    by_hand(model, loudness)
    episodes = [copying(number, words) for number, words in enumerate(WORDS)]
    return white_box(
        episodes,
        chat=CHAT,
        rules=RULES,
        score=lambda role, traces: label_logprobs(model, traces, temperature=1.0, microbatch_tokens=2048),
    )


def test_a_plan_that_is_copied_tells_of_the_reply_and_one_that_is_not_heard_does_not(run_ranks):
    (row,), (deaf,) = run_ranks(1, measured, 1, 1, HEARS), run_ranks(1, measured, 1, 1, DEAF)
    ignored = Finding("plan_use", Access.POLICY, {}, True, "the reasoner ignores the plan")
    information, influence = findings(row, [ignored])
    assert np.shape(row["plan_information"]) == (9, 8), "8 plans of 9 problems"
    assert 0.5 < information.values["plan_information_nats"] <= np.log(8) and not information.alarm
    assert min(influence.values[f"{role}_influence_nats"] for role in Role) > 0.1 and not influence.alarm

    for finding in findings(deaf, [ignored]):
        assert finding.access is Access.WEIGHTS and finding.alarm and finding.mechanism is None
        assert all(abs(value) < 1e-4 for name, value in finding.values.items() if name.endswith("_nats")), finding
    assert not any(finding.alarm for finding in findings(deaf, [replace(ignored, alarm=False)])), "alone they are values on record"

    for others in run_ranks(4, measured, 2, 2, HEARS):
        assert others["scored_tokens"] == row["scored_tokens"]
        np.testing.assert_allclose(others["plan_information"], row["plan_information"], atol=1e-4)
        for role in Role:
            for part in ("full", "masked"):
                np.testing.assert_allclose(others["influence"][role][part], row["influence"][role][part], atol=1e-5)
