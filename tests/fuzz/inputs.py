"""Strategies: values that nobody wants, texts that a policy may write, and files with damage done to their bytes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

HUGE = 10**400  # no float holds it
NASTY_TEXTS = (
    *("", " ", "\t", "\0", "a\0b", "\ud800", "x\udfffy", "\ufeff", "\u200b\u200d\u2060", "\u202e\u2066abc", "\x1b[31mred\x1b[0m\x07"),
    *("\r\n", "\x85\u2028", "nan", "inf", "-0", "1e999", "9" * 500, "9" * 5000, "\u0663", "\u00b2", "true", "null", "None", "[]", "{}"),
    *("<script>alert(1)</script>", "\"'><img src=x>", "&lt;", "]]>", "<!--", "[/red]", "[bold]", "$x", "${a}", "%s", "{0}", "{question}"),
    *("\\boxed{", "\\boxed{}", "}{", "$$", "\\", "[FINISH]", "[[A]]", "[[B]] [[A]]", "<|im_start|>", "<|im_end|>", "\U0001f9ee"),
    *("../../etc/passwd", "/", "/dev/null", "a" * 300, "a/" * 3000, "~", "x" * 20_000, "meta_thinking", "reasoning"),
)
texts = st.one_of(st.sampled_from(NASTY_TEXTS), st.text(max_size=12), st.text(st.characters(codec=None), max_size=6))
integers = st.one_of(st.sampled_from([0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**63), HUGE, -HUGE]), st.integers())
floats = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]))
scalars = st.one_of(st.none(), st.booleans(), integers, floats, texts)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)), max_leaves=5
)


def mutated(row: Any, replacements: st.SearchStrategy = values, *, texts_only: bool = False) -> st.SearchStrategy:
    """``row`` with up to three of its places, at any depth, taken out, put twice, or filled with something else.

    ``texts_only``: other texts in the place of texts, and keys that nobody reads.
    """

    @st.composite
    def build(draw: st.DrawFn) -> Any:
        tree = json.loads(json.dumps(row))
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
            places = [place for place in _places(tree) if not texts_only or isinstance(place[0][place[1]], str)]
            if not places:
                break
            parent, key = draw(st.sampled_from(places))
            how = draw(st.sampled_from(["replace", "replace", "add", *([] if texts_only else ["remove"])]))
            if how == "replace":
                parent[key] = draw(replacements)
            elif how == "remove":
                del parent[key]
            elif isinstance(parent, dict):
                parent[draw(texts)] = draw(replacements)
            else:
                parent.insert(key, parent[key])
        return tree

    return build()


def _places(tree: Any) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


@st.composite
def lines(draw: st.DrawFn, row: Any) -> bytes:
    """One line of a JSONL file: a mutated row, its text, and then its bytes, perhaps damaged."""
    tree = draw(mutated(row))
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()))
    line = text.encode("utf-8", "surrogatepass")
    return draw(damaged(line))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    how = draw(st.sampled_from(["whole"] * 40 + list(_DAMAGE)))
    if how == "whole":
        return data
    return _DAMAGE[how](data, draw(st.integers(0, max(len(data) - 1, 0))), draw)


_DAMAGE: dict[str, Any] = {
    "cut": lambda data, at, draw: data[:at],
    "byte": lambda data, at, draw: data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :],
    "insert": lambda data, at, draw: data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:],
    "nul": lambda data, at, draw: data[:at] + b"\0" * draw(st.integers(1, 64)) + data[at:],
    "bom": lambda data, at, draw: b"\xef\xbb\xbf" + data,
    "utf16": lambda data, at, draw: data.decode("utf-8", "replace").encode("utf-16"),
    "latin1": lambda data, at, draw: data + "\u00e9".encode("latin-1"),
    "crlf": lambda data, at, draw: data + b"\r",
    "twice": lambda data, at, draw: data + data,
    "same key twice": lambda data, at, draw: data.replace(b"{", b'{"question": 1, "question": "q", ', 1),
    "deep": lambda data, at, draw: b"[" * draw(st.sampled_from([10, 900, 1000, 5000, 100_000])) + data,
    "deep and closed": lambda data, at, draw: (lambda n: b'{"question": ' + b"[" * n + b"]" * n + b', "answer": "1"}')(
        draw(st.sampled_from([100, 500, 900, 950, 980, 990, 995, 1000, 50_000]))
    ),
    "deep objects": lambda data, at, draw: (lambda n: b'{"a":' * n + b"1" + b"}" * n)(draw(st.sampled_from([100, 480, 990, 20_000]))),
    "garbage": lambda data, at, draw: draw(st.binary(max_size=64)),
    "blank": lambda data, at, draw: draw(st.sampled_from([b"", b" ", b"\t", b"\r", b"\x0c", b"\xc2\xa0"])),
    "many digits": lambda data, at, draw: b'{"question": "q", "answer": ' + b"9" * draw(st.sampled_from([400, 4300, 4301, 10_000])) + b"}",
    "bare": lambda data, at, draw: draw(st.sampled_from([b"NaN", b"Infinity", b"null", b"1", b'"x"', b"[]", b"{}", b"true"])),
}


def files(*rows: Any) -> st.SearchStrategy[bytes]:
    """A JSONL file of up to four lines."""
    one = st.one_of([lines(row) for row in rows])
    endings = st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\r"])
    return st.tuples(st.lists(one, max_size=4), endings, st.booleans()).map(lambda drawn: drawn[1].join(drawn[0]) + drawn[1] * drawn[2])
