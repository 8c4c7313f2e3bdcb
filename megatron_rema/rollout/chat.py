"""A model's chat format as token segments, derived once from its chat template.

The template is rendered with placeholder messages and cut at the placeholders. Each segment and each message is then encoded on its
own, so the tokens of a message do not depend on its neighbours and sampled ids are appended verbatim, never encoded again.
Templates that rewrite history (dropping old thoughts, say) therefore cannot change what was already said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from megatron_rema.reading import brief

SYSTEM, USER, ASSISTANT, NEXT_USER = "PLACEHOLDERSYSTEM", "PLACEHOLDERUSER", "PLACEHOLDERASSISTANT", "PLACEHOLDERNEXT"
# A template is a program of the model's folder: its syntax errors, and what its expressions may raise.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


class ChatFormat:
    """Token segments of one chat template.

    opening(system, user)        the start of a chat up to where the assistant's first message begins
    following(own_ids, user)     what comes between the assistant's message and its next one: closing, user message, generation prompt

    A template without a system role gets the system prompt in front of the first user message. ``template_kwargs`` go to the template
    (``{"enable_thinking": False}``, ``{"date_string": ...}``: a template that prints today's date is repeatable only with it fixed).
    """

    def __init__(self, tokenizer: Any, *, template_kwargs: Mapping[str, Any] | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat_template, which dialogues need: "
                "add chat_template.jinja to the model's folder."
            )
        self.tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        user = {"role": "user", "content": USER}
        later = [{"role": "assistant", "content": ASSISTANT}, {"role": "user", "content": NEXT_USER}]
        try:
            self.has_system_role = self._probe_system_role()
            system = [{"role": "system", "content": SYSTEM}] if self.has_system_role else []
            with_system, bare, chat = self._render([*system, user]), self._render([user]), self._render([*system, user, *later])
        except _TEMPLATE_ERRORS as error:
            raise ValueError(
                f"the chat_template of {tokenizer.name_or_path!r} cannot be rendered ({type(error).__name__}: {brief(str(error), 300)}): "
                "correct chat_template.jinja (or tokenizer_config.json) in the model's folder."
            ) from error
        if with_system.count(USER) != 1 or bare.count(USER) != 1 or chat.count(ASSISTANT) != 1 or chat.count(NEXT_USER) != 1:
            raise ValueError(
                f"the chat_template of {tokenizer.name_or_path!r} does not print every user and assistant message exactly once: "
                "multi-turn dialogues need a template that does; use another template."
            )
        self._trims = f" {USER} " not in self._render([*system, {"role": "user", "content": f" {USER} "}])
        self._opening = self._segments(with_system)
        self._opening_without_system = self._segments(bare)
        after_own = self._segments(chat.partition(ASSISTANT)[2])
        if not isinstance(after_own[0], tuple):  # the template closes a message with nothing at all
            after_own.insert(0, ())
        self._closing, self._following = after_own[0], after_own[1:]
        self._control_token_ids = self._find_control_tokens()
        self._num_closing = self._find_end_token()  # ids of the closing segment up to its end token, which is included
        eos = tokenizer.eos_token_id
        if self._num_closing == 0 and eos is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no eos_token and its chat_template ends a message with no special token: "
                "turns could never stop; set eos_token in tokenizer_config.json."
            )
        self.end_token_id: int = self._closing[self._num_closing - 1] if self._num_closing else eos
        self.stop_token_ids: tuple[int, ...] = (self.end_token_id,) if eos in (None, self.end_token_id) else (self.end_token_id, eos)

    @classmethod
    def from_pretrained(cls, path: str, *, template_kwargs: Mapping[str, Any] | None = None) -> ChatFormat:
        from transformers import AutoTokenizer  # seconds of import: only who opens a tokenizer pays

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            tokenizer.decode(tokenizer.encode("a", add_special_tokens=False))  # some settings are first read when it is used
        except Exception as error:  # of tokenizers: it raises no narrower class; and a damaged file fails anywhere in transformers
            said = brief(" ".join(str(error).split()), 300)
            raise ValueError(
                f"the tokenizer of {path} cannot be read ({type(error).__name__}: {said}): copy tokenizer.json and "
                "tokenizer_config.json again."
            ) from error
        return cls(tokenizer, template_kwargs=template_kwargs)

    def opening(self, system: str, user: str) -> tuple[int, ...]:
        """From the first token to the generation prompt of the first message. An empty ``system`` sends no system message."""
        if system and not self.has_system_role:
            return self._fill(self._opening_without_system, {USER: f"{system}\n\n{user}"})
        return self._fill(self._opening if system else self._opening_without_system, {SYSTEM: system, USER: user})

    def following(self, own_token_ids: Sequence[int], user: str) -> tuple[int, ...]:
        """From the end of the own message (only its last id is read) to the generation prompt of the next one.

        A sampled end token is not repeated; a message that was cut, or that stopped at another token, is closed here, unlabelled.
        """
        closed = bool(own_token_ids) and self._num_closing > 0 and own_token_ids[-1] == self.end_token_id
        closing = self._closing[self._num_closing :] if closed else self._closing
        return closing + self._fill(self._following, {NEXT_USER: user})

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Tokens of a message as plain text: a special token's spelling inside it stays text."""
        ids = self._encode_plain(text)
        if self._control_token_ids.isdisjoint(ids):
            return ids
        # An added token that is not flagged special, but that the template uses: cut its spelling after the first character.
        spellings = sorted((self.tokenizer.convert_ids_to_tokens(i) for i in self._control_token_ids), key=len, reverse=True)
        pieces = re.split("|".join(f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in spellings if len(s) > 1), text)
        ids = tuple(token_id for piece in pieces for token_id in self._encode_plain(piece))
        if not self._control_token_ids.isdisjoint(ids):
            raise ValueError(f"the tokenizer turns plain text into control tokens: {text!r} -> {ids}; use a tokenizer that does not.")
        return ids

    def encode_message(self, text: str) -> tuple[int, ...]:
        """A written message as if it had been sampled: its text and the end token."""
        return (*self.encode_text(text), self.end_token_id)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of a sampled message, its trailing stop token stripped."""
        body = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_token_ids else token_ids
        return self.tokenizer.decode(list(body), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._template_kwargs)

    def _probe_system_role(self) -> bool:
        try:
            text = self._render([{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}])
        except TemplateError:  # what a template's raise_exception raises
            return False
        return text.count(SYSTEM) == 1

    def _segments(self, text: str) -> list[tuple[int, ...] | str]:
        """Placeholders as names, the text between them as token ids (special tokens recognised)."""
        parts = re.split(f"({SYSTEM}|{USER}|{NEXT_USER})", text)
        encode = self.tokenizer.encode
        return [part if i % 2 else tuple(encode(part, add_special_tokens=False)) for i, part in enumerate(parts) if part]

    def _fill(self, segments: Sequence[tuple[int, ...] | str], messages: Mapping[str, str]) -> tuple[int, ...]:
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, str):
                text = messages[segment]
                ids += self.encode_text(text.strip() if self._trims else text)
            else:
                ids += segment
        return tuple(ids)

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _find_control_tokens(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        segments = (*self._opening, *self._opening_without_system, self._closing, *self._following)
        printed = {i for segment in segments if isinstance(segment, tuple) for i in segment}
        special = {i for i, token in added.items() if token.special or i in printed}
        return frozenset((special | set(self.tokenizer.all_special_ids)) - {self.tokenizer.unk_token_id})

    def _find_end_token(self) -> int:
        """The first control token of the closing segment ends a message, if only white space stands before it; 0 when none does."""
        for position, token_id in enumerate(self._closing):
            if token_id in self._control_token_ids:
                return 0 if self.tokenizer.decode(list(self._closing[:position])).strip() else position + 1
        return 0
