"""Which tokens may come next where a turn must match a regular expression: xgrammar on one model's vocabulary.

The same library in every engine and in the trainer, which replays it over sampled tokens: both then speak of one distribution
(docs/decisions/0007-constrained-logprobs.md). A set of tokens is a ``bytes`` of little-endian 32-bit words: see ``types.Trace.allowed``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any


def require_xgrammar() -> None:
    """Raise ValueError with the remedy when the library is missing. Imports nothing."""
    if importlib.util.find_spec("xgrammar") is None:
        raise ValueError(
            "sampling under a grammar (task.json_actions) needs xgrammar, which is not installed. It comes with vLLM; beside "
            "engine.name=transformers: pip install xgrammar."
        )


class Grammars:
    """Regular expressions over the tokens of one model folder. Each is compiled once (milliseconds); equal token sets are one object.

    ``vocab_size`` is the model's, of which a token set holds one bit each; tokens beyond the tokenizer's are never allowed.
    """

    def __init__(self, model_path: str | Path, vocab_size: int) -> None:
        require_xgrammar()
        self._model_path, self._vocab_size = model_path, vocab_size
        self._sets: dict[bytes, bytes] = {}

    def matcher(self, regex: str, stop_token_ids: Sequence[int]) -> Matcher:
        """At the start of a turn. Once the text matches, any of ``stop_token_ids`` may end it."""
        from xgrammar import GrammarMatcher

        return Matcher(GrammarMatcher(self._compiler.compile_regex(regex), override_stop_tokens=list(stop_token_ids)), self)

    def one_object(self, token_set: bytes) -> bytes:
        return self._sets.setdefault(token_set, token_set)

    def new_bitmask(self) -> Any:
        """[1, W] int32, every token in it."""
        from xgrammar import allocate_token_bitmask

        return allocate_token_bitmask(1, self._vocab_size)

    @cached_property
    def _compiler(self) -> Any:
        from transformers import AutoTokenizer
        from xgrammar import GrammarCompiler, TokenizerInfo

        tokenizer = AutoTokenizer.from_pretrained(self._model_path, trust_remote_code=False)
        return GrammarCompiler(TokenizerInfo.from_huggingface(tokenizer, vocab_size=self._vocab_size), max_threads=1)


class Matcher:
    """Where one turn is in its grammar."""

    def __init__(self, matcher: Any, grammars: Grammars) -> None:
        self._matcher, self._grammars = matcher, grammars
        self._bitmask = grammars.new_bitmask()

    def allowed(self) -> bytes:
        """The tokens that may come next."""
        self._matcher.fill_next_token_bitmask(self._bitmask, 0)
        return self._grammars.one_object(self._bitmask.numpy().tobytes())

    def accept(self, token_id: int) -> None:
        """Raises RuntimeError for a token that was not allowed: it was sampled under another grammar or tokenizer."""
        if not self._matcher.accept_token(token_id):
            raise RuntimeError(f"token {token_id} was sampled where the grammar does not allow it: engine and trainer differ in it.")
