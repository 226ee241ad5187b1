"""From a checked request to pieces of text: admission, the engine, detokenization.

Every token of every output becomes one `Delta`, in the order the engine told them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flexllm_jax.config import Config
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.engine.sampling.reasoning import Thinking
from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from flexllm_jax.models.text.detokenizer import Detokenizer, OutputText
from flexllm_jax.server.engines.client import EngineUnavailable, Generation
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.protocol import Output
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.http.access import Admission, Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.logprobs import (
    Logprobs,
    TokenReport,
    prompt_table,
    report_token,
)
from flexllm_jax.server.inference.schema import (
    ChatCompletionRequest,
    InferenceRequest,
    TokenizeRequest,
    Tool,
)
from flexllm_jax.server.inference.structures import StructureChecks
from flexllm_jax.server.inference.text import TextCodec, too_long
from flexllm_jax.server.inference.tools.formats import Format
from flexllm_jax.server.metrics import RequestMetrics, ServerMetrics


@dataclass(frozen=True)
class Delta:
    """A token of output `index`, and the text that is certain since the one before."""

    index: int
    token: int
    text: str
    report: TokenReport | None  # where log-probabilities are asked for
    prompt_logprobs: list[Logprobs | None] | None
    finish_reason: str | None
    stop_reason: str | int | None  # the stop string or the one of stop_token_ids that ended it


class Answer:
    """The outputs of one HTTP request. Iterate once; `close` in any case.

    Raises ApiError when the engine refuses the request or fails.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        generation: Generation,
        texts: list[OutputText],
        metrics: list[RequestMetrics],
        params: SamplingParams,
        detokenizer: Detokenizer,
    ):
        self.prompts, self._params, self._detokenizer = prompts, params, detokenizer
        self.output_tokens = [0] * len(texts)
        self.reasoning_tokens = [0] * len(texts)
        self._cached_tokens = [0] * len(texts)
        self._generation, self._texts, self._metrics = generation, texts, metrics

    async def close(self) -> None:
        """Drop what has not ended, and give back what the request holds."""
        self._generation.close()
        for metrics in self._metrics:
            metrics.end("abort")  # those that have ended stay as they were

    def tell_prompt(
        self, body: InferenceRequest, index: int, logprobs: list[Logprobs | None] | None
    ) -> dict[str, Any]:
        """What vLLM's fields ask for of an output's prompt: its tokens, and what was likely."""
        prompt, table = self.prompts[index * len(self.prompts) // len(self.output_tokens)], None
        if body.prompt_logprobs is not None:
            table = prompt_table(self._detokenizer, prompt, logprobs or [], body.prompt_logprobs)
        tokens = prompt if body.return_token_ids else None
        return {"prompt_token_ids": tokens, "prompt_logprobs": table}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and outputs, as OpenAI tells them."""
        prompt, output = sum(map(len, self.prompts)), sum(self.output_tokens)
        n = len(self.output_tokens) // len(self.prompts)  # a prompt counts once
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens[::n])},
            "completion_tokens_details": {"reasoning_tokens": sum(self.reasoning_tokens)},
        }

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for index, at, output in self._generation:
            if output.error:
                self._metrics[index].end("error")
                if output.busy:
                    raise ApiError(429, output.error, code="server_busy", retry_after_s=5)
                raise ApiError(400 if output.invalid else 503, output.error)
            for position, token in enumerate(output.token_ids):
                yield self._take(index, at, token, output, position)
                if self._texts[index].stopped:
                    break

    def _take(self, index: int, at: float, token: int, output: Output, position: int) -> Delta:
        text = self._texts[index]
        logprobs = output.logprobs[position] if output.logprobs else None
        self.output_tokens[index] += 1
        self._cached_tokens[index] = max(self._cached_tokens[index], output.cached_tokens)
        self._metrics[index].token(at, output.queued_s, output.cached_tokens)
        last = position == len(output.token_ids) - 1
        reason = output.finish_reason if last else None
        told = {other: text.would_add(other) for other in logprobs or {}}
        # The engine stops at stop tokens only, whose text is part of the answer if asked for.
        is_text = reason != "stop" or self._params.include_stop_str_in_output
        if is_text and text.push(token):
            reason = "stop"
            self._generation.drop(index)
        if reason:
            text.finish()
            self._metrics[index].end(reason)
        if is_text:
            told[token] = text.piece
        offset = text.offset if is_text else len(text.text)
        stopped_by = text.stop
        if reason == "stop" and token in self._params.stop_token_ids:
            stopped_by = token
        return Delta(
            index,
            token,
            text.take(),
            report_token(token, told, offset, logprobs) if logprobs else None,
            output.prompt_logprobs if position == 0 else None,
            reason,
            stopped_by,
        )


class Inference:
    """Checks requests and gives them to the engine."""

    def __init__(
        self,
        config: Config,
        engines: Engines,
        codec: TextCodec,
        models: ModelRegistry,
        admission: Admission,
        metrics: ServerMetrics,
    ):
        self.config, self.engines, self.codec, self.models = config, engines, codec, models
        self._admission, self._metrics = admission, metrics
        self.structures = StructureChecks(codec.tokenizer)
        self._slo_classes = ["standard", *config.scheduler.slo_classes]

    def max_model_len(self) -> int:
        """Longest prompt plus output; ApiError 503 while there is no engine to tell."""
        if self.engines.info is None:
            raise not_ready(self.engines)
        return self.engines.info.max_model_len

    def room(self, prompt: list[int]) -> int:
        """Most tokens that an answer to `prompt` may have, at least 1."""
        limit, info = self.max_model_len(), self.engines.info
        if info is not None:
            limit = min(limit, info.num_pages * info.page_size + 1)  # the last has no KV
        return max(1, limit - len(prompt))

    async def structure(
        self,
        client: Client,
        body: InferenceRequest,
        form: Format | None = None,
        thinking: Thinking | None = None,
    ) -> StructuredOutputsParams | None:
        """What the outputs must match, if anything; ApiError when that cannot be kept to. `form`:
        how the model writes calls, `thinking`: and what comes before an answer."""
        literal = self.codec.literal
        if thinking is not None and thinking.budget is not None and body.is_free:
            make_budget = partial(thinking.before, None, literal)
            return await self._checked(client, make_budget, "thinking_token_budget")
        if body.is_free:
            return None
        field = "response_format" if body.structured_outputs is None else "structured_outputs"
        answer = await self._checked(client, body.format, field)

        def make() -> StructuredOutputsParams | None:
            structure = body.structure(form, literal)
            return structure if thinking is None else thinking.before(structure, literal)

        return await self._checked(client, make, "tools", answer)

    async def _checked(
        self,
        client: Client,
        make: Callable[[], StructuredOutputsParams | None],
        field: str,
        known: StructuredOutputsParams | None = None,
    ) -> StructuredOutputsParams | None:
        """What is made, if it can be kept to, as `known` can; else ApiError that names the field.
        In a thread, as what is made may be long."""

        def write() -> tuple[StructuredOutputsParams | None, str]:
            structure = make()
            return structure, "" if structure in (None, known) else structure.to_grammar()

        try:
            structure, grammar = await asyncio.to_thread(write)
            if grammar:
                await self.structures.check(client, grammar)
        except (ValueError, RecursionError) as error:
            message = str(error).replace("structured_outputs", field, 1)
            raise ApiError(400, message, param=field) from None
        return structure

    async def render(
        self, body: ChatCompletionRequest | TokenizeRequest, tools: Sequence[Tool] | None
    ) -> str:
        """A request's messages through the chat template. ApiError for what cannot be used."""
        if body.chat_template is not None and not self.config.server.trust_request_chat_template:
            raise ApiError(
                400,
                "chat_template: is a program, which this server runs for nobody unless "
                "server.trust_request_chat_template is set; leave it out",
                param="chat_template",
            )
        messages, limit = body.messages or [], self.max_model_len()
        if len(messages) > limit:
            what = f"there are {len(messages)} messages, and max_model_len is {limit} tokens"
            raise too_long(what, "messages")
        options = dict(body.chat_template_kwargs or {})
        if (effort := body.reasoning_effort) is not None:
            asked = self.codec.template.effort(effort)
            # With `none`, one that does not think gets what it asks for.
            if asked is None and (effort != "none" or self.codec.thinks()):
                message = "reasoning_effort: this model's chat template does not read it; leave it"
                raise ApiError(400, f"{message} out", param="reasoning_effort")
            options = (asked or {}) | options
        budget = body.thinking_token_budget
        if budget is not None and self.codec.template.reads("thinking_budget"):
            options = {"thinking_budget": budget} | options
        text = await self.codec.render(
            messages,
            [tool.model_dump(exclude_unset=True) for tool in tools or ()],
            options,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            source=body.chat_template,
        )
        if budget is not None and self.codec.thinking(text, budget) is None:
            message = (
                "thinking_token_budget: the answer begins with no thought that is known as one"
            )
            raise ApiError(400, f"{message}; leave it out", param="thinking_token_budget")
        return text

    async def encode(
        self, body: InferenceRequest | TokenizeRequest, texts: Sequence[str], *, special: bool
    ) -> list[list[int]]:
        """Tokens of prompts; of a prompt that is to be cut, those that are left."""
        limit = self.max_model_len()
        if body.truncate_prompt_tokens is None:
            return await self.codec.encode(texts, limit, add_special_tokens=special)
        longest = max(map(len, texts), default=0)
        encoded = await self.codec.encode(texts, longest, add_special_tokens=special)
        return [body.cut(tokens) for tokens in encoded]

    def open(
        self,
        client: Client,
        body: InferenceRequest,
        prompts: Sequence[list[int]],
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        *,
        structure: StructuredOutputsParams | None = None,
        keep: Collection[str] = (),
    ) -> Answer:
        """Admit a request and start it. ApiError: it is wrong, or has to wait. `keep`: special
        tokens that are text of the outputs."""
        arrival = time.monotonic()
        if body.prompt_logprobs is not None:
            if body.stream:
                message = "prompt_logprobs: is not told in a stream; leave out it or stream"
                raise ApiError(400, message, param="prompt_logprobs")
            prompt_logprobs = max(body.prompt_logprobs, prompt_logprobs or 0)
        if body.stream_options is not None and not body.stream:
            message = "stream_options: needs stream=true; set it or leave this out"
            raise ApiError(400, message, param="stream_options")
        adapter = self.models.resolve(body.model, client)
        slo = body.slo or "standard"
        if slo not in self._slo_classes:
            raise ApiError(
                400, f"slo: got {slo!r}; must be one of {self._slo_classes}", param="slo"
            )
        try:
            params = body.sampling_params(max_tokens, logprobs, prompt_logprobs, structure)
            if self.engines.info is not None:
                params.check_tokens(self.engines.info.vocab_size)
        except ValueError as error:
            param = re.split("[=: ]", str(error), maxsplit=1)[0]
            raise ApiError(400, str(error), param=param) from None
        for prompt in prompts:
            self._check_size(prompt, params)
        n = body.n or 1
        outputs = n * len(prompts)
        tokens = n * sum(map(len, prompts))
        admitted = self._admission.admit(client, outputs, tokens, outputs * max_tokens)
        try:
            generation = self.engines.generate(prompts, params, n, adapter, slo, arrival)
        except EngineUnavailable:
            admitted.close(0)
            raise not_ready(self.engines) from None
        except BaseException:
            admitted.close(0)
            raise
        batch = self._metrics.batch(admitted, outputs, n, max_tokens)
        name = adapter.name if adapter else None
        return Answer(
            prompts,
            generation,
            [
                OutputText(
                    self.codec.detokenizer,
                    prompts[i // n],
                    body.stop_strings,
                    params.min_tokens,
                    skip_special_tokens=body.skip_special_tokens is not False,
                    include_stop=params.include_stop_str_in_output,
                    keep=keep,
                )
                for i in range(outputs)
            ],
            [
                RequestMetrics(batch, arrival, len(prompts[i // n]), name, slo)
                for i in range(outputs)
            ],
            params,
            self.codec.detokenizer,
        )

    def _check_size(self, prompt: list[int], params: SamplingParams) -> None:
        info = self.engines.info
        if info is None:
            raise not_ready(self.engines)
        if not prompt:
            raise ApiError(400, "prompt: it has no tokens; give at least one", param="prompt")
        total = len(prompt) + params.max_tokens
        if total > info.max_model_len:
            raise ApiError(
                400,
                f"prompt of {len(prompt)} tokens + max_tokens={params.max_tokens} exceeds "
                f"max_model_len={info.max_model_len}: shorten the prompt or lower max_tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if -(-(total - 1) // info.page_size) > info.num_pages:
            raise ApiError(
                400,
                f"prompt of {len(prompt)} tokens + max_tokens={params.max_tokens} does not fit in "
                f"the {info.num_pages} KV pages of {info.page_size} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        outside = next((t for t in prompt if t >= info.vocab_size), None)
        if outside is not None:
            raise ApiError(
                400,
                f"prompt: token id {outside} is out of vocabulary, which has ids 0 to "
                f"{info.vocab_size - 1}: use this model's tokenizer",
                param="prompt",
            )


def not_ready(engines: Engines) -> ApiError:
    """The answer while no engine serves."""
    return ApiError(503, f"the engine is {engines.state}; try again", retry_after_s=5)
