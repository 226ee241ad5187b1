"""What people write with other projects' libraries, once each, against a server: an answer, a
stream, a form, a tool. A program of its own that imports nothing of this package, so that a
library's environment, which need not hold this package, can run it:

    LIBRARY/bin/python -P library_flows.py LIBRARY http://127.0.0.1:8000 MODEL

A flow checks what any model must do: the form asked for, text, tokens that are counted. Forms have
an end (an enumeration, a number), since a small model may write text without one. It prints a line
for each flow, and the exit status is 1 when one failed.
"""

# pyright: reportMissingImports=false
# Libraries are imported where they are used: no environment holds all of them.

import asyncio
import sys
import traceback
from typing import Any, Literal

QUESTION = "Tell me about Laura."
CITIES = ("Rome", "Lima", "Quito")
CITY = {"type": "object", "properties": {"city": {"enum": list(CITIES)}}, "required": ["city"]}
CITY["additionalProperties"] = False
TOOL = {"name": "weather", "description": "Tell the weather.", "parameters": CITY}
TOOLS = [{"type": "function", "function": TOOL}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}
MOST = 512  # tokens: a small model writes much white space between two of a form's
MESSAGES = [{"role": "user", "content": QUESTION}]


def _place() -> Any:
    """A form, as the libraries take it; pydantic is one of theirs."""
    from pydantic import BaseModel, ConfigDict, Field

    class Place(BaseModel):
        """A place to go to."""

        model_config = ConfigDict(extra="forbid")

        city: Literal["Rome", "Lima", "Quito"]
        days: int = Field(ge=1, le=9)

    return Place


def _weather(city: Literal["Rome", "Lima", "Quito"]) -> str:
    """Tell the weather in a city."""
    return f"It rains in {city}."


def _litellm(url: str, model: str) -> dict[str, Any]:
    named = {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", "api_key": "none"}
    return named | {"messages": MESSAGES, "max_tokens": MOST}


def litellm_chat(url: str, model: str) -> None:
    """An answer, with its tokens counted."""
    import litellm

    told = litellm.completion(**_litellm(url, model))
    assert told.choices[0].message.content and told.usage.completion_tokens


def litellm_stream(url: str, model: str) -> None:
    """A stream that ends with the tokens counted; its parts make an answer."""
    import litellm

    asked = _litellm(url, model)
    parts = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(parts)
    assert whole.choices[0].message.content and parts[-1].usage.completion_tokens


def litellm_tool(url: str, model: str) -> None:
    """A call of a tool, and an answer after its result."""
    import litellm

    asked = _litellm(url, model)
    message = litellm.completion(**asked, tools=TOOLS, tool_choice="required").choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "weather" and "city" in call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    asked["messages"] = [*MESSAGES, message.model_dump(), result]
    assert litellm.completion(**asked).choices[0].message.content is not None


def litellm_form(url: str, model: str) -> None:
    """An answer in a form of pydantic's."""
    import litellm

    place = _place()
    told = litellm.completion(**_litellm(url, model), response_format=place)
    place.model_validate_json(told.choices[0].message.content)


def litellm_responses(url: str, model: str) -> None:
    """The Responses API."""
    import litellm

    named = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none"}
    told = litellm.responses(**named, input=QUESTION, max_output_tokens=MOST)
    assert told.output[0].content[0].text and told.usage.output_tokens


def _langchain(url: str, model: str, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", max_tokens=MOST, **options)


def langchain_chat(url: str, model: str) -> None:
    """An answer, and several at once."""
    chat = _langchain(url, model)
    told = chat.invoke(QUESTION)
    assert told.content and told.usage_metadata["output_tokens"]
    assert all(told.content for told in chat.batch([QUESTION] * 3))


def langchain_stream(url: str, model: str) -> None:
    """A stream with the tokens counted."""
    first, *rest = _langchain(url, model, stream_usage=True).stream(QUESTION)
    whole: Any = sum(rest, start=first)
    assert whole.content and whole.usage_metadata["output_tokens"]


def langchain_form(url: str, model: str) -> None:
    """An answer in a form, by a JSON schema and by a call of a function."""
    place = _place()
    for method in ("json_schema", "function_calling"):
        chat = _langchain(url, model).with_structured_output(place, method=method)
        assert isinstance(chat.invoke(QUESTION), place)


def langchain_tool(url: str, model: str) -> None:
    """A call of a tool, streamed, and an answer after its result."""
    from langchain_core.messages import HumanMessage, ToolMessage

    chat = _langchain(url, model)
    first, *rest = chat.bind_tools([_weather], tool_choice="required").stream(QUESTION)
    asked: Any = sum(rest, start=first)
    (call,) = asked.tool_calls
    result = ToolMessage(_weather(**call["args"]), tool_call_id=call["id"])
    assert chat.invoke([HumanMessage(QUESTION), asked, result]).content is not None


def langchain_agent(url: str, model: str) -> None:
    """An agent that ends with a form."""
    from langchain.agents import create_agent
    from langchain.agents.structured_output import ToolStrategy

    place = _place()
    agent = create_agent(_langchain(url, model), response_format=ToolStrategy(place))
    told = agent.invoke({"messages": MESSAGES})
    assert isinstance(told["structured_response"], place)


def langchain_responses(url: str, model: str) -> None:
    """The Responses API, and an answer that goes on from another."""
    chat = _langchain(url, model, use_responses_api=True)
    told = chat.invoke(QUESTION)
    assert told.text and told.response_metadata["id"]
    following = chat.invoke(QUESTION, previous_response_id=told.response_metadata["id"])
    assert following.usage_metadata["input_tokens"] > told.usage_metadata["input_tokens"]


def _instructor(url: str, mode: str) -> Any:
    import instructor
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    return instructor.from_openai(client, mode=instructor.Mode[mode])


def instructor_modes(url: str, model: str) -> None:
    """An answer in a form, in each mode that OpenAI's servers have."""
    place = _place()
    asked = {"model": model, "response_model": place, "max_tokens": MOST, "max_retries": 0}
    for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):
        told = _instructor(url, mode).chat.completions.create(messages=MESSAGES, **asked)
        assert isinstance(told, place), mode


def instructor_stream(url: str, model: str) -> None:
    """A form that fills up."""
    create = _instructor(url, "TOOLS").chat.completions.create_partial
    asked = {"model": model, "response_model": _place(), "max_tokens": MOST}
    *_, last = create(messages=MESSAGES, **asked)
    assert last.city in CITIES and 1 <= last.days <= 9


def instructor_responses(url: str, model: str) -> None:
    """An answer in a form, by the Responses API."""
    place = _place()
    create = _instructor(url, "RESPONSES_TOOLS").responses.create
    told = create(model=model, input=QUESTION, response_model=place, max_output_tokens=MOST)
    assert isinstance(told, place)


def _agent(url: str, model: str, kind: str = "OpenAIChatModel", **options: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models import openai
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    asked = getattr(openai, kind)(model, provider=provider)
    return Agent(asked, model_settings={"max_tokens": MOST}, **options)


def pydantic_ai_chat(url: str, model: str) -> None:
    """An answer, and one that follows it."""
    agent = _agent(url, model)
    told = agent.run_sync(QUESTION)
    assert told.output and told.usage.output_tokens
    assert agent.run_sync("And Mark?", message_history=told.all_messages()).output


def pydantic_ai_stream(url: str, model: str) -> None:
    """A stream."""

    async def stream() -> list[str]:
        async with _agent(url, model).run_stream(QUESTION) as told:
            return [text async for text in told.stream_text(delta=True)]

    assert "".join(asyncio.run(stream()))


def pydantic_ai_form(url: str, model: str) -> None:
    """An answer in a form: by a call of a tool, and by a JSON schema."""
    from pydantic_ai import NativeOutput

    place = _place()
    for kind in (place, NativeOutput(place)):
        assert isinstance(_agent(url, model, output_type=kind).run_sync(QUESTION).output, place)


def pydantic_ai_tool(url: str, model: str) -> None:
    """A tool that the model has to call, and an answer after its result."""
    agent, called = _agent(url, model), []

    @agent.tool_plain
    def weather(city: Literal["Rome", "Lima", "Quito"]) -> str:
        called.append(city)
        return _weather(city)

    def once(context: Any) -> dict[str, Any]:
        return {"max_tokens": MOST, "tool_choice": "auto" if called else ["weather"]}

    assert agent.run_sync(QUESTION, model_settings=once).output and called


def pydantic_ai_responses(url: str, model: str) -> None:
    """The Responses API: text, and a form."""
    place = _place()
    assert _agent(url, model, "OpenAIResponsesModel").run_sync(QUESTION).output
    agent = _agent(url, model, "OpenAIResponsesModel", output_type=place)
    assert isinstance(agent.run_sync(QUESTION).output, place)


def _llama_index(url: str, model: str, **options: Any) -> Any:
    from llama_index.llms.openai_like import OpenAILike

    own = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": MOST}
    return OpenAILike(model=model, api_base=f"{url}/v1", api_key="none", **own | options)


def llama_index_chat(url: str, model: str) -> None:
    """An answer, and a completion."""
    from llama_index.core.llms import ChatMessage

    assert _llama_index(url, model).chat([ChatMessage(QUESTION)]).message.content
    assert _llama_index(url, model, is_chat_model=False).complete(QUESTION).text


def llama_index_stream(url: str, model: str) -> None:
    """A stream."""
    from llama_index.core.llms import ChatMessage

    *_, last = _llama_index(url, model).stream_chat([ChatMessage(QUESTION)])
    assert last.message.content


def llama_index_tool(url: str, model: str) -> None:
    """A call of a tool, and an answer after its result."""
    from llama_index.core.tools import FunctionTool

    llm = _llama_index(url, model)
    tool = FunctionTool.from_defaults(_weather, name="weather")
    told = llm.predict_and_call([tool], QUESTION, tool_required=True)
    assert "It rains in" in str(told)


def llama_index_form(url: str, model: str) -> None:
    """An answer in a form: by a call of a function, and by a JSON schema."""
    from llama_index.core.prompts import PromptTemplate

    place = _place()
    for by_schema in (False, True):
        llm = _llama_index(url, model, should_use_structured_outputs=by_schema)
        told = llm.structured_predict(place, PromptTemplate(QUESTION))
        assert isinstance(told, place)


def _hub(url: str) -> Any:
    from huggingface_hub import InferenceClient

    return InferenceClient(base_url=f"{url}/v1", api_key="none")


def huggingface_hub_chat(url: str, model: str) -> None:
    """An answer, with log-probabilities."""
    asked = {"model": model, "messages": MESSAGES, "max_tokens": MOST}
    told = _hub(url).chat_completion(**asked, logprobs=True, top_logprobs=2)
    assert told.choices[0].message.content and told.usage.completion_tokens
    assert len(told.choices[0].logprobs.content[0].top_logprobs) == 2


def huggingface_hub_stream(url: str, model: str) -> None:
    """A stream."""
    client = _hub(url)  # which ends the stream when it goes
    parts = client.chat_completion(model=model, messages=MESSAGES, max_tokens=MOST, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


def huggingface_hub_tool(url: str, model: str) -> None:
    """A call of a tool."""
    asked = {"model": model, "messages": MESSAGES, "max_tokens": MOST}
    told = _hub(url).chat_completion(**asked, tools=TOOLS, tool_choice="required")
    (call,) = told.choices[0].message.tool_calls
    assert call.function.name == "weather"


def huggingface_hub_form(url: str, model: str) -> None:
    """An answer in a form."""
    asked = {"model": model, "messages": MESSAGES, "max_tokens": MOST}
    told = _hub(url).chat_completion(**asked, response_format=SCHEMA)
    assert any(city in told.choices[0].message.content for city in CITIES)


def _outlines(url: str, model: str, kind: str = "from_vllm") -> Any:
    import openai
    import outlines

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    return getattr(outlines, kind)(client, model)


def outlines_chat(url: str, model: str) -> None:
    """Text, and a stream of it, as from vLLM and as from OpenAI."""
    for kind in ("from_vllm", "from_openai"):
        asked = _outlines(url, model, kind)
        assert asked(QUESTION, max_tokens=MOST)
        assert "".join(asked.stream(QUESTION, max_tokens=MOST))


def outlines_form(url: str, model: str) -> None:
    """A form of pydantic's, as from vLLM and as from OpenAI."""
    place = _place()
    for kind in ("from_vllm", "from_openai"):
        place.model_validate_json(_outlines(url, model, kind)(QUESTION, place, max_tokens=MOST))


def outlines_kinds(url: str, model: str) -> None:
    """A choice, a number, a regular expression and a grammar."""
    from outlines import types

    asked = _outlines(url, model)
    assert asked(QUESTION, Literal["Rome", "Lima"], max_tokens=16) in ("Rome", "Lima")
    assert asked(QUESTION, types.Regex("[a-c]{3}"), max_tokens=16).strip("abc") == ""
    assert asked(QUESTION, types.CFG('start: "yes" | "no"'), max_tokens=16) in ("yes", "no")


LIBRARIES = (
    *("huggingface_hub", "instructor", "langchain", "litellm", "llama_index", "outlines"),
    "pydantic_ai",
)


def main(library: str, url: str, model: str) -> int:
    """Run a library's flows; the exit status."""
    named = globals().items()
    flows = {name: flow for name, flow in named if name.startswith(f"{library}_")}
    failed = []
    for name, flow in flows.items():
        try:
            flow(url, model)
        except Exception:
            failed.append(name)
            traceback.print_exc()
        print("FAILED" if name in failed else "ok", name, flush=True)
    print(f"{len(flows) - len(failed)} of {len(flows)} flows;", *failed)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
