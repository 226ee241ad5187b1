"""Structured outputs: every token is the one that transformers takes of those that a brute-force
matcher allows, whatever else the engine does; and what is finished has its schema."""

import json

import jsonschema
import numpy as np
import pytest
import regex
import torch

from flexllm_jax import SamplingParams, StructuredOutputsParams
from tests.engines import (
    given_back,
    job_config,
    letter_rows,
    load_with_adapter,
    random_prompts,
    reference_greedy,
    reference_logprobs,
    save_random_adapter,
    write_rows,
)

PROMPTS = random_prompts([23, 5, 40])
CHOICES = ("yes", "no way", 'a "quoted" \\ one')
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
CASES = {
    "regex": ({"regex": r"(ab|ba)+c{3,9}[!-@]{2}"}, r"(ab|ba)+c{3,9}[!-@]{2}"),
    "date": ({"regex": r"[12][0-9]{3}-(0[0-9]|1[0-2]) ?!*"}, r"[12][0-9]{3}-(0[0-9]|1[0-2]) ?!*"),
    "choice": ({"choice": CHOICES}, "|".join(map(regex.escape, CHOICES))),
    "grammar": ({"grammar": 'start: "<" (start | "x") ">"'}, r"(<(?:(?1)|x)>)"),
}


def matching(fields, **others):
    structure = StructuredOutputsParams(**fields)
    return SamplingParams(max_tokens=40, structured_outputs=structure, **others)


@pytest.fixture(scope="module")
def texts(llm):
    """The text of each token that is plain ASCII."""
    found = {token: llm.tokenizer.decode([token]) for token in range(272)}
    special = set(llm.tokenizer.all_special_ids)
    return {t: text for t, text in found.items() if t not in special and text.isascii() and text}


@pytest.fixture(scope="module")
def expect(texts, llm):
    """Greedy tokens of a model in transformers, of those that may begin a text with `pattern`."""
    eos = llm.tokenizer.eos_token_id

    def run(model, prompt, pattern, count=40):
        whole = regex.compile(pattern)

        def allowed(_, tokens):
            before = "".join(texts[t] for t in tokens[len(prompt) :].tolist() if t != eos)
            ends = [eos] if whole.fullmatch(before) else []
            return ends + [
                t for t, text in texts.items() if whole.fullmatch(before + text, partial=True)
            ]

        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
            prefix_allowed_tokens_fn=allowed,
        )
        return output[0, len(prompt) :].tolist()

    return run


@pytest.fixture(scope="module")
def adapter(llm, llama, tmp_path_factory):
    path = save_random_adapter(llama, tmp_path_factory.mktemp("adapter") / "structured")
    with given_back():
        llm.load_adapter("structured", path)
        yield load_with_adapter(llama, path)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(case, llm, llama_reference, adapter, expect):
    fields, pattern = CASES[case]
    models = {None: llama_reference, "structured": adapter}
    for name, model in models.items():
        for prompt in PROMPTS[:2]:
            (answer,) = llm.generate([prompt], matching(fields), name)
            expected = expect(model, prompt, pattern)
            assert answer.outputs[0].token_ids == expected
            finished = expected[-1] == llm.tokenizer.eos_token_id
            assert answer.outputs[0].finish_reason == ("stop" if finished else "length")
            if finished:
                assert regex.fullmatch(pattern, answer.outputs[0].text)


def test_beside_other_requests_and_a_job(llm, llama_reference, expect, tmp_path):
    """Some of a step have structures and some have none; a job learns beside them."""
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20))
    job = llm.finetune(job_config("beside-structures", rows, steps=500))
    while not job.steps:
        assert job.status == "running", job.reason
    steps, params, expected = job.steps, [], []
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    for prompt in PROMPTS:
        params.append(free)
        expected.append(reference_greedy(llama_reference, prompt, 40))
        for fields, pattern in CASES.values():
            params.append(matching(fields))
            expected.append(expect(llama_reference, prompt, pattern))
    prompts = [prompt for prompt in PROMPTS for _ in range(1 + len(CASES))]
    answers = llm.generate(prompts, params)
    assert job.steps > steps, "no optimizer step fell within the requests: nothing is shown"
    job.cancel()
    assert [answer.outputs[0].token_ids for answer in answers] == expected


def test_a_job_learns_the_same_beside_structures(llm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20))
    alone = llm.finetune(job_config("alone", rows, steps=12)).wait(120)
    beside = llm.finetune(job_config("beside", rows, steps=12))
    while beside.status == "running":
        llm.generate(PROMPTS, matching(CASES["date"][0]))
    np.testing.assert_allclose(beside.losses, alone.losses, rtol=1e-4)


def test_what_is_drawn_has_its_schema(llm):
    """At a high temperature, in a pool too small for all: preempted requests go on as they were."""
    structure = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)
    options = {"max_tokens": 100, "temperature": 2.0, "structured_outputs": structure}
    params = [SamplingParams(seed=seed, **options) for seed in range(12)]
    prompts = random_prompts([40] * len(params), seed=3)
    llm.engine.observations.clear()
    answers = llm.generate(prompts, params)
    assert any(step.preempted for step in llm.engine.observations)
    texts = [answer.outputs[0].text for answer in answers]
    for answer, text in zip(answers, texts, strict=True):
        assert answer.outputs[0].finish_reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) > len(texts) / 2
    one_by_one = [llm.generate([prompts[i]], params[i])[0].outputs[0].text for i in range(4)]
    assert one_by_one == texts[:4]


def test_logprobs_are_those_of_the_model(llm, llama_reference):
    """Of all tokens, not of those that were allowed."""
    (answer,) = llm.generate([PROMPTS[1]], matching(CASES["regex"][0], logprobs=1))
    output = answer.outputs[0]
    expected = reference_logprobs(llama_reference, PROMPTS[1] + output.token_ids)
    for i, (token, reported) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        at = len(PROMPTS[1]) - 1 + i
        assert reported[token] == pytest.approx(expected[at, token], abs=1e-4)
        assert max(reported.values()) == pytest.approx(expected[at].max(), abs=1e-4)


def test_several_outputs_and_a_stop_string(llm):
    (answer,) = llm.generate([PROMPTS[0]], matching({"json_object": True}, n=3, temperature=1.0))
    assert len({output.text for output in answer.outputs}) == 3
    assert all(output.text.lstrip().startswith("{") for output in answer.outputs)
    (answer,) = llm.generate([PROMPTS[0]], matching(CASES["date"][0], stop=("-",)))
    assert regex.fullmatch(r"[12][0-9]{3}", answer.outputs[0].text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "structured_outputs has nothing: give exactly one of json"),
        ({"regex": "a", "json_object": True}, "json_object and regex: give exactly one"),
        ({"json": ["type"]}, "structured_outputs.json=.* must be a JSON schema"),
        ({"choice": []}, r"structured_outputs.choice=\(\) must be strings that are not empty"),
        ({"choice": ["a", ""]}, "must be strings that are not empty"),
        ({"regex": "(ab"}, "structured_outputs: .*unclosed group"),
        ({"regex": "(?=a)b"}, "structured_outputs: .*look-around"),
        ({"json": {"type": "strin"}}, "structured_outputs: Invalid type: strin"),
        ({"json": "{"}, "structured_outputs: .*EOF"),
        ({"json": {"not": {"type": "string"}}}, "structured_outputs: .*not"),
        ({"json": {"$ref": "#"}}, "structured_outputs: "),
        ({"json": '{"properties": {"a": ' * 10_000}, "structured_outputs: recursion limit"),
        ({"regex": "(" * 10_000}, r"structured_outputs: .{,320}$"),
        ({"grammar": 'start: "a" missing'}, "structured_outputs: .*missing"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(llm, fields, says):
    with pytest.raises(ValueError, match=says) as error:
        llm.generate([PROMPTS[0]], matching(fields))
    assert "\n" not in str(error.value)


def test_what_turns_out_to_be_too_much_fails_alone(llm, llama_reference):
    fields = {f"a{i}": {"type": "string", "maxLength": 5} for i in range(2000)}
    structure = StructuredOutputsParams(
        json={"type": "object", "properties": fields, "required": ["a1999"]},
        disable_any_whitespace=True,
    )
    with pytest.raises(RuntimeError, match=r"structured_outputs: .*Current row has"):
        llm.generate([PROMPTS[0]], SamplingParams(max_tokens=20, structured_outputs=structure))
    (answer,) = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=9, ignore_eos=True))
    assert answer.outputs[0].token_ids == reference_greedy(llama_reference, PROMPTS[1], 9)


@pytest.mark.parametrize(
    ("pattern", "least", "as_if"),
    [("(ab|ba)*", 0, ""), ("(ab|ba)*", 5, "(ab|ba){3}"), ("[abc]{3}", 9, "[abc]{3}")],
    ids=["none", "held back", "nothing else may follow"],
)
def test_min_tokens_holds_the_end_back(pattern, least, as_if, llm, llama_reference, expect):
    """Where the structure lets the output go on; the bias makes it end as soon as it may."""
    biases = {llm.tokenizer.eos_token_id: 100.0}
    params = matching({"regex": pattern}, min_tokens=least, logit_bias=biases, n=2)
    for output in llm.generate([PROMPTS[0]], params)[0].outputs:
        assert output.token_ids == expect(llama_reference, PROMPTS[0], as_if)
        assert output.finish_reason == "stop" and regex.fullmatch(as_if, output.text)


def test_min_tokens_holds_stop_tokens_back(llm, texts):
    """As many as there are: the device itself can hold back sixteen."""
    (token,) = (token for token, text in texts.items() if text == "a")
    others = {t for t, text in texts.items() if text not in "ab"}
    stops = {"stop_token_ids": (token, *sorted(others)[:20]), "logit_bias": {token: 100.0}}
    (answer,) = llm.generate([PROMPTS[0]], matching({"regex": "[ab]{8}"}, min_tokens=4, **stops))
    assert answer.outputs[0].text == "bbbb" and answer.outputs[0].token_ids[4:] == [token]


@pytest.mark.parametrize("field", ["json", "regex", "choice", "grammar"])
def test_what_is_false_asks_for_nothing(field):
    alone = StructuredOutputsParams(json_object=True)
    assert StructuredOutputsParams(json_object=True, **{field: False}) == alone
