"""Numbers, names and plain arithmetic read into sympy from their syntax tree.

sympy turns text into a program and runs it by ``eval``: math_verify has it read expressions such as 3/4 so, and sympy itself every number
that is given as text. The text is a policy's, and is never evaluated here.
"""

from __future__ import annotations

import ast
from typing import Any

import sympy

_CONSTANTS = {"E": sympy.E, "I": sympy.I, "pi": sympy.pi}


def contain() -> None:
    """Let sympy and math_verify read text by ``read``, in this process and from now on; what would still evaluate text raises."""
    import math_verify.parser
    from sympy.parsing import sympy_parser

    math_verify.parser.parse_expr = sympy_parser.parse_expr = read
    sympy_parser.eval_expr = _refuse


def read(text: str, local_dict: Any = None, transformations: Any = None, global_dict: Any = None, evaluate: bool = True) -> sympy.Expr:
    """What ``sympy.parse_expr`` gives for digits, names, + - * / ** and brackets. Raises SyntaxError for anything else.

    The other arguments of that function say how to write a program, and none is written.
    """
    text = text.strip()
    return _expression(ast.parse(text, mode="eval").body, text, evaluate)


def _expression(node: ast.expr, text: str, evaluate: bool) -> sympy.Expr:
    minus_one = sympy.Integer(-1)
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return sympy.Integer(value)
        case ast.Constant(value=float()):
            return sympy.Float(ast.get_source_segment(text, node))  # its digits, not their nearest double
        case ast.Name(id=name):
            return _CONSTANTS.get(name) or sympy.Symbol(name)
        case ast.UnaryOp(op=ast.UAdd()):
            return _expression(node.operand, text, evaluate)
        case ast.UnaryOp(op=ast.USub()):
            return sympy.Mul(minus_one, _expression(node.operand, text, evaluate), evaluate=evaluate)
        case ast.BinOp():
            left, right = _expression(node.left, text, evaluate), _expression(node.right, text, evaluate)
            match node.op:
                case ast.Add():
                    return sympy.Add(left, right, evaluate=evaluate)
                case ast.Sub():
                    return sympy.Add(left, sympy.Mul(minus_one, right, evaluate=evaluate), evaluate=evaluate)
                case ast.Mult():
                    return sympy.Mul(left, right, evaluate=evaluate)
                case ast.Div():
                    return sympy.Mul(left, sympy.Pow(right, minus_one, evaluate=evaluate), evaluate=evaluate)
                case ast.Pow():
                    return sympy.Pow(left, right, evaluate=evaluate)
    raise SyntaxError(f"{text!r} is not plain arithmetic.")


def _refuse(*_: object) -> None:
    raise ValueError("text is never evaluated here.")
