"""Supervised cold start: each policy learns its roles' turns of written dialogues, in exactly the contexts that RL will show it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rema.config import ConfigError, RunConfig
from megatron_rema.parallel.pipeline import reduce_stats
from megatron_rema.report.page import write_report
from megatron_rema.rollout.traces import traces_of_dialogue
from megatron_rema.trainer.cast import (
    Layouts,
    Policy,
    build_policies,
    chat_formats,
    choose_kernels,
    dialogue_rules,
    export_hf,
    process_group,
    trained,
)
from megatron_rema.trainer.diagnosis import find_non_finite, tell_skipped
from megatron_rema.trainer.experience import pack_for_rank
from megatron_rema.trainer.inputs import Inputs, Source
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.scoring import label_logprobs
from megatron_rema.trainer.supervised import fit
from megatron_rema.types import Batch, Trace


def train(config: RunConfig, inputs: Inputs) -> None:
    """The ``sft`` front door. ``trainer.steps`` optimizer steps of ``trainer.global_batch_dialogues`` dialogues each."""
    chat, rules = chat_formats(config), dialogue_rules(config)
    dialogues = [
        traces_of_dialogue(
            chat, rules, dialogue.question, dialogue.turns, fields=dialogue.fields, episode_id=str(index), where=dialogue.where
        )
        for index, dialogue in enumerate(inputs.dialogues)
    ]
    longest = max(len(trace.token_ids) for traces in dialogues for trace in traces)
    if longest > config.trainer.microbatch_tokens:
        raise ConfigError(
            f"trainer.microbatch_tokens ({config.trainer.microbatch_tokens}) must hold the longest dialogue view of "
            f"{config.task.cold_start_file} ({longest} tokens): raise it."
        )
    with process_group(config):
        first = dist.get_rank() == 0
        dist.barrier()  # every rank has looked at run_dir before rank 0 makes it
        reporter, folder = Reporter(speaks=first), RunFolder(config.run_dir, writes=first, private=config.private_run_dir)
        reporter.say(choose_kernels(config))
        with reporter.phase("build models"):
            policies = build_policies(config, inputs.architectures, Layouts(), total_steps=max(config.trainer.steps, 1), with_others=False)

        learners = trained(policies)  # a frozen partner stays as it is

        def step(number: int, chosen: list[list[Trace]]) -> dict[str, float]:
            metrics: dict[str, float] = {}
            for policy in learners.values():
                prefix = f"train/{policy.name}/" if len(policies) > 1 else "train/"
                traces = [trace for dialogue in chosen for trace in dialogue if trace.role in policy.roles]
                own = _update(policy, traces, config)
                if own["skipped_updates"]:
                    logprobs = label_logprobs(policy.model, traces, temperature=1.0, microbatch_tokens=config.trainer.microbatch_tokens)
                    found = find_non_finite(traces, {"logprobs": logprobs})
                    tell_skipped(found, step=number, model=f"policy {policy.name}", folder=folder, reporter=reporter)
                metrics |= {prefix + name: value for name, value in own.items()}
            return metrics

        source = Source.of("task.cold_start_file", config.task.cold_start_file, inputs.dialogues)
        fit(config, "cold start", dialogues, source=source, learners=learners, update=step, folder=folder, reporter=reporter)
        if config.trainer.save_hf:
            with reporter.phase("export"):
                paths = export_hf(policies, folder.path / "hf")
            for path in paths:
                reporter.say(f"policy exported: {path}")
        with reporter.phase("report"):
            if first:
                reporter.say(f"report: {write_report(folder.path)}")
            dist.barrier()


def _update(policy: Policy, traces: Sequence[Trace], config: RunConfig) -> dict[str, float]:
    """One optimizer step on the mean negative log-likelihood (nats) of the policy's own tokens."""
    model = policy.model
    batches = pack_for_rank(
        traces, aggregation="token", max_turns=1, microbatch_tokens=config.trainer.microbatch_tokens, groups=model.groups
    )

    def loss(outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_T = model.statistics(outputs, batch).logprobs
        total = -torch.where(batch.loss_mask, batch.loss_weights * logprobs_T, 0.0).sum()
        return total, {"loss": total.detach(), "tokens": batch.loss_mask.sum()}

    policy.optimizer.zero_grad()
    stats = reduce_stats(model.forward_backward(batches, loss), model.groups)
    result = policy.optimizer.step()
    return {**stats, "grad_norm": result.grad_norm, "skipped_updates": float(result.skipped), "lr": result.lr}
