"""JSON actions: what a meta-thinker may say where its messages are actions, and what of it the reasoner hears. Pure.

{"action": "DECOMPOSE", "output": "first ..., then ..."}      the reasoner hears the output
{"action": "REWRITE", "output": "the problem, put so: ..."}   likewise
{"action": "EMPTY", "output": ""}                             the reasoner hears nothing and solves alone

One regular expression is both the grammar that engines sample under and the parser. It leaves no choice in white space and key order: a
choice that means nothing would be trained like one that does. Of JSON's escapes it has three, quote, backslash and line break: with the
others a LaTeX word written with one backslash (times, frac, boxed) would be read as a tab, a form feed or a backspace, and with \\uXXXX the
same word could be spelled so that counters of leaks do not see it.
Source: ReMA arXiv:2503.09501, single-turn experiments with JSON actions.
"""

from __future__ import annotations

import json
import re

from megatron_rema.types import Action

_CHARACTERS = r'([^"\\\x00-\x1f]|\\["\\n])*'
_SAYING = "|".join(action for action in Action if action is not Action.EMPTY)


def action_regex(finish_marker: str | None) -> str:
    """Matches exactly the valid messages. EMPTY says nothing, or the finish marker alone where the protocol has one (None: it has none).

    Only what every grammar library reads alike: no anchors, no lookaround, no flags.
    """
    nothing = "" if finish_marker is None else f"({_literal(json.dumps(finish_marker, ensure_ascii=False)[1:-1])})?"
    return rf'\{{"action": ("({_SAYING})", "output": "{_CHARACTERS}"|"{Action.EMPTY}", "output": "{nothing}")\}}'


def parse_action(text: str, finish_marker: str | None) -> tuple[Action, str] | None:
    """(action, what the reasoner hears), or None for a message that is not whole and valid: one that was cut, say."""
    if re.fullmatch(action_regex(finish_marker), text) is None:
        return None
    message = json.loads(text)
    return Action(message["action"]), message["output"]


def _literal(text: str) -> str:
    return re.sub(r"[\\.^$*+?()\[\]{}|]", lambda match: "\\" + match[0], text)  # re.escape escapes spaces too, which xgrammar does not read
