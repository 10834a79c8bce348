"""The calculator computes what it should and nothing else."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.tools import use_calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("37*84", "3108"),
        (" 48 / 2 ", "24"),
        ("7/2", "3.5"),
        ("1/3", "0.3333333333"),
        ("1,234 + 1", "1235"),
        ("12,345,678*1", "12345678"),
        ("-(3 - 10) // 2", "3"),
        ("17 % 5", "2"),
        ("2**10", "1024"),
        ("0.1+0.2", "0.3"),
        ('"strawberry".count("r")', "3"),
        ("'1,000,000'.count(',')", "2"),
    ],
)
def test_computes(expression: str, result: str) -> None:
    assert use_calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", "1/0", "9**9**9", "2**9999", "10**65", "1e999", "float('nan')", "x", "__import__('os')", "().__class__",
        "'a'*10", "'a'.upper()", "'a'.count('a', 0)", "f'{1}'.count('1')", "(x := 1)", "lambda: 1", "[1]", "b'a'.count(b'a')",
        "True", "1 if 1 else 2", "1 < 2", "1; 2", "3\n4", "(" * 200 + ")" * 200, "-" * 100 + "1", "1+" * 127 + "1" * 10,
        "9" * 300, "\0", "(-8)**0.5", "'a' 'b'.join('c')", "1j", "~1", "1 << 3", "3and 4", "0x10", "1_000",
        "'a\\n'.count('a')",
        "'x'.count", "open('f')",
    ],
)  # fmt: skip
def test_refuses(expression: str) -> None:
    assert use_calculator(expression) is None


@given(st.text(max_size=300))
def test_never_raises_and_is_quick(text: str) -> None:
    began = time.process_time()
    result = use_calculator(text)
    assert result is None or isinstance(result, str)
    assert time.process_time() - began < 1


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.sampled_from("+-*"))
def test_agrees_with_python(a: int, b: int, op: str) -> None:
    expected = {"+": a + b, "-": a - b, "*": a * b}[op]
    assert use_calculator(f"({a}){op}({b})") == str(expected)


numbers = st.integers(0, 999).map(str) | st.decimals(0, 99, places=2).map(str)
expressions = st.recursive(
    numbers,
    lambda parts: st.tuples(parts, st.sampled_from([" + ", "-", "*", " / ", "//", "%"]), parts).map("".join)
    | parts.map("({})".format)
    | parts.map("-{}".format),
    max_leaves=8,
)


@given(expressions)
def test_agrees_with_python_on_whole_expressions(expression: str) -> None:
    try:
        expected = eval(expression.replace("-" * 2, "- -"))
    except ZeroDivisionError:
        expected = None
    result = use_calculator(expression)
    if expected is None or len(expression) > 256:
        assert result is None
    else:
        assert float(result) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@given(st.text("ab 3,x()+", max_size=40), st.text("ab 3,x", max_size=3))
def test_counts_like_python(text: str, part: str) -> None:
    assert use_calculator(f"'{text}'.count('{part}')") == str(text.count(part))


@given(st.text("0123456789andxelo_.+-*/ '\\\"()", max_size=30))
def test_python_has_nothing_to_warn_of(text: str) -> None:
    """What a model writes must not end as a warning on the user's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_calculator(text)


def test_works_from_any_thread() -> None:
    results: list[str | None] = []
    threads = [threading.Thread(target=lambda: results.append(use_calculator("6*7"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["42"] * 8
