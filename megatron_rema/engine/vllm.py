"""vLLM in the trainer's own processes: one engine per tensor-parallel group, driven step by step.

Under torchrun every rank builds its engine ("external_launcher"); ranks of one tensor-parallel group replay the same
calls in the same order, so nothing is broadcast. The five traps of this arrangement and what we do about them are in
``contain.py`` (process-wide) and in ``load_weights`` (stale copies of weights). CUDA paths follow vLLM's documented
behaviour but have not been run: see ``sleep``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_rema.engine.contain import close_core, contained, kept_rng, prepare_environment, register_in_process, require_vllm, tame
from megatron_rema.engine.contract import EngineCounters, check_request, checkpoint_names, complete
from megatron_rema.types import Completion, StopReason, TurnRequest

if TYPE_CHECKING:
    from torch import Tensor

_STOP_REASONS = {"stop": StopReason.STOP, "length": StopReason.LENGTH, "abort": StopReason.ABORT, "error": StopReason.ABORT}


class VllmEngine:
    """The ``Engine`` protocol on vLLM. Needs an initialised default process group, all of whose ranks start and close engines together.

    ``kv_cache_gib`` is memory per rank for keys and values; it must hold at least one sequence of ``max_model_len``.
    Log-probabilities are those of the sampling distribution (temperature and top_p applied); at temperature 0, those of
    the untempered policy. Under a request's regex (an engine that is ``constrained`` takes them) the distribution is that over the tokens
    which the grammar allows. A turn ends on the request's own ``stop_token_ids`` only: the model's end-of-sequence is ignored.
    """

    _num_alive = 0  # engines of this process, which share vLLM's process groups

    def __init__(
        self,
        model_path: str | Path,
        *,
        tensor: int = 1,
        dtype: str = "float32",
        max_model_len: int,
        max_num_seqs: int = 64,
        block_size: int = 32,
        kv_cache_gib: float = 0.25,
        seed: int = 0,
        constrained: bool = False,
    ) -> None:
        require_vllm()
        assert dist.is_initialized(), "VllmEngine shares the trainer's process group: call init_process_group first"
        if dist.get_world_size() % tensor:
            raise ValueError(f"engine.tensor ({tensor}) must divide world_size ({dist.get_world_size()}).")
        prepare_environment()
        self.counters = EngineCounters()
        self._expected = checkpoint_names(model_path)
        self._max_model_len = max_model_len
        self._constrained = constrained
        self._unfinished: dict[str, tuple[int, TurnRequest, int]] = {}  # id -> (order, request, weight version at submission)
        self._num_submitted = 0
        self._weight_version = 0
        self._fault: str | None = None
        with contained():
            from vllm.engine.arg_utils import EngineArgs
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.llm_engine import LLMEngine

            self._sampling_params, self._final_only = SamplingParams, RequestOutputKind.FINAL_ONLY
            self._structured_outputs = StructuredOutputsParams
            tame()
            _check_tensor_size(tensor)
            register_in_process(json.loads((Path(model_path) / "config.json").read_text())["architectures"])
            self._on_cpu = current_platform.is_cpu()
            for name, value in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size()), ("LOCAL_RANK", 0)):
                os.environ.setdefault(name, str(value))
            arguments = EngineArgs(
                model=str(model_path),
                trust_remote_code=False,
                tensor_parallel_size=tensor,
                distributed_executor_backend="external_launcher",
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                block_size=block_size,
                kv_cache_memory_bytes=int(kv_cache_gib * 2**30),  # given: no profiling run, no warm-up
                seed=seed,
                # A prompt prefilled in two parts makes vLLM rewind the request's seeded generator, which a CPU generator cannot do.
                enable_chunked_prefill=not self._on_cpu,
                max_num_batched_tokens=max(4096, max_model_len) if self._on_cpu else None,
                enforce_eager=self._on_cpu,  # no compilation on CPU; CUDA graphs elsewhere
                enable_prefix_caching=True,
                async_scheduling=False,  # ranks of a group step in lockstep
                enable_sleep_mode=not self._on_cpu,
                logprobs_mode="processed_logprobs",  # the default would ignore temperature
                generation_config="vllm",  # sampling comes from the request alone
                skip_tokenizer_init=not constrained,  # token ids in, token ids out; a grammar knows tokens by their spelling
                structured_outputs_config={"backend": "xgrammar"},  # the library that the trainer replays grammars with
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
            self._engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        VllmEngine._num_alive += 1

    @property
    def weight_version(self) -> int:
        return self._weight_version

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def submit(self, request: TurnRequest) -> None:
        self._check_usable()
        check_request(request, max_model_len=self._max_model_len, known_ids=self._unfinished, constrained=self._constrained)
        parameters = self._sampling_params(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,
            structured_outputs=None if request.regex is None else self._structured_outputs(regex=request.regex),
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final_only,
        )
        self._engine.add_request(request.request_id, {"prompt_token_ids": list(request.token_ids)}, parameters)
        self._unfinished[request.request_id] = (self._num_submitted, request, self._weight_version)
        self._num_submitted += 1

    def step(self) -> list[Completion]:
        """One forward pass over the running batch; requests that ended, in order of submission.

        A completion carries the weight version at its submission: the oldest weights any of its tokens came from.
        """
        self._check_usable()
        if not self._unfinished:
            return []
        self.counters.num_steps += 1
        with kept_rng():
            outputs = self._engine.step()
        ended = []
        for output in outputs:
            if not output.finished:
                continue
            order, request, weight_version = self._unfinished.pop(output.request_id)
            answer = output.outputs[0]
            completion = Completion(
                request_id=request.request_id,
                token_ids=tuple(answer.token_ids),
                logprobs=tuple(answer.logprobs.logprobs) if answer.logprobs else (),
                stop_reason=_STOP_REASONS[answer.finish_reason],
                weight_version=weight_version,
            )
            assert len(completion.logprobs) == len(completion.token_ids), "vLLM must return one logprob per sampled token"
            self.counters.count(
                prompt_tokens=len(request.token_ids),
                cached_tokens=output.num_cached_tokens or 0,
                sampled_tokens=len(completion.token_ids),
            )
            ended.append((order, completion))
        return [completion for _, completion in sorted(ended, key=lambda pair: pair[0])]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Replace all weights in place and drop cached prefixes; running requests go on with the new weights.

        Tensors may be kept until this returns, so the caller must not reuse their memory meanwhile. After an error the
        engine refuses to sample until a load succeeds.
        """
        self._fault = "its last load_weights failed, so it holds a mixture of old and new weights"
        # The model's own load_weights fails on CPU, where parameters have been repacked; this path unpacks them first.
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": complete(named_tensors, self._expected)})
        self._engine.apply_model(_repack_tied_head)
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache; cached keys and values would belong to the old weights.")
        self._fault = None
        self._weight_version = weight_version

    def sleep(self) -> None:
        """Give device memory back: weights go to host memory, the KV cache is dropped. A no-op on CPU, which has no such mode.

        The CUDA path is written from vLLM's documentation (sleep level 1) and has NOT been run on a GPU.
        """
        assert not self._unfinished, f"sleep with {len(self._unfinished)} unfinished requests would abort them"
        if not self._on_cpu:
            self._engine.sleep(level=1)

    def wake(self) -> None:
        """Undo ``sleep``. The CUDA path has NOT been run on a GPU."""
        if not self._on_cpu:
            self._engine.wake_up()

    def close(self) -> None:
        """Free this engine. The trainer's process groups stay: it destroys them last, after every engine is closed."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            self._unfinished.clear()
            VllmEngine._num_alive -= 1
            close_core(engine.engine_core, is_last=VllmEngine._num_alive == 0)

    def _check_usable(self) -> None:
        assert self._engine is not None, "the engine is closed"
        if self._fault is not None:
            raise RuntimeError(f"the engine cannot sample: {self._fault}.")


def _check_tensor_size(tensor: int) -> None:
    """vLLM keeps one tensor-parallel group per process, which all engines share."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size != tensor:
            raise ValueError(f"engine.tensor ({tensor}) differs from an engine already in this process ({size}); give all the same.")


def _repack_tied_head(model: torch.nn.Module) -> None:
    """On CPU a tied lm_head multiplies with a packed copy of the embedding, which a reload leaves as it was: silent wrong logits."""
    head, embedding = model.lm_head, model.model.embed_tokens
    if head is not embedding and hasattr(head, "cpu_linear") and head.weight.data_ptr() == embedding.weight.data_ptr():
        head.quant_method.process_weights_after_loading(head)
