"""Prompts answered outside a workload: encoded with room for an answer, answered, written out.

What `scripts/generate.py` does, and `scripts/coserve.py --ask` before and after finetuning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from flexllm_jax.config import Config, ConfigError, PreloadedAdapter
from flexllm_jax.config.cli import find_adapter
from flexllm_jax.engine.outputs import RequestOutput
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.launch.replay import encode_prompt
from flexllm_jax.launch.run import Inputs
from flexllm_jax.llm import LLM
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.tokenizer import encode_text

ADAPTER = "requested"  # the name by which `with_adapter` has an adapter served


def encode_prompts(
    texts: Sequence[str], inputs: Inputs, answer_tokens: int, option: str, *, raw: bool = False
) -> list[list[int]]:
    """Token ids of users' messages, through the chat template unless `raw`.

    Raises ConfigError, naming the command line's `option`, for one that is empty or leaves no room
    in the context for an answer of so many tokens.
    """
    prompts, template = [], ChatTemplate(inputs.tokenizer)
    for text in texts:
        tokens = encode_text(inputs.tokenizer, text) if raw else encode_prompt(template, text)
        if not tokens:
            raise ConfigError(
                f"{option}: the prompt {text[:40]!r} has no tokens; give a longer one"
            )
        if len(tokens) + answer_tokens > inputs.context:
            raise ConfigError(
                f"{option}: the prompt {text[:40]!r} of {len(tokens)} tokens and an answer of "
                f"{answer_tokens} exceed the context of {inputs.context}; shorten it"
            )
        prompts.append(tokens)
    return prompts


def with_adapter(config: Config, given: str) -> Config:
    """The configuration with the adapter of that name or path preloaded, by the name ADAPTER."""
    preloaded = PreloadedAdapter(name=ADAPTER, path=find_adapter(config, given))
    adapters = config.adapters.model_copy(update={"preload": (preloaded,), "slots": 2})
    return config.model_copy(update={"adapters": adapters})


def answer_greedily(
    llm: LLM, prompts: Sequence[list[int]], max_tokens: int, adapter: str | None = None
) -> list[str]:
    """The texts of the answers, without white space around them."""
    if not prompts:
        return []
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=max_tokens), adapter)
    return [output.text.strip() for output in outputs]


def render(texts: Sequence[str], outputs: Sequence[RequestOutput], format: str) -> Iterator[str]:
    """The lines to write: each prompt with its answers as `text`, or a JSON object (`jsonl`) an
    answer."""
    for text, output in zip(texts, outputs, strict=True):
        for completion in output.outputs:
            if format == "text":
                yield f"> {text}\n{completion.text.strip()}\n"
                continue
            row = {
                "prompt": text,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "token_ids": completion.token_ids,
            }
            if completion.logprobs is not None:
                row["logprobs"] = completion.logprobs
            yield json.dumps(row, ensure_ascii=False)
