"""Lets real megatron-core run on a machine with no CUDA (gloo), and stays out of the way on one with CUDA.

megatron-core asks for CUDA in four ways only. Each has one answer here:

1. torch.cuda.<function>()        every megatron.core module sees `torch` through a `View`, whose `.cuda` answers for the CPU
2. device="cuda" in a factory     the same view wraps torch.zeros, torch.tensor, ...
3. tensor.cuda(), tensor.type()   a TorchFunctionMode, entered only around the few megatron functions that use them
4. the CUDA random-number state   two functions of megatron.core.tensor_parallel.random answer with the CPU generator

The real `torch` namespace and `torch.Tensor` are never modified. Found by running megatron-core 0.16.1 with one answer
taken away at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this process computes: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def backend() -> str:
    """What to hand to ``torch.distributed.init_process_group``. gloo stays alongside NCCL for objects and CPU tensors."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def enable() -> None:
    """Make megatron.core usable on this machine. May be called again after more of megatron was imported; with CUDA it does nothing."""
    if has_cuda():
        return
    for name in _LAZY_MODULES:
        importlib.import_module("megatron.core." + name)
    for name, module in list(sys.modules.items()):
        if name.split(".")[:2] == ["megatron", "core"] and getattr(module, "torch", None) is torch:
            module.torch = _VIEW
    for module_name, path in _TENSOR_METHOD_USERS:
        _wrap_once(importlib.import_module("megatron.core." + module_name), path)
    rng = importlib.import_module("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = _get_cpu_rng_state
    rng._set_cuda_rng_state = _set_cpu_rng_state


# --- 1 and 2: megatron's view of torch ------------------------------------------------------------------------------


class View(types.ModuleType):
    """A module that answers with its own attributes first, then with the wrapped module's."""

    def __init__(self, wrapped: types.ModuleType, **own: Any):
        super().__init__(wrapped.__name__)
        self.__dict__.update(_wrapped=wrapped, **own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_wrapped"], name)


def _on_cpu(factory: Callable) -> Callable:
    """``factory`` with device="cuda" read as the CPU, where memory is never pinned."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _nothing(*_: Any, **__: Any) -> None:
    """What synchronising amounts to on the CPU: everything is in order already."""


def _get_cpu_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
    return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


_STREAM = types.SimpleNamespace(wait_stream=_nothing, wait_event=_nothing, synchronize=_nothing)  # the one stream a CPU has
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
_VIEW = View(
    torch,
    autocast=_autocast,
    cuda=View(
        torch.cuda,
        current_device=lambda: _CPU,
        set_device=_nothing,
        synchronize=_nothing,
        manual_seed=torch.manual_seed,
        get_rng_state=_get_cpu_rng_state,
        set_rng_state=_set_cpu_rng_state,
        # megatron-core >= 0.19: the gradient buffers' communication stream waits for the current one
        current_stream=lambda device=None: _STREAM,
        default_stream=lambda device=None: _STREAM,
        Stream=lambda *_, **__: _STREAM,
        stream=lambda stream: contextlib.nullcontext(),
    ),
    **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES},
)


# --- 3: methods of Tensor -------------------------------------------------------------------------------------------


class _TensorMethods(TorchFunctionMode):
    """Inside: t.cuda() is t, and t.type() names the CUDA type (megatron's optimizers compare it with 'torch.cuda.FloatTensor')."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return out.replace("torch.", "torch.cuda.", 1)
        return out


def _wrap_once(owner: Any, path: str) -> None:
    """Replace the function at ``owner.path`` by itself inside `_TensorMethods`."""
    *classes, attribute = path.split(".")
    for name in classes:
        owner = getattr(owner, name)
    inner = getattr(owner, attribute)
    if getattr(inner, "runs_inside_tensor_methods", False):
        return

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _TensorMethods():
            return inner(*args, **kwargs)

    call.runs_inside_tensor_methods = True
    setattr(owner, attribute, call)


_TENSOR_METHOD_USERS = (  # module, qualified name
    ("optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.get_parameter_state_dp_zero"),
    ("models.common.language_module.language_module", "LanguageModule.setup_embeddings_and_output_layer"),
    ("dist_checkpointing.strategies.fully_parallel", "exchange_by_distribution"),
)

# modules that megatron imports inside functions: imported beforehand, so that they get the view as well
_LAZY_MODULES = (
    "models.gpt.gpt_model",
    "pipeline_parallel.schedules",
    "tensor_parallel.random",
    "distributed",
    "optimizer",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.clip_grads",
    "optimizer_param_scheduler",
    "timers",
    "rerun_state_machine",
    "dist_checkpointing.serialization",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.common",
)
