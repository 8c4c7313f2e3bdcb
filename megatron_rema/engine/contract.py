"""What every engine checks and counts in the same way: requests, complete weights, counters."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rema.types import TurnRequest


@dataclass
class EngineCounters:
    """Totals since the engine started, each counted once per request when it ends (steps: when they run)."""

    num_steps: int = 0  # engine steps: forward passes over the running batch
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    num_sampled_tokens: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Cached over all prompt tokens, 0.0 before the first request ended."""
        return self.num_cached_tokens / max(self.num_prompt_tokens, 1)

    def count(self, *, prompt_tokens: int, cached_tokens: int, sampled_tokens: int) -> None:
        """Add one request that ended."""
        self.num_requests += 1
        self.num_prompt_tokens += prompt_tokens
        self.num_cached_tokens += cached_tokens
        self.num_sampled_tokens += sampled_tokens


def check_request(request: TurnRequest, *, max_model_len: int, known_ids: Container[str], constrained: bool) -> None:
    """Refuse what no engine could answer faithfully. Raises ValueError naming the request, the value and the rule.

    ``constrained``: this engine was started to sample under grammars.
    The whole token budget must fit: a turn cut by the context window would look like a turn cut by its own budget.
    """
    who, length = f"request {request.request_id!r}", len(request.token_ids)
    if request.request_id in known_ids:
        raise ValueError(f"{who} was submitted twice; request ids must be unique among unfinished requests.")
    if length == 0:
        raise ValueError(f"{who}: token_ids is empty; there is nothing to condition on.")
    if request.max_tokens < 1:
        raise ValueError(f"{who}: max_tokens ({request.max_tokens}) must be at least 1.")
    if length + request.max_tokens > max_model_len:
        raise ValueError(
            f"{who}: {length} context tokens + max_tokens ({request.max_tokens}) = {length + request.max_tokens} exceed "
            f"max_model_len ({max_model_len}); shorten the turn or end the episode."
        )
    if request.temperature < 0.0:
        raise ValueError(f"{who}: temperature ({request.temperature}) must be >= 0; 0 is greedy.")
    if not 0.0 < request.top_p <= 1.0:
        raise ValueError(f"{who}: top_p ({request.top_p}) must be in (0, 1].")
    if request.regex is not None and not constrained:
        raise ValueError(f"{who} has a regex, but the engine was started without its tokenizer: start it with constrained=True.")
    if request.regex is not None and not request.stop_token_ids:
        raise ValueError(f"{who} has a regex but no stop_token_ids: a turn whose text is complete could never end.")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"{who}: seed ({request.seed}) must be in [0, 2**63).")


def checkpoint_names(model_path: str | Path) -> frozenset[str]:
    """Names of the tensors that make up the model: those of its safetensors files, a tied lm_head left out.

    Reads headers only. Raises ValueError when the directory holds no safetensors.
    """
    from safetensors import safe_open

    path = Path(model_path)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"])
    else:
        names = set()
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
    if not names:
        raise ValueError(f"model path {str(path)!r} holds no *.safetensors; save the model in that format first.")
    if json.loads((path / "config.json").read_text()).get("tie_word_embeddings", False):
        names.discard("lm_head.weight")
    return frozenset(name for name in names if not name.endswith("rotary_emb.inv_freq"))  # a buffer that old files carry


def complete(named_tensors: Iterable[tuple[str, Tensor]], expected: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors through and hold them to ``expected``: engines accept a partial load without a word.

    Raises ValueError at the first unknown or repeated name and, after the last tensor, naming those that never came.
    """
    seen: set[str] = set()
    for name, tensor in named_tensors:
        if name not in expected:
            raise ValueError(f"load_weights: unknown tensor {name!r}; the model has {len(expected)} tensors and none of this name.")
        if name in seen:
            raise ValueError(f"load_weights: tensor {name!r} came twice.")
        seen.add(name)
        yield name, tensor
    if missing := sorted(expected - seen):
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"load_weights: {len(missing)} of {len(expected)} tensors are missing: {shown}. All weights must come at once.")
