"""What a grammar allowed at each token of a trace: the replay, and the libraries it needs."""

from __future__ import annotations

import sys

import pytest

from megatron_rema.engine.grammar import Grammars, require_xgrammar
from megatron_rema.trainer.constraint import with_allowed
from megatron_rema.types import Role, Trace
from tests.family_tokenizers import family_tokenizer, save_family
from tests.unit.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer("chatml")
END = TOKENIZER.eos_token_id


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.convert_tokens_to_ids(list(text)))  # byte by byte


def tokens_in(token_set: bytes) -> set[int]:
    return {8 * i + bit for i, byte in enumerate(token_set) for bit in range(8) if byte >> bit & 1}


def trace_of(*turns: tuple[int, ...]) -> Trace:
    """Each turn behind one token of context."""
    tokens = [token for turn in turns for token in (END, *turn)]
    turn_ids = [k for number, turn in enumerate(turns) for k in (-1, *[number] * len(turn))]
    return Trace("e", Role.META_THINKING, tuple(tokens), tuple(k >= 0 for k in turn_ids), tuple(turn_ids), (0.0,) * len(tokens), ())


@pytest.fixture(scope="module")
def grammars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return Grammars(folder, len(TOKENIZER) + 20)  # a model's vocabulary may be larger than its tokenizer's


def test_every_own_token_gets_the_set_it_was_chosen_from_and_every_turn_begins_anew(grammars):
    # grammar x(y|z)?: x is forced; then y, z or the end; after y only the end
    a, b = (*ids_of("xy"), END), (*ids_of("x"), END)
    trace = with_allowed(trace_of(a, b), lambda: grammars.matcher("x(y|z)?", (END,)))
    (x,), (y,), (z,) = map(ids_of, "xyz")
    assert [None if s is None else tokens_in(s) for s in trace.allowed] == [None, {x}, {y, z, END}, {END}, None, {x}, {y, z, END}]
    assert trace.allowed[2] is trace.allowed[6]  # equal sets are one object: a step of a large vocabulary holds some dozens, not millions
    assert trace.token_ids == trace_of(a, b).token_ids and trace.loss_mask == trace_of(a, b).loss_mask


def test_a_turn_that_was_cut_is_replayed_as_far_as_it_went(grammars):
    trace = with_allowed(trace_of(ids_of("x")), lambda: grammars.matcher("x(y|z)?", (END,)))
    assert tokens_in(trace.allowed[1]) == set(ids_of("x"))


def test_a_token_that_the_grammar_does_not_allow_is_an_error(grammars):
    with pytest.raises(RuntimeError, match=rf"token {ids_of('q')[0]} was sampled where the grammar does not allow it"):
        with_allowed(trace_of(ids_of("xq")), lambda: grammars.matcher("x(y|z)?", (END,)))


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1"])
def test_tokens_of_several_bytes_are_allowed_by_their_spelling(family, tmp_path):
    save_family(family, tmp_path)
    tokenizer = family_tokenizer(family)
    allowed = tokens_in(Grammars(tmp_path, len(tokenizer)).matcher("(problem|prob)", (tokenizer.eos_token_id,)).allowed())
    spelled = {tokenizer.decode([token]) for token in allowed}
    assert "p" in spelled and all("problem".startswith(text) for text in spelled) and len(spelled) > 2


def test_a_missing_library_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ValueError, match=r"task\.json_actions.* needs xgrammar, which is not installed.*pip install xgrammar"):
        require_xgrammar()
