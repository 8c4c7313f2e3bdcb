"""Every CUDA symbol that megatron-core is answered for, one test each; and what must stay as it was."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import transformer_layer

from megatron_rema.parallel import platform

platform.enable()

CPU = torch.device("cpu")
view = transformer_layer.torch  # `torch`, as a megatron module sees it

only_without_cuda = pytest.mark.skipif(platform.has_cuda(), reason="with CUDA megatron-core sees torch itself")


@pytest.fixture
def probe(monkeypatch) -> types.ModuleType:
    """A module of megatron.core that was imported after `enable`, and sees torch itself."""
    module = types.ModuleType("megatron.core.probe")
    module.torch = torch
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_with_cuda_enable_changes_nothing(probe, monkeypatch):
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(platform, "_wrap_once", lambda *_: pytest.fail("a megatron function was replaced"))
    before = (megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state)
    platform.enable()
    assert probe.torch is torch
    assert (megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state) == before


def test_with_cuda_nccl_is_the_backend_and_gloo_stays_for_cpu_tensors(monkeypatch):
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    assert platform.backend() == "cpu:gloo,cuda:nccl"


def test_with_cuda_the_device_is_the_current_one(monkeypatch):
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert platform.device() == torch.device("cuda", 3)


@only_without_cuda
def test_without_cuda_device_and_backend_are_cpu_and_gloo():
    assert platform.device() == CPU
    assert platform.backend() == "gloo"


@only_without_cuda
def test_a_module_imported_later_gets_the_view_from_the_next_enable(probe):
    platform.enable()
    assert probe.torch is view


@only_without_cuda
def test_every_loaded_megatron_module_sees_the_view():
    megatron = {name: module for name, module in sys.modules.items() if name.split(".")[:2] == ["megatron", "core"]}
    assert sum(getattr(module, "torch", None) is view for module in megatron.values()) > 80  # 116 in 0.16.1 with everything imported
    assert [name for name, module in megatron.items() if getattr(module, "torch", None) is torch] == []


@only_without_cuda
def test_modules_that_megatron_imports_lazily_see_the_view():
    for name in ("filesystem_async", "state_dict_saver", "fully_parallel"):
        assert importlib.import_module(f"megatron.core.dist_checkpointing.strategies.{name}").torch is view


@only_without_cuda
def test_other_modules_see_torch_itself():
    assert view is not torch
    assert sys.modules[__name__].torch is importlib.import_module("megatron_rema.parallel.groups").dist.torch is torch


# --- torch.cuda.* ---------------------------------------------------------------------------------------------------


@only_without_cuda
def test_current_device_is_the_cpu():
    assert view.cuda.current_device() == CPU


@only_without_cuda
@pytest.mark.parametrize("name", ["synchronize", "set_device"])
def test_nothing_to_wait_for_and_no_device_to_choose(name):
    assert getattr(view.cuda, name)(0) is None
    with pytest.raises((AssertionError, RuntimeError, AttributeError)):
        getattr(torch.cuda, name)(0)


@only_without_cuda
def test_manual_seed_seeds_the_cpu_generator():
    with torch.random.fork_rng():
        view.cuda.manual_seed(11)
        seen = torch.rand(4)
        torch.manual_seed(11)
        assert torch.equal(seen, torch.rand(4))


@only_without_cuda
@pytest.mark.parametrize(
    ("get", "put"),
    [
        pytest.param(lambda: view.cuda.get_rng_state(), lambda s: view.cuda.set_rng_state(s, device=0), id="torch.cuda"),
        pytest.param(lambda: megatron_random._get_cuda_rng_state("cuda"), megatron_random._set_cuda_rng_state, id="megatron"),
    ],
)
def test_random_state_is_that_of_the_cpu_generator_and_comes_back_at_once(get, put):
    with torch.random.fork_rng():
        state = get()
        assert torch.equal(state, torch.get_rng_state())
        drawn = torch.rand(4)
        put(state)  # megatron's own queues this until CUDA starts, which never happens here
        assert torch.equal(drawn, torch.rand(4))


@only_without_cuda
def test_streams_order_nothing():
    stream = view.cuda.current_stream()
    assert view.cuda.default_stream() is stream and view.cuda.Stream(device=0) is stream
    stream.wait_stream(stream)
    stream.synchronize()
    with view.cuda.stream(stream):
        assert torch.ones(1).device == CPU


@only_without_cuda
def test_autocast_of_cuda_is_autocast_of_the_cpu():
    with view.autocast("cuda", dtype=torch.bfloat16):
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype is torch.bfloat16


# --- torch.<factory>(device="cuda") ---------------------------------------------------------------------------------

ARGUMENTS = {
    "tensor": ([1.0, 2.0],),
    "full": ((2,), 3.0),
    "arange": (2,),
    "empty_like": (torch.ones(2),),
    "zeros_like": (torch.ones(2),),
    "ones_like": (torch.ones(2),),
}


@only_without_cuda
@pytest.mark.parametrize("name", ["tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), "cpu", None])
def test_factories_make_cpu_tensors(name, device):
    made = getattr(view, name)(*ARGUMENTS.get(name, (2,)), device=device, dtype=torch.float64)
    assert made.device == CPU and made.shape == (2,) and made.dtype is torch.float64


@only_without_cuda
def test_a_factory_never_pins_memory():
    assert view.zeros(2, pin_memory=True).device == CPU


def test_meta_tensors_stay_meta():
    assert view.zeros(2, device="meta").is_meta


@only_without_cuda
def test_what_the_view_does_not_answer_is_torch_itself():
    assert view.nn is torch.nn and view.Tensor is torch.Tensor and view.cat is torch.cat
    assert view.cuda.is_available is torch.cuda.is_available
    with pytest.raises(AttributeError):
        view.no_such_name  # noqa: B018


# --- tensor.cuda(), tensor.type() -----------------------------------------------------------------------------------


@only_without_cuda
def test_cuda_and_type_are_answered_inside_a_wrapped_function_only():
    class Owner:
        @staticmethod
        def ask(tensor):
            return tensor.cuda(), tensor.type(), tensor.type(torch.float64).dtype

    t = torch.ones(2, dtype=torch.bfloat16)
    platform._wrap_once(Owner, "ask")
    same, kind, cast = Owner.ask(t)
    assert same is t
    assert kind == "torch.cuda.BFloat16Tensor"
    assert cast is torch.float64  # .type(dtype) still casts
    assert t.type() == "torch.BFloat16Tensor"
    with pytest.raises((AssertionError, RuntimeError)):
        t.cuda()


@only_without_cuda
@pytest.mark.parametrize(("module", "path"), platform._TENSOR_METHOD_USERS)
def test_megatron_functions_that_use_tensor_methods_are_wrapped_once(module, path):
    def found():
        owner = importlib.import_module("megatron.core." + module)
        for part in path.split("."):
            owner = getattr(owner, part)
        return owner

    before = found()
    platform.enable()
    assert found() is before and before.runs_inside_tensor_methods
    assert not hasattr(before.__wrapped__, "runs_inside_tensor_methods")


# --- the real torch -------------------------------------------------------------------------------------------------


@only_without_cuda
def test_the_real_torch_is_untouched():
    for name in platform._FACTORIES:
        assert getattr(torch, name) is getattr(torch._C._VariableFunctions, name)
    assert torch.Tensor.cuda is torch._C.TensorBase.cuda and torch.Tensor.type is torch._C.TensorBase.type
    assert type(torch.cuda) is types.ModuleType and torch.cuda.synchronize.__module__ == "torch.cuda"
    assert torch.autocast.__module__ == "torch.amp.autocast_mode"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
