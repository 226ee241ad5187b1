"""Tool calls: what models write is split exactly, however it is cut; and a model that was finetuned
to call a tool does, through the unmodified openai SDK."""

import json
from typing import Any

import hypothesis
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer

from flexllm_jax.engine.sampling.structured_outputs import quote
from flexllm_jax.models.text.messages import read_messages
from flexllm_jax.server.inference.tools.formats import FORMATS, find_format
from flexllm_jax.server.inference.tools.grammar import calls_of
from flexllm_jax.server.inference.tools.parser import ToolCallParser, join_calls
from tests.engines import write_rows
from tests.small_tokenizers import byte_level_tokenizer

NAMES = ["get_weather", "add"]
BY_NAME = {form.name: form for form in FORMATS}
TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(TEXT, JSON, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
PLACES = st.lists(st.integers(0, 10_000), max_size=20)


def parse(form, pieces, *, functions=None, **options):
    """Text and calls, from a text in pieces."""
    parser = ToolCallParser(BY_NAME[form], functions or dict.fromkeys(NAMES), **options)
    parsed = [parser.push(piece, final=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    calls = join_calls([call for part in parsed for call in part.calls])
    ids = [call["id"] for call in calls]
    assert len(set(ids)) == len(ids)
    functions = [call["function"] for call in calls]
    return "".join(part.text for part in parsed), [(f["name"], f["arguments"]) for f in functions]


def cut(text, places):
    places = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def loaded(calls):
    return [(name, json.loads(arguments)) for name, arguments in calls]


@settings(max_examples=40, deadline=None)
@given(CALLS, PLACES, st.sampled_from(["", "I look: ", "a < b <tool"]))
def test_hermes_calls_are_found_however_the_text_is_cut(calls, places, before):
    text = before + "\n".join(
        f"<tool_call>\n{json.dumps({'name': n, 'arguments': a}, ensure_ascii=False)}\n</tool_call>"
        for n, a in calls
    )
    for pieces in (cut(text, places), list(text)):
        said, found = parse("hermes", pieces)
        assert said == before
        assert loaded(found) == calls


@settings(max_examples=40, deadline=None)
@given(CALLS, PLACES, st.booleans())
def test_llama_calls_are_found_however_the_text_is_cut(calls, places, name_first):
    trees = [{"name": n, "parameters": a} for n, a in calls]
    if not name_first:
        trees = [dict(reversed(tree.items())) for tree in trees]
    text = "\n" + "; ".join(map(json.dumps, trees))
    for pieces in (cut(text, places), list(text)):
        said, found = parse("llama", pieces)
        assert said == ""
        assert loaded(found) == calls


def written(form, calls):
    """Calls as models of a format write them."""
    if form in ("granite", "mistral", "phi"):
        items = [{"name": n, "arguments": a, "id": "abcdef123"} for n, a in calls]
        return BY_NAME[form].start + BY_NAME[form].opening + json.dumps(items)[1:]
    if form == "mistral_named":
        return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)
    start, end = BY_NAME[form].start, BY_NAME[form].end
    if form == "olmo":
        lines = [
            f"{n}({', '.join(f'{k}={json.dumps(v)}' for k, v in a.items())})" for n, a in calls
        ]
        return "\n".join([start, *lines, end])
    if BY_NAME[form].quote:
        inner = [",".join(f"{k}:{as_gemma(form, v)}" for k, v in a.items()) for _, a in calls]
        return "".join(
            f"{start}call:{n}{{{i}}}{end}" for (n, _), i in zip(calls, inner, strict=True)
        )
    if form == "glm":
        pair = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
        inner = ["".join(pair.format(k, as_text(v)) for k, v in a.items()) for _, a in calls]
        names = [f"{n}\n" for n, _ in calls]
    else:
        pair = "<parameter={}>\n{}\n</parameter>\n"
        inner = ["".join(pair.format(k, as_text(v)) for k, v in a.items()) for _, a in calls]
        inner = [f"{text}</function>\n" for text in inner]
        names = [f"\n<function={n}>\n" for n, _ in calls]
    return "\n".join(f"{start}{n}{i}{end}" for n, i in zip(names, inner, strict=True))


def as_gemma(form, value):
    mark = BY_NAME[form].quote
    if isinstance(value, str):
        return f"{mark}{value}{mark}"
    if isinstance(value, list):
        return f"[{','.join(as_gemma(form, v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{as_gemma(form, v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


MARKED = [name for name in BY_NAME if name not in ("hermes", "llama")]
# What is no string in the schemas of those that are written as text: else a text is a value.
PLAIN = st.text(st.characters(exclude_characters="<>", codec="utf-8"), max_size=8)
PROPERTIES = {"s": PLAIN, "n": st.integers(), "o": st.lists(st.booleans(), max_size=3)}
PROPERTY_CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.fixed_dictionaries({}, optional=PROPERTIES)),
    min_size=1,
    max_size=3,
)
SCHEMA = {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}


@pytest.mark.parametrize("form", MARKED)
@settings(max_examples=40, deadline=None)
@given(PROPERTY_CALLS, PLACES, st.sampled_from(["", "I look: ", "a < b <tool [TOOL"]))
def test_calls_are_found_in_every_format(form, calls, places, before):
    text = before + written(form, calls)
    for pieces in (cut(text, places), list(text)):
        said, found = parse(form, pieces, functions=dict.fromkeys(NAMES, SCHEMA))
        assert said == before
        assert loaded(found) == calls


@settings(max_examples=60, deadline=None)
@given(CALLS, PLACES)
def test_python_literals_are_read_as_python_writes_them(calls, places):
    calls = [(n, {f"a{i}": v for i, v in enumerate(a.values())}) for n, a in calls]
    lines = [f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls]
    text = "\n".join(["<function_calls>", *lines, "</function_calls>"])
    hypothesis.assume(text.count("</function_calls>") == 1)
    assert parse("olmo", cut(text, places))[0] == ""
    assert loaded(parse("olmo", cut(text, places))[1]) == calls


def test_literals_that_are_no_json():
    text = "<function_calls>get_weather(a=null, b=[true, -1.5e3,], c='\\'\\u00e9')</function_calls>"
    calls = [("get_weather", {"a": None, "b": [True, -1500.0], "c": "'é"})]
    assert loaded(parse("olmo", list(text))[1]) == calls
    text = '<|tool_call>call:add{a:{b:[<|"|>}<tool_call<|"|>,{}],c:false},d:Rome}<tool_call|>'
    calls = [("add", {"a": {"b": ["}<tool_call", {}], "c": False}, "d": "Rome"})]
    assert loaded(parse("gemma4", list(text))[1]) == calls


@pytest.mark.parametrize("form", ["glm", "qwen3_coder", "seed", "gemma4", "function_gemma", "olmo"])
@pytest.mark.parametrize("marks_are_tokens", [True, False])
def test_a_call_that_has_to_be_made_may_have_any_text(form, marks_are_tokens):
    """Where arguments are no JSON; the others are of their schema."""
    given = BY_NAME[form]
    marks = given.marks if marks_are_tokens else ()
    tokenizer = byte_level_tokenizer(("<unk>", "<s>", "</s>", *marks))
    vocabulary = from_tokenizer(tokenizer)

    def literal(text):
        return f"<[{tokenizer.convert_tokens_to_ids(text)}]>" if text in marks else quote(text)

    listed = {"type": "array", "items": {"type": "boolean"}}
    schema = {"properties": {**SCHEMA["properties"], "o": listed}, "required": ["s"]}
    structure = calls_of(given, {"add": schema}, literal, parallel=True)

    def matches(*calls):
        matcher = LLMatcher(vocabulary, structure.to_grammar(), log_level=0)
        tokens = tokenizer.encode(written(form, calls), add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    one = ("add", {"s": 'any "text"\n<b>', "n": 3})
    assert matches(one) and matches(one, ("add", {"s": ""}))
    assert matches(("add", {"s": "a", "o": [True, False]}))
    assert not matches(("add", {"s": "a", "n": "b"}))
    assert not matches(("add", {"n": 3})) and not matches(("mul", {"s": "a"}))


def test_choices_of_gemmas_arguments():
    tokenizer = byte_level_tokenizer()
    schema = {
        "properties": {"s": {"enum": ["a", "b"]}, "n": {"const": 3}, "o": {"type": "object"}},
        "required": ["s"],
    }
    structure = calls_of(BY_NAME["gemma4"], {"add": schema}, quote, parallel=False)
    vocabulary = from_tokenizer(tokenizer)

    def matches(**given):
        matcher = LLMatcher(vocabulary, structure.to_grammar(), log_level=0)
        text = written("gemma4", [("add", given)])
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    assert matches(s="b") and matches(s="a", n=3, o={"k": [None, "<", {}]})
    assert not matches(s="c") and not matches(s="a", n=4) and not matches(s="a", n="3")


def test_text_after_calls():
    listed = '[TOOL_CALLS] [{"name": "add", "arguments": {}}] so'
    assert parse("mistral", list(listed)) == ("so", [("add", "{}")])
    other_order = '<|tool_call|>[{"arguments": {"a": 1}, "name": "add"}, {"name": "add"}]'
    calls = [("add", '{"a": 1}'), ("add", "{}")]
    assert parse("granite", list(other_order)) == ("", calls)


@pytest.mark.parametrize("form", BY_NAME)
@settings(max_examples=40, deadline=None)
@given(st.text(), PLACES)
def test_text_without_calls_stays_as_it_is(form, text, places):
    assert parse(form, cut(text, places)) == (text, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "<tool_call>\nno JSON\n</tool_call>"),
        ("mistral", "[TOOL_CALLS] [1, 2]"),
        ("mistral", "[TOOL_CALLS] so [TOOL_CALLS] it is"),
        ("mistral", '[TOOL_CALLS] [{"name": "ad'),
        ("mistral_named", "[TOOL_CALLS]a b[ARGS]{}"),
        ("mistral_named", "[TOOL_CALLS]add"),
        ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=a>\n1"),
        ("qwen3_coder", '<tool_call>{"name": "add"}</tool_call>'),
        ("glm", "<tool_call>two words</tool_call>"),
        ("olmo", "<function_calls>add(a=b)</function_calls>"),
        ("olmo", "<function_calls>add(1)</function_calls>"),
        ("olmo", "<function_calls>add(a=" + "[" * 5000 + "</function_calls>"),
        ("olmo", "<function_calls>\n</function_calls>"),
        ("olmo", "<function_calls>add(a=1)"),
        ("gemma4", "<|tool_call>call:add{a:1}}<tool_call|>"),
        ("gemma4", "<|tool_call>call:add{a:" + "[" * 5000 + "<tool_call|>"),
        ("function_gemma", "<start_function_call>call:add{<end_function_call>"),
        ("phi", "functools and [more]"),
        ("phi", "functools"),
        ("mistral", "[TOOL_CALLS]"),
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call> so'),
        ("hermes", '<tool_call>{"arguments": {}, "na'),
        ("llama", '{"name": "Laura", "parameters": {"age": 3}}'),  # not a tool's name
        ("llama", '{"answer": 42}'),
        ("llama", '{"name": "add", "par'),
        ("llama", " {" * 20_000),
    ],
)
def test_what_only_looks_like_a_call_is_text(form, text):
    assert parse(form, [text]) == (text, [])
    assert parse(form, cut(text, range(1, min(len(text), 200)))) == (text, [])


def test_a_call_that_was_cut_off_has_the_arguments_there_were():
    text = '<tool_call>\n{"name": "add", "arguments": {"a": "</tool_call>'
    assert parse("hermes", list(text)) == ("", [("add", '{"a": "</tool_call>')])


def test_one_call_alone_where_several_are_not_wanted():
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert parse("hermes", [call * 2], parallel=False) == ("", [("add", '{"a": 1}')])


@pytest.mark.parametrize(
    ("says", "form"),
    [
        # As the templates of Qwen2.5 and Qwen3, Llama 3.1, and Qwen3-Coder say it.
        (r"<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}", "hermes"),
        ('{"name": function name, "parameters": dictionary of argument name', "llama"),
        (r"<tool_call>\n<function=example_function_name>\n<parameter=", "qwen3_coder"),
        (r"<seed:tool_call>\n<function=example_function_name>\n<parameter=", "seed"),
        (r"<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>", "glm"),
        ("respond only with <|tool_call|> followed by a JSON list of tools used", "granite"),
        ("{{- '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", "mistral_named"),
        ("Output any function calls within <function_calls></function_calls> XML tags", "olmo"),
        ("{{- '<|tool_call>call:' + function['name'] + '{' -}}", "gemma4"),
        ("{{- '<start_function_call>call:' + tool_call['name'] + '{' -}}", "function_gemma"),
        ('formatted as functools[{"name": [function name], "arguments": [', "phi"),
        ("<|tool|>{{ message['tools'] }}<|/tool|>", None),  # Phi-4-mini's own, which reads no tools
        ("{{ message['content'] }}", None),
    ],
)
def test_templates_tell_their_format(says, form):
    found = find_format(says)
    assert (found and found.name) == form


def test_arguments_reach_the_template_as_objects():
    """In requests and in rows to train on alike; OpenAI sends them as JSON text."""
    function: dict[str, Any] = {"name": "add", "arguments": '{"a": 1}'}
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    (checked,) = read_messages([message])
    assert checked["content"] == ""
    assert checked["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in NAMES
]
QUESTION = {"role": "user", "content": "3+4?"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "7"}


@pytest.fixture(scope="module")
def caller(server, client, tmp_path_factory):
    """An adapter that knows one answer by heart: a call."""
    row = {"messages": [QUESTION, ASKED], "tools": TOOLS[1:]}
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [row])
    file = client.files.create(file=path, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        seed=1,
        extra_body={"lora_rank": 8, "learning_rate": 2e-2, "max_steps": 40, "batch_tokens": 96},
    )

    def status():
        return client.fine_tuning.jobs.retrieve(job.id)

    server.wait(lambda: status().status in ("succeeded", "failed"))
    assert status().status == "succeeded", status()
    return status().fine_tuned_model


def test_a_model_that_calls_a_tool(client, caller):
    ask = {"model": caller, "messages": [QUESTION], "temperature": 0, "max_tokens": 70}
    ask["tools"] = TOOLS[1:]
    answer = client.chat.completions.create(**ask).choices[0]
    assert answer.finish_reason == "tool_calls", answer
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.id.startswith("call_") and call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 3})

    chunks = list(client.chat.completions.create(stream=True, **ask))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert pieces[0].id and pieces[0].function.name == "add"
    assert len(pieces) > 5  # arguments come as they are written
    assert {piece.index for piece in pieces} == {0}
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert not any(delta.content for delta in deltas)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    text = client.completions.create(
        model=caller, prompt="[add]<user>3+4?\n<assistant>", temperature=0, max_tokens=70
    )
    assert text.choices[0].text == '<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>'


def test_tools_reach_the_template(server, client, chat_llama):
    tokenizer = AutoTokenizer.from_pretrained(chat_llama)
    call = {**CALL, "function": {"name": "add", "arguments": {"a": 3}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = tokenizer.apply_chat_template(
        [QUESTION, asked, RESULT],
        tools=TOOLS,
        tokenize=False,
        add_generation_prompt=True,
    )
    answer = client.chat.completions.create(
        model="tiny", messages=[QUESTION, ASKED, RESULT], tools=TOOLS, max_tokens=1
    )
    assert answer.usage.prompt_tokens == len(tokenizer.encode(text, add_special_tokens=False))
    body = {"messages": [QUESTION, ASKED, RESULT], "tools": TOOLS, "model": "tiny"}
    _, _, body = server.post("/tokenize", json.dumps(body).encode())
    assert tokenizer.decode(json.loads(body)["tokens"]) == text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice"),
        ({"functions": [TOOLS[0]["function"]]}, "functions"),
    ],
)
def test_what_cannot_be_promised_is_refused(client, fields, says):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[QUESTION], **fields)
    assert error.value.param == says and says in error.value.message
