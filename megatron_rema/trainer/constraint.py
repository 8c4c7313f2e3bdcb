"""Traces of turns that were sampled under a regex, and what the regex allowed at each of their tokens: found by replaying them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_rema.config import RunConfig
from megatron_rema.engine.grammar import Grammars, Matcher
from megatron_rema.rollout.dialogue import Chats, DialogueRules, chat_of
from megatron_rema.types import Role, Trace

Constrain = Callable[[Trace], Trace]


def constraint_of(config: RunConfig, rules: DialogueRules, chat: Chats, vocab_sizes: dict[str, int]) -> Constrain:
    """Trace -> the same with ``allowed`` set, where ``rules`` constrain its role. ``vocab_sizes`` by policy."""
    matchers: dict[Role, Callable[[], Matcher]] = {}
    for role in rules.roles:
        regex, policy = rules.regex_for(role), config.policy_of_role[role]
        if regex is not None:
            grammars, stop_token_ids = Grammars(config.model_path(policy), vocab_sizes[policy]), chat_of(chat, role).stop_token_ids
            matchers[role] = lambda g=grammars, r=regex, s=stop_token_ids: g.matcher(r, s)
    return lambda trace: with_allowed(trace, matchers[trace.role]) if trace.role in matchers else trace


def with_allowed(trace: Trace, new_matcher: Callable[[], Matcher]) -> Trace:
    """``trace`` with the set of tokens that each own token was sampled from; every own turn begins with a new matcher."""
    allowed: list[bytes | None] = []
    turn = -1
    for token_id, its_turn in zip(trace.token_ids, trace.turn_ids, strict=True):
        if its_turn < 0:
            allowed.append(None)
            continue
        if its_turn != turn:
            turn, matcher = its_turn, new_matcher()
        allowed.append(matcher.allowed())
        matcher.accept(token_id)
    return replace(trace, allowed=tuple(allowed))
