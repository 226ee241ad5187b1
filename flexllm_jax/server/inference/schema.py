"""Bodies of the OpenAI inference requests, with the extras of vLLM that are supported.

Fields that are not known are ignored, as OpenAI's clients send ones that mean nothing here; those
of other servers that would change the answer are refused (unsupported.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from flexllm_jax.engine.sampling.params import BIASES, SamplingParams
from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams, quote
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.response_format import ResponseFormat
from flexllm_jax.server.inference.tools.formats import Format
from flexllm_jax.server.inference.tools.grammar import calls_of
from scheduler.drafts import MOST

Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]  # a body may have a million wrong items
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
_StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[list[_StopString], Field(fail_fast=True, max_length=16)]


def _token_biases(biases: Any) -> Any:
    """Biases by token id, which JSON has as text; ValueError that names every key that is none."""
    if not isinstance(biases, dict):
        return biases
    if len(biases) > BIASES:
        raise ValueError(f"{len(biases):,} biases; there may be {BIASES} at most")
    if wrong := [key for key in biases if not str(key).isdecimal()]:
        told = ", ".join(map(repr, wrong[:4]))
        raise ValueError(f"{told}{', ...' * (len(wrong) > 4)} must be token ids")
    return {int(key): bias for key, bias in biases.items()}


LogitBias = Annotated[dict[TokenId, float], BeforeValidator(_token_biases)]


class StreamOptions(Body):
    """What a stream tells besides tokens."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False

    @property
    def running(self) -> bool:
        """Whether every chunk tells the usage so far, as vLLM has it."""
        return bool(self.include_usage and self.continuous_usage_stats)


class CutPrompt(Body):
    """How a prompt is cut that has too many tokens."""

    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None

    def cut(self, tokens: list[int]) -> list[int]:
        """What is left of a prompt: its end, unless its right side is to be cut."""
        kept = self.truncate_prompt_tokens
        if kept is None:
            return tokens
        return tokens[:kept] if self.truncation_side == "right" else tokens[-kept:]


class InferenceRequest(CutPrompt):
    """What completions and chat completions have in common. Extra fields are kept, to be refused if
    they mean something."""

    model_config = ConfigDict(extra="allow")
    model: str | None = Field(default=None, description="null: the model that is served.")
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stop: _StopString | Stop | None = None
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
    include_stop_str_in_output: bool | None = False
    min_tokens: Count | None = 0
    stop_token_ids: Annotated[Tokens, Field(max_length=64)] | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Tokens | None = None
    bad_words: Annotated[list[_StopString], Field(fail_fast=True, max_length=256)] | None = None
    logprob_token_ids: Tokens | None = None
    skip_special_tokens: bool | None = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    # SGLang's, which mean the same
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | None = None
    # ours
    logprobs_at_temperature: bool | None = Field(
        default=False,
        description="Tell log-probabilities of the distribution that the temperature makes.",
    )
    num_speculative_tokens: Annotated[int, Field(ge=0, le=MOST)] | None = Field(
        default=None,
        description="Most tokens tried at once that prompt lookup proposes: same answer, sooner. "
        "null: scheduler.num_speculative_tokens.",
    )
    slo: str | None = Field(
        default=None, description="Class of service: standard or one of scheduler.slo_classes."
    )

    @model_validator(mode="after")
    def _read_sglangs(self) -> InferenceRequest:
        """What SGLang has as fields of a request are structured outputs."""
        asked = {"regex": self.regex, "grammar": self.ebnf, "json": self.json_schema}
        if asked := {kind: given for kind, given in asked.items() if given}:
            self.structured_outputs = (self.structured_outputs or {}) | asked
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end an output."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def is_free(self) -> bool:
        """Whether the output may be anything."""
        return self.response_format is None and self.structured_outputs is None

    def alternatives(self, likeliest: int | None) -> int | None:
        """How many alternatives to a token are told, where it may be so many of the likeliest."""
        ids = self.logprob_token_ids
        return likeliest if likeliest is None or not ids else len(ids) + 1

    def format(self) -> StructuredOutputsParams | None:
        """What an answer must match. ValueError for what makes no sense."""
        form, given = self.response_format, self.structured_outputs
        wanted = {} if form is None else form.wanted()
        if given is None:
            return StructuredOutputsParams(**wanted) if wanted else None
        known = [each.name for each in fields(StructuredOutputsParams)]
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"structured_outputs has {unknown[0]}; must be of {', '.join(known)}")
        return StructuredOutputsParams(**(given | wanted))

    def structure(
        self, form: Format | None = None, literal: Callable[[str], str] = quote
    ) -> StructuredOutputsParams | None:
        """What the output must match. ValueError for what makes no sense."""
        return self.format()

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
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            logit_bias=self.logit_bias or {},
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
            logprobs=logprobs,
            logprob_token_ids=tuple(self.logprob_token_ids or ()),
            logprobs_at_temperature=bool(self.logprobs_at_temperature),
            prompt_logprobs=prompt_logprobs,
            structured_outputs=structure,
            num_speculative_tokens=self.num_speculative_tokens,
        )


class CompletionRequest(InferenceRequest):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=2048)]
        | Annotated[
            list[Annotated[Tokens, Field(min_length=1)]],
            Field(fail_fast=True, min_length=1, max_length=2048),
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


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=1024)]


class AllowedTools(Body):
    """Of the tools of a chat request, those that may be called this time, and whether one must."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[Tool], Field(fail_fast=True, min_length=1, max_length=1024)]


class ChatCompletionRequest(InferenceRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[Objects, Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    documents: Objects | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: Count | None = None
    include_reasoning: bool | None = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    echo: bool | None = False
    add_special_tokens: bool | None = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _allow_tools(self) -> ChatCompletionRequest:
        """A choice among some of the tools is one of a request that has no others."""
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            allowed = AllowedTools.model_validate(choice.get("allowed_tools"))
            names = [name.function.name for name in allowed.tools]
            tools = {tool.function.name: tool for tool in self.tools or ()}
            if unknown := [name for name in names if name not in tools]:
                raise ValueError(f"tool_choice allows {unknown[0]!r}, which is not among the tools")
            self.tools, self.tool_choice = [tools[name] for name in names], allowed.mode
        return self

    @property
    def may_call(self) -> bool:
        """Whether the answer may be calls of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def is_free(self) -> bool:
        """Whether the output may be anything."""
        return super().is_free and self.tool_choice in (None, "none", "auto")

    def forced_tools(self) -> list[Tool]:
        """The tools of which one must be called; none if the model may choose."""
        choice, tools = self.tool_choice, self.tools or []
        if choice in (None, "none", "auto"):
            return []
        if choice != "required":
            named = {t.function.name: t for t in tools}
            tools = [t for n, t in named.items() if choice == _call_of(n)]
        if not tools:
            raise ApiError(
                400,
                f"tool_choice: got {choice!r}; must be none, auto, or, with tools, required or one "
                f'of them: {{"type": "function", "function": {{"name": ...}}}}, or allowed_tools',
                param="tool_choice",
            )
        return tools

    def structure(
        self, form: Format | None = None, literal: Callable[[str], str] = quote
    ) -> StructuredOutputsParams | None:
        """What the output must match. A response format binds an answer, and no calls, as OpenAI
        has it; `structured_outputs` binds the whole output, as vLLM has it. `form`: how the model
        writes calls, `literal`: its marks in a grammar."""
        answer, forced = self.format(), self.forced_tools()
        named = self.response_format is not None and self.response_format.type != "text"
        if forced and answer and not named:
            message = "tool_choice: an output cannot be a call and have a structure; leave out one"
            raise ApiError(400, message, param="tool_choice")
        if not forced and not (self.may_call and named):
            return answer
        if form is None:
            field = "tool_choice" if forced else "response_format"
            message = f"{field}: it is not known how this model writes calls; leave out it or tools"
            raise ApiError(400, message, param=field)
        functions = [tool.function for tool in forced or self.tools or ()]
        return calls_of(
            form,
            {function.name: function.parameters for function in functions},
            literal,
            parallel=self.tool_choice in (None, "auto", "required")
            and self.parallel_tool_calls is not False,
            answer=None if forced else answer,
        )


def _call_of(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


# What a request says of a conversation besides its messages.
CONVERSATION_FIELDS = {
    "tools",
    "documents",
    "reasoning_effort",
    "thinking_token_budget",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
}


class TokenizeRequest(CutPrompt):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Objects, Field(min_length=1)] | None = None
    tools: Tools | None = None
    documents: Objects | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: Count | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens
