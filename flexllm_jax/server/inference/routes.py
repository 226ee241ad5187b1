"""Which path leads where: completions, chat, models and the tokenizer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.chat import chat
from flexllm_jax.server.inference.completions import complete
from flexllm_jax.server.inference.requests import Inference
from flexllm_jax.server.inference.schema import (
    CONVERSATION_FIELDS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from flexllm_jax.server.inference.text import too_long
from flexllm_jax.server.inference.unsupported import refuse_unsupported


def routes(inference: Inference, delete: Callable[[str, Client], Awaitable[None]]) -> APIRouter:
    """The routes of this floor but for adapters'. `delete` forgets a finetuned model."""
    router = APIRouter()
    codec, models, engines = inference.codec, inference.models, inference.engines

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest, client: Known) -> Response:
        return await complete(request, body, client, inference)

    @router.post("/v1/chat/completions")
    async def chat_completions(
        request: Request, body: ChatCompletionRequest, client: Known
    ) -> Response:
        return await chat(request, body, client, inference)

    @router.post("/invocations")
    async def invocations(request: Request, body: dict[str, Any], client: Known) -> Response:
        """The one path that Amazon SageMaker asks: a conversation has `messages`."""
        try:
            if "messages" in body:
                conversation = ChatCompletionRequest.model_validate(body)
                return await chat(request, conversation, client, inference)
            completion = CompletionRequest.model_validate(body)
        except ValidationError as error:
            found = [{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)]
            raise RequestValidationError(found, body=body) from None
        return await complete(request, completion, client, inference)

    @router.get("/v1/models")
    async def list_models(client: Known) -> Response:
        return sse.json_response({"object": "list", "data": models.describe_all(client)})

    @router.get("/v1/models/{name:path}")
    async def model(name: str, client: Known) -> Response:
        return sse.json_response(models.describe(name, client))

    @router.delete("/v1/models/{name:path}")
    async def delete_model(name: str, client: Known) -> Response:
        await delete(name, client)
        return sse.json_response({"id": name, "object": "model", "deleted": True})

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, client: Known) -> Response:
        refuse_unsupported(body)
        models.resolve(body.model, client)  # 404 for one that there is not
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give exactly one of prompt and messages", param="prompt")
        limit = inference.max_model_len()
        if body.messages is not None:
            text = await inference.render(body, body.tools)
        else:
            given = body.model_dump(exclude_defaults=True).keys() & CONVERSATION_FIELDS
            if name := min(given, default=None):
                raise ApiError(400, f"{name}: goes with messages, not with a prompt", param=name)
            text = body.prompt or ""
        special = body.add_special_tokens
        special = body.messages is None if special is None else special
        (tokens,) = await inference.encode(body, [text], special=special)
        if len(tokens) > limit:
            raise too_long(f"the prompt has {len(tokens)} tokens, and max_model_len is {limit}")
        names = codec.backend.id_to_token
        return sse.json_response(
            {
                "count": len(tokens),
                "max_model_len": models.max_model_len,
                "tokens": tokens,
                "token_strs": [names(t) for t in tokens] if body.return_token_strs else None,
            }
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, client: Known) -> Response:
        models.resolve(body.model, client)
        known = engines.info.vocab_size if engines.info else len(codec.tokenizer)
        if outside := [token for token in body.tokens if token >= known]:
            message = f"tokens: got {outside[0]}; the vocabulary has ids 0 to {known - 1}"
            raise ApiError(400, message, param="tokens")
        return sse.json_response({"prompt": await codec.decode(body.tokens)})

    @router.get("/tokenizer_info")
    async def tokenizer_info(client: Known) -> Response:
        tokenizer = codec.tokenizer
        return sse.json_response(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": len(tokenizer),
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "unk_token": tokenizer.unk_token,
                "chat_template": tokenizer.chat_template,
            }
        )

    return router
