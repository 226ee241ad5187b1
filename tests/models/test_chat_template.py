"""Prompts are those of transformers; and what templates would leave out, or refuse for its form,
is written so that they show it."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import ConversationError, read_conversation, read_tools

END = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + END
# As Qwen2.5's: only these roles, the first system message ahead of the others.
KNOWN_ROLES = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}\n{% endif %}"
    "{% for m in messages %}{% if m.role in ('user', 'assistant') or (m.role == 'system' and "
    "not loop.first) %}<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}" + END
)
# As Qwen3.5's, and as gpt-oss's: a later system message is an error, or nothing.
RAISES_LATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}" + END
)
DROPS_LATE = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    "<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}" + END
)
KNOWS_DEVELOPER = (
    "{% for m in messages %}{% if m.role == 'developer' %}<DEV>{% else %}<{{ m.role }}>{% endif %}"
    "{{ m.content }}\n{% endfor %}" + END
)
# As Llama 3.1's: a key decides.
TESTS_KEYS = (
    "{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "<call>{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}" + END
)
# As DeepSeek's: calls where the content is none, their arguments as text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}<call>{{ c['function']['name'] + c['function']['arguments'] }}"
    "{% endfor %}{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}"
    "{{ '\\n' }}{% endfor %}" + END
)
# As some vision models': contents are lists of parts.
# As some others': an object's arguments, and content only where the key is.
OBJECTS = (
    "{% for m in messages %}{% if 'content' in m %}<{{ m.role }}>{{ m.content }}{% else %}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "{% for key, value in c.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}"
    "{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}" + END
)
# As Mistral's: ids of nine letters and digits, in a call and its result.
NINE = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "<call>{{ c.function | tojson }} {{ c.id }}{% endfor %}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "<tool>{{ m.content }} {{ m.tool_call_id }}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{{ '\\n' }}{% endfor %}" + END
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    + END
)
NO_TOOL_ROLE = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}\n"
    "{% endif %}{% endfor %}" + END
)

SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be kind."}
USER = {"role": "user", "content": "3+4?"}
ANSWER = {"role": "assistant", "content": "7"}


def calling(arguments, content=None):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "7"}


def make_tokenizer(template):
    tokens = ["<unk>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def render(template, messages, tools=None, documents=None, kwargs=None, **options):
    conversation = read_conversation(messages, tools, documents, kwargs)
    return ChatTemplate(make_tokenizer(template)).render(conversation, **options)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("template", [PLAIN, KNOWN_ROLES, TESTS_KEYS])
def test_the_prompt_is_that_of_transformers(template, generation):
    messages = [SYSTEM, USER, ANSWER, USER]
    expected = make_tokenizer(template).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation
    )
    assert render(template, messages, add_generation_prompt=generation) == expected


def test_an_answer_is_continued_as_transformers_does():
    messages = [USER, {"role": "assistant", "content": "The answer is"}]
    expected = make_tokenizer(PLAIN).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert expected.endswith("<assistant>The answer is")
    assert render(PLAIN, messages, continue_final_message=True) == expected
    with pytest.raises(ConversationError, match="leave out one of them"):
        render(PLAIN, messages, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (KNOWN_ROLES, [DEVELOPER, USER], "<system>Be kind.\n<user>3+4?\n"),
        (PLAIN, [DEVELOPER, USER], "<system>Be kind.\n<user>3+4?\n"),
        (KNOWS_DEVELOPER, [DEVELOPER, USER], "<DEV>Be kind.\n<user>3+4?\n"),
        (
            KNOWN_ROLES,
            [SYSTEM, DEVELOPER, USER],
            "<system>Be brief.\n<system>Be kind.\n<user>3+4?\n",
        ),
        (RAISES_LATE, [SYSTEM, DEVELOPER, USER], "<system>Be brief.\n\nBe kind.\n<user>3+4?\n"),
        (
            RAISES_LATE,
            [USER, ANSWER, SYSTEM, USER],
            "<system>Be brief.\n<user>3+4?\n<assistant>7\n<user>3+4?\n",
        ),
        (DROPS_LATE, [USER, SYSTEM, USER], "<system>Be brief.\n<user>3+4?\n<user>3+4?\n"),
    ],
)
def test_what_a_system_or_developer_message_says_reaches_the_model(template, messages, prompt):
    assert render(template, messages) == prompt + "<assistant>"


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (TESTS_KEYS, '<call>add {"a": 3}'),
        (TEXT_ARGUMENTS, '<call>add{"a": 3}'),
        (OBJECTS, "<call>add a=3"),
    ],
)
def test_calls_reach_the_model(template, call):
    for content in (None, ""):
        for arguments in ('{"a": 3}', {"a": 3}):
            messages = [USER, calling(arguments, content), RESULT]
            expected = f"<user>3+4?\n{call}\n<tool>7\n<assistant>"
            assert render(template, messages) == expected
    older = {"name": "add", "arguments": '{"a": 3}'}
    messages = [
        USER,
        {"role": "assistant", "content": None, "function_call": older},
        {"role": "function", "name": "add", "content": "7"},
    ]
    assert render(template, messages) == f"<user>3+4?\n{call}\n<tool>7\n<assistant>"


def test_ids_of_calls_are_as_long_as_the_template_wants_them():
    def conversation(call_id):
        call = {"id": call_id, "type": "function", "function": {"name": "add", "arguments": "{}"}}
        asked = {"role": "assistant", "content": None, "tool_calls": [call]}
        return [USER, asked, {"role": "tool", "tool_call_id": call_id, "content": "7"}]

    lines = render(NINE, conversation("call_0123456789abcdef01234567")).split("\n")
    own = lines[1].split()[-1]
    assert len(own) == 9 and own.isalnum() and lines[2] == f"<tool>7 {own}"
    assert own not in render(NINE, conversation("call_other"))
    assert "abcDEF123" in render(NINE, conversation("abcDEF123"))  # it is one


def test_contents_as_parts():
    parts = [{"type": "text", "text": "3+"}, {"type": "text", "text": "4?"}]
    assert render(PARTS, [SYSTEM, USER]) == "<system>Be brief.\n<user>3+4?\n<assistant>"
    for template in (PLAIN, PARTS):
        asked = {"role": "user", "content": parts}
        assert render(template, [asked]) == "<user>3+4?\n<assistant>"
    with pytest.raises(ConversationError, match="parts that are not text"):
        render(PLAIN, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


@pytest.mark.parametrize(
    "key", ["tool_calls", "function_call", "refusal", "audio", "annotations", "name"]
)
def test_what_the_openai_sdk_dumps_can_be_sent_back(key):
    """It writes all keys there are; templates look whether one is there."""
    answer = {**ANSWER, key: None}
    assert render(TESTS_KEYS, [USER, answer, USER]) == render(TESTS_KEYS, [USER, ANSWER, USER])
    assert render(TESTS_KEYS, [USER, {**ANSWER, "tool_calls": []}]) == render(
        TESTS_KEYS, [USER, ANSWER]
    )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("", "{}"),
        (None, "{}"),
        ("null", "{}"),
        ("3", "3"),
        ("[1, 2]", "[1, 2]"),
        ('"a"', '"a"'),
        ("three and four", '"three and four"'),
        ('{"a": 3', json.dumps('{"a": 3')),
        ("[" * 100_000, json.dumps("[" * 100_000)),
    ],
)
def test_arguments_are_what_the_model_wrote(arguments, shown):
    assert render(TESTS_KEYS, [USER, calling(arguments)]).startswith(
        f"<user>3+4?\n<call>add {shown}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text", "objects"),
    [
        ("null", "{}", ""),
        ("3", "3", " arguments=3"),
        ("[1]", "[1]", " arguments=[1]"),
        ("plain", "plain", " arguments=plain"),
    ],
)
def test_arguments_that_are_no_object_are_there_in_all_templates(arguments, text, objects):
    messages = [USER, calling(arguments), RESULT]
    assert f"<call>add{text}\n" in render(TEXT_ARGUMENTS, messages)
    assert f"<call>add{objects}\n" in render(OBJECTS, messages)


def test_what_a_template_has_no_place_for_is_refused():
    with pytest.raises(ConversationError, match="leaves out tool messages") as error:
        render(NO_TOOL_ROLE, [USER, calling("{}"), RESULT])
    assert error.value.field == "messages"
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(ConversationError, match=r"tools: .* no place"):
        render(PLAIN, [USER], tools)
    with pytest.raises(ConversationError, match=r"documents: .* no place"):
        render(PLAIN, [USER], documents=[{"title": "a", "text": "b"}])
    shows = "{{ documents | tojson }}{{ tools | tojson }}" + PLAIN
    text = render(shows, [USER], tools, [{"title": "a", "text": "b"}])
    assert text.startswith('[{"title": "a", "text": "b"}][{"type": "function"')


def test_only_variables_that_the_template_reads():
    template = "{{ bos_token }}{{ 'think ' if enable_thinking }}" + PLAIN
    assert render(template, [USER], kwargs={"enable_thinking": True}).startswith("think <user>")
    for name in ("chat_template", "padding", "tokenize", "messages", "bos_token", "thinking"):
        with pytest.raises(ConversationError, match=f"{name}.*; it reads enable_thinking") as error:
            render(template, [USER], kwargs={name: "x"})
        assert error.value.field == "chat_template_kwargs"


def test_another_template():
    assert render(PLAIN, [USER], source="{{ messages[0].content }}!") == "3+4?!"
    with pytest.raises(ConversationError, match="not a Jinja template") as error:
        render(PLAIN, [USER], source="{% if %}")
    assert error.value.field == "chat_template"
    with pytest.raises(ConversationError, match="refuses the conversation: no"):
        render("{{ raise_exception('no') }}", [USER])


def test_tools_of_all_forms():
    function = {"name": "add", "description": "", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    for given in ([tool], [function], json.dumps([function]), json.dumps([tool])):
        assert read_tools(given) == [tool]
    assert read_tools(None) == read_tools("") == read_tools("null") == []
    for given in ("add", [{"type": "function"}], 3, {"name": "add"}, ["add"]):
        with pytest.raises(ConversationError, match="tools"):
            read_tools(given)
