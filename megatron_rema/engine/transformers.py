"""Continuous batching over a Hugging Face model: the engine for GPU machines without vLLM, and the reference in tests.

Every running sequence owns one row of a key-value store. A step prefills the sequences that were waiting, decodes one
token of every other, and closes the gaps of those that ended, so that the running ones are always rows 0..n-1.

Shapes: n running sequences, q query tokens of each, L keys, h key-value heads, d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rema.engine.contain import kept_rng
from megatron_rema.engine.contract import EngineCounters, check_request, checkpoint_names, complete
from megatron_rema.engine.grammar import Grammars, Matcher
from megatron_rema.parallel.vocab import allowed_columns
from megatron_rema.types import Completion, StopReason, TurnRequest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_GROWTH_TOKENS = 256  # the store grows by this many positions at a time
_MAX_PREFILL_TOKENS = 16384  # padded tokens of one prefill


class TransformersEngine:
    """The ``Engine`` protocol on a Hugging Face causal model. Every rank is an engine of its own (no tensor parallelism).

    Sampling is exact: one uniform number per token from the request's own generator, which inverts the cumulative
    distribution, so a request's tokens do not depend on what else is running. Log-probabilities as in ``VllmEngine``.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        tensor: int = 1,
        dtype: str = "float32",
        max_model_len: int,
        max_num_seqs: int = 64,
        device: torch.device | str | None = None,
        constrained: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        if tensor != 1:
            raise ValueError(f"engine.tensor ({tensor}) must be 1 with engine.name=transformers; use engine.name=vllm to split a model.")
        self.counters = EngineCounters()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._expected = checkpoint_names(model_path)
        with kept_rng():
            model = AutoModelForCausalLM.from_pretrained(
                model_path, dtype=getattr(torch, dtype), attn_implementation="sdpa", trust_remote_code=False
            )
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._store = _KeyValueStore(model.config, max_num_seqs, getattr(torch, dtype), self._device)
        self._max_model_len, self._max_num_seqs = max_model_len, max_num_seqs
        self._grammars = Grammars(model_path, model.config.vocab_size) if constrained else None
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # index = row of the store
        self._unfinished: set[str] = set()
        self._num_submitted = 0
        self._weight_version = 0
        self._fault: str | None = None

    @property
    def weight_version(self) -> int:
        return self._weight_version

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def submit(self, request: TurnRequest) -> None:
        self._check_usable()
        constrained = self._grammars is not None
        check_request(request, max_model_len=self._max_model_len, known_ids=self._unfinished, constrained=constrained)
        matcher = None if request.regex is None else self._grammars.matcher(request.regex, request.stop_token_ids)
        self._waiting.append(_Sequence(request, self._num_submitted, self._weight_version, matcher))
        self._unfinished.add(request.request_id)
        self._num_submitted += 1

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One token of every running sequence; those that ended, in order of submission."""
        self._check_usable()
        if not self._unfinished:
            return []
        self.counters.num_steps += 1
        num_old = len(self._running)
        logits = [self._decode()] if num_old else []
        while new := self._admit():
            logits.append(self._prefill(new))
        _sample(torch.cat(logits), self._running)
        return self._collect()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Replace all weights in place; running sequences are computed again from their tokens under the new weights."""
        self._fault = "its last load_weights failed, so it holds a mixture of old and new weights"
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in complete(named_tensors, self._expected):
                if tensor.shape != parameters[name].shape:
                    raise ValueError(f"load_weights: {name!r} has shape {tuple(tensor.shape)}, the model {tuple(parameters[name].shape)}.")
                parameters[name].copy_(tensor)
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
        self._fault = None
        self._weight_version = weight_version

    def sleep(self) -> None:
        """Drop the key-value store; on CUDA the weights move to host memory."""
        assert not self._unfinished, f"sleep with {len(self._unfinished)} unfinished requests"
        self._store.release()
        if self._device.type == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        self._model.to(self._device)

    def close(self) -> None:
        self._fault = "it is closed"
        self._waiting.clear()
        self._running.clear()
        self._unfinished.clear()
        self._model = None
        self._store.release()

    def _admit(self) -> list[_Sequence]:
        """Move waiting sequences into free rows, as many as one padded prefill may hold (at least one)."""
        first, longest = len(self._running), 0
        while self._waiting and len(self._running) < self._max_num_seqs:
            longest = max(longest, self._waiting[0].length)
            if len(self._running) > first and longest * (len(self._running) - first + 1) > _MAX_PREFILL_TOKENS:
                break
            self._running.append(self._waiting.popleft())
        return self._running[first:]

    def _prefill(self, new: list[_Sequence]) -> Tensor:
        """Logits [n, V] after the last token of each. Right padding is exact under a causal mask: it lies in the future."""
        longest = max(sequence.length for sequence in new)
        tokens_nq = torch.zeros(len(new), longest, dtype=torch.long)
        for row, sequence in enumerate(new):
            tokens_nq[row, : sequence.length] = torch.tensor(sequence.token_ids)
        positions_nq = torch.arange(longest).expand(len(new), -1)
        last = torch.tensor([sequence.length - 1 for sequence in new])
        return self._forward(tokens_nq, positions_nq, last, first_row=len(self._running) - len(new))

    def _decode(self) -> Tensor:
        """Logits [n, V] after the newest token of every running sequence."""
        tokens_nq = torch.tensor([[sequence.token_ids[-1]] for sequence in self._running])
        positions_nq = torch.tensor([[sequence.length - 1] for sequence in self._running])
        return self._forward(tokens_nq, positions_nq, torch.zeros(len(self._running), dtype=torch.long), first_row=0)

    def _forward(self, tokens_nq: Tensor, positions_nq: Tensor, last_n: Tensor, *, first_row: int) -> Tensor:
        num_keys = int(positions_nq.max()) + 1
        tokens_nq, positions_nq, last_n = tokens_nq.to(self._device), positions_nq.to(self._device), last_n.to(self._device)
        self._store.aim(first_row, positions_nq, num_keys)
        mask_nqL = torch.arange(num_keys, device=self._device) <= positions_nq[:, :, None]
        hidden_nqd = self._model.base_model(
            input_ids=tokens_nq,
            position_ids=positions_nq,
            attention_mask=mask_nqL[:, None],
            past_key_values=self._store,
            use_cache=True,
        ).last_hidden_state
        rows = torch.arange(len(last_n), device=self._device)
        return self._model.get_output_embeddings()(hidden_nqd[rows, last_n]).float()

    def _collect(self) -> list[Completion]:
        """Take out the sequences that ended and move the last rows into their place."""
        ended = []
        for row in reversed(range(len(self._running))):
            sequence = self._running[row]
            stop_reason = sequence.stop_reason
            if stop_reason is None:
                continue
            tail = self._running.pop()
            if tail is not sequence:
                self._running[row] = tail
                self._store.move(source=len(self._running), target=row)
            request = sequence.request
            self._unfinished.remove(request.request_id)
            sampled = tuple(sequence.token_ids[len(request.token_ids) :])
            self.counters.count(prompt_tokens=len(request.token_ids), cached_tokens=0, sampled_tokens=len(sampled))
            completion = Completion(request.request_id, sampled, tuple(sequence.logprobs), stop_reason, sequence.weight_version)
            ended.append((sequence.order, completion))
        return [completion for _, completion in sorted(ended, key=lambda pair: pair[0])]

    def _check_usable(self) -> None:
        if self._fault is not None:
            raise RuntimeError(f"the engine cannot sample: {self._fault}.")


@dataclass(eq=False)
class _Sequence:
    """One request while it waits or runs; ``token_ids`` are its context and what was sampled so far."""

    request: TurnRequest
    order: int
    weight_version: int
    matcher: Matcher | None  # of a request with a regex: where its grammar is after what was sampled
    token_ids: list[int] = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.token_ids)
        self.generator = torch.Generator().manual_seed(self.request.seed)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def stop_reason(self) -> StopReason | None:
        if self.token_ids[-1] in self.request.stop_token_ids:
            return StopReason.STOP
        return StopReason.LENGTH if len(self.logprobs) == self.request.max_tokens else None


class _KeyValueStore:
    """Keys and values of all rows, per layer [rows, capacity, h, d]; stands in for a Hugging Face cache (``update``)."""

    def __init__(self, config: PretrainedConfig, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (num_rows, config.num_key_value_heads, head_dim)
        self._dtype, self._device, self._num_layers = dtype, device, config.num_hidden_layers
        self.release()

    def release(self) -> None:
        self._capacity = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def aim(self, first_row: int, positions_nq: Tensor, num_keys: int) -> None:
        """Say which rows and positions the next forward writes, and how many keys it reads."""
        self._rows = slice(first_row, first_row + len(positions_nq))
        self._rows_n1 = torch.arange(self._rows.start, self._rows.stop, device=self._device)[:, None]
        self._positions_nq, self._num_keys = positions_nq, num_keys
        if num_keys > self._capacity:
            self._grow(-(-num_keys // _GROWTH_TOKENS) * _GROWTH_TOKENS)

    def update(self, keys_nhqd: Tensor, values_nhqd: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        store_k, store_v = self._layers[layer]
        store_k[self._rows_n1, self._positions_nq] = keys_nhqd.transpose(1, 2)
        store_v[self._rows_n1, self._positions_nq] = values_nhqd.transpose(1, 2)
        return store_k[self._rows, : self._num_keys].transpose(1, 2), store_v[self._rows, : self._num_keys].transpose(1, 2)

    def move(self, *, source: int, target: int) -> None:
        for pair in self._layers:
            for tensor in pair:
                tensor[target] = tensor[source]

    def _grow(self, capacity: int) -> None:
        num_rows, num_heads, head_dim = self._shape
        old, self._layers = self._layers, []
        for layer in range(self._num_layers):
            pair = tuple(  # zeros, not empty: a masked key has weight 0, but 0 * NaN is NaN
                torch.zeros(num_rows, capacity, num_heads, head_dim, dtype=self._dtype, device=self._device) for _ in range(2)
            )
            if old:
                for grown, before in zip(pair, old[layer], strict=True):
                    grown[:, : self._capacity] = before
            self._layers.append(pair)
        self._capacity = capacity


def _sample(logits_nV: Tensor, sequences: list[_Sequence]) -> None:
    """Append one token and its log-probability to every sequence. Temperature 0 takes the argmax.

    A token outside a sequence's grammar gets probability 0 before temperature and top_p are applied.
    """
    for row, sequence in enumerate(sequences):
        if sequence.matcher is not None:
            words_1W = torch.frombuffer(bytearray(sequence.matcher.allowed()), dtype=torch.int32)[None].to(logits_nV.device)
            logits_nV[row].masked_fill_(~allowed_columns(words_1W, 0, logits_nV.shape[1])[0], float("-inf"))
    temperature_n1 = logits_nV.new_tensor([[sequence.request.temperature] for sequence in sequences])
    greedy_n = temperature_n1[:, 0] == 0.0
    logits_nV = logits_nV / torch.where(temperature_n1 == 0.0, 1.0, temperature_n1)
    top_p = [sequence.request.top_p for sequence in sequences]
    if min(top_p) < 1.0:
        logits_nV = _keep_nucleus(logits_nV, logits_nV.new_tensor(top_p)[:, None])
    logprobs_nV = logits_nV.log_softmax(dim=-1)
    uniform_n = [torch.rand((), generator=sequence.generator, dtype=torch.float64) for sequence in sequences]
    cumulative_nV = logprobs_nV.double().exp().cumsum(dim=-1)
    target_n1 = torch.stack(uniform_n).to(cumulative_nV.device)[:, None] * cumulative_nV[:, -1:]
    drawn_n = torch.searchsorted(cumulative_nV, target_n1, right=True)[:, 0].clamp_(max=logits_nV.shape[1] - 1)
    tokens_n = torch.where(greedy_n, logits_nV.argmax(dim=-1), drawn_n)
    chosen_n = logprobs_nV.gather(1, tokens_n[:, None])[:, 0]
    for sequence, token, logprob in zip(sequences, tokens_n.tolist(), chosen_n.tolist(), strict=True):
        sequence.token_ids.append(token)
        sequence.logprobs.append(logprob)
        if sequence.matcher is not None:
            sequence.matcher.accept(token)


def _keep_nucleus(logits_nV: Tensor, top_p_n1: Tensor) -> Tensor:
    """-inf outside the smallest set of most likely tokens whose probability reaches top_p."""
    ordered_nV, index_nV = logits_nV.sort(dim=-1, descending=True)
    before_nV = ordered_nV.softmax(dim=-1).cumsum(dim=-1) - ordered_nV.softmax(dim=-1)
    ordered_nV = ordered_nV.masked_fill((before_nV >= top_p_n1) & (top_p_n1 < 1.0), float("-inf"))
    return torch.empty_like(logits_nV).scatter_(1, index_nV, ordered_nV)
