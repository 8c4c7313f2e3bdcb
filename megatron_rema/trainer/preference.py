"""Reward models: Bradley-Terry training on preference pairs, and scores of whole episodes inside the RL step.

A dialogue is scored at its last token in the reasoner's view, which holds the question, every instruction and every answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rema.algorithm.preference import PreferenceStats, bootstrap_weights, bradley_terry
from megatron_rema.config import RewardModelConfig, RunConfig
from megatron_rema.models.policy import ParallelModel
from megatron_rema.parallel.microbatch import padded_tokens, plan_microbatches
from megatron_rema.parallel.pipeline import reduce_stats
from megatron_rema.rollout.dataset import WrittenPair
from megatron_rema.rollout.traces import traces_of_dialogue
from megatron_rema.trainer.cast import Critic, Layouts, adam, build_model, chat_formats, dialogue_rules, export_model, process_group
from megatron_rema.trainer.diagnosis import find_non_finite, tell_skipped
from megatron_rema.trainer.experience import pack, to_device
from megatron_rema.trainer.inputs import Inputs, Source
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.scoring import scalars
from megatron_rema.trainer.supervised import fit
from megatron_rema.types import Batch, Role, Trace


@dataclass(frozen=True)
class Pair:
    """Scoring views of two dialogues about one question. ``number``: its place in the file, from 0."""

    number: int
    chosen: Trace
    rejected: Trace
    margin: float


def scoring_view(trace: Trace) -> Trace:
    """The trace with one more label, so that its last token is an input: the only trained position, where the score is read."""
    length = len(trace.token_ids)
    return replace(
        trace,
        token_ids=(*trace.token_ids, 0),
        loss_mask=(False,) * length + (True,),
        turn_ids=(-1,) * length + (0,),
        rollout_logprobs=(0.0,) * (length + 1),
        turn_rewards=(),
        advantages=(),
    )


def episode_scores(model: ParallelModel, views: Sequence[Trace], *, microbatch_tokens: int) -> list[list[float]]:
    """The K head outputs of each reasoner's view, on every rank. A collective of the world."""
    outputs = scalars(model, [scoring_view(view) for view in views], microbatch_tokens=microbatch_tokens)
    return [values_LK[-1].tolist() for values_LK in outputs]


def train(config: RunConfig, inputs: Inputs) -> None:
    """The ``train_reward_model`` front door: a scalar-head model on model.path's trunk, at parallel.reward_model."""
    chat, rules, settings = chat_formats(config), dialogue_rules(config), config.reward_model

    def view(pair: WrittenPair, turns: Sequence[tuple[Role, str]], episode_id: str) -> Trace:
        traces = traces_of_dialogue(chat, rules, pair.question, turns, fields=pair.fields, episode_id=episode_id, where=pair.where)
        return scoring_view(next(trace for trace in traces if trace.role is Role.REASONING))

    def views(written: Sequence[WrittenPair]) -> list[Pair]:
        margin = 1.0 if settings.margin else 0.0
        return [
            Pair(i, view(pair, pair.chosen, f"{i}/chosen"), view(pair, pair.rejected, f"{i}/rejected"), margin * pair.margin)
            for i, pair in enumerate(written)
        ]

    pairs, heldout = views(inputs.pairs), views(inputs.heldout_pairs)
    (arch,) = inputs.architectures.values()
    with process_group(config):
        first = dist.get_rank() == 0
        dist.barrier()  # every rank has looked at run_dir before rank 0 makes it
        reporter, folder = Reporter(speaks=first), RunFolder(config.run_dir, writes=first, private=config.private_run_dir)
        layout, tokens = config.parallel.layout("reward_model"), config.trainer.microbatch_tokens
        # a reward model of as many heads goes on from where it is; anything else lends its trunk
        fresh_head = arch.num_scalars != settings.heads
        arch = replace(arch, num_scalars=settings.heads, tied=False)
        with reporter.phase("build models"):
            model = build_model(
                config,
                arch,
                config.model.path,
                layout,
                Layouts(),
                trainable=True,
                random=config.model.init == "random",
                fresh_head=fresh_head,
            )
        learner = Critic(model, adam(config, model, lr=config.optimizer.lr, total_steps=max(config.trainer.steps, 1)))

        def step(number: int, chosen: list[Pair]) -> dict[str, float]:
            metrics = _update(learner, chosen, settings=settings, seed=config.seed, microbatch_tokens=tokens)
            if metrics["train/skipped_updates"]:
                both = [trace for pair in chosen for trace in (pair.chosen, pair.rejected)]
                found = find_non_finite(both, {"scores": scalars(model, both, microbatch_tokens=tokens)})
                tell_skipped(found, step=number, model="the reward model", folder=folder, reporter=reporter)
            return metrics

        fit(
            config,
            "reward model",
            pairs,
            source=Source.of("task.preference_file", config.task.preference_file, inputs.pairs),
            learners={"reward_model": learner},
            update=step,
            folder=folder,
            reporter=reporter,
        )
        if heldout:
            with reporter.phase("evaluate"):
                accuracy = pairwise_accuracy(model, heldout, microbatch_tokens=tokens)
            reporter.say(f"pairwise accuracy on {len(heldout)} held-out pairs: {accuracy:.4f}")
            if first:
                (folder.path / "preference.json").write_text(
                    json.dumps({"heldout_pairs": len(heldout), "pairwise_accuracy": accuracy}) + "\n"
                )
        with reporter.phase("export"):
            target = export_model(model, config.model.path, folder.path / "hf" / "reward_model")
        reporter.say(f"reward model exported: {target}")


def pairwise_accuracy(model: ParallelModel, pairs: Sequence[Pair], *, microbatch_tokens: int) -> float:
    """Fraction of pairs whose chosen dialogue has the larger mean score over heads; a tie counts half. A collective."""
    outputs = scalars(model, [trace for pair in pairs for trace in (pair.chosen, pair.rejected)], microbatch_tokens=microbatch_tokens)
    scores = torch.stack([values_LK[-1].mean() for values_LK in outputs])
    difference = scores[0::2] - scores[1::2]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def _update(learner: Critic, pairs: Sequence[Pair], *, settings: RewardModelConfig, seed: int, microbatch_tokens: int) -> dict[str, float]:
    """One Bradley-Terry step. A pair is never parted: both dialogues lie in one microbatch, chosen first."""
    groups = learner.model.groups
    lengths = [len(pair.chosen.token_ids) + len(pair.rejected.token_ids) - 2 for pair in pairs]
    multiple = 8 * groups.tensor_size
    plan = plan_microbatches(lengths, max_tokens=microbatch_tokens, num_ranks=groups.data_size, multiple=multiple)
    length = padded_tokens(plan, lengths, multiple=multiple)
    mine = plan[groups.data_rank]
    batches = [to_device(pack([trace for i in indices for trace in (pairs[i].chosen, pairs[i].rejected)], length)) for indices in mine]
    pairs_of = {id(batch): [pairs[i] for i in indices] for batch, indices in zip(batches, mine, strict=True)}

    def loss(values_TK: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores_NK = values_TK[batch.loss_mask]  # chosen, rejected, chosen, ...
        own = pairs_of[id(batch)]
        margin_N = torch.tensor([pair.margin for pair in own], device=scores_NK.device)
        seen_NK = None
        if settings.bootstrap:
            seen_NK = bootstrap_weights([pair.number for pair in own], num_heads=settings.heads, seed=seed).to(scores_NK.device)
        total, stats = bradley_terry(
            scores_NK[0::2],
            scores_NK[1::2],
            margin_N=margin_N,
            centering=settings.centering,
            weights_N=torch.full_like(margin_N, 1.0 / len(pairs)),
            head_weights_NK=seen_NK,
        )
        return total, stats.as_dict()

    learner.optimizer.zero_grad()
    stats = reduce_stats(learner.model.forward_backward(batches, loss), groups)
    result = learner.optimizer.step()
    means = {f"train/{name}": value for name, value in PreferenceStats.means(stats).items()}
    return {
        **means,
        "train/grad_norm": result.grad_norm,
        "train/skipped_updates": float(result.skipped),
        "train/lr": result.lr,
    }
