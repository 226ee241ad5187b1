"""What requests for text are answered with, as /openapi.json declares it: the shapes that OpenAI's
clients read.

The answers themselves are built as plain data where they arise (a stream sends one a token); a test
holds every answer against these declarations.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from flexllm_jax.server.http.openapi import EVENTS, TEXT, WITH_BODY, WRITES, Answers

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Tokens that were in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Tokens of what was thought before the answer, its marks included."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionLogprobs(BaseModel):
    """Per token; None for the first of a prompt, which nothing predicts."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(BaseModel):
    """A token, and the bytes it stands for."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenTokenLogprob(TokenLogprob):
    """A token of the output, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Per token."""

    content: list[ChosenTokenLogprob] | None


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    reasoning: str | None = None
    reasoning_content: str | None = Field(default=None, description="The same, by its older name.")


class ChatChoice(BaseModel):
    """One output."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatCompletion(BaseModel):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """A model that requests can name; `parent` is an adapter's base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class DeletedModel(BaseModel):
    """DELETE of a finetuned model."""

    id: str
    object: Literal["model"]
    deleted: bool


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """POST /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


_INFERENCE = (*WITH_BODY, 404, 429, 503)
ANSWERS: Answers = {
    ("post", "/v1/completions"): ([Completion, EVENTS], _INFERENCE),
    ("post", "/v1/chat/completions"): ([ChatCompletion, EVENTS], _INFERENCE),
    ("post", "/invocations"): ([ChatCompletion, Completion, EVENTS], _INFERENCE),
    ("get", "/v1/models"): ([ModelList], ()),
    ("get", "/v1/models/{name}"): ([Model], (404,)),
    ("delete", "/v1/models/{name}"): ([DeletedModel], (400, 404, 409, *WRITES)),
    ("post", "/tokenize"): ([Tokens], (*WITH_BODY, 404)),
    ("post", "/detokenize"): ([Text], (*WITH_BODY, 404)),
    ("get", "/tokenizer_info"): ([TokenizerInfo], ()),
    ("post", "/v1/load_lora_adapter"): ([TEXT], (*WITH_BODY, 403, 404, *WRITES)),
    ("post", "/v1/unload_lora_adapter"): ([TEXT], (*WITH_BODY, 404, *WRITES)),
}
