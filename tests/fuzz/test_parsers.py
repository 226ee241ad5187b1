"""What clients send, made up: structures, conversations, datasets and adapters are read, or refused
in the one way each has; nothing else comes out of a parser. Here a few seconds of it; every night,
and with `make fuzz`, ten minutes.
"""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from flexllm_jax.finetune.data import FORMATS, Dataset, DatasetError, load_dataset
from flexllm_jax.peft.adapter import Adapter, AdapterError, LoraConfig, init_adapter
from flexllm_jax.peft.hf.files import CONFIG
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.structures import StructureChecks
from flexllm_jax.server.inference.text import TextCodec
from tests.finetune.test_data import CHATML
from tests.peft.test_hf_targets import MODEL
from tests.small_tokenizers import byte_level_tokenizer

fuzz = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def fields(**known):
    """Objects with some of the known fields, mostly as they should be."""
    return st.fixed_dictionaries({}, optional={n: v | anything for n, v in known.items()})


# -- structures -----------------------------------------------------------------------------------

types = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])
schemas = st.recursive(
    fields(
        type=types | st.lists(types),
        enum=st.lists(scalars),
        const=scalars,
        pattern=st.text(max_size=20),
        format=st.sampled_from(["date", "email", "uuid", "x"]),
        minLength=st.integers(),
        maxLength=st.integers(),
        minimum=st.floats(),
        maximum=st.floats(),
    )
    | st.builds(lambda i: {"$ref": f"#/$defs/{i}"}, st.integers(0, 3)),
    lambda inner: fields(
        properties=st.dictionaries(st.text(max_size=8), inner),
        required=st.lists(st.text(max_size=8)),
        additionalProperties=inner,
        items=inner,
        minItems=st.integers(-1, 10**6),
        maxItems=st.integers(-1, 10**6),
        anyOf=st.lists(inner, max_size=3),
        allOf=st.lists(inner, max_size=3),
        oneOf=st.lists(inner, max_size=3),
    ).flatmap(
        lambda own: (
            st.just(own)
            | st.lists(inner, max_size=4).map(
                lambda defs: own | {"$defs": {str(i): d for i, d in enumerate(defs)}}
            )
        )
    ),
    max_leaves=10,
)
regexes = st.recursive(
    st.sampled_from(["a", "[a-z]", ".", r"\d", r"\w", "é", "^", "$", "(?i)b", "[^", "|"]),
    lambda inner: (
        st.builds("({}){}".format, inner, st.sampled_from(["", "*", "+?", "{0,1000}"]))
        | st.builds("{}{}".format, inner, inner)
        | st.builds("{}|{}".format, inner, inner)
    ),
    max_leaves=12,
)
words = ["start", "a", "B", ":", "|", '"x"', "/[a-z]+/", "(", ")", "[", "]", "*", "+", "?", "~"]
words += ["1..9", "%ignore", "%json", "{}", "%lark", "\n"]
grammars = st.lists(st.sampled_from(words), max_size=25).map(lambda w: f"start: {' '.join(w)}\n")


@pytest.fixture(scope="module")
def checks():
    checks = StructureChecks(byte_level_tokenizer())
    yield checks
    checks.close()


@fuzz
@given(
    st.builds(lambda v: {"json": v}, schemas)
    | st.builds(lambda v: {"regex": v}, regexes | st.text())
    | st.builds(lambda v: {"grammar": v}, grammars | st.text())
    | st.builds(lambda v: {"choice": v}, st.lists(st.text(), max_size=5))
    | fields(json=schemas, regex=st.text(), json_object=st.booleans()).map(
        lambda f: {n: v for n, v in f.items() if n in ("json", "regex", "json_object")}
    )
)
def test_structures(checks, given_fields):
    try:
        grammar = StructuredOutputsParams(**given_fields).to_grammar()
        asyncio.run(checks.check(Client("a"), grammar))
    except ValueError as error:
        assert str(error)
    asyncio.run(checks.check(Client("a"), StructuredOutputsParams(regex="a").to_grammar()))


# -- conversations --------------------------------------------------------------------------------

roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])
contents = st.text() | st.lists(fields(type=st.just("text"), text=st.text()), max_size=3)
functions = fields(
    name=st.text(max_size=8), arguments=st.text() | st.dictionaries(st.text(), scalars)
)
messages = fields(
    role=roles,
    content=contents,
    tool_calls=st.lists(fields(type=st.just("function"), function=functions), max_size=2),
    tool_call_id=st.text(max_size=5),
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@fuzz
@given(
    st.lists(messages, max_size=4),
    st.none() | st.lists(fields(type=st.just("function"), function=functions), max_size=2),
    st.dictionaries(st.text(max_size=8), scalars, max_size=2),
)
def test_conversations(tokenizer, given_messages, tools, options):
    codec = TextCodec(tokenizer)
    try:
        text = asyncio.run(codec.render(given_messages, tools, options))
        (tokens,) = asyncio.run(codec.encode([text], 10**6))
    except ApiError as error:
        assert error.status == 400
    else:
        assert isinstance(text, str) and all(isinstance(token, int) for token in tokens)


# -- datasets -------------------------------------------------------------------------------------

turns = fields(**{"from": st.sampled_from(["human", "gpt", "system"]), "value": st.text()})
columns = {
    "messages": st.lists(messages, max_size=4),
    "conversations": st.lists(turns, max_size=4),
    "tools": st.lists(fields(type=st.just("function"), function=functions), max_size=2),
    "history": st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=2),
} | {name: st.text() for kind in FORMATS.values() for name in kind.fields if name[-1] != "s"}
some = st.lists(messages, max_size=3)
answers = {name: some | st.text() for name in ("prompt", "chosen", "rejected")}
answers |= dict.fromkeys(("preferred_output", "non_preferred_output"), some)
columns |= answers | {"input": st.text() | fields(messages=some, tools=columns["tools"])}
lines = st.builds(json.dumps, fields(**columns) | anything) | st.text(max_size=30)


@fuzz
@given(
    st.lists(lines.map(str.encode) | st.binary(max_size=30), max_size=6),
    st.sampled_from(["jsonl", "array"]),
    st.sampled_from(["auto", *FORMATS]),
    st.booleans(),
)
def test_datasets(tmp_path, tokenizer, rows, kind, form, pairs):
    path = tmp_path / "rows"
    path.write_bytes(b"\n".join(rows) if kind == "jsonl" else b"[" + b",".join(rows) + b"]")
    try:
        data = load_dataset(path, tokenizer, form, max_seq_len=32, pairs=pairs)
    except DatasetError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(data, Dataset) and len(data) and data.summary()


# -- adapters -------------------------------------------------------------------------------------

names = st.lists(st.sampled_from(["q_proj", "up_proj", "k_proj", "x"]), max_size=3)
patterns = st.dictionaries(
    regexes | st.just("q_proj"), st.integers(-1, 9) | st.floats(), max_size=2
)
configs = fields(
    r=st.integers(),
    lora_alpha=st.integers() | st.floats(),
    lora_dropout=st.floats(),
    target_modules=names | regexes,
    exclude_modules=names | regexes,
    layers_to_transform=st.integers(0, 4) | st.lists(st.integers(0, 4)),
    layers_pattern=st.text(max_size=8) | st.lists(regexes, max_size=2),
    rank_pattern=patterns,
    alpha_pattern=patterns,
    use_rslora=st.booleans(),
    peft_type=st.sampled_from(["LORA", "IA3", "PREFIX_TUNING", "BOTTLENECK"]),
    num_virtual_tokens=st.integers(),
    bottleneck_size=st.integers(),
    bias=st.just("none"),
    init_lora_weights=st.booleans(),
    base_model_name_or_path=st.text(),
    modules_to_save=st.none(),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    adapter = init_adapter(LoraConfig(4, 8, ("q_proj", "up_proj")), MODEL, 0)
    save_adapter(adapter, MODEL, "base", path)
    return path


@fuzz
@given(configs)
def test_adapters(folder, changes):
    path = folder / CONFIG
    right = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(right) | changes))
        assert isinstance(load_adapter(folder, MODEL), Adapter)
    except AdapterError as error:
        assert len(str(error)) < 1100
    finally:
        path.write_text(right)
