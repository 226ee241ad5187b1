"""Anthropic's Messages API: the unmodified `anthropic` SDK where it is installed, and always what
goes over the wire."""

import json
import urllib.request

import pytest

from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.messages.request import MessagesRequest
from tests.server.running import KEY

WEATHER = {
    "name": "get_weather",
    "description": "Of a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"enum": ["Oslo"]}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
ASK = {"max_tokens": 60, "messages": [{"role": "user", "content": "Who?"}], "temperature": 0}
TINY, THINKER = ASK | {"model": "tiny"}, ASK | {"model": "thinker"}
# The SDK's newest version has no argument for it.
SDK = {name: value for name, value in TINY.items() if name != "temperature"}
SDK |= {"extra_body": {"temperature": 0}}
SDK_THINKER = SDK | {"model": "thinker"}
LONG = TINY | {"max_tokens": 100}
CALL = {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
FORM = {"output_config": {"format": {"type": "json_schema", "schema": {"enum": [17]}}}}


def post(server, path="/v1/messages", status=200, **body):
    got, _, text = server.post(path, json.dumps(body).encode())
    assert got == status, text
    return text if body.get("stream") and status == 200 else json.loads(text)


def events(text):
    pairs = [part.split("\n") for part in text.strip().split("\n\n")]
    data = [json.loads(line.removeprefix("data: ")) for _, line in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [each["type"] for each in data]
    return data


@pytest.fixture(scope="module")
def sdk(server):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is in the extra test-clients")
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def thinking_sdk(thinking_server):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is in the extra test-clients")
    return anthropic.Anthropic(base_url=thinking_server.url, api_key="none", max_retries=0)


def test_a_request_means_a_chat_request():
    body = MessagesRequest.model_validate(
        {
            **TINY,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "I look.", "signature": ""},
                        {"type": "text", "text": "So: "},
                        {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t1",
                            "content": [{"type": "text", "text": "rain"}],
                        },
                        {"type": "text", "text": "And?"},
                    ],
                },
            ],
            "stop_sequences": ["END"],
            "thinking": {"type": "enabled", "budget_tokens": 9},
            **CALL,
        }
    )
    chat = body.to_chat()
    function = {"name": "get_weather", "arguments": '{"a": 1}'}
    assert chat.messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "So: "}],
            "reasoning_content": "I look.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    assert chat.tools and chat.tools[0].function.parameters == WEATHER["input_schema"]
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)
    assert (chat.thinking_token_budget, chat.reasoning_effort) == (9, "high")
    assert (chat.stop, chat.max_completion_tokens) == (["END"], 60)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 3}]}]},
            "parts that are not text",
        ),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools.0.function.name"),
        ({"mcp_servers": [{}]}, "mcp_servers: is not supported"),
    ],
)
def test_what_means_no_chat_request_is_refused(fields, says):
    with pytest.raises(ApiError, match=says):
        MessagesRequest.model_validate(TINY | fields).to_chat()


def test_a_message_over_the_wire(server, client):
    """The same text as a chat completion's; a stream has it in pieces."""
    chat = client.chat.completions.create(
        model="tiny", messages=TINY["messages"], max_tokens=20, temperature=0
    )
    answer = post(server, **TINY | {"max_tokens": 20})
    (block,) = answer["content"]
    assert block["type"] == "text" and block["text"] == chat.choices[0].message.content
    assert answer["stop_reason"] == "max_tokens" and answer["role"] == "assistant"
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat.usage.prompt_tokens
    assert usage["output_tokens"] == 20

    told = events(post(server, **TINY | {"max_tokens": 20, "stream": True}))
    kinds = [event["type"] for event in told]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"]["text"] for event in told[2:-3]]
    assert "".join(deltas) == block["text"] and len(deltas) > 10
    assert told[-2]["delta"]["stop_reason"] == "max_tokens"
    assert told[-2]["usage"]["output_tokens"] == 20


def test_tokens_are_counted_as_a_message_has_them(server):
    fields = {name: TINY[name] for name in ("model", "messages")} | {"tools": [WEATHER]}
    counted = post(server, "/v1/messages/count_tokens", **fields)["input_tokens"]
    usage = post(server, **TINY, tools=[WEATHER])["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted


def test_the_key_may_be_in_anthropics_header(server):
    headers = {"Content-Type": "application/json", "X-Api-Key": KEY}
    body = json.dumps(TINY | {"max_tokens": 2}).encode()
    request = urllib.request.Request(server.url + "/v1/messages", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200


def test_an_error_over_the_wire(server):
    answer = post(server, status=404, **TINY | {"model": "nobody's"})
    assert answer["type"] == "error" and answer["error"]["type"] == "not_found_error"


def test_more_tokens_than_there_is_room_for(server):
    answer = post(server, **TINY | {"max_tokens": 100_000})
    assert answer["stop_reason"] in ("model_context_window_exceeded", "end_turn")


def test_an_answer_that_is_begun_goes_on(server, client):
    begun = [*ASK["messages"], {"role": "assistant", "content": "So"}]
    text = post(server, **TINY | {"max_tokens": 4, "messages": begun})["content"][0]["text"]
    chat = client.chat.completions.create(
        model="tiny",
        messages=begun,
        max_tokens=4,
        temperature=0,
        extra_body={"continue_final_message": True},
    )
    assert text == chat.choices[0].message.content


def test_a_call_over_the_wire(server):
    answer = post(server, **LONG, **CALL)
    (block,) = answer["content"]
    assert answer["stop_reason"] == "tool_use"
    assert (block["name"], block["input"]) == ("get_weather", {"place": "Oslo"})
    told = events(post(server, **LONG, **CALL, stream=True))
    pieces = [e["delta"]["partial_json"] for e in told if e["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"place": "Oslo"}
    start = next(event for event in told if event["type"] == "content_block_start")
    assert start["content_block"]["input"] == {} and start["content_block"]["id"]


def test_thoughts_are_blocks(thinking_server):
    fields = THINKER | {"thinking": {"type": "enabled", "budget_tokens": 4}} | FORM
    answer = post(thinking_server, **fields)
    thought, text = answer["content"]
    assert thought["type"] == "thinking" and thought["thinking"] and text["text"] == "17"
    assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": 5}
    off = post(thinking_server, **THINKER | {"thinking": {"type": "disabled"}} | FORM)
    assert [block["type"] for block in off["content"]] == ["text"]


def test_a_conversation_with_the_sdk(sdk):
    message = sdk.messages.create(**SDK)
    assert message.content[0].text and message.stop_reason == "max_tokens"
    count = sdk.messages.count_tokens(model="tiny", messages=ASK["messages"])
    used = message.usage
    assert count.input_tokens == used.input_tokens + used.cache_read_input_tokens
    with sdk.messages.stream(**SDK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == message.content[0].text == final.content[0].text
    assert final.usage.output_tokens == 60


def test_a_tool_with_the_sdk(sdk):
    with sdk.messages.stream(**SDK | {"max_tokens": 100}, **CALL) as stream:
        final = stream.get_final_message()
    (call,) = final.content
    assert (call.name, call.input, final.stop_reason) == (
        "get_weather",
        {"place": "Oslo"},
        "tool_use",
    )
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    again = sdk.messages.create(
        **SDK
        | {
            "messages": [
                *ASK["messages"],
                {"role": "assistant", "content": final.content},
                {"role": "user", "content": [result]},
            ],
            "max_tokens": 5,
        },
        tools=[WEATHER],
    )
    assert again.usage.output_tokens == 5


def test_thinking_with_the_sdk(thinking_sdk):
    thinking = {"type": "enabled", "budget_tokens": 4}
    with thinking_sdk.messages.stream(**SDK_THINKER, **FORM, thinking=thinking) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "thinking" in kinds and [block.type for block in final.content] == ["thinking", "text"]
    again = thinking_sdk.messages.create(
        **SDK_THINKER
        | {
            "messages": [
                *ASK["messages"],
                {"role": "assistant", "content": final.content},
                {"role": "user", "content": "And?"},
            ],
            "max_tokens": 3,
        }
    )
    assert again.usage.output_tokens == 3


def test_errors_with_the_sdk(sdk):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is in the extra test-clients")
    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        sdk.messages.create(**SDK | {"model": "nobody's"})
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        sdk.messages.create(**SDK | {"messages": []})
    wrong = sdk.with_options(api_key="wrong-key")
    with pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(**SDK)
