"""A byte-level BPE tokenizer written down by hand: the alphabet is all 256 bytes, the merges spell the given words and nothing else.

Any text round-trips, however rare; what the task says often (numbers, role names, the finish marker) is one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, END_ID = 0, 2  # as build_tokenizer numbers them


def build_tokenizer(words: Sequence[str]) -> Any:
    """A `tokenizers.Tokenizer` that encodes each of ``words``, and any number of them in a row, as single tokens.

    Vocabulary: 3 special tokens, 256 bytes, then the words and the prefixes that their merges pass through. Earlier words win where
    two overlap. Raises ValueError naming a word that the merges of earlier words tear apart.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {token: i for i, token in enumerate((PAD, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    merges: list[tuple[str, str]] = []
    for word in words:
        spelled = byte_level.pre_tokenize_str(word)[0][0]  # one printable character per byte
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in vocabulary:
                vocabulary[spelled[:end]] = len(vocabulary)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)])
    for word in words:
        tokens = tokenizer.encode(word, add_special_tokens=False).tokens
        if len(tokens) != 1:
            raise ValueError(f"word {word!r} is encoded as {tokens}, not as one token: earlier words tear it apart; reorder the words.")
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template, as `AutoTokenizer.from_pretrained` reads them."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
