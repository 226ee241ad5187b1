"""score_model and label_model: what a model is asked, and what of its answers is a reward.

The model is a function here, as `make_grader` takes it; a server's is asked in
tests/server/finetuning/test_graders.py.
"""

import json
import threading
import time

import jsonschema
import pytest

from flexllm_jax.config.sections.graders import read_grader
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Completion, GradingError, Question, Sample, Usage, make_grader

INPUT = [
    {"role": "system", "content": "Grade."},
    {"role": "user", "content": "{{ item.x }} is {{ sample.output_text }}"},
]
SCORE = {"type": "score_model", "model": "judge", "input": INPUT}
LABEL = {
    "type": "label_model",
    "model": "judge",
    "input": INPUT,
    "labels": ["good", "fair", "bad"],
    "passing_labels": ["good", "fair"],
}
USAGE = Usage(7, 3, 1)


def says(text: str, whole: bool = True):
    return lambda question: Completion(text, whole, USAGE)


def grade(told: dict, complete, **fields):
    grader = make_grader(read_grader(told | fields), complete)
    (result,) = grader.grade([Sample("42", {"x": "It"})])
    return result


def test_what_is_asked():
    asked: list[Question] = []

    def complete(question: Question) -> Completion:
        asked.append(question)
        return Completion('{"steps": [], "result": 0.25}', True, USAGE)

    sampling = {"temperature": 1, "top_p": 0.5, "seed": 42, "max_completions_tokens": 9}
    result = grade(SCORE, complete, sampling_params=sampling)
    assert (result.reward, result.error, result.usage) == (0.25, None, {"judge": USAGE})
    (question,) = asked
    assert question.model == "judge"
    assert question.messages == [
        {"role": "system", "content": "Grade."},
        {"role": "user", "content": "It is 42"},
    ]
    assert (question.temperature, question.top_p, question.seed) == (1, 0.5, 42)
    assert question.max_tokens == 9
    for answer, fits in {
        '{"steps": [{"description": "a", "conclusion": "b"}], "result": 1}': True,
        '{"steps": [], "result": 1.01}': False,
        '{"steps": [], "result": "1"}': False,
        '{"result": 1}': False,
    }.items():
        assert jsonschema.Draft202012Validator(question.answer).is_valid(json.loads(answer)) == fits


@pytest.mark.parametrize(
    ("text", "whole", "said"),
    [
        ('{"steps": [], "result": 1.5}', True, "result is 1.5, outside of range [0, 1]"),
        ('{"steps": [], "result": -1}', True, "result is -1, outside of range [0, 1]"),
        ('{"steps": [], "result": NaN}', True, "result is nan, outside of range"),
        ('{"steps": [], "result": 1e999}', True, "result is inf, outside of range"),
        ('{"steps": [], "result": true}', True, ": there is no number `result`"),
        ('{"steps": [], "result": "0.5"}', True, ": there is no number `result`"),
        ("[0.5]", True, ": there is no number `result`"),
        ("0.5", True, ": there is no number `result`"),
        ("I say\n0.5", True, "it said 'I say\\n0.5', which is not JSON"),
        ("[" * 100_000, True, "which is not JSON"),
        ('{"steps": [', False, "its answer is cut off after 3 tokens; raise sampling_params.max"),
    ],
)
def test_what_is_no_score(text, whole, said):
    result = grade(SCORE, says(text, whole))
    assert result.failed and set(result.flags) == {"model_grader_parse_error"}
    assert (result.error or "").startswith("grader.model: ") and said in (result.error or "")
    assert "\n" not in (result.error or "") and result.usage == {"judge": USAGE}


def test_a_range_of_its_own():
    assert grade(SCORE, says('{"steps": [], "result": 70}'), range=[0, 100]).reward == 70


@pytest.mark.parametrize(
    ("label", "reward"), [("good", 1), ("fair", 1), ("bad", 0), ("GOOD", None), (None, None)]
)
def test_labels(label, reward):
    result = grade(LABEL, says(json.dumps({"label": label})))
    if reward is None:
        assert result.failed and (result.error or "").endswith(": label is none of good, fair, bad")
    else:
        assert (result.reward, result.error) == (reward, None)


def test_a_model_that_does_not_answer():
    def complete(question: Question) -> Completion:
        raise GradingError("model_grader_server_error", f"{question.field}: no such model")

    result = grade(SCORE, complete)
    assert result.failed and result.error == "grader.model: no such model"
    assert set(result.flags) == {"model_grader_server_error"}


def test_samples_are_asked_about_at_once():
    """As many as there are: an engine answers them together."""
    together = threading.Barrier(8, timeout=10)

    def complete(question: Question) -> Completion:
        together.wait()
        result = float(question.messages[1]["content"].split()[-1])
        time.sleep(0.02 * (1 - result))
        return Completion(json.dumps({"steps": [], "result": result}), True, USAGE)

    samples = [Sample(str(i / 8), {"x": "It"}) for i in range(8)]
    grades = make_grader(read_grader(SCORE), complete).grade(samples)
    assert [grade.reward for grade in grades] == [i / 8 for i in range(8)]


def test_usage_of_a_multi_grader_is_by_model():
    parts = {"a": SCORE, "b": SCORE | {"model": "other"}, "c": SCORE}
    told = {"type": "multi", "graders": parts, "calculate_output": "a + b + c"}
    grader = make_grader(read_grader(told), says('{"steps": [], "result": 1}'))
    (result,) = grader.grade([Sample("42", {"x": "It"})])
    assert result.reward == 3 and result.usage == {"judge": Usage(14, 6, 2), "other": USAGE}


@pytest.mark.parametrize(
    "content",
    [
        "a {{ item.x }}",
        {"type": "input_text", "text": "a {{ item.x }}"},
        [{"type": "input_text", "text": "a "}, {"type": "output_text", "text": "{{ item.x }}"}],
        ["a ", "{{ item.x }}"],
    ],
)
def test_contents_as_openai_writes_them(content):
    told = SCORE | {"input": [{"type": "message", "role": "user", "content": content}]}
    asked = []
    make_grader(read_grader(told), lambda q: asked.append(q) or says("{}")(q)).grade(
        [Sample("", {"x": "b"})]
    )
    assert asked[0].messages == [{"role": "user", "content": "a b"}]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (SCORE | {"range": [1, 0]}, "grader.range: got [1.0, 0.0]; the first must be less than"),
        (SCORE | {"range": [0]}, "grader.range"),
        (SCORE | {"sampling_params": {"seed": 2**63}}, "grader.sampling_params.seed: got 922"),
        (SCORE | {"input": []}, "grader.input: got []"),
        (SCORE | {"input": [{"role": "tool", "content": ""}]}, "grader.input.0.role: got 'tool'"),
        (
            SCORE | {"input": [{"role": "user", "content": {"type": "input_image"}}]},
            "grader.input.0.content: a part of type 'input_image'; graders read input_text",
        ),
        (
            SCORE | {"input": [{"role": "user", "content": "{{ row.x }}"}]},
            "grader.input.0.content: {{ row.x }}: there is no 'row'",
        ),
        (SCORE | {"sampling_params": {"max_tokens": 1}}, "grader.sampling_params.max_tokens: unk"),
        (SCORE | {"sampling_params": {"temperature": -1}}, "grader.sampling_params.temperature: "),
        (
            LABEL | {"passing_labels": ["great"]},
            "grader: passing_labels: 'great' is not one of labels; add it there, or drop it",
        ),
        (LABEL | {"labels": ["a", "a"]}, "grader: labels: 'a' is given twice"),
        (LABEL | {"labels": [1] * 100_000}, "grader.labels"),
        (LABEL | {"passing_labels": []}, "grader.passing_labels: got []"),
    ],
)
def test_what_cannot_be_used(told, said):
    with pytest.raises(UserError) as error:
        make_grader(read_grader(told), says("{}"))
    message = str(error.value)
    assert message.startswith(said) and "\n" not in message and len(message) < 500


@pytest.mark.parametrize("told", [SCORE, LABEL])
def test_without_a_model_to_ask(told):
    with pytest.raises(UserError, match=r"^grader.type: .*_model asks a model, and there is none"):
        make_grader(read_grader(told))
