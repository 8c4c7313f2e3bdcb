"""Who takes part in a run: the process group, the policies in their layout, the engines beside them, and the rules they play by."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.weights import iterate_hf_tensors, load_hf, save_hf
from megatron_rema.config import RunConfig
from megatron_rema.engine.start import build_engine
from megatron_rema.models.optimizer import Optimizer, build_optimizer
from megatron_rema.models.policy import ParallelModel, build_policy
from megatron_rema.parallel import platform
from megatron_rema.parallel.groups import Groups
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.types import Engine, Role


@dataclass(frozen=True)
class Policy:
    """One trained set of weights. ``reference`` is its frozen copy from the start of the run, or None when no KL is asked for."""

    name: str
    path: str  # Hugging Face folder it started from: config and tokenizer for engines and exports
    roles: tuple[Role, ...]
    model: ParallelModel
    optimizer: Optimizer
    reference: ParallelModel | None


@contextmanager
def process_group() -> Iterator[None]:
    """The world: torchrun's, or this process alone. Destroyed at the end, after every engine is closed."""
    if platform.has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(platform.backend())
    else:
        dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def chat_format(config: RunConfig) -> ChatFormat:
    """The chat format that all policies share."""
    return ChatFormat.from_pretrained(config.model_path(next(iter(config.agents.policies))))


def dialogue_rules(config: RunConfig) -> DialogueRules:
    rollout, task = config.rollout, config.task
    return DialogueRules(
        max_turn_tokens=rollout.max_turn_tokens,
        max_episode_tokens=rollout.max_episode_tokens,
        max_context_tokens=rollout.max_context_tokens,
        max_rounds=rollout.max_rounds,
        roles=config.roles,
        finish_marker=task.finish_marker,
        system_prompts=task.system_prompts,
        policy_of_role=config.policy_of_role,
        reasoner_template=task.reasoner_template,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
    )


def build_policies(
    config: RunConfig, architectures: Mapping[str, Architecture], groups: Groups, *, total_steps: int, with_reference: bool
) -> dict[str, Policy]:
    """Weights on megatron-core at the configured layout, filled from Hugging Face folders or drawn from ``seed``. A collective."""
    parallel, optimizer = config.parallel, config.optimizer
    dtype = getattr(torch, config.model.dtype)
    policies = {}
    for name, policy in config.agents.policies.items():
        path = config.model_path(name)

        def weights(trainable: bool, name: str = name, path: str = path) -> ParallelModel:
            is_random = config.model.init == "random"
            model = build_policy(
                architectures[name],
                groups=groups,
                dtype=dtype,
                trainable=trainable,
                seed=config.seed if is_random else None,
                sequence_parallel=parallel.sequence_parallel,
                recompute=parallel.recompute,
                distributed_optimizer=parallel.distributed_optimizer,
            )
            if not is_random:
                load_hf(model.module, architectures[name], path, groups)
            return model

        model = weights(trainable=True)
        adam = build_optimizer(
            model,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            schedule=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            total_steps=total_steps,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            grad_clip=optimizer.grad_clip,
        )
        reference = weights(trainable=False) if with_reference else None
        policies[name] = Policy(name, path, tuple(policy.roles), model, adam, reference)
    return policies


def build_engines(config: RunConfig, *, max_num_seqs: int | None = None) -> dict[str, Engine]:
    """One engine a policy, in this process, on the policy's Hugging Face folder. A collective."""
    engine = config.engine
    return {
        name: build_engine(
            engine.name,
            config.model_path(name),
            tensor=engine.tensor,
            dtype=engine.dtype,
            max_model_len=config.rollout.max_context_tokens,
            max_num_seqs=max_num_seqs or engine.max_num_seqs,
            block_size=engine.block_size,
            kv_cache_gib=engine.kv_cache_mib / 1024,
            seed=config.seed,
        )
        for name in config.agents.policies
    }


def sync_weights(policies: Mapping[str, Policy], engines: Mapping[str, Engine], weight_version: int) -> None:
    """Trainer -> engines, in place, through the bridge; every engine then stamps ``weight_version`` on what it samples. A collective."""
    for name, policy in policies.items():
        model = policy.model
        engines[name].load_weights(iterate_hf_tensors(model.module, model.arch, model.groups), weight_version)


def export_hf(policies: Mapping[str, Policy], folder: Path) -> list[Path]:
    """Every policy as a Hugging Face checkpoint in ``folder``/NAME. The run's own earlier export is replaced once the new one is whole.

    A collective.
    """
    written = []
    first = dist.get_rank() == 0
    for name, policy in policies.items():
        target, fresh = folder / name, folder / f".{name}.new"
        if first:
            shutil.rmtree(fresh, ignore_errors=True)  # left by a run that was killed
        dist.barrier()
        save_hf(policy.model.module, policy.model.arch, policy.path, fresh, policy.model.groups)
        if first:
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        written.append(target)
    dist.barrier()
    return written
