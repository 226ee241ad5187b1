"""Bodies of the OpenAI inference requests, with the extras of vLLM that are supported.

Fields that are not known are ignored, as OpenAI's clients send ones that mean nothing here; those
that are known and would change the answer, but are not supported, are refused.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from flexllm_jax.engine.sampling_params import SamplingParams
from flexllm_jax.engine.structured_outputs import StructuredOutputsParams
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError

Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]


class StreamOptions(Body):
    """What a stream tells besides tokens."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


# With the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_bias", "functions"), (None, {}, [])),
    **dict.fromkeys(("function_call", "suffix"), (None, "", "none")),
    **dict.fromkeys(("modalities",), (None, ["text"])),
    # vLLM's
    **dict.fromkeys(("allowed_token_ids", "bad_words"), (None, [])),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), (None,)),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "prompt_embeds"), (None,)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output"), (None, False)),
    "skip_special_tokens": (None, True),
}


class JsonSchema(Body):
    """Of a response format."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer looks like: text, any JSON object, or JSON that has a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class InferenceRequest(Body):
    """What completions and chat completions have in common. Extra fields are kept, to be refused if
    they mean something."""

    model_config = ConfigDict(extra="allow")
    model: str
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stop: Annotated[str, Field(min_length=1, max_length=1000)] | Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] | None = 1.0
    ignore_eos: bool | None = False
    min_tokens: Count | None = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    # ours
    slo: str | None = Field(
        default=None, description="Class of service: standard or one of scheduler.slo_classes."
    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end an output."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def structure(self) -> StructuredOutputsParams | None:
        """What the output must match. ValueError for what makes no sense."""
        form, given = self.response_format, self.structured_outputs
        wanted: dict[str, Any] = {}
        if form is not None and form.type == "json_object":
            wanted = {"json_object": True}
        elif form is not None and form.json_schema is not None:
            wanted = {"json": form.json_schema.schema_}
        if given is None:
            return StructuredOutputsParams(**wanted) if wanted else None
        known = [each.name for each in fields(StructuredOutputsParams)]
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"structured_outputs has {unknown[0]}; must be of {', '.join(known)}")
        return StructuredOutputsParams(**(given | wanted))

    def sampling_params(
        self,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        structure: StructuredOutputsParams | None,
    ) -> SamplingParams:
        """What the engine is told; ValueError for values outside of their ranges."""

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=given(self.min_tokens, 0),
            temperature=given(self.temperature, 1.0),
            top_k=given(self.top_k, 0),
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            repetition_penalty=given(self.repetition_penalty, 1.0),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=structure,
        )


def refuse_unsupported(body: InferenceRequest) -> None:
    """ApiError 400 for fields of OpenAI and vLLM that would change the answer, and cannot here."""
    for name, value in (body.model_extra or {}).items():
        if name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
            raise ApiError(400, f"{name}: is not supported; leave it out", param=name)


class CompletionRequest(InferenceRequest):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=2048),
        ]
    )
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    best_of: Count | None = None
    add_special_tokens: bool | None = True


class ToolFunction(Body):
    """A function that the model may call; what else it says reaches the chat template."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,256}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool of a chat request."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: ToolFunction


def dump_tools(tools: list[Tool] | None) -> list[dict[str, Any]]:
    """Tools as they were given."""
    return [tool.model_dump(exclude_unset=True) for tool in tools or ()]


class ChatCompletionRequest(InferenceRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
