"""Clients of the Tinker API under load, by its unmodified SDK (the extra `test-clients`).

Tokens/s of training beside a job of the same rows, interactive requests beside tenants who learn
from rewards, and many sessions and samples at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import tinker  # pyright: ignore[reportMissingImports]
from tinker import types  # pyright: ignore[reportMissingImports]

from flexllm_jax.experiments.load.client import first_model, metric, open_client, read_metrics
from flexllm_jax.experiments.load.generator import Load, LoadShape
from flexllm_jax.experiments.load.report import attainment, percentiles
from flexllm_jax.experiments.load.server import ServerProcess, open_files, resident_bytes

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
ROW, BATCH, AHEAD = 120, 16, 2  # tokens of a row, rows of a step, steps handed over beforehand
GROUPS, SAMPLES, SAMPLED = 4, 8, 24  # of a step from rewards
RANK, KEY = 32, "tml-load"


@dataclass(frozen=True)
class Shape:
    """How much is asked."""

    turns: int = 3
    steps: int = 24
    seconds: float = 60.0
    clients: int = 4
    tenants: int = 2
    sessions: int = 200
    samples: int = 1000


def service(url: str) -> tinker.ServiceClient:
    """A session, without telemetry."""
    os.environ["TINKER_TELEMETRY"] = "0"
    return tinker.ServiceClient(base_url=url, api_key=KEY)


def base_model(url: str) -> str:
    """A name under which the server knows its model."""
    with open_client(url, KEY) as http:
        return http.get("/api/v1/get_server_capabilities").json()["supported_models"][0][
            "model_name"
        ]


# -- training beside a job -------------------------------------------------------------------------


def training_rates(server: ServerProcess, shape: Shape, out: Path) -> dict[str, Any]:
    """Tokens/s of the same rows as a job and through the SDK, in turns, from the first step on."""
    random = np.random.default_rng(0)
    rows = random.integers(5, 200, (shape.steps * BATCH, ROW)).tolist()
    path = out / "rows.jsonl"
    lines = (json.dumps({"input_ids": row, "labels": row}) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    file, model = server.upload(path), first_model(server.client)
    turns: list[tuple[float, float]] = []
    for _ in range(shape.turns + 1):
        turns.append((_as_job(server, model, file, shape), _by_calls(server.url, rows)))
    turns = turns[1:]  # the first one loads programs
    job, calls = (statistics.median(column) for column in zip(*turns, strict=True))
    ratio = statistics.median(own / native for native, own in turns)
    return {"job_tokens_per_s": job, "sdk_tokens_per_s": calls, "ratio": ratio}


def _as_job(server: ServerProcess, model: str, file: str, shape: Shape) -> float:
    fields = {"lora_rank": RANK, "lora_target_modules": MODULES, "max_steps": shape.steps}
    job = server.start_job(model, file, "native", batch_tokens=BATCH * ROW, **fields)
    seen: list[tuple[float, float]] = []
    whole = shape.steps * BATCH * ROW
    while not seen or seen[-1][1] < whole:
        done = server.tokens_of_jobs().get(job, {}).get("forward", 0.0)
        if done >= BATCH * ROW:
            seen.append((time.monotonic(), done))
        time.sleep(0.05)
    (began, first), (ended, last) = seen[0], next(each for each in seen if each[1] >= whole)
    return (last - first) / (ended - began)


def _by_calls(url: str, rows: list[list[int]]) -> float:
    client = service(url)
    model = client.create_lora_training_client(base_model(url), rank=RANK).result()
    step = types.AdamParams(learning_rate=1e-3)
    ends: list[float] = []
    waiting: list[tuple[Any, Any]] = []

    def wait(most: int) -> None:
        while len(waiting) > most:
            for future in waiting.pop(0):
                future.result()
            ends.append(time.monotonic())

    for at in range(0, len(rows), BATCH):
        data = [_datum(row[:-1], target_tokens=row[1:]) for row in rows[at : at + BATCH]]
        waiting.append((model.forward_backward(data, "cross_entropy"), model.optim_step(step)))
        wait(AHEAD)
    wait(0)
    return (len(ends) - 1) * BATCH * ROW / (ends[-1] - ends[0])


def _datum(tokens: list[int], **inputs: Any) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


# -- interactive requests beside tenants -----------------------------------------------------------


def beside_tenants(
    server: ServerProcess, shape: Shape, slo: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Latencies of interactive clients alone, and beside tenants who learn from rewards."""
    told = {"alone": asyncio.run(_interactive(server, shape, slo))}
    ready, stop = Barrier(shape.tenants + 1), Event()
    with ThreadPoolExecutor(shape.tenants) as pool:
        tenants = [pool.submit(_learn, server.url, n, ready, stop) for n in range(shape.tenants)]
        try:
            ready.wait()
            told["beside"] = asyncio.run(_interactive(server, shape, slo))
        finally:
            stop.set()
        counted = [tenant.result() for tenant in tenants]
    for name in ("steps", "trained", "sampled"):
        total = sum(each[name] for each in counted)
        told["beside"][f"tenants_{name}_per_s"] = total / shape.seconds
    return told


async def _interactive(server: ServerProcess, shape: Shape, slo: dict[str, float]):
    load = Load(
        server.url,
        first_model(server.client),
        LoadShape(clients=shape.clients, seconds=shape.seconds, leaving=0.0, uploads=0),
    )
    await load.run()
    done = [request for request in load.requests if request.outcome == "finished"]
    return {
        "requests": len(load.requests),
        "finished": len(done),
        "tokens_per_s": sum(request.tokens for request in done) / shape.seconds,
        "ttft_ms": percentiles([r.ttft_s for r in done if r.ttft_s is not None]),
        "tpot_ms": percentiles([r.tpot_s for r in done if r.tpot_s is not None]),
        "attainment": attainment(done, slo)["both"],
    }


def _learn(url: str, seed: int, ready: Barrier, stop: Event) -> Counter[str]:
    """A tenant's loop: samples of a snapshot, rewards, a step; what it did from `ready`, after its
    first step, to `stop`."""
    client, random = service(url), np.random.default_rng(seed)
    model = client.create_lora_training_client(base_model(url), rank=RANK, seed=seed).result()
    _learn_once(model, random)
    ready.wait()
    counted = Counter[str]()
    while not stop.is_set():
        counted += _learn_once(model, random)
    return counted


def _learn_once(model: tinker.TrainingClient, random: np.random.Generator) -> Counter[str]:
    params = types.SamplingParams(max_tokens=SAMPLED, temperature=1.0)
    sampler = model.save_weights_and_get_sampling_client().result()
    prompts = random.integers(5, 200, (GROUPS, 16)).tolist()
    groups = [sampler.sample(types.ModelInput.from_ints(p), SAMPLES, params) for p in prompts]
    data, counted = [], Counter(steps=1)
    for prompt, group in zip(prompts, groups, strict=True):
        for sequence in group.result().sequences:
            said, whole = list(sequence.tokens), [*prompt, *sequence.tokens]
            zeros = [0.0] * (len(prompt) - 1)
            inputs = {
                "target_tokens": whole[1:],
                "logprobs": zeros + list(sequence.logprobs or ()),
                "advantages": zeros + [float(random.normal())] * len(said),
            }
            data.append(_datum(whole[:-1], **inputs))
            counted += Counter(sampled=len(said), trained=len(whole) - 1)
    both = model.forward_backward(data, "importance_sampling")
    model.optim_step(types.AdamParams(learning_rate=1e-5)).result()
    both.result()
    return counted


# -- what is sampled, scored and trained on -----------------------------------------------------


def agreement(url: str) -> dict[str, float]:
    """How far log-probabilities of sampled tokens are from those of `compute_logprobs` and of
    `forward`, of a model after a step: what a policy's ratios are off by, and the dtype's."""
    client, random = service(url), np.random.default_rng(0)
    model = client.create_lora_training_client(base_model(url), rank=RANK, seed=1).result()
    _learn_once(model, random)
    sampler = model.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=SAMPLED, temperature=1.0, seed=1)
    scored, trained = [], []
    for prompt in random.integers(5, 200, (GROUPS, 16)).tolist():
        answer = sampler.sample(types.ModelInput.from_ints(prompt), SAMPLES, params).result()
        for sequence in answer.sequences:
            said, whole = np.array(sequence.logprobs), [*prompt, *sequence.tokens]
            text = types.ModelInput.from_ints(whole)
            found = np.array(sampler.compute_logprobs(text).result()[len(prompt) :])
            both = model.forward([_datum(whole[:-1], target_tokens=whole[1:])], "cross_entropy")
            forward = both.result().loss_fn_outputs[0]["logprobs"].to_numpy()[len(prompt) - 1 :]
            scored.append(np.abs(found - said))
            trained.append(np.abs(forward - said))
    told = {"compute_logprobs": np.concatenate(scored), "forward": np.concatenate(trained)}
    means = {f"{name}_mean": float(own.mean()) for name, own in told.items()}
    return means | {f"{name}_max": float(own.max()) for name, own in told.items()}


# -- many at once ----------------------------------------------------------------------------------


def many_at_once(server: ServerProcess, shape: Shape, rounds: int = 3) -> dict[str, Any]:
    """Sessions that say that they live while samples are asked for all at once, in some rounds:
    what came back, the slowest heartbeat, and memory and open files after each round."""
    http = open_client(server.url, KEY)
    body = {"tags": [], "sdk_version": "load"}
    created = [http.post("/api/v1/create_session", json=body).json() for _ in range(shape.sessions)]
    beats: list[float] = []
    told: dict[str, Any] = {"asked": rounds * shape.samples, "answered": 0, "rounds": []}
    sampler = service(server.url).create_sampling_client(base_model=base_model(server.url))
    sampler = sampler.result()
    params = types.SamplingParams(max_tokens=8)
    with ThreadPoolExecutor(1) as pool:
        stop: list[bool] = []
        beating = pool.submit(_beat, http, [each["session_id"] for each in created], beats, stop)
        for number in range(rounds):
            began = time.monotonic()
            texts = ([1, 2, 3 + i % 200, 3 + number] for i in range(shape.samples))
            futures = [
                sampler.sample(types.ModelInput.from_ints(text), 1, params) for text in texts
            ]
            told["answered"] += sum(len(f.result().sequences) == 1 for f in futures)
            told["rounds"].append({"seconds": time.monotonic() - began, **dict(_footprint(server))})
        stop.append(True)
        beating.result()
    metrics = read_metrics(http)
    told |= {"sessions": metric(metrics, "flexllm:tinker_sessions"), "heartbeats": len(beats)}
    return told | {"slowest_heartbeat_s": max(beats)}


def _beat(http: Any, sessions: list[str], beats: list[float], stop: list[bool]) -> None:
    while not stop:
        for session in sessions:
            began = time.monotonic()
            answer = http.post("/api/v1/session_heartbeat", json={"session_id": session})
            answer.raise_for_status()
            beats.append(time.monotonic() - began)
        time.sleep(1)


def _footprint(server: ServerProcess) -> Iterator[tuple[str, float]]:
    for name, pid in (("http", server.pid), ("engine", server.engine_pid)):
        yield f"{name}_mib", resident_bytes(pid) / 2**20
        yield f"{name}_fds", open_files(pid)
