"""Arithmetic expressions whose every value is small: drawn, shown, evaluated and reduced one operation at a time."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from typing import TypeAlias

MAX_VALUE = 20  # every value on the way lies in 0..MAX_VALUE
MAX_OPERAND = 9  # numbers in the question lie in 1..MAX_OPERAND
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}

# A number, or (operator, left, right).
Expression: TypeAlias = "int | tuple[str, Expression, Expression]"


def draw(rng: random.Random, level: int) -> Expression:
    """A random expression of ``level`` operations whose every value lies in 0..MAX_VALUE (by rejection)."""
    if level < 1:
        raise ValueError(f"level is {level}; it is the number of operations and must be at least 1.")
    while True:
        expression = _draw_tree(rng, level)
        if value_of(expression) is not None:
            return expression


def show(expression: Expression) -> str:
    """Fully parenthesised, but for the outermost pair."""
    if isinstance(expression, int):
        return str(expression)
    operator, left, right = expression
    return operator.join(str(side) if isinstance(side, int) else f"({show(side)})" for side in (left, right))


def parse(text: str) -> Expression | None:
    """What `show` wrote; None for anything else."""
    operators = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}

    def read(node: ast.expr) -> Expression:
        if isinstance(node, ast.BinOp):
            return (operators[type(node.op)], read(node.left), read(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError(ast.dump(node))

    try:
        expression = read(ast.parse(text, mode="eval").body)
        return expression if show(expression) == text else None
    except (SyntaxError, ValueError, KeyError, TypeError, RecursionError):  # of text that is no expression, or not one of these
        return None


def with_numbers(expression: Expression, number: Callable[[], int]) -> Expression:
    """The same operations on the numbers that ``number`` gives, from left to right."""
    if isinstance(expression, int):
        return number()
    operator, left, right = expression
    return (operator, with_numbers(left, number), with_numbers(right, number))


def value_of(expression: Expression) -> int | None:
    """None when some value on the way leaves 0..MAX_VALUE."""
    if isinstance(expression, int):
        return expression
    operator, left, right = expression
    a, b = value_of(left), value_of(right)
    if a is None or b is None:
        return None
    value = OPERATIONS[operator](a, b)
    return value if 0 <= value <= MAX_VALUE else None


def next_operation(expression: Expression) -> Expression:
    """The leftmost sub-expression whose two sides are numbers."""
    _, left, right = expression
    return next_operation(left) if isinstance(left, tuple) else next_operation(right) if isinstance(right, tuple) else expression


def replace_next(expression: Expression, value: int) -> Expression:
    """``expression`` with its `next_operation` replaced by ``value``."""
    operator, left, right = expression
    if isinstance(left, tuple):
        return (operator, replace_next(left, value), right)
    return (operator, left, replace_next(right, value)) if isinstance(right, tuple) else value


def _draw_tree(rng: random.Random, level: int) -> Expression:
    if level == 0:
        return rng.randint(1, MAX_OPERAND)
    num_left = rng.randrange(level)
    return (rng.choice("+-*"), _draw_tree(rng, num_left), _draw_tree(rng, level - 1 - num_left))
