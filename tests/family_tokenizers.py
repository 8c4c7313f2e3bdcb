"""Tokenizers in the format of real model families, trained here on the data at hand: none can be downloaded in a test.

Each family has its published normalizer, pre-tokenizer pattern, special tokens (ids after the vocabulary, in the published order), the
post-processor that adds a first token when asked to, and a chat template that behaves like the published one. What differs is the
vocabulary: a few thousand merges instead of 128k or 152k, from MATH problems and dialogues, or from generated text where there are none.

    qwen2_5    ChatML; a default system prompt when none is given
    qwen3      ChatML; thoughts of earlier turns are dropped; enable_thinking=False opens with an empty thought
    qwen3_2507 the variant that always thinks: the generation prompt opens the thought
    llama3     headers; every message is trimmed; the first token stands in the template AND in the post-processor
    llama3_1   as llama3, and a system message with a date is always there
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tests.real_data import MATH

VOCAB_SIZE = 4000
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ONE_DIGIT, THREE_DIGITS = rf"{_WORDS}\p{{N}}{_REST}", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"

QWEN_DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN2_5 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\n" + QWEN_DEFAULT_SYSTEM + "<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last_query=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}"
    "{%- if loop.index0 > ns.last_query and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
_CHOICE = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
QWEN3_2507 = QWEN3.replace(_CHOICE, "{{- '<think>\\n' }}")
_HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\\n\\n'"
LLAMA3 = (
    "{%- for message in messages %}{%- if loop.first %}{{- bos_token }}{%- endif %}"
    "{{- " + _HEADER.format("message['role']") + " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- " + _HEADER.format("'assistant'") + " }}{%- endif %}"
)
LLAMA3_1 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}"
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- " + _HEADER.format("'system'") + " }}"
    "{{- 'Cutting Knowledge Date: December 2023\\n' }}{{- 'Today Date: ' + date_string + '\\n\\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- " + _HEADER.format("message['role']") + " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- " + _HEADER.format("'assistant'") + " }}{%- endif %}"
)

_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VISION = ("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end", "vision_start", "vision_end")
_QWEN_PADS = ("vision_pad", "image_pad", "video_pad")
_QWEN_MORE = tuple(f"<|{name}|>" for name in (*_QWEN_VISION, *_QWEN_PADS))
_QWEN_CODE = tuple(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"))
_LLAMA_NAMES = ("finetune_right_pad_id", "reserved_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "reserved_3")
_LLAMA_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|{name}|>" for name in _LLAMA_NAMES))


@dataclass(frozen=True)
class Family:
    """What a tokenizer folder of the family says."""

    model_type: str  # of config.json
    tokenizer_class: str  # of tokenizer_config.json: Qwen's makes transformers put a pre-tokenizer of its own in place of the saved one
    pattern: str
    composes: bool  # the normalizer is NFC: text comes back composed
    template: str
    special: tuple[str, ...]
    unflagged: tuple[str, ...]  # added tokens that are not flagged special
    eos: str
    bos: str | None = None
    pad: str | None = None

    def as_read(self, text: str) -> str:
        """The text that encoding and decoding gives back."""
        return unicodedata.normalize("NFC", text) if self.composes else text


_QWEN2_5 = Family(
    "qwen2",
    "Qwen2Tokenizer",
    ONE_DIGIT,
    True,
    QWEN2_5,
    (*_QWEN_SPECIAL, *_QWEN_MORE),
    ("<tool_call>", "</tool_call>", *_QWEN_CODE),
    "<|im_end|>",
    pad="<|endoftext|>",
)
_QWEN3 = replace(
    _QWEN2_5,
    model_type="qwen3",
    template=QWEN3,
    unflagged=(*_QWEN2_5.unflagged, "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
_LLAMA3 = Family(
    "llama", "PreTrainedTokenizerFast", THREE_DIGITS, False, LLAMA3, _LLAMA_SPECIAL, (), "<|end_of_text|>", "<|begin_of_text|>"
)
FAMILIES = {
    "qwen2_5": _QWEN2_5,
    "qwen3": _QWEN3,
    "qwen3_2507": replace(_QWEN3, template=QWEN3_2507),
    "llama3": _LLAMA3,
    "llama3_1": replace(_LLAMA3, template=LLAMA3_1, eos="<|eot_id|>"),
}


@cache
def family_tokenizer(name: str) -> Any:
    """The family's tokenizer; trained once in a process (a second or two)."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    bpe = Tokenizer.from_str(_trained(family.pattern, family.composes))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.unflagged])
    if family.bos:
        first = [(family.bos, bpe.token_to_id(family.bos))]
        bpe.post_processor = processors.TemplateProcessing(f"{family.bos} $A", f"{family.bos} $A {family.bos}:1 $B:1", first)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=family.eos,
        bos_token=family.bos,
        pad_token=family.pad,
        additional_special_tokens=[token for token in family.special if token not in (family.eos, family.bos, family.pad)],
        clean_up_tokenization_spaces=False,
        chat_template=family.template,
        name_or_path=name,
    )


def save_family(name: str, folder: Path) -> None:
    """A tokenizer folder as the family publishes it."""
    family_tokenizer(name).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = FAMILIES[name].tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": FAMILIES[name].model_type}))


@cache
def _trained(pattern: str, composes: bool) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    if composes:
        bpe.normalizer = normalizers.NFC()
    by_pattern = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False))
    return bpe.to_str()


# Runs of white space and punctuation that vocabularies trained on code spell as one token, and mathematics seldom holds.
CODE_LIKE = [
    "a\n\n\nb",
    "a\n\n\n\nb",
    "a \nb",
    "a\n \nb",
    "a\n\n \nb",
    "a\r\nb",
    "a\n\r\nb",
    "a\n\n\r\nb",
    "a \\([b]\\).",
    "a.[b].",
    "a([b])",
]


def _corpus() -> Iterator[str]:
    """Every tenth published dialogue and every fourth benchmark problem; where they are not there, text made up in their manner."""
    dialogues, problems = MATH / "mamrp_meta_thinking.jsonl", MATH / "benchmarks.jsonl"
    if dialogues.is_file() and problems.is_file():
        for line in dialogues.read_text().splitlines()[::10]:
            row = json.loads(line)
            yield from (text for pair in row["history"] for text in pair)
        yield from (json.loads(line)["question"] for line in problems.read_text().splitlines()[::4])
    else:
        yield from made_up_texts(2000)
    yield from CODE_LIKE * 500


def made_up_texts(num: int) -> list[str]:
    """Sentences, formulas, lists and blank lines from a small stock of words. The same every time."""
    rng = random.Random(0)
    words = ["the", "of", "and", "to", "find", "let", "so", "number", "value", "positive", "equation", "Wait", "check", "answer", "is"]
    stems = [a + b for a in ("com", "pro", "inter", "sub", "equi") for b in ("pute", "duct", "val", "tract", "lateral", "position")]
    formulas = ["\\frac{%d}{%d}", "\\sqrt{%d}x^{%d}", "%d \\times %d", "\\boxed{%d} + %d", "a_{%d} = %d"]

    def piece() -> str:
        if rng.random() < 0.3:
            return f"\\( {rng.choice(formulas) % (rng.randrange(2000), rng.randrange(100))} \\)"
        return rng.choice(words if rng.random() < 0.7 else stems)

    ends = (". ", ".\n", ".\n\n", ":\n\n- ", "? ", ", ")
    return ["".join(" ".join(piece() for _ in range(rng.randint(3, 12))) + rng.choice(ends) for _ in range(6)) for _ in range(num)]
