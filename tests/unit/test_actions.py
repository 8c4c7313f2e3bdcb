"""JSON actions: which messages are valid, what the reasoner hears of them, and that grammar and parser are one."""

import json

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st

from megatron_rema.rollout.actions import action_regex, parse_action
from megatron_rema.types import Action

MARKER = "[FINISH]"
BYTES = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([bytes([i]) for i in range(256)] + ["<end>"], stop_token_ids=[256]), max_threads=1)
HEARD = {  # message -> (action, what the reasoner hears)
    '{"action": "DECOMPOSE", "output": "first add, then square"}': (Action.DECOMPOSE, "first add, then square"),
    '{"action": "REWRITE", "output": "Was ist 2 + 3? \u00e9"}': (Action.REWRITE, "Was ist 2 + 3? \u00e9"),
    '{"action": "REWRITE", "output": ""}': (Action.REWRITE, ""),
    r'{"action": "DECOMPOSE", "output": "a \"b\"\nput \\boxed{5} {x}"}': (Action.DECOMPOSE, 'a "b"\nput \\boxed{5} {x}'),
    '{"action": "DECOMPOSE", "output": "Done. [FINISH]"}': (Action.DECOMPOSE, "Done. [FINISH]"),
    '{"action": "EMPTY", "output": ""}': (Action.EMPTY, ""),
    '{"action": "EMPTY", "output": "[FINISH]"}': (Action.EMPTY, "[FINISH]"),
}
INVALID = {
    "another word": '{"action": "SOLVE", "output": "a"}',
    "small letters": '{"action": "empty", "output": ""}',
    "an output that is no string": '{"action": "REWRITE", "output": 5}',
    "no output": '{"action": "REWRITE"}',
    "one key more": '{"action": "REWRITE", "output": "a", "why": "b"}',
    "the other order": '{"output": "a", "action": "REWRITE"}',
    "a key twice": '{"action": "EMPTY", "output": "", "output": "a"}',
    "other white space": '{"action":"REWRITE","output":"a"}',
    "text before": 'Sure: {"action": "REWRITE", "output": "a"}',
    "text after": '{"action": "REWRITE", "output": "a"} ',
    "a line after": '{"action": "REWRITE", "output": "a"}\n',
    "cut": '{"action": "REWRITE", "output": "a',
    "EMPTY that speaks": '{"action": "EMPTY", "output": "add"}',
    "a raw line break": '{"action": "REWRITE", "output": "a\nb"}',
    "LaTeX with one backslash": r'{"action": "REWRITE", "output": "\times"}',
    "a spelled-out character": r'{"action": "REWRITE", "output": "\u005cboxed{5}"}',
    "plain text": "Add the numbers.",
    "nothing": "",
}


@pytest.mark.parametrize("text", HEARD)
def test_a_valid_message_is_its_action_and_what_the_reasoner_hears(text):
    assert parse_action(text, MARKER) == HEARD[text]
    assert json.loads(text) == dict(zip(("action", "output"), HEARD[text], strict=True))  # it is JSON to everyone else too


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_message_is_no_action(kind):
    assert parse_action(INVALID[kind], MARKER) is None


def test_a_protocol_without_marker_leaves_empty_nothing_to_say():
    assert parse_action('{"action": "EMPTY", "output": ""}', None) == (Action.EMPTY, "")
    assert parse_action('{"action": "EMPTY", "output": "[FINISH]"}', None) is None


@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"])), marker=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
)
def test_whatever_is_said_or_ends_a_dialogue_survives(text, marker):
    def message(action: str, output: str) -> str:
        return json.dumps({"action": action, "output": output}, ensure_ascii=False)

    assert parse_action(message("REWRITE", text), marker) == (Action.REWRITE, text)
    assert parse_action(message("EMPTY", marker), marker) == (Action.EMPTY, marker)  # a marker of quotes and brackets is itself, no pattern
    assert (parse_action(message("EMPTY", text), marker) is None) == (text not in ("", marker))


@given(marker=st.text(min_size=1, max_size=8))
def test_xgrammar_reads_the_regex_of_any_marker_and_accepts_what_the_parser_does(marker):
    grammar = BYTES.compile_regex(action_regex(marker))
    for output in ("", marker, marker + "a"):
        matcher, message = xgrammar.GrammarMatcher(grammar), json.dumps({"action": "EMPTY", "output": output}, ensure_ascii=False)
        whole = matcher.accept_string(message) and matcher.accept_token(256)
        assert whole == (parse_action(message, marker) is not None)


@pytest.mark.parametrize("text", [*HEARD, *INVALID.values()])
def test_xgrammar_and_the_parser_agree_on_every_message(text):
    matcher = xgrammar.GrammarMatcher(BYTES.compile_regex(action_regex(MARKER)))
    whole = matcher.accept_string(text) and matcher.accept_token(256)
    assert whole == (parse_action(text, MARKER) is not None)
