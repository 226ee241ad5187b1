"""One sample request from its body to a SampleResponse.

Tokens include the one that ended the output, or that completed a stop string: renderers read from
it whether an answer ended well. Log-probabilities of sampled tokens are those of the distribution
at the request's temperature; of prompts, the model's own.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flexllm_jax.engine.sampling.params import TOP_LOGPROBS, SamplingParams
from flexllm_jax.models.text.detokenizer import Detokenizer, OutputText
from flexllm_jax.server.engines.client import Generation
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.registry import ServedAdapter
from flexllm_jax.server.tinker.protocol import prompt_targets, schema
from flexllm_jax.server.tinker.protocol.prompt_targets import PromptTargets
from flexllm_jax.server.tinker.protocol.wire import Sampled, Top, sample_response

SLO_CLASS = "batch"  # interactive requests keep their objective


class SampleFailed(Exception):
    """The engine refused it, or failed. `invalid`: the request is to blame; `lost`: the engine has
    ended; `busy`: it can be tried again."""

    def __init__(self, message: str, *, invalid: bool, busy: bool = False):
        super().__init__(message)
        self.invalid, self.busy = invalid, busy


@dataclass(frozen=True)
class Asked:
    """What a request asks for, checked."""

    prompt: list[int]
    params: SamplingParams
    samples: int
    stop_strings: tuple[str, ...]
    scored: bool  # log-probabilities of the prompt
    targets: PromptTargets | None  # more of them
    scored_last: int  # of so many of its last tokens
    prompt_k: int
    sample_k: int

    @property
    def tokens(self) -> int:
        """Most tokens that it generates."""
        return self.samples * self.params.max_tokens


def check(body: schema.Sample, room: Callable[[list[int]], int], vocab_size: int) -> Asked:
    """What a request asks for; ValueError in one line. `room`: most tokens after a prompt."""
    prompt: list[int] = []
    for chunk in body.prompt.chunks:
        if chunk.type != "encoded_text" or chunk.tokens is None:
            raise ValueError(f"prompt: has a chunk of type {chunk.type!r}; text only")
        prompt += chunk.tokens
    if not prompt:
        raise ValueError("prompt: it has no tokens; give at least one")
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"prompt: token {wrong} is not in the vocabulary of {vocab_size}")
    if not 1 <= body.num_samples <= 4096:
        raise ValueError(f"num_samples: got {body.num_samples}; must be between 1 and 4096")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        k = getattr(body, name)
        if not 0 <= k <= TOP_LOGPROBS:
            raise ValueError(f"{name}: got {k}; must be between 0 and {TOP_LOGPROBS}")
    if body.prompt_alt_tokens_k:
        raise ValueError("prompt_alt_tokens_k: is not supported; leave it out")
    targets = None
    if body.target_prompt_logprobs is not None:
        targets = prompt_targets.read(body.target_prompt_logprobs, len(prompt), vocab_size)
    last = body.prompt_logprobs_last_n
    if last is not None and not (body.prompt_logprobs and 1 <= last < max(2, len(prompt))):
        raise ValueError(
            f"prompt_logprobs_last_n: got {last}; needs prompt_logprobs, and must be between 1 and "
            f"{len(prompt) - 1}"
        )
    sampling = body.sampling_params
    stop = sampling.stop
    listed: list = [stop] if isinstance(stop, str) else list(stop or ())
    strings = tuple(part for part in listed if isinstance(part, str))
    if not all(strings):
        raise ValueError("sampling_params.stop: a stop string is empty; leave it out")
    scored = bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
    most = sampling.max_tokens
    params = SamplingParams(
        max_tokens=room(prompt) if most is None else most,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=None if sampling.seed is None else sampling.seed % 2**31,
        stop_token_ids=tuple(part for part in listed if isinstance(part, int)),
        ignore_eos=stop == [],
        logprobs=body.topk_sample_logprobs,
        logprobs_at_temperature=True,
        prompt_logprobs=body.topk_prompt_logprobs if scored or targets else None,
        prompt_logprob_token_ids=targets.rows if targets else (),
    )
    return Asked(
        prompt,
        params,
        body.num_samples,
        strings,
        scored,
        targets,
        len(prompt) if last is None else last,
        body.topk_prompt_logprobs,
        body.topk_sample_logprobs,
    )


@dataclass
class Outcome:
    """A SampleResponse, and what it took."""

    response: bytes
    sampled_tokens: int


class Sampler:
    """Runs checked requests in the engines."""

    def __init__(self, engines: Engines, detokenizer: Detokenizer):
        self._engines, self._detokenizer = engines, detokenizer

    async def run(
        self, asked: Asked, adapter: ServedAdapter | None, started: Callable[[int], None]
    ) -> Outcome:
        """Generate all samples of a request. EngineUnavailable, SampleFailed. `started` is told
        the prompt's tokens at the first token of each."""
        arrival = time.monotonic()
        params = asked.params
        parts: list[tuple[int, Generation]] = []
        try:
            # The prompt is scored once; the others share what of it is in the prefix cache.
            for count, offset in _split(asked):
                own = params
                if offset:
                    seed = None if params.seed is None else params.seed + offset
                    own = dataclasses.replace(
                        params, prompt_logprobs=None, prompt_logprob_token_ids=(), seed=seed
                    )
                generation = self._engines.generate(
                    [asked.prompt], own, count, adapter, SLO_CLASS, arrival
                )
                parts.append((offset, generation))
            collected = [_Output(self._detokenizer, asked) for _ in range(asked.samples)]
            for offset, generation in parts:
                async for index, _, output in generation:
                    if output.error:
                        raise SampleFailed(output.error, invalid=output.invalid, busy=output.busy)
                    taken = collected[offset + index]
                    if not taken.tokens:
                        started(len(asked.prompt))
                    if taken.take(output):
                        generation.drop(index)
        finally:
            for _, generation in parts:
                generation.close()
        return Outcome(_respond(asked, collected), sum(len(each.tokens) for each in collected))


def _split(asked: Asked) -> list[tuple[int, int]]:
    """How many samples are asked for together, and which is the first of them."""
    if asked.params.prompt_logprobs is not None and asked.samples > 1:
        return [(1, 0), (asked.samples - 1, 1)]
    return [(asked.samples, 0)]


class _Output:
    """One output as it comes."""

    def __init__(self, detokenizer: Detokenizer, asked: Asked):
        stops = asked.stop_strings
        self._text = OutputText(detokenizer, asked.prompt, stops, skip_special_tokens=False)
        self._looks = bool(stops)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[Top] = []
        self.prompt: Sequence[dict[int, float] | None] | None = None
        self.cached_tokens = 0
        self.stopped = False

    def take(self, output) -> bool:
        """Take in new tokens; whether a stop string ends it here."""
        self.prompt = output.prompt_logprobs or self.prompt
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        for position, token in enumerate(output.token_ids):
            self.tokens.append(token)
            likely = output.logprobs[position]
            self.logprobs.append(likely[token])
            self.top.append(likely)
            if self._looks and self._text.push(token):
                self.stopped = True
                return True
        self.stopped = output.finish_reason == "stop"
        return False


def _respond(asked: Asked, outputs: Sequence[_Output]) -> bytes:
    sequences = [
        Sampled(each.tokens, each.logprobs, each.stopped, each.top if asked.sample_k else None)
        for each in outputs
    ]
    prompt_logprobs = prompt_top = targets = None
    if asked.targets:
        targets = asked.targets.answer([likely or {} for likely in (outputs[0].prompt or ())[1:]])
    if asked.scored:
        told = list(outputs[0].prompt or ())
        told = [None] * (len(asked.prompt) - len(told)) + told
        first = len(asked.prompt) - asked.scored_last
        told = [None if i < first else likely for i, likely in enumerate(told)]
        pairs = zip(asked.prompt, told, strict=True)
        prompt_logprobs = np.array(
            [math.nan if likely is None else likely[token] for token, likely in pairs], np.float32
        )
        if asked.prompt_k:
            prompt_top = [likely or {} for likely in told]
    cached = max(each.cached_tokens for each in outputs)
    return sample_response(
        sequences,
        asked.sample_k,
        None if prompt_logprobs is None else prompt_logprobs.tolist(),
        prompt_top,
        asked.prompt_k,
        cached,
        targets,
    )
