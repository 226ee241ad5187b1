"""string_check and its templates: OpenAI's form, one line for what cannot be used."""

import math

import pytest

from flexllm_jax.config.sections.graders import read_grader
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Grade, Sample, make_grader


def grade(text: str, item: dict | None = None, tools: list | None = None, **fields) -> Grade:
    told = {"type": "string_check", "input": "{{ sample.output_text }}", "operation": "eq"}
    grader = make_grader(read_grader(told | {"reference": "{{ item.answer }}"} | fields))
    (result,) = grader.grade([Sample(text, item or {}, tools)])
    return result


@pytest.mark.parametrize(
    ("operation", "text", "answer", "reward"),
    [
        ("eq", "Paris", "Paris", 1),
        ("eq", "Paris", "paris", 0),
        ("eq", "Paris ", "Paris", 0),
        ("ne", "Paris", "Rome", 1),
        ("ne", "Paris", "Paris", 0),
        ("like", "It is Paris.", "Paris", 1),
        ("like", "It is paris.", "Paris", 0),
        ("like", "Paris", "It is Paris.", 0),
        ("ilike", "IT IS PARIS", "paris", 1),
        ("ilike", "Die STRASSE", "straße", 1),
    ],
)
def test_operations(operation, text, answer, reward):
    """The input contains the reference, not the other way around."""
    assert grade(text, {"answer": answer}, operation=operation).reward == reward


def test_paths_lead_through_json():
    text = '{"people": [{"name": "Sara"}], "n": 1.0, "ok": true}'
    item = {"wanted": {"first name": "Sara"}, "items": ["a", "b"], "none": None}
    for template, value in {
        "{{ sample.output_json.people[0].name }}": "Sara",
        "{{sample.output_json['people'][0]['name']}}": "Sara",
        "{{ sample.output_json.n }} {{ sample.output_json.ok }}": "1.0 true",
        "{{ sample.output_json.people }}": '[{"name": "Sara"}]',
        "{{ sample.choices[0].message.content }}": text,
        "{{ item.wanted['first name'] }}\n": "Sara\n",
        "{{ item.items[1] }}": "b",  # not the method of a dict
        "{{ item.none }}": "null",
        "a {# remark #}b": "a b",
    }.items():
        result = grade(text, item | {"value": value}, input=template, reference="{{ item.value }}")
        assert result.reward == 1, (template, result)


def test_calls_of_tools():
    tools = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    path = "{{sample.output_tools[0].function.%s}}"
    assert grade("", tools=tools, input=path % "name", reference="f").reward == 1
    assert grade("", tools=tools, input=path % "arguments", reference='{"a": 1}').reward == 1
    without = grade("", input=path % "name", reference="f")
    assert without.reward == 0 and "sample_parse_error" in without.flags


def test_what_a_sample_lacks_is_its_own_fault():
    """A model learns nothing from failures: what is not JSON has the reward 0."""
    for text in ("not JSON", "[1, 2]", '{"b": NaN}', "[" * 100_000, '{"a": 1' + "0" * 10_000):
        result = grade(text, input="{{ sample.output_json.a }}", reference="1")
        assert (result.reward, result.error) == (0, None)
        (message,) = result.flags.values()
        assert "sample.output_json" in message and "\n" not in message


def test_what_a_row_lacks_is_an_error():
    good, bad = {"answer": "x"}, {"other": "x"}
    told = {"type": "string_check", "input": "x", "operation": "eq", "reference": "{{item.answer}}"}
    grader = make_grader(read_grader(told))
    assert grader.reads == {"answer"}
    first, second, third = grader.grade([Sample("x", good), Sample("x", bad), Sample("x", good)])
    assert first.reward == third.reward == 1
    assert math.isnan(second.reward) and second.failed
    assert second.error == (
        "grader.reference: {{ item.answer }}: item has no field 'answer'; it has other"
    )
    assert second.flags == {"invalid_variable_error": second.error}


def test_rows_that_are_no_json_and_deep_ones():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ({1, 2}, deep):
        result = grade("", {"x": value}, input="{{ item.x }}", reference="")
        assert result.failed and "grader.input: {{ item.x }} cannot be written" in (
            result.error or ""
        )


def test_a_rendered_text_is_bounded():
    result = grade("x" * 2**19, input="{{ sample.output_text }}" * 3, reference="")
    assert result.failed and "over 1,048,576 characters" in (result.error or "")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ items.x }}", "there is no 'items'"),
        ("{{ x }}", "there is no 'x'"),
        ("{{ item }}", "names no field"),
        ("{{ item[0] }}", "names no field"),
        ("{{ sample.text }}", "a sample has output_text, output_json"),
        ("{{ item.x", "not a template, line 1"),
        ("{{ item.x | upper }}", "'filter' is not for graders"),
        ("{{ item.x() }}", "'call' is not for graders"),
        ("{{ item[sample.output_text] }}", "in [ ] is not for graders"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "'pow' is not for graders"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "'for' is not for graders"),
        ("{% include '/etc/passwd' %}", "'include' is not for graders"),
        ("{{ item['x'][" + "9" * 5000 + "] }}", "not a template, "),
        ("{{ item" + ".x" * 100 + " }}", "a path of 100 steps; it may have 32"),
        ("{{" + "(" * 5000 + "item.x" + ")" * 5000 + "}}", "nested too deep"),
    ],
)
def test_a_template_that_cannot_be_used(template, said):
    with pytest.raises(UserError) as error:
        grade("", input=template)
    message = str(error.value)
    assert message.startswith("grader.input: ") and said in message and "\n" not in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"operation": "equals"}, "grader.operation: got 'equals'; must be 'eq', 'ne', 'like'"),
        ({"input": 3}, "grader.input: got 3; "),
        ({"refrence": ""}, "grader.refrence: unknown field"),
        ({"input": "x" * 70_000}, "grader.input: "),
        ({"input": [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}, "grader: it is nested deeper than 16"),
    ],
)
def test_a_form_that_cannot_be_used(fields, said):
    with pytest.raises(UserError) as error:
        grade("", **fields)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
