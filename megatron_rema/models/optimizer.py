"""Adam and its schedule for one `ParallelModel`: megatron-core's optimizers, plain or ZeRO-1, bf16 weights with fp32 master copies.

A step whose gradients are not finite changes nothing: not the weights, not Adam's state, not the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rema.models.offload import HostOffload
from megatron_rema.models.policy import ParallelModel
from megatron_rema.parallel import platform

# ZeRO-1 state that loads at any tensor x pipeline x data layout
_CHECKPOINT_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    grad_norm: float  # L2 norm of all gradients before clipping; may be inf or nan
    skipped: bool  # gradients were not finite: nothing was changed
    lr: float  # learning rate of this step


class Optimizer:
    """zero_grad -> forward_backward -> step."""

    def __init__(self, model: ParallelModel, megatron: ChainedOptimizer, scheduler: OptimizerParamScheduler):
        self.model = model
        self.megatron = megatron
        self.scheduler = scheduler
        self.offload = None if model.offload is None else HostOffload(self._state_tensors, self._gradient_buffers)
        if not HAVE_APEX_OR_TE:
            for part in megatron.chained_optimizers:
                _mend_torch_adam(part)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Weights, gradients, master weights and Adam's moments are on the device inside; gradients begin at 0."""
        with self.model.resident():
            if self.offload is None:
                yield
            else:
                with self.offload.resident():
                    yield

    def _state_tensors(self) -> Iterator[torch.Tensor]:
        """Everything of the optimizer that outlives a step and is not the model's own weights."""
        weights = {param.untyped_storage() for module in self.model.modules for param in module.parameters()}
        for part in self.megatron.chained_optimizers:
            masters = [param.data for group in part.param_groups for param in group["params"]]
            moments = [value for state in part.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
            yield from (tensor for tensor in masters + moments if tensor.untyped_storage() not in weights)

    def _gradient_buffers(self) -> Iterator[torch.Tensor]:
        for chunk in self.model.chunks:
            yield from (buffer.grad_data for buffer in chunk.buffers + chunk.expert_parallel_buffers)

    def zero_grad(self) -> None:
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, *, position: int | None = None) -> StepResult:
        """Clip, update, move the schedule to ``position`` (None: one on). The k-th step (from 1) uses its value at k: warm-up starts at
        lr / warmup_steps.

        Over the wire: one sum for the norm and, between data-parallel ranks, one number that says whether any of them must skip: a single
        replica that skipped alone, for a fault of its own memory, would part from the others unseen. Under ZeRO-1 an all-gather
        of the new weights over data-parallel ranks.
        """
        found_inf = self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        must_skip = torch.tensor(float(found_inf or not math.isfinite(grad_norm)), device=platform.device())
        dist.all_reduce(must_skip, op=dist.ReduceOp.MAX, group=self.model.groups.dp)
        if must_skip:
            return StepResult(grad_norm=math.nan if math.isfinite(grad_norm) else grad_norm, skipped=True, lr=self.lr)
        self.scheduler.step(1 if position is None else position - self.scheduler.num_steps)
        self.megatron.step()
        return StepResult(grad_norm=grad_norm, skipped=False, lr=self.lr)

    @property
    def lr(self) -> float:
        return self.megatron.param_groups[0]["lr"]

    def reload_weights(self) -> None:
        """Refresh the fp32 master copies after the model's weights were replaced from outside (a checkpoint without optimizer state)."""
        self.megatron.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """For megatron's dist_checkpointing, beside ``model_state`` = the module's own sharded state dict. Loads at any layout.

        Call it, like the module's, inside ``groups.megatron_globals()``.
        """
        for part in self.megatron.chained_optimizers:
            _allocate_adam_state(part)
        metadata = {**_CHECKPOINT_METADATA, "dp_cp_group": self.model.groups.dp}
        adam = self.megatron.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        return {"adam": adam, "schedule": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What dist_checkpointing loaded into `sharded_state_dict`. The schedule stays as configured; only the position in it is loaded."""
        self.megatron.load_state_dict(state["adam"])
        for part in self.megatron.chained_optimizers:
            _separate_step_counters(part)
        self.scheduler.num_steps = 0
        self.scheduler.step(state["schedule"]["num_steps"])


def build_optimizer(
    model: ParallelModel,
    *,
    lr: float,
    min_lr: float = 0.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
) -> Optimizer:
    """AdamW over the trainable parameters of ``model``; ZeRO-1 when the model was built for it. A collective of the world.

    ``schedule``: constant, linear or cosine, from ``lr`` after warm-up to ``min_lr`` at ``total_steps``. No weight decay on norms and
    biases. ``grad_clip`` is a global L2 norm; 0 turns clipping off.
    """
    if not 0.0 <= min_lr <= lr:
        raise ValueError(f"optimizer.min_lr ({min_lr}) must be between 0 and optimizer.lr ({lr}): correct one of them.")
    dtype = model.config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        clip_grad=grad_clip,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=model.chunks[0].ddp_config.use_distributed_optimizer,
    )
    megatron = get_megatron_optimizer(config, model.chunks, use_gloo_process_groups=False, pg_collection=model.groups.collection)
    decay_steps = max(total_steps, warmup_steps + 1)  # a run shorter than its warm-up never leaves it
    scheduler = OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=schedule,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
    )
    return Optimizer(model, megatron, scheduler)


# --- megatron's checkpoints of torch's Adam ---------------------------------------------------------------------------
# Without Transformer Engine or Apex megatron uses torch's AdamW, whose state has a `step` tensor per parameter that megatron's ZeRO-1
# (0.16.1 and later) does not expect: it asserts one step before there is any, copies `step` from tensors that have none, and gives all
# parameters the same step tensor, which Adam then counts up once per parameter. The three functions below are the whole mend.


def _allocate_adam_state(part: MegatronOptimizer) -> None:
    """Adam's state before its first step, exactly as Adam itself would begin."""
    if part.optimizer is None or HAVE_APEX_OR_TE:
        return
    for group in part.optimizer.param_groups:
        for param in group["params"]:
            state = part.optimizer.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(param.data)
                state["exp_avg_sq"] = torch.zeros_like(param.data)


def _mend_torch_adam(part: MegatronOptimizer) -> None:
    """Make ZeRO-1 restore weights and moments only; `step` comes back with the parameter groups."""
    if not isinstance(part, DistributedOptimizer):
        return

    @torch.no_grad()
    def restore(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][order]
        state = part.optimizer.state[main_param]
        for name, target in (("param", main_param), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            target.copy_(tensors[name])

    part._set_main_param_and_optimizer_states = restore


def _separate_step_counters(part: MegatronOptimizer) -> None:
    if part.optimizer is not None:
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
