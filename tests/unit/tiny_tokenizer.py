"""Small byte-level BPE tokenizers with chat templates of every kind that we must bear with. Built in memory, nothing downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "Question: what is 12 + 34 * (56 - 7)? Instruction: compute the product first, then add. The answer is \\boxed{42}.",
    "system user assistant human: bot: [FINISH] [INST] done. Let us think step by step; the the the and of to in is",
    "<|im_start|> <|im_end|> special tokens spelled out in plain text, naive and na\u00efve, caf\u00e9",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2.5: a system message of its own when none is given.
CHATML_DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
# Qwen3 without thinking: the generation prompt holds an empty thought, history is rendered without it.
CHATML_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Gemma: no system role (an error), other names for the roles.
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|start|>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
# Llama 2: the system prompt inside the first user message; a space before the end token.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + (s if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
# GLM 4: no end token, the next role's header ends a message.
HEADER_ENDS = (
    "[gMASK]{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Plain words, no special token at all: only the tokenizer's eos ends a message.
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
# Role markers that were added to the vocabulary without being flagged special.
UNFLAGGED = CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|stop|>")

# name -> (template, eos, bos, other special tokens, added tokens not flagged special)
KINDS: dict[str, tuple[str, str, str | None, list[str], list[str]]] = {
    "chatml": (CHATML, "<|im_end|>", None, ["<|im_start|>", "<|endoftext|>"], ["<think>", "</think>"]),
    "chatml_other_eos": (CHATML, "<|endoftext|>", None, ["<|im_start|>", "<|im_end|>"], []),
    "chatml_default_system": (CHATML_DEFAULT_SYSTEM, "<|im_end|>", None, ["<|im_start|>"], []),
    "chatml_thought": (CHATML_THOUGHT, "<|im_end|>", None, ["<|im_start|>"], ["<think>", "</think>"]),
    "llama3": (LLAMA3, "<|eot_id|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"], []),
    "no_system": (NO_SYSTEM, "<eos>", "<bos>", ["<|start|>", "<|end|>"], []),
    "inst": (INST, "</s>", "<s>", ["<unk>"], []),
    "header_ends": (HEADER_ENDS, "<|endoftext|>", None, ["[gMASK]", "<|system|>", "<|user|>", "<|assistant|>"], []),
    "plain": (PLAIN, "<|endoftext|>", None, [], []),
    "unflagged": (UNFLAGGED, "<|endoftext|>", None, [], ["<|turn|>", "<|stop|>"]),
}


@cache
def tiny_tokenizer(kind: str = "chatml", vocab_size: int = 320) -> Any:
    from transformers import PreTrainedTokenizerFast

    template, eos, bos, special, unflagged = KINDS[kind]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in [eos, *([bos] if bos else []), *special]])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in unflagged])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token=bos, additional_special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer
