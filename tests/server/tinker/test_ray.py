"""Models on two engines of Ray: a sampler is where its model is, and a model whose engine dies goes
on in the other one with the same numbers."""

import os
import signal
import time

import numpy as np
import pytest

from tests.server.engines.test_ray import SERVE_RAY, SLOW_S, by_engine, pid_of
from tests.server.running import RunningServer
from tests.server.tinker.conftest import KEYS, tinker_config
from tests.server.tinker.speaking import Model
from tests.server.tinker.test_restarts import DATA, Patient, train

pytest.importorskip("ray", reason="needs Ray: pip install 'flexllm_jax[ray]'")

TOKENS = "vllm:iteration_tokens_total_sum"


@pytest.fixture(scope="module")
def two_engines(chat_llama, tmp_path_factory):
    config = tinker_config(
        chat_llama,
        tmp_path_factory.mktemp("ray"),
        ray={"replicas": 2, "cpus_per_replica": 0.5},
    )
    with RunningServer(config, SERVE_RAY) as running:
        running.wait(lambda: all(f"engine {i} ready" in running.output for i in "01"), SLOW_S)
        yield running
        assert running.stop() == 0, running.output


def settled(server):
    """Tokens of each engine, once all that it did is told of."""
    before, now = None, by_engine(server, TOKENS)
    while now != before:
        time.sleep(1)
        before, now = now, by_engine(server, TOKENS)
    return now


def engine_of(server, speaker, sampler, first_seq):
    """The one that answers a sampler's requests, all of them."""
    before = settled(server)
    params = {"max_tokens": 8, "stop": []}
    promises = [
        speaker.ask_sample(sampler, [1, 5, 20, 33], first_seq + i, num_samples=1, params=params)
        for i in range(4)
    ]
    for promise in promises:
        speaker.result(promise)

    now = settled(server)
    (engine,) = {e for e in now if now[e] > before.get(e, 0)}
    return engine


def test_models_spread_and_outlive_their_engine(two_engines):
    speaker = Patient(two_engines, KEYS["boss"]).begin()
    expected = train(Model.make(speaker))  # goes on being there: the others spread beside it
    models = [Model.make(speaker) for _ in range(3)]
    for model in models:
        model.train(*DATA, forward_only=True)
    samplers = [model.sampler() for model in models]
    where = [engine_of(two_engines, speaker, s, 100 * i) for i, s in enumerate(samplers)]
    assert where[0] == where[2] != where[1]
    dying = models[0]

    losses = train(dying, lambda: os.kill(pid_of(two_engines, where[0]), signal.SIGKILL))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert engine_of(two_engines, speaker, dying.sampler(), 1000) == where[1]
    scored = speaker.logprobs(samplers[0], [1, 5, 20, 33], 2000)  # of what it was before
    base = speaker.logprobs(speaker.sampler(), [1, 5, 20, 33], 0)
    np.testing.assert_allclose(scored[1:], base[1:], atol=1e-5)
