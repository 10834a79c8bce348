"""The calculator that the model may call. Used by engine.py and tasks/arithmetic.py.

It parses an expression and walks the tree: nothing is ever evaluated as code, and every operand is bounded before an
operation, so that no input takes much time or memory. It needs no signals and can be used from any thread.
"""

from __future__ import annotations

import ast
import math
import operator
import re

MAX_CHARS = 256  # in an expression
MAX_DEPTH = 32
MAX_DIGITS = 64  # of an integer, at every step
MAX_EXPONENT = 256

Number = int | float
NO_NUMBER = re.compile(r"\d\.?(?![eE][-+]?\d)[A-Za-z_]")  # such as 3and, of which Python's parser would warn

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class _NotAllowed(Exception):
    """The calculator does not support the expression."""


def use_calculator(expression: str) -> str | None:
    """The value of an arithmetic expression, or of "text".count("part"); None if it is neither, or too large.

    Commas between digits outside of strings are thousands separators.
    """
    if len(expression) > MAX_CHARS or set(expression) & {"\0", "\\"}:
        return None
    try:
        tree = ast.parse(_without_separators(expression.strip()), mode="eval")
        return _format(_evaluate(tree.body, 0))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError, _NotAllowed):
        return None


def _without_separators(expression: str) -> str:
    """Drop commas between digits, but not in string literals. Raises _NotAllowed for digits that run into letters."""
    pieces = re.split(r"""("[^"]*"|'[^']*')""", expression)
    if any(NO_NUMBER.search(piece) for piece in pieces[::2]):
        raise _NotAllowed
    return "".join(p if i % 2 else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", p) for i, p in enumerate(pieces))


def _evaluate(node: ast.expr, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise _NotAllowed
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand, depth + 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, depth + 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _apply(type(op), _evaluate(left, depth + 1), _evaluate(right, depth + 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise _NotAllowed


def _apply(op: type[ast.operator], left: Number, right: Number) -> Number:
    if op is ast.Pow:
        too_large = abs(right) > MAX_EXPONENT or (abs(left) > 1 and math.log10(abs(left)) * abs(right) > MAX_DIGITS)
        if too_large or (left < 0 and right != int(right)):
            raise _NotAllowed
    return _bounded(OPERATORS[op](left, right))


def _bounded(value: Number) -> Number:
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotAllowed
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise _NotAllowed
    return value


def _format(value: Number) -> str:
    """Whole numbers without a point, others with at most ten significant digits."""
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.10g}"
    return str(value)
