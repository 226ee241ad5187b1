"""Models that are trained by calls to an engine's process: what is answered, what bad bytes do, and
that a client which keeps its calls ends with the same numbers when the engine is killed."""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from flexllm_jax.config import build_config
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.server.engines.client import EngineClient, EngineRefused, EngineUnavailable
from flexllm_jax.server.engines.registry import ServedAdapter
from flexllm_jax.server.engines.training_client import TrainingFailed
from flexllm_jax.server.engines.training_messages import (
    ForwardBackward,
    LoadState,
    OptimStep,
    SaveAdapter,
    SaveState,
    Tensor,
    TrainingDatum,
)
from tests.server.running import make_config

STEPS = 12


def tensor(values, dtype):
    array = np.asarray(values, dtype)
    return Tensor(array.tobytes(), dtype, list(array.shape))


def data(seed, lengths=(20, 33, 7)):
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        tokens = random.integers(3, 260, length + 1).astype(np.int32)
        inputs = {
            "target_tokens": tensor(tokens[1:], "int64"),
            "weights": tensor(random.choice([0.0, 1.0, 0.5], length), "float32"),
        }
        rows.append(TrainingDatum(tokens[:-1].tobytes(), inputs))
    return rows


def pairs(first, last):
    """What a step is made of, for so many steps."""
    return [
        call
        for number in range(first, last)
        for call in (
            ForwardBackward(data(number), "cross_entropy"),
            OptimStep(learning_rate=1e-2 / (1 + number)),
        )
    ]


@asynccontextmanager
async def engine(config):
    client = EngineClient(config)
    running = asyncio.create_task(client.run())
    await ready(client)
    try:
        yield client
    finally:
        await client.stop(30)
        await running


async def ready(client, restarts=0):
    end = time.monotonic() + 120
    while client.state != "ready" or client.restarts < restarts:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


@pytest.fixture
def config(llama, tmp_path):
    return build_config(make_config(llama, tmp_path / "served"), "test")


async def create(client, name, **fields):
    fields = {"rank": 4, "seed": 1, "train_unembed": False} | fields
    return await client.call("create_training_model", 60, model=name, **fields)


def train(client: EngineClient, name: str, calls: Sequence[Any]) -> list[Any]:
    """Futures of answers."""
    return list(client.training.train(name, calls))


async def told(futures):
    """Losses and norms."""
    results = await asyncio.gather(*futures)
    return [next(iter(result.metrics.values())) for result in results]


def test_what_a_client_is_answered(config, tmp_path):
    async def run():
        async with engine(config) as client:
            with pytest.raises(EngineRefused, match="rank=9: this server trains ranks from 1 to 8"):
                await create(client, "s:train:0", rank=9)
            made = await create(client, "s:train:0")
            assert made == {
                "rank": 4,
                "alpha": 32.0,
                "train_attn": True,
                "train_mlp": True,
                "train_unembed": False,
                "step": 0,
                "max_datum_tokens": 96,
            }
            good, *bad, sampler, step, late = train(
                client,
                "s:train:0",
                [
                    ForwardBackward(data(0), "cross_entropy"),
                    ForwardBackward([TrainingDatum(b"abc", {})], "cross_entropy"),
                    ForwardBackward(data(0), "stable_reinforce"),
                    LoadState(str(tmp_path / "nowhere"), True),
                    SaveAdapter(str(tmp_path / "sampler"), "s:sample:0"),
                    OptimStep(learning_rate=1e-2),
                    SaveState(str(tmp_path / "state")),
                ],
            )
            result = await good
            assert [t.shape for t in result.logprobs] == [[20], [33], [7]]
            total = 0.0
            for own, given in zip(result.logprobs, data(0), strict=True):
                lp = np.frombuffer(own.data, "<f4")
                total -= (np.frombuffer(given.inputs["weights"].data, "<f4") * lp).sum()
            assert result.metrics == {"loss:sum": pytest.approx(total, rel=1e-5)}
            for future, text in zip(
                bad, ("datum 0: model_input: 3 bytes", "stable_reinforce", "nowhere"), strict=True
            ):
                with pytest.raises(TrainingFailed, match=text) as failed:
                    await future
                assert failed.value.category == "user"
            stepped = await step
            assert stepped.step == 1 and stepped.metrics["grad_norm"] > 0
            assert (await sampler).size_bytes > 1000 and (await late).size_bytes > 1000
            with pytest.raises(TrainingFailed, match="no-such") as failed:
                await train(client, "no-such", [OptimStep()])[0]
            assert failed.value.category == "user"

            # The sampler is the adapter before the step: B is zero, so it says what the base says.
            served = ServedAdapter("x", "s:sample:0", str(tmp_path / "sampler"))
            params = SamplingParams(max_tokens=8, temperature=1.0, seed=5, logprobs=0)
            said = {}
            for adapter in (served, None):
                outputs = client.generate(
                    [[5, 6, 7, 8]], params, 1, adapter, "standard", time.monotonic()
                )
                said[adapter] = [o.token_ids async for _, _, o in outputs]
            assert said[served] == said[None]
            end = time.monotonic() + 10
            while not (client.stats and [m.waiting for m in client.stats.training] == [0]):
                assert time.monotonic() < end, client.stats
                await asyncio.sleep(0.05)
            (state,) = client.stats.training
            assert (state.name, state.waiting, state.parked) == ("s:train:0", 0, False)
            await client.call("delete_training_model", 60, model="s:train:0")

    asyncio.run(run())


def test_an_engine_that_is_killed_ends_with_the_same_numbers(config, tmp_path):
    """As the HTTP process does it: it keeps the calls since the last state that is on disk, and
    sends them again."""

    async def run():
        async with engine(config) as client:
            await create(client, "undisturbed")
            expected = await told(train(client, "undisturbed", pairs(0, STEPS)))
            await create(client, "killed")
            snapshot = str(tmp_path / "snapshot")
            futures = train(client, "killed", [*pairs(0, 4), SaveState(snapshot), *pairs(4, STEPS)])
            await futures[8]
            first = await told(futures[:8])
            assert client.info is not None
            os.kill(client.info.pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*futures, return_exceptions=True)
            assert isinstance(outcomes[-1], EngineUnavailable), "it was killed too late"
            assert first == pytest.approx(expected[:8], rel=1e-6)
            await ready(client, restarts=1)
            made = await client.call(
                "create_training_model_from", 60, model="killed", path=snapshot, optimizer=True
            )
            assert made["step"] == 4
            again = train(client, "killed", pairs(4, STEPS))
            # How a batch is cut into steps depends on the clock, and the last bits on that.
            assert await told(again) == pytest.approx(expected[8:], rel=1e-6)

    asyncio.run(run())
