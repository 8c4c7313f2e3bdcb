"""What counts as a correct answer. Pure functions of text; math_verify is imported only where it is needed (verifier processes).

strict    the last \\boxed{...} of the message, against the gold answer: the training reward
lenient   strict, or math_verify finds the gold answer in the whole message: a metric only (a reward with slack is a reward to be hacked)

math_verify alone has slack that a policy could find, and blind spots. What is decided here instead, strictly and for every data set:
words         it multiplies their letters, so that ``last`` would be ``salt``: words of four letters or more are compared as text
bases         it drops the base of 4210_5, so that 4210_6 would be the same: where both sides state a base, digits and base must agree
small numbers it compares to 6 (exact ones: 15) decimals, so that 5e-34 would be 6.63e-34: here the zeros after the point do not count
percent       it cannot read 70\\% alone: here it equals 70 (what was asked for in percent) and 0.7 (its value)

A judge's answer is a letter, [[A]] or [[B]]: the last one of the message counts, as the last box does, so that naming both gains nothing
and a message may quote its instructions first. Exactly so written: [[a]], [A] or [[C]] (a tie) are no answer, hence wrong.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_rema.types import LETTERS, AnswerFormat, Verdict

INTEGER = re.compile(r"[+-]?\d{1,1000}")
LETTER = re.compile(rf"\[\[({'|'.join(LETTERS)})\]\]")
WORD = re.compile(r"[A-Za-z]{4,}")
IN_BASE = re.compile(r"([0-9A-F]+)_\{?(\d+)\}?")
PERCENT = re.compile(r"([^%]*[^%\\\s])\s*\\?%")
_BOX = "\\boxed{"
FLOAT_DECIMALS = 6  # math_verify's own defaults: floats are compared rounded to so many decimals,
EXACT_DECIMALS = 15  # and expressions without a float by a difference that vanishes to so many
SPARE_DIGITS = 3  # of the 15 to 16 of a double, left to rounding

# What changes an answer's looks and not its value: spacing, sizes, fonts, a full stop at the end.
_SPACING = re.compile(r"\\(?:[!,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~")
_SIZES = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])")
_FRACTIONS = re.compile(r"\\[dt]frac(?![A-Za-z])")
_FONTS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s*\{([^{}\\]*)\}")
_OTHER_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # a space between two digits parts two numbers


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...}, braces balanced (escaped braces do not count); None when there is no box or it never closes."""
    start = text.rfind(_BOX)
    return None if start < 0 else _content(text, start + len(_BOX))


def boxes(text: str) -> list[str]:
    """Contents of every \\boxed{...} that closes and stands in no other that does, in order. One pass: a policy may nest a thousand."""
    closed: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of each open brace's box begins; None: the brace of something else
    for token in re.finditer(r"\\boxed\{|\\.|[{}]", text, re.S):
        if token[0] == "}" and opened:
            begin = opened.pop()
            if begin is not None:
                closed.append((begin, token.start()))
        elif token[0] in (_BOX, "{"):
            opened.append(token.end() if token[0] == _BOX else None)
    contents, reached = [], 0
    for begin, end in sorted(closed):
        if begin >= reached:
            contents.append(text[begin:end])
            reached = end
    return contents


def is_ambiguous(text: str) -> bool:
    """Several boxes that differ, or alternatives inside one."""
    contents = [box.strip() for box in boxes(text)]
    return len(set(contents)) > 1 or any(re.search(r"(?:^|\W)or(?:\W|$)|\\text\{\s*or\s*\}", box) for box in contents)


def _content(text: str, begin: int) -> str | None:
    """Up to the brace that closes the one before ``begin``."""
    depth, i = 1, begin
    while i < len(text):
        if text[i] == "\\":
            i += 1  # the escaped character
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:i]
        i += 1
    return None


def last_letter(text: str) -> str | None:
    """The last of [[A]] and [[B]] in the text; None when there is neither."""
    letters = LETTER.findall(text)
    return letters[-1] if letters else None


def last_answer(text: str, answer_format: AnswerFormat) -> str | None:
    """What the last answer of the text says, in the format asked for; None when it holds none."""
    return last_letter(text) if answer_format is AnswerFormat.LETTER else last_box(text)


def boxed(content: str) -> str:
    return f"\\boxed{{{content}}}"


def normalised(answer: str) -> str:
    """The answer's text without what only changes its looks. Equal texts are equal answers; different texts say nothing."""
    text = answer.replace("\\$", "").replace("$", "").replace("{,}", ",").replace("{:}", ":")
    text = _SPACING.sub(lambda match: "" if match[0] == "\\!" else " ", text)
    text = _FONTS.sub(r"\1", _FRACTIONS.sub(r"\\frac", _SIZES.sub("", text)))
    text = _OTHER_SPACE.sub("", " ".join(text.split()))
    return text[:-1] if len(text) > 1 and text.endswith(".") else text


def quick_verdict(text: str, gold: str) -> Verdict | None:
    """The strict verdict where it needs no algebra. None: ask ``verify``.

    No box; the same text but for its looks; two integers. A blank gold answer decides nothing: there is no right or wrong, UNKNOWN.
    """
    if not gold.strip():
        return Verdict.UNKNOWN
    box, gold = normalised(last_box(text) or ""), normalised(gold)
    if not box:
        return Verdict.WRONG
    if box == gold:
        return Verdict.CORRECT
    if INTEGER.fullmatch(box) and INTEGER.fullmatch(gold):
        return _verdict(int(box) == int(gold))
    return None


def letter_verdict(text: str, gold: str) -> Verdict:
    """Is the last letter of the text the gold one? No letter is WRONG; a gold answer that is no letter decides nothing: UNKNOWN."""
    return _verdict(last_letter(text) == gold) if gold in LETTERS else Verdict.UNKNOWN


def verify(answer: str, gold: str) -> Verdict:
    """math_verify's verdict on what it finds in ``answer``. May raise, hang or take the process down: runs in a verifier process.

    An answer that is one box is the strict question (see the file's head), any other is a whole message. A gold answer that
    math_verify cannot read is UNKNOWN, not WRONG.
    """
    from math_verify import parse
    from math_verify import verify as is_equal

    from megatron_rema.reward import arithmetic

    arithmetic.contain()

    def read(text: str) -> list:
        return parse(text, parsing_timeout=None)

    # No inner time-outs (they would say "not equal"): the pool's own time-out ends the process, and the verdict is UNKNOWN.
    content = last_box(answer)
    is_box = content is not None and answer == boxed(content)
    if is_box and (verdict := _words_or_bases(normalised(content), normalised(gold))) is not None:
        return verdict
    for said, wanted in _without_percent(content, gold) if is_box else [(None, gold)]:
        gold_parsed = read(boxed(_tidy(wanted)))
        if not gold_parsed:
            return Verdict.UNKNOWN
        answer_parsed = read(answer if said is None else boxed(_tidy(said)))
        zeros = _leading_zeros(gold_parsed)
        if is_equal(
            gold_parsed,
            answer_parsed,
            float_rounding=FLOAT_DECIMALS + zeros,
            numeric_precision=EXACT_DECIMALS + max(zeros - SPARE_DIGITS, 0),
            timeout_seconds=None,
            raise_on_error=True,
        ):
            return Verdict.CORRECT
    return Verdict.WRONG


def equal_classes(answers: Sequence[str], is_equal: Callable[[str, str], bool]) -> list[int]:
    """Class of each answer, numbered by first appearance: ``is_equal(answer, first)`` to the first answer of a class joins it.

    Only different texts are asked about, each against one answer a class: at most d (d - 1) / 2 questions for d texts.
    """
    firsts: list[str] = []
    class_of_text: dict[str, int] = {}
    classes = []
    for answer in answers:
        text = normalised(answer)
        if text not in class_of_text:
            joined = next((index for index, first in enumerate(firsts) if is_equal(answer, first)), len(firsts))
            if joined == len(firsts):
                firsts.append(answer)
            class_of_text[text] = joined
        classes.append(class_of_text[text])
    return classes


def majority_is_right(samples: Sequence[tuple[bool, str | None]], is_equal: Callable[[str, str], bool]) -> bool:
    """Is the most frequent answer of one problem's samples right (self-consistency, arXiv:2203.11171)?

    ``samples`` are (right, answer) in the order they came; one without an answer (None) does not vote. Right answers equal each other,
    being equal to the gold one; wrong ones are grouped by ``equal_classes``. Of equally frequent answers the one seen first wins.
    No votes: False. Nothing is asked of ``is_equal`` where no grouping of the wrong answers could change the outcome.
    """
    votes = [(right, answer) for right, answer in samples if answer is not None]
    wrong = [answer for right, answer in votes if not right]
    num_right = len(votes) - len(wrong)
    if num_right > len(wrong):
        return True
    if num_right == 0 or num_right < max(Counter(map(normalised, wrong)).values()):
        return False
    classes = iter(equal_classes(wrong, is_equal))
    labels = [-1 if right else next(classes) for right, _ in votes]
    return Counter(labels).most_common(1)[0][0] == -1  # equal counts stand in the order of their first vote


def _verdict(is_right: bool) -> Verdict:
    return Verdict.CORRECT if is_right else Verdict.WRONG


def _words_or_bases(box: str, gold: str) -> Verdict | None:
    """The verdict on two words, or on two numbers that both state a base; None for anything else."""
    if WORD.fullmatch(box) and WORD.fullmatch(gold):
        return _verdict(box.casefold() == gold.casefold())
    said, wanted = IN_BASE.fullmatch(box), IN_BASE.fullmatch(gold)
    if said and wanted:
        return _verdict([part.lstrip("0") for part in said.groups()] == [part.lstrip("0") for part in wanted.groups()])
    return None


def _tidy(content: str) -> str:
    """Without a full stop after a digit, which math_verify cannot read."""
    return re.sub(r"(?<=\d)\.$", "", content.strip())


def _without_percent(said: str, wanted: str) -> list[tuple[str, str]]:
    """The pairs to compare, (said, wanted), of which one must be equal. p\\% against p\\% compares the numbers; p\\% against q is right
    where p = q or p / 100 = q."""
    said_percent, wanted_percent = PERCENT.fullmatch(said.strip()), PERCENT.fullmatch(wanted.strip())
    if said_percent and wanted_percent:
        return [(said_percent[1], wanted_percent[1])]
    if said_percent:
        return [(said_percent[1], wanted), (f"\\frac{{{said_percent[1]}}}{{100}}", wanted)]
    if wanted_percent:
        return [(said, wanted_percent[1]), (said, f"\\frac{{{wanted_percent[1]}}}{{100}}")]
    return [(said, wanted)]


def _leading_zeros(gold_parsed: list) -> int:
    """Zeros between the decimal point and the first digit of a gold answer that is one number; 0 for anything else."""
    try:
        size = abs(float(gold_parsed[0]))
    except (TypeError, ValueError, OverflowError):  # no number: an expression, a set, a word
        return 0
    return -1 - math.floor(math.log10(size)) if 0.0 < size < 0.1 else 0
