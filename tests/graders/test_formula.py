"""The formula of a multi grader: arithmetic as on paper, and nothing of Python."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexllm_jax.errors import UserError
from flexllm_jax.graders.formula import Formula
from flexllm_jax.graders.grade import GradingError

NAMES = frozenset({"a", "b", "name_1"})


def value(text: str, **values: float) -> float:
    return Formula(text, NAMES, "grader.calculate_output").value({"a": 2.0, "b": 3.0} | values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5 * a + 0.5 * b", 2.5),
        ("(a + b) / 2", 2.5),
        ("a - b - 1", -2),
        ("12 / a / b", 2),
        ("a + b * 2 ^ 3", 26),
        ("2 ^ 3 ^ 2", 512),
        ("-2 ^ 2", -4),
        ("2 ^ -1", 0.5),
        ("- - + a", 2),
        ("1.5e1 + .5 + 2.", 17.5),
        ("min(a, b, 1) + max(a, b)", 4),
        ("max(a)", 2),
        ("abs(a - b) + floor(2.7) + ceil(2.1)", 6),
        ("sqrt(4) + exp(0) + log(exp(2))", 5),
        ("name_1", 7),
    ],
)
def test_arithmetic(text, expected):
    assert value(text, name_1=7.0) == pytest.approx(expected)


_numbers = st.floats(0, 9).map(lambda x: f"{x:.3f}")
_expressions = st.recursive(
    _numbers | st.sampled_from(["a", "b"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(" ".join),
        inner.map("({})".format),
        st.tuples(inner, inner).map(lambda pair: f"max({pair[0]}, {pair[1]})"),
    ),
    max_leaves=20,
)


@given(_expressions)
@settings(max_examples=200, deadline=None)
def test_it_is_pythons_where_both_agree(text):
    """Of + - * and parentheses Python has the same grammar; `text` is made here."""
    expected = eval(text, {"a": 2.0, "b": 3.0, "max": max})
    assert value(text) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a / (b - 3)", "division by zero, where a = 2, b = 3"),
        ("sqrt(a - b)", "math domain error"),
        ("log(0)", "math domain error"),
        ("(a - b) ^ 0.5", "math domain error"),
        ("exp(1000)", "math range error"),
        ("9 ^ 9 ^ 9 ^ 9", "math range error"),
        ("1e308 * 10", "it is inf"),
        ("1e308 * 10 - 1e308 * 10", "it is nan"),
    ],
)
def test_no_finite_number_is_no_reward(text, said):
    with pytest.raises(GradingError) as error:
        value(text)
    message = str(error.value)
    assert message.startswith("grader.calculate_output: ") and said.split(",")[0] in message
    assert error.value.kind == "formula_parse_error" and "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a + c", "there is no grader 'c'; there are a, b, name_1"),
        ("a +", "it ends where a number or a name should stand"),
        ("", "it ends where a number"),
        ("0.5 * a + 0.5 * b)", "')' stands where an operator should"),
        ("(a", "a ( is not closed; add )"),
        ("a b", "'b' stands where an operator should"),
        ("a ** b", "'*' stands where a number or a name should"),
        ("a % b", "'% b' is not known"),
        ("a.real", "'.real' is not known"),
        ("a[0]", "'[0]' is not known"),
        ("'a'", "is not known"),
        ("__import__(a)", "no function '__import__'; there are abs, ceil, exp"),
        ("abs(a, b)", "abs is of one number, and 2 are given"),
        ("min()", "')' stands where a number or a name should"),
        ("ä", "'ä' is not known"),
        ("a\n+\nc", "there is no grader 'c'"),
        ("(" * 200 + "a" + ")" * 200, "nested deeper than 50"),
        ("a ^ " * 200 + "a", "nested deeper than 50"),
        ("a + " * 300 + "a", "it has 601 parts; it may have 500"),
    ],
)
def test_what_is_no_formula(text, said):
    with pytest.raises(UserError) as error:
        value(text)
    message = str(error.value)
    assert message.startswith("grader.calculate_output: ") and said in message
    assert "\n" not in message


def test_the_longest_and_the_deepest_are_read():
    assert value("a + " * 249 + "a") == 500
    assert value("(" * 49 + "a" + ")" * 49) == 2
    assert value("-" * 400 + "a") == 2
    begin = time.perf_counter()
    assert math.isfinite(value("a * 0.5 * " * 120 + "1"))
    assert time.perf_counter() - begin < 1
