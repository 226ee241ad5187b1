"""Several outputs of one prompt, in the engine's process: the prompt is computed once, whoever of
them is dropped meanwhile, and each output is what it would have been alone."""

import time

import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.server.engines.calls import EngineCalls
from flexllm_jax.server.engines.engine_requests import EngineRequests
from flexllm_jax.server.engines.protocol import Generate
from tests.engines import random_prompts

PROMPT = random_prompts([40], seed=9)[0]


class Side:
    """The engine's side of the socket."""

    def __init__(self, llm):
        self.tokens, self.cached, self.ended, self.errors = {}, {}, {}, {}
        calls = EngineCalls(llm.config, llm.engine, llm._loop, llm.tokenizer)

        def run(function, *arguments):
            function(*arguments)

        self.requests = EngineRequests(llm.engine, llm._loop, calls, self.tell, run, run)

    def tell(self, event):
        for output in event.outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            self.cached.setdefault(output.request_id, output.cached_tokens)
            if output.error:
                self.errors[output.request_id] = output.error
            if output.finish_reason or output.error:
                self.ended[output.request_id] = output.finish_reason

    def take(self, first, count, prompt=PROMPT, seed=7, **params):
        params = {"max_tokens": 6, "temperature": 1.0, "seed": seed} | params
        now = time.monotonic()
        self.requests.take(
            [
                Generate(
                    first + i, prompt, SamplingParams(**params), None, None, now, i, "standard"
                )
                for i in range(count)
            ]
        )

    def wait(self, numbers):
        end = time.monotonic() + 60
        while not set(numbers) <= self.ended.keys():
            assert time.monotonic() < end, (self.ended, self.errors)
            time.sleep(0.01)


@pytest.fixture
def side(llm, monkeypatch):
    directory = llm.engine.adapters.directory
    monkeypatch.setattr(directory, "rooms", [*directory.rooms])
    for holder, name in (
        (llm.engine.trainer, "turns"),
        (llm.engine.trainer.writer, "on_checkpoint"),
        (llm.engine.trainer.writer, "keep_trying_s"),
        (llm._loop, "_after_step"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name))
    side = Side(llm)
    llm._loop._after_step = side.requests.tell_tokens
    return side


def test_the_prompt_is_computed_once_and_outputs_are_as_alone(side, llm):
    side.take(0, 4)
    side.wait(range(4))
    whole = len(PROMPT) // 8 * 8  # pages of 8 tokens
    assert side.cached[0] == 0 and all(side.cached[i] >= whole - 8 for i in (1, 2, 3))
    assert not side.requests._behind
    for i in range(4):
        params = SamplingParams(max_tokens=6, temperature=1.0, seed=7 + i)
        assert side.tokens[i] == llm.generate(PROMPT, params)[0].outputs[0].token_ids
    assert len({tuple(tokens) for tokens in side.tokens.values()}) > 1


def test_others_go_on_when_the_first_is_dropped_or_refused(side):
    side.take(10, 3, prompt=random_prompts([41], seed=10)[0], max_tokens=60)
    side.requests.cancel([10, 12])
    side.wait([11])
    assert side.ended[11] == "length" and 12 not in side.ended
    side.take(20, 3, prompt=[*PROMPT, 999])
    side.wait(range(20, 23))
    assert all("999" in side.errors[i] for i in range(20, 23))
    assert not side.requests._behind


def test_what_shares_no_page_or_is_scored_does_not_wait(side):
    side.take(30, 2, prompt=PROMPT[:8])
    side.take(40, 2, prompt_logprobs=0)
    assert not side.requests._behind
    side.wait([30, 31, 40, 41])
