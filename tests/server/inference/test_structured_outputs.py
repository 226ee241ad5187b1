"""Answers with a format and tool calls that have to be made, through the unmodified openai SDK."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jsonschema
import llguidance.hf as hf
import numpy as np
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexllm_jax.engine.sampling.constraints import Constraint, Constraints
from flexllm_jax.engine.sampling.structured_outputs import (
    StructuredOutputsParams,
    TokenMatchers,
    quote,
)
from flexllm_jax.server.inference.response_format import ResponseFormat
from flexllm_jax.server.inference.tools.grammar import calls_of
from tests.server.inference.test_tool_calls import BY_NAME, parse

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "temperature": 0}


class Pet(BaseModel):
    """A random model comes to its end."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)
    tame: bool


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    schema["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"$ref": "#/$defs/small"}),
    tool("get_weather", place={"enum": ["Paris", "Oslo"]}),
]
TOOLS[0]["function"]["parameters"]["$defs"] = {"small": {"type": "integer", "enum": [1, 2]}}


def test_parse_of_the_sdk(client):
    """`response_format` is made of a class, and its answer becomes one."""
    compact = {"structured_outputs": {"disable_any_whitespace": True}}
    for seed in range(3):
        answer = client.chat.completions.parse(
            **ASK | {"temperature": 1.5}, seed=seed, response_format=Pet, extra_body=compact
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Pet)


def test_a_stream_is_the_same(client):
    form = schema_format(Pet.model_json_schema())
    extra = {"structured_outputs": {"disable_any_whitespace": True}}
    whole = client.chat.completions.create(**ASK, response_format=form, extra_body=extra)
    chunks = list(
        client.chat.completions.create(**ASK, response_format=form, extra_body=extra, stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    jsonschema.validate(json.loads(text), Pet.model_json_schema())
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_any_object(client):
    answer = client.chat.completions.create(
        **ASK, response_format={"type": "json_object"}, max_tokens=8
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")
    answer = client.chat.completions.create(**ASK, response_format={"type": "text"}, max_tokens=8)
    assert not answer.choices[0].message.content.lstrip().startswith("{")


def test_an_objects_schema_as_other_servers_clients_write_it():
    schema = Pet.model_json_schema()
    wanted = ResponseFormat.model_validate(schema_format(schema)).wanted()
    for name in ("schema", "value"):
        form = ResponseFormat.model_validate({"type": "json_object", name: schema})
        assert form.wanted() == wanted == {"json": schema}
        with pytest.raises(ValidationError, match="schema, or value, goes with the type json_obj"):
            ResponseFormat.model_validate({"type": "text", name: schema})
    assert ResponseFormat(type="json_object").wanted() == {"json_object": True}
    assert ResponseFormat(type="text").wanted() == {}


@pytest.mark.parametrize("model", ["tiny", "random"])
def test_completions(client, model):
    """With vLLM's extra, of the base model and of an adapter; several prompts at once."""
    answer = client.completions.create(
        model=model,
        prompt=["a", "b", "c"],
        max_tokens=30,
        extra_body={"structured_outputs": {"choice": ["left", "right"]}},
    )
    assert {choice.text for choice in answer.choices} <= {"left", "right"}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


@pytest.mark.parametrize("name", ["add", "get_weather"])
def test_a_function_that_has_to_be_called(client, name):
    choice = {"type": "function", "function": {"name": name}}
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == name
    schema = next(t["function"] for t in TOOLS if t["function"]["name"] == name)["parameters"]
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_some_function_has_to_be_called(client):
    ask = ASK | {"temperature": 1.0, "tools": TOOLS, "tool_choice": "required"}
    for seed in range(3):
        answer = client.chat.completions.create(**ask, seed=seed, parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls
        chunks = list(
            client.chat.completions.create(**ask, seed=seed, parallel_tool_calls=False, stream=True)
        )
        deltas = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()]
        assert deltas[0].function.name == call.function.name
        assert "".join(d.function.arguments for d in deltas) == call.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_vocabulary_is_read_once_and_when_it_is_needed(tokenizer, monkeypatch):
    """It takes seconds: an engine's start does not wait for it, nor one request for another's."""
    made, read = [], hf.from_tokenizer

    def counted(*given):
        made.append(read(*given))
        return made[-1]

    monkeypatch.setattr(hf, "from_tokenizer", counted)
    matchers = TokenMatchers(tokenizer, 272, [tokenizer.eos_token_id])
    assert not made
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(matchers.match, [StructuredOutputsParams(regex="a+")] * 4))
    assert len(made) == 1


@pytest.mark.parametrize("form", BY_NAME)
def test_what_the_grammar_of_calls_allows_is_what_the_parser_finds(form, tokenizer):
    """Random walks through it, to its end."""
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    constraints = Constraints(tokenizer, 272, [tokenizer.eos_token_id])
    structure, counts = calls_of(BY_NAME[form], schemas, quote, parallel=True), set()
    for seed in range(12):
        random, tokens = np.random.default_rng(seed), []
        matcher = constraints.matchers.match(structure)
        while not tokens or tokens[-1] != tokenizer.eos_token_id:
            (mask,) = constraints.allowed([(Constraint(matcher), 0)], 1)
            bits = (mask[:, None] >> np.arange(32)) & 1
            tokens.append(int(random.choice(np.flatnonzero(bits))))
            assert matcher.consume_token(tokens[-1])
        text, calls = parse(form, list(tokenizer.decode(tokens[:-1])), functions=schemas)
        assert calls and not text.strip()
        counts.add(len(calls))
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
    assert (max(counts) > 1) == (form != "llama")


ANSWERS = {
    "json": {"json": schema_format({"const": {"a": 1}})["json_schema"]["schema"]},
    "choice": {"choice": ("yes", "no / never")},
    "regex": {"regex": "a{2,3}/[b}]"},
    "grammar": {"grammar": 'start: word+\nword: "a}" | "b"'},
}


@pytest.mark.parametrize("form", ["hermes", "llama"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_with_a_structure_or_calls(form, kind, tokenizer):
    """Every answer that the structure alone allows, every call, and nothing else."""
    matchers = TokenMatchers(tokenizer, 272, [tokenizer.eos_token_id])
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    answer = StructuredOutputsParams(**ANSWERS[kind])
    whole = calls_of(BY_NAME[form], schemas, quote, parallel=True, answer=answer)
    call = calls_of(BY_NAME[form], schemas, quote, parallel=True)

    def allows(structure, text):
        matcher = matchers.match(structure)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    key = "arguments" if form == "hermes" else "parameters"
    called = f'{{"name": "get_weather", "{key}": {{"place": "Oslo"}}}}'
    called = f"<tool_call>{called}</tool_call>" if form == "hermes" else called
    assert allows(whole, called) and allows(call, called) and not allows(answer, called)
    texts = ['{"a": 1}', '{"a": 2}', "yes", "no / never", "aa/b", "aaa/}", "a/b", "a}b", "b", "c"]
    for text in texts:
        assert allows(whole, text) == allows(answer, text), text
        assert not allows(call, text)
    assert any(allows(answer, text) for text in texts)


def test_a_format_is_for_answers(client):
    """A call that has to be made is none; beside tools that may be called either is whole."""
    form = schema_format(Pet.model_json_schema())
    extra = {"structured_outputs": {"disable_any_whitespace": True}}
    ask = ASK | {"tools": TOOLS, "response_format": form, "extra_body": extra}
    forced = client.chat.completions.create(
        **ask | {"temperature": 1.0}, seed=1, tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    assert forced.finish_reason == "tool_calls" and forced.message.tool_calls
    for seed in range(4):
        free = client.chat.completions.create(**ask | {"temperature": 1.5}, seed=seed).choices[0]
        if not free.message.tool_calls:
            jsonschema.validate(json.loads(free.message.content), form["json_schema"]["schema"])
    text = client.chat.completions.create(
        **ask | {"response_format": {"type": "text"}, "extra_body": {}}, max_tokens=4
    )
    assert text.usage.completion_tokens == 4
    chosen = client.chat.completions.create(
        **ASK, tools=TOOLS, extra_body={"structured_outputs": {"choice": ["left", "right"]}}
    )  # vLLM's: the whole output
    assert chosen.choices[0].message.content in ("left", "right")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": schema_format({"type": "strin"})}, "response_format: Invalid type"),
        ({"response_format": schema_format({"not": {}})}, "response_format: Unimplemented keys"),
        ({"extra_body": {"structured_outputs": {}}}, "structured_outputs has nothing"),
        ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs: .*unclosed"),
        ({"extra_body": {"structured_outputs": {"yaml": "a"}}}, "structured_outputs has yaml"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "mul"}}},
            "tool_choice: got",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": "required",
                "extra_body": {"structured_outputs": {"regex": "a"}},
            },
            "tool_choice: an output cannot be a call and have a structure",
        ),
        (
            {"tools": [tool("odd", a={"type": "strin"})], "tool_choice": "required"},
            "tools: .*Invalid type",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(client, fields, says):
    with pytest.raises(openai.BadRequestError, match=says) as error:
        client.chat.completions.create(**ASK, **fields)
    assert error.value.param == says.split(":")[0].split()[0]
