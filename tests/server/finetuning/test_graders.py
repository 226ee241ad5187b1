"""The routes of graders by the unmodified openai SDK: validate, run, and what cannot be used."""

import json
import threading
import time

import openai
import pytest

CHECK = {
    "type": "string_check",
    "name": "check",
    "input": "{{ sample.output_json.name }}",
    "reference": "{{ item.name }}",
    "operation": "eq",
}
LABEL = {
    "type": "label_model",
    "name": "judge",
    "model": "tiny",
    "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
    "labels": ["good", "bad"],
    "passing_labels": ["good", "bad"],
}
SCORE = LABEL | {"type": "score_model", "range": [0, 1], "sampling_params": {"seed": 1}}
SCORE = {name: value for name, value in SCORE.items() if "labels" not in name}
LOOP = "def grade(sample, item):\n    while item.get('loop'): pass\n    return item['x'] / 4\n"


@pytest.fixture
def graders(client):
    """The SDK's resource."""
    return client.fine_tuning.alpha.graders


def test_run(graders):
    run = graders.run(grader=CHECK, model_sample='{"name": "Sara"}', item={"name": "Sara"})
    assert run.reward == 1 and run.sub_rewards == {}
    assert (run.metadata.name, run.metadata.type) == ("check", "string_check")
    assert 0 <= run.metadata.execution_time < 1
    errors = run.metadata.errors
    flags = {name: value for name, value in errors.to_dict().items() if name.endswith("_error")}
    assert flags and not any(flags.values()) and errors.to_dict()["details"] == {}
    assert run.api_model_grader_token_usage_per_model == {}
    assert graders.run(grader=CHECK, model_sample="no JSON").metadata.errors.sample_parse_error


def test_validate_answers_with_the_grader(graders):
    told = {"type": "multi", "name": "both", "graders": {"a": CHECK, "b": LABEL}}
    told |= {"calculate_output": "0.5 * a + 0.5 * b"}
    assert graders.validate(grader=told).to_dict(warnings=False) == {"grader": told}


def test_a_model_of_the_server_grades(graders):
    """It is held to the labels, whatever its weights are."""
    run = graders.run(grader=LABEL, model_sample="Sara is 42.")
    assert (run.reward, run.metadata.sampled_model_name) == (1, "tiny")
    usage = run.api_model_grader_token_usage_per_model["tiny"]
    assert usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0
    assert run.metadata.token_usage == usage["prompt_tokens"] + usage["completion_tokens"]
    passing = [graders.run(grader=LABEL | {"passing_labels": [label]}, model_sample="Sara is 42.")
               for label in ("good", "bad")]  # fmt: skip
    assert sorted(run.reward for run in passing) == [0, 1]


def test_a_model_that_says_too_much_is_told(graders):
    """Random weights write steps until they may write no more."""
    run = graders.run(grader=SCORE, model_sample="Sara is 42.")
    assert run.reward == 0 and run.metadata.errors.api_model_grader_parse_error
    assert (
        "its answer is cut off after"
        in run.metadata.errors.to_dict()["details"]["model_grader_parse_error"]
    )


def test_a_prompt_that_is_too_long_is_told(graders):
    run = graders.run(grader=LABEL, model_sample="Sara " * 1000)
    details = run.metadata.errors.api_model_grader_server_error_details or ""
    assert run.reward == 0 and details.startswith("grader.model: ") and "max_model_len" in details


def test_a_multi_grader_of_all_kinds(graders):
    similar = CHECK | {"type": "text_similarity", "evaluation_metric": "fuzzy_match"}
    del similar["operation"]
    told = {
        "type": "multi",
        "graders": {
            "check": CHECK,
            "similar": similar,
            "judge": LABEL,
            "program": {"type": "python", "source": LOOP},
        },
        "calculate_output": "check + 10 * similar + 100 * judge + 1000 * program",
    }
    item = {"name": "Sara", "x": 4}
    run = graders.run(grader=told, model_sample='{"name": "Sara"}', item=item)
    assert run.reward == 1111 and run.metadata.name == "multi"
    assert run.sub_rewards == {"check": 1, "similar": 1, "judge": 1, "program": 1}
    run = graders.run(grader=told, model_sample='{"name": "Sara"}', item={"name": "Sara"})
    assert run.reward == 0 and run.sub_rewards["program"] is None
    assert run.metadata.errors.python_grader_runtime_error_details == (
        "grader.graders.program.source: line 3: KeyError: 'x'"
    )


def test_the_server_goes_on_while_a_grader_does_not_end(graders):
    """Nor does a grader hold a request up: the loop answers within a tenth of a second."""
    told = {"type": "python", "source": LOOP}
    result = []
    item = {"loop": True, "x": 1}
    work = threading.Thread(
        target=lambda: result.append(graders.run(grader=told, model_sample="", item=item))
    )
    work.start()
    slowest, count = 0.0, 0
    while work.is_alive():
        begin = time.perf_counter()
        graders.run(grader=CHECK, model_sample="{}", item={"name": ""})
        slowest, count = max(slowest, time.perf_counter() - begin), count + 1
    assert count > 10 and slowest < 1, (count, slowest)
    errors = result[0].metadata.errors
    assert errors.python_grader_server_error
    assert errors.python_grader_server_error_type == "grader: it took over 2 s"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"type": "regex"}, "grader.type: got 'regex'; must be one of 'string_check', "),
        ({}, "grader.type: required field is missing"),
        (CHECK | {"operation": "is"}, "grader.operation: got 'is'; must be 'eq'"),
        (CHECK | {"input": "{{ row.x }}"}, "grader.input: {{ row.x }}: there is no 'row'"),
        (LABEL | {"model": "gpt"}, "grader.model: the model 'gpt' does not exist; GET /v1/models"),
        (
            {"type": "multi", "graders": {"a": LABEL | {"model": "x"}}, "calculate_output": "a"},
            "grader.graders.a.model: the model 'x' does not exist",
        ),
        (
            {"type": "multi", "graders": {"a": CHECK}, "calculate_output": "a / b"},
            "grader.calculate_output: there is no grader 'b'; there are a",
        ),
        ({"type": "python", "source": "x = 1"}, "grader.source: it has no function `grade`"),
        (
            CHECK | {"type": "text_similarity", "evaluation_metric": "cosine", "operation": None},
            "grader.operation: unknown field",
        ),
    ],
)
def test_what_cannot_be_used(graders, told, said):
    for call in (
        lambda: graders.validate(grader=told),
        lambda: graders.run(grader=told, model_sample="", item={}),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            call()
        body = error.value.body
        assert isinstance(body, dict) and body["param"] == "grader"
        assert body["message"].startswith(said) and "\n" not in body["message"]


@pytest.mark.parametrize("field", ["grader", "model_sample", "item"])
def test_half_a_character_is_refused(server, field):
    """The SDK sends none; JSON can."""
    body = {"grader": CHECK, "model_sample": "", "item": {"name": "x"}}
    broken = {"grader": CHECK | {"name": "\ud800"}, "model_sample": "\ud800"}
    broken["item"] = {"x": ["\ud800"]}
    told = json.dumps(body | {field: broken[field]}).encode()
    status, _, answer = server.post("/v1/fine_tuning/alpha/graders/run", told)
    assert status == 400 and "half a surrogate pair" in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("field", ["grader", "item"])
@pytest.mark.parametrize("floors", [50, 150, 900, 40_000])
def test_deep_bodies(server, field, floors):
    """No depth ends anything."""
    deep = "[" * floors + "]" * floors
    told = {"grader": json.dumps(CHECK), "item": '{"name": "x"}'}
    told[field] = told[field][:-1] + f', "x": {deep}}}'
    body = f'{{"grader": {told["grader"]}, "model_sample": "", "item": {told["item"]}}}'
    status, _, answer = server.post("/v1/fine_tuning/alpha/graders/run", body.encode())
    assert status == (200 if (field, floors) == ("item", 50) else 400), answer
