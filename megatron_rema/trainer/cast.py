"""Who takes part in a run: the process group, the policies in their layout, the engines beside them, and the rules they play by."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.weights import iterate_hf_tensors, load_hf, save_hf
from megatron_rema.config import ConfigError, LayoutConfig, PreflightConfig, RunConfig
from megatron_rema.engine.start import build_engine
from megatron_rema.kernels import library as kernels
from megatron_rema.models.optimizer import Optimizer, build_optimizer
from megatron_rema.models.policy import ParallelModel, build_policy
from megatron_rema.parallel import platform
from megatron_rema.parallel.exchange import gather
from megatron_rema.parallel.groups import Groups, build_groups
from megatron_rema.parallel.reach import is_first, launchers_store, meet
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.counterfactual import Counterfactuals
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.trainer import faults, preflight, watchdog
from megatron_rema.trainer.progress import Reporter
from megatron_rema.types import Engine, Role


@dataclass(frozen=True)
class Critic:
    """A value model and its optimizer."""

    model: ParallelModel
    optimizer: Optimizer


@dataclass(frozen=True)
class Policy:
    """One set of weights. ``optimizer``: None for a frozen partner, which is never updated; ``reference``: its frozen copy from the start
    of the run; ``critic``: what predicts its returns."""

    name: str
    path: str  # Hugging Face folder it started from: config and tokenizer for engines and exports
    roles: tuple[Role, ...]
    model: ParallelModel
    optimizer: Optimizer | None
    reference: ParallelModel | None
    critic: Critic | None


@contextmanager
def process_group(config: RunConfig | None = None) -> Iterator[None]:
    """The world: torchrun's, or this process alone. Destroyed at the end, after every engine is closed.

    With ``config``, the environment is checked first (trainer/preflight.py): raises ConfigError where ranks could not train together. And a
    hang inside ends the process (trainer/watchdog.py).
    """
    store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    limits = PreflightConfig() if config is None else config.trainer.preflight
    store = meet(store, rank, world, wait_s=limits.wait_s)
    checked = config is not None and limits.enabled
    limit_s = 0.0 if config is None else config.trainer.watchdog_seconds
    reporter = Reporter(speaks=rank == 0)
    folder = "" if config is None else config.run_dir
    with watchdog.watching(launchers_store(store, rank) if limit_s else store, rank, world, limit_s=limit_s, folder=folder):
        with reporter.phase("preflight"):
            if checked:
                preflight.check(store, rank, world, config, reporter.say)
            if platform.has_cuda():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            timeout = watchdog.COLLECTIVE_TIMEOUT if limit_s else None  # whoever waits is the watchdog's business then
            dist.init_process_group(platform.backend(), store=store, rank=rank, world_size=world, timeout=timeout)
        try:
            if checked:
                preflight.check_collective(store, config, reporter.say)
            yield
        except Exception as error:
            faults.tell_rank(error, rank, is_first=is_first(store, "error", wait_s=5.0))
            raise
        finally:
            dist.destroy_process_group()


def chat_formats(config: RunConfig) -> dict[Role, ChatFormat]:
    """Each role's chat format: that of the policy which speaks for it."""
    of_path = {path: ChatFormat.from_pretrained(path) for path in dict.fromkeys(map(config.model_path, config.agents.policies))}
    return {role: of_path[config.model_path(policy)] for role, policy in config.policy_of_role.items()}


def choose_kernels(config: RunConfig) -> str:
    """Choose this process's kernels; returns what to log. Raises ConfigError where ranks would choose differently: what they gather from
    each other is not the same numbers. A collective of the world."""
    chosen = kernels.select(config.kernels, platform.device())
    everywhere = gather(chosen)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            raise ConfigError(
                f"kernels is {config.kernels}, which is '{everywhere[0]}' on rank 0 and '{other}' on rank {rank}; all ranks must compute "
                "alike: build the kernels on every machine, or set kernels=reference."
            )
    return chosen


def dialogue_rules(config: RunConfig) -> DialogueRules:
    rollout, task, algorithm = config.rollout, config.task, config.algorithm
    counterfactuals = None
    if algorithm.credit != "outcome":
        counterfactuals = Counterfactuals(algorithm.credit, rollout.episodes_per_prompt, algorithm.counterfactual_samples)
    return DialogueRules(
        max_turn_tokens=rollout.max_turn_tokens,
        max_episode_tokens=rollout.max_episode_tokens,
        max_context_tokens=rollout.max_context_tokens,
        max_rounds=rollout.max_rounds,
        samples_per_plan=rollout.samples_per_plan,
        counterfactuals=counterfactuals,
        roles=config.roles,
        finish_marker=task.finish_marker,
        json_actions=task.json_actions,
        system_prompts=task.system_prompts,
        policy_of_role=config.policy_of_role,
        reasoner_template=task.reasoner_template,
        solo_template=task.solo_template,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
    )


class Layouts:
    """The process groups of every layout in use: models that ask for the same cut share them."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], Groups] = {}

    def groups(self, layout: LayoutConfig) -> Groups:
        """A collective the first time a layout is asked for: every rank asks in the same order."""
        key = (layout.tensor, layout.pipeline)
        if key not in self._made:
            self._made[key] = build_groups(tensor=layout.tensor, pipeline=layout.pipeline)
        return self._made[key]


def build_model(
    config: RunConfig,
    arch: Architecture,
    path: str | Path,
    layout: LayoutConfig,
    layouts: Layouts,
    *,
    trainable: bool,
    random: bool = False,
    fresh_head: bool = False,
) -> ParallelModel:
    """One model at its layout, filled from a Hugging Face folder, or ``random``: drawn from ``seed``. ``fresh_head``: the head is drawn."""
    groups = layouts.groups(layout)
    model = build_policy(
        arch,
        groups=groups,
        virtual=layout.virtual_pipeline,
        dtype=getattr(torch, config.model.dtype),
        trainable=trainable,
        seed=config.seed if random or fresh_head else None,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
        distributed_optimizer=layout.distributed_optimizer and trainable,
        offload=layout.offload,
        logits_chunk_tokens=config.trainer.logits_chunk_tokens,
    )
    if not random:
        load_hf(model.modules, arch, path, groups, fresh_head=fresh_head)
    return model


def adam(config: RunConfig, model: ParallelModel, *, lr: float, total_steps: int) -> Optimizer:
    """The configured optimizer over one model, at its own peak learning rate. A collective of the world."""
    optimizer = config.optimizer
    return build_optimizer(
        model,
        lr=lr,
        min_lr=min(optimizer.min_lr, lr),
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        total_steps=total_steps,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        grad_clip=optimizer.grad_clip,
    )


def build_policies(
    config: RunConfig, architectures: Mapping[str, Architecture], layouts: Layouts, *, total_steps: int, with_others: bool
) -> dict[str, Policy]:
    """Every policy on megatron-core at parallel.actor; ``with_others``: its reference and critic too, where the objective asks for them."""
    parallel, random = config.parallel, config.model.init == "random"
    policies = {}
    for name, policy in config.agents.policies.items():
        path, arch = config.model_path(name), architectures[name]
        model = build_model(config, arch, path, parallel.actor, layouts, trainable=policy.trainable, random=random)
        optimizer = reference = critic = None
        if not policy.trainable:
            policies[name] = Policy(name, path, tuple(policy.roles), model, optimizer, reference, critic)
            continue
        optimizer = adam(config, model, lr=config.optimizer.lr, total_steps=total_steps)
        if with_others and config.algorithm.needs_reference:
            reference = build_model(config, arch, path, parallel.layout("reference"), layouts, trainable=False, random=random)
        if with_others and config.algorithm.advantage == "gae":
            trunk = replace(arch, num_scalars=1, tied=False)
            layout = parallel.layout("critic")
            values = build_model(config, trunk, config.critic.path or path, layout, layouts, trainable=True, random=random, fresh_head=True)
            critic = Critic(values, adam(config, values, lr=config.critic.lr, total_steps=total_steps))
        policies[name] = Policy(name, path, tuple(policy.roles), model, optimizer, reference, critic)
    return policies


def trained(policies: Mapping[str, Policy]) -> dict[str, Policy | Critic]:
    """Everything that learns, by the name that checkpoints use."""
    critics = {f"{name}_critic": policy.critic for name, policy in policies.items() if policy.critic is not None}
    return {**{name: policy for name, policy in policies.items() if policy.optimizer is not None}, **critics}


def rest(policies: Mapping[str, Policy], reward_model: ParallelModel | None) -> None:
    """Every model whose layout asks for it leaves the device until its phase of a step."""
    for learner in trained(policies).values():
        with learner.optimizer.resident():
            pass
    frozen = [policy.model for policy in policies.values() if policy.optimizer is None]
    for model in [reward_model, *frozen, *(policy.reference for policy in policies.values())]:
        if model is not None:
            with model.resident():
                pass


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
            constrained=config.task.json_actions and Role.META_THINKING in policy.roles,
        )
        for name, policy in config.agents.policies.items()
    }


def sync_weights(policies: Mapping[str, Policy], engines: Mapping[str, Engine], weight_version: int) -> None:
    """Trainer -> engines, in place, through the bridge; every engine then stamps ``weight_version`` on what it samples. A collective."""
    for name, policy in policies.items():
        load(engines[name], policy.model, weight_version)


def load(engine: Engine, model: ParallelModel, weight_version: int) -> None:
    with model.resident():
        engine.load_weights(iterate_hf_tensors(model.modules, model.arch, model.groups), weight_version)


@contextmanager
def reference_speaks(policy: Policy, engine: Engine) -> Iterator[None]:
    """The policy's engine samples with the weights of its reference, the policy of the run's start; then with its own again. A
    collective."""
    version = engine.weight_version
    load(engine, policy.reference, version)
    try:
        yield
    finally:
        load(engine, policy.model, version)


def export_hf(policies: Mapping[str, Policy], folder: Path) -> list[Path]:
    """Every policy as a Hugging Face checkpoint in ``folder``/NAME. A collective."""
    return [export_model(policy.model, policy.path, folder / name) for name, policy in policies.items()]


def export_model(model: ParallelModel, source: str | Path, target: Path) -> Path:
    """``model`` as the Hugging Face checkpoint ``target``, with config and tokenizer of ``source``. The run's own earlier export is
    replaced once the new one is whole. A collective."""
    first, fresh = dist.get_rank() == 0, target.with_name(f".{target.name}.new")
    if first:
        shutil.rmtree(fresh, ignore_errors=True)  # left by a run that was killed
    dist.barrier()
    with model.resident():
        save_hf(model.modules, model.arch, source, fresh, model.groups)
    if first:
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    dist.barrier()
    return target
