"""multi: one reward out of several graders, in the forms that OpenAI's documents show."""

import math

import pytest

from flexllm_jax.config.sections.graders import read_grader
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Sample, make_grader

PART = {
    "type": "string_check",
    "input": "{{ sample.output_json.name }}",
    "reference": "{{ item.name }}",
    "operation": "eq",
}
EMAIL = PART | {"input": "{{ sample.output_json.email }}", "reference": "{{ item.email }}"}
SAMPLE = Sample('{"name": "Sara", "email": "x"}', {"name": "Sara", "email": "s@example.org"})


def multi(graders, formula="(name + email) / 2", **fields):
    told = {"type": "multi", "graders": graders, "calculate_output": formula} | fields
    return make_grader(read_grader(told))


@pytest.mark.parametrize(
    ("graders", "formula", "reward"),
    [
        ({"name": PART, "email": EMAIL}, "(name + email) / 2", 0.5),
        ([PART | {"name": "name"}, EMAIL | {"name": "email"}], "name - email", 1),
        (PART | {"name": "name"}, "1 - 0.25 * name", 0.75),
        ({"type": PART, "graders": EMAIL}, "type + graders", 1),
    ],
)
def test_forms(graders, formula, reward):
    """The guide's object, the reference's array, the SDK's one grader; any names."""
    (grade,) = multi(graders, formula).grade([SAMPLE])
    assert grade.reward == reward and set(grade.scores.values()) <= {0, 1}


def test_parts_are_told():
    grader = multi({"name": PART, "email": EMAIL})
    assert grader.reads == {"name", "email"}
    whole, lacking, no_json = grader.grade(
        [SAMPLE, Sample(SAMPLE.text, {"name": "Sara"}), Sample("?", SAMPLE.item)]
    )
    assert whole.scores == {"name": 1, "email": 0} and whole.error is None
    assert lacking.failed and lacking.scores["name"] == 1 and math.isnan(lacking.scores["email"])
    assert (lacking.error or "").startswith("grader.graders.email.reference: {{ item.email }}: ")
    assert no_json.reward == 0 and set(no_json.flags) == {"sample_parse_error"}


def test_a_part_that_the_formula_leaves_out_may_fail():
    (grade,) = multi({"name": PART, "email": EMAIL}, "name").grade(
        [Sample(SAMPLE.text, {"name": "Sara"})]
    )
    assert grade.reward == 1 and "invalid_variable_error" in grade.flags


def test_a_formula_without_a_result():
    (grade,) = multi({"name": PART, "email": EMAIL}, "name / email").grade([SAMPLE])
    assert grade.failed and set(grade.flags) == {"formula_parse_error"}
    error = grade.error or ""
    assert error.startswith("grader.calculate_output: ")
    assert "division by zero, where email = 0, name = 1; keep it finite" in error


@pytest.mark.parametrize(
    ("graders", "formula", "said"),
    [
        ({"a": PART}, "b", "grader.calculate_output: there is no grader 'b'; there are a"),
        ({}, "1", "grader.graders: "),
        ({"a b": PART}, "1", "grader.graders: 'a b' cannot stand in a formula"),
        ([PART], "1", "grader.graders: 0: each of an array needs a `name` of its own"),
        ([PART | {"name": "a"}] * 2, "a", "grader.graders: 1: each of an array needs"),
        ({"a": PART | {"input": "{{ x }}"}}, "a", "grader.graders.a.input: {{ x }}: there is no"),
        ({"a": PART | {"operation": "is"}}, "a", "grader.graders.a.operation: got 'is'; must"),
        ({"a": PART | {"referenc": ""}}, "a", "grader.graders.a.referenc: unknown field"),
        ({"a": PART | {"type": "regex"}}, "a", "grader.graders.a.type: got 'regex'; must be one"),
        ({"a": {"type": "multi"}}, "a", "grader.graders.a.type: got 'multi'; must be one of"),
        ({f"g{i}": PART for i in range(33)}, "g1", "grader.graders: there are 33; at most 32"),
        (dict.fromkeys(map(str, range(100_000)), 1), "1", "grader.graders: there are 100000"),
    ],
)
def test_what_cannot_be_used(graders, formula, said):
    with pytest.raises(UserError) as error:
        multi(graders, formula)
    message = str(error.value)
    assert message.startswith(said) and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"type": "regex"}, "grader.type: got 'regex'; must be one of 'string_check', "),
        ({}, "grader.type: required field is missing"),
        ("x", "grader: got 'x'"),
        ([], "grader: got []"),
        (None, "grader: got None"),
        (dict.fromkeys(map(str, range(100_000)), 1) | PART, "grader: it has 100004 fields; known"),
    ],
)
def test_what_is_no_grader(told, said):
    with pytest.raises(UserError) as error:
        read_grader(told)
    message = str(error.value)
    assert message.startswith(said) and "\n" not in message and len(message) < 500
