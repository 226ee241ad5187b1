"""OpenAI's Responses API through the unmodified SDK: what is asked, streamed, kept and gone on
from."""

import asyncio
import json
import time
from typing import Any, Literal, cast

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import update

from flexllm_jax.server.database import Database
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.conversing import Said
from flexllm_jax.server.inference.requests import Answer, Delta
from flexllm_jax.server.inference.responses.answer import Responding
from flexllm_jax.server.inference.responses.request import ResponseRequest, to_messages
from flexllm_jax.server.inference.responses.store import ResponseRow, ResponseStore
from tests.server.running import LIMITED_KEY

ASK = {"model": "tiny", "input": "Who?", "temperature": 0, "max_output_tokens": 12}
THINKER = ASK | {"model": "thinker", "extra_body": {"thinking_token_budget": 4}}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"place": {"enum": ["Oslo"]}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
CALL = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
CALL |= {"max_output_tokens": 100}


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]


def chat_text(client, messages, **fields):
    answer = client.chat.completions.create(
        **{"model": "tiny", "temperature": 0, "max_tokens": 12} | fields, messages=messages
    )
    return answer.choices[0].message.content, answer.usage


def said(item):
    """An item of the output, to be sent back."""
    return item.model_dump(exclude_none=True)


def test_items_are_messages():
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "So"}]},
        {"type": "message", "role": "assistant", "content": "I look."},
        call,
        call | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"role": "assistant", "content": "Rain."},
        {"role": "assistant", "content": "And snow."},
    ]
    function = {"name": "f", "arguments": '{"a": 1}'}
    calls = [{"id": name, "type": "function", "function": function} for name in ("c1", "c2")]
    assert to_messages(items) == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "reasoning_content": "So",
            "content": "I look.",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
        {"role": "assistant", "content": "And snow."},
    ]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": [{"type": "computer_call_output"}]}, "'computer_call_output'"),
        ({"tools": [{"type": "web_search"}]}, "'web_search'; only functions"),
        ({"tools": [{"type": "namespace", "name": "a"}]}, "a namespace must have"),
        ({"input": []}, "nothing to answer"),
        ({"prompt": {"id": "p"}}, "prompt: is not supported"),
        ({"n": 2}, "one output"),
        ({"text": {"format": {"type": "yaml"}}}, "response_format"),
    ],
)
def test_what_means_no_chat_request_is_refused(fields, says):
    with pytest.raises(ApiError, match=says):
        ResponseRequest.model_validate(ASK | fields).to_chat([])


def test_a_response_is_a_chat_in_other_words(client):
    response = client.responses.create(**ASK, instructions="Be brief.", metadata={"a": "b"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    text, usage = chat_text(client, messages)
    assert response.output_text == text
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert response.usage.input_tokens == usage.prompt_tokens
    assert (response.usage.output_tokens, response.metadata) == (12, {"a": "b"})
    assert response.output[0].status == "incomplete" and response.instructions == "Be brief."


def test_a_stream_tells_it_in_pieces(client):
    whole = client.responses.create(**ASK)
    with client.responses.stream(**ASK) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text and len(deltas) > 5
    assert events[-1].response.output_text == whole.output_text
    ids = {event.item_id for event in deltas}
    assert ids == {events[-1].response.output[0].id}


def test_a_form_and_its_tokens(client):
    compact = {"structured_outputs": {"disable_any_whitespace": True}}
    fields = ASK | {"max_output_tokens": 60}
    answer = client.responses.parse(
        **fields, text_format=Pet, extra_body=compact, include=["message.output_text.logprobs"]
    )
    assert answer.status == "completed" and answer.output_parsed.kind in ("cat", "dog")
    (part,) = answer.output[0].content
    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert all(entry.logprob <= 0 for entry in part.logprobs)


def test_a_call_and_its_result(client):
    response = client.responses.create(**ASK | CALL)
    (call,) = response.output
    assert (call.type, call.name, response.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments) == {"place": "Oslo"}
    with client.responses.stream(**ASK | CALL) as stream:
        done = [e for e in stream if e.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    assert json.loads(done[0].arguments) == {"place": "Oslo"} and final.output[0].name == call.name

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    by_id = client.responses.create(
        **ASK | {"input": [result]}, tools=[WEATHER], previous_response_id=response.id
    )
    sent = [{"role": "user", "content": "Who?"}, said(call), result]
    by_hand = client.responses.create(**ASK | {"input": sent}, tools=[WEATHER])
    assert by_id.output_text == by_hand.output_text
    assert by_id.usage.input_tokens == by_hand.usage.input_tokens

    named = {"type": "function", "name": "get_weather"}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        chosen = client.responses.create(**ASK | CALL | {"tool_choice": choice})
        assert chosen.output[0].name == "get_weather"


def test_functions_of_a_namespace(client):
    """The model calls them by both names, as one."""
    space = {"type": "namespace", "name": "weather", "tools": [WEATHER]}
    response = client.responses.create(**ASK | CALL | {"tools": [space]})
    (call,) = response.output
    assert (call.name, call.namespace) == ("get_weather", "weather")
    with client.responses.stream(**ASK | CALL | {"tools": [space]}) as stream:
        added = [e.item for e in stream if e.type == "response.output_item.added"]
    assert (added[0].name, added[0].namespace) == ("get_weather", "weather")
    flat = WEATHER | {"name": "weather__get_weather"}
    assert client.responses.create(**ASK | CALL | {"tools": [flat]}).output[0].name == flat["name"]
    (message,) = to_messages([said(call)])
    assert message["tool_calls"][0]["function"]["name"] == flat["name"]
    chosen = {"type": "function", "name": "get_weather", "namespace": "weather"}
    chosen = client.responses.create(**ASK | CALL | {"tools": [space], "tool_choice": chosen})
    assert chosen.output[0].namespace == "weather"


def test_the_tokens_behind_a_response(client, tokenizer):
    fields = {"enable_response_messages": True}
    response = client.responses.create(**ASK, extra_body=fields)
    (given,), (made,) = response.input_messages, response.output_messages
    assert given["message"] == tokenizer.decode(given["tokens"]) == "<user>Who?\n<assistant>"
    assert len(made["tokens"]) == 12 and made["message"] == response.output_text


def test_thoughts_are_items(thinking_client):
    response = thinking_client.responses.create(**THINKER)
    thought, message = response.output
    assert (thought.type, message.type) == ("reasoning", "message")
    assert thought.content[0].text and response.output_text == message.content[0].text
    assert response.usage.output_tokens_details.reasoning_tokens == 5
    with thinking_client.responses.stream(**THINKER) as stream:
        events = list(stream)
    told = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert told == thought.content[0].text
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
    sent = [{"role": "user", "content": "Who?"}, *map(said, response.output)]
    sent.append({"role": "user", "content": "And?"})
    again = thinking_client.responses.create(**THINKER | {"input": sent})
    assert again.output[0].type == "reasoning"
    off = thinking_client.responses.create(
        **{name: value for name, value in THINKER.items() if name != "extra_body"},
        reasoning={"effort": "none"},
    )
    assert [item.type for item in off.output] == ["message"]


def test_a_conversation_is_kept(client):
    first = client.responses.create(**ASK, instructions="Be brief.")
    second = client.responses.create(
        **ASK | {"input": "And?"}, previous_response_id=first.id, store=False
    )
    messages = [
        {"role": "user", "content": "Who?"},  # without the instructions, as OpenAI has it
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
    ]
    assert second.output_text == chat_text(client, messages)[0]
    counted = client.responses.input_tokens.count(
        model="tiny", input="And?", previous_response_id=first.id
    )
    assert counted.input_tokens == second.usage.input_tokens

    assert client.responses.retrieve(first.id).model_dump() == first.model_dump()
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    third = client.responses.create(**ASK, previous_response_id=first.id)
    items = client.responses.input_items.list(third.id, order="asc", limit=2)
    assert [item.content[0].text for item in items] == ["Who?", first.output_text, "Who?"]
    newest = next(iter(client.responses.input_items.list(third.id, limit=1)))
    assert newest.content[0].text == "Who?" and newest.id != items.data[0].id

    client.responses.delete(first.id)
    for use in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            use(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASK, previous_response_id=third.id)


def wait(client, response, *ended):
    end = time.monotonic() + 60
    while (response := client.responses.retrieve(response.id)).status not in ended:
        assert time.monotonic() < end, response
        time.sleep(0.05)
    return response


def test_a_response_in_the_background(client):
    response = client.responses.create(**ASK, background=True)
    assert response.status in ("queued", "in_progress") and response.background
    done = wait(client, response, "incomplete")
    assert done.output_text == client.responses.create(**ASK).output_text
    with pytest.raises(openai.BadRequestError, match="is not running"):
        client.responses.retrieve(response.id, stream=True)
    assert client.responses.cancel(response.id).status == "incomplete"  # it has ended

    long = ASK | {"max_output_tokens": 140, "extra_body": {"ignore_eos": True}}
    events = client.responses.create(**long, background=True, stream=True)
    started = next(iter(events)).response
    events.close()  # and it goes on
    told = list(client.responses.retrieve(started.id, stream=True, starting_after=1))
    numbers = [event.sequence_number for event in told]
    assert numbers == list(range(2, 2 + len(numbers)))
    assert isinstance(told[-1].response, Response) and told[-1].type == "response.incomplete"


def test_a_response_in_the_background_is_cancelled(client):
    long = ASK | {"max_output_tokens": 140, "extra_body": {"ignore_eos": True}}
    response = client.responses.create(**long, background=True)
    cancelled = client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    assert client.responses.retrieve(response.id).status == "cancelled"
    foreground = client.responses.create(**ASK)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(foreground.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.create(**ASK, background=True, store=False)


def test_what_cannot_be_told_again_is_refused(server):
    body = json.dumps(ASK | {"metadata": {"a": "\ud800"}}).encode()
    status, _, answer = server.post("/v1/responses", body)
    assert status == 400 and "surrogate" in answer, answer


class Failing:
    """An answer whose engine fails after some text."""

    usage = Answer.usage
    prompts, output_tokens, reasoning_tokens, _cached_tokens = [[1]], [1], [0], [0]

    async def __aiter__(self):
        yield Said(Delta(0, 5, "So", None, None, None, None), "", "So", [], None)
        raise ApiError(503, "the engine was lost")


def test_a_failure_is_told_and_kept():
    kept, events = [], []

    async def save(response):
        kept.append(dict(response))

    async def run():
        body = ResponseRequest.model_validate(ASK)
        async for event in Responding(
            body, cast(Any, Failing()), cast(Any, None), "tiny", save
        ).events():
            events.append(event)

    with pytest.raises(ApiError, match="lost"):
        asyncio.run(run())
    assert events[-1]["type"] == "response.failed" and events[-1]["response"] == kept[0]
    assert kept[0]["error"] == {"code": "server_error", "message": "the engine was lost"}
    assert kept[0]["output"][0]["status"] == "incomplete"


def test_one_client_does_not_see_anothers(client, server):
    response = client.responses.create(**ASK)
    other = server.client(LIMITED_KEY)
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        other.responses.create(**ASK, previous_response_id=response.id)


def test_what_is_kept_ends_and_fails(tmp_path):
    """After its time; and what a killed server had not finished is told to have failed."""
    database = Database(f"sqlite:///{tmp_path / 'kept.sqlite'}")
    asyncio.run(_check_kept(database))
    database.close()


async def _check_kept(database):
    store, client = ResponseStore(database, 60), Client("everybody")
    for name, status in (("resp_1", "completed"), ("resp_2", "in_progress")):
        response = {"id": name, "previous_response_id": None, "status": status, "output": []}
        await store.save(client, response, [])
    await ResponseStore(database, 60).begin()
    assert (await store.get(client, "resp_1"))["status"] == "completed"
    failed = await store.get(client, "resp_2")
    assert failed["status"] == "failed" and "restarted" in failed["error"]["message"]
    await database.run(lambda s: s.execute(update(ResponseRow).values(expires_at=time.time())))
    with pytest.raises(ApiError, match=r"Response with id .* not found"):
        await store.get(client, "resp_1")
    await store.save(client, failed | {"id": "resp_3"}, [])
    rows = await database.run(lambda s: [row.id for row in s.query(ResponseRow)])
    assert rows == ["resp_3"]
