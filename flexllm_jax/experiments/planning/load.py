"""A planned engine under load: the scheduler's own code on a virtual clock
(`scheduler.simulation.engine`), one engine or as many as the requests need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexllm_jax.engine.device.profile import model_cost
from flexllm_jax.engine.scheduling import make_scheduler, slo_classes
from flexllm_jax.experiments.planning.engine import PlannedEngine
from flexllm_jax.experiments.simulation.report import figures
from scheduler.latency.model import StepFeatures
from scheduler.simulation.engine import SimulatedEngine, report, request_of
from scheduler.simulation.fleet import Fleet, LeastLoaded
from scheduler.simulation.supply import FinetuneSupply
from scheduler.simulation.workload import Arrival, Lengths
from scheduler.windows import KeyReads

_NOISE = 0.03  # sigma of the logarithm of step times
_ALONE_S = 30.0  # of the clock, in which finetuning alone is counted
_PATIENCE_S = 120.0  # after the last arrival
_MOST_ENGINES = 256


@dataclass(frozen=True)
class Job:
    """The job that never ends: mean length of its sequences, its coefficient of variation, and how
    many an optimizer step is of."""

    mean_tokens: float = 1000.0
    cv: float = 0.6
    batch: int = 8


def step_times(
    planned: PlannedEngine, context: int, rows: Sequence[int] | None = None
) -> dict[str, float]:
    """Predicted milliseconds of decode steps by rows, each with `context` keys, and prefill
    tokens/s in the largest step. rows: how many; None: one, an eighth of all, and all."""
    sizes, latency = planned.sizes, planned.latency
    reads, times = KeyReads(model_cost(sizes).windows), {}
    for count in rows or sorted({1, max(1, sizes.rows // 8), sizes.rows}):
        bucket = next(bucket for bucket in sizes.buckets if bucket >= count)
        step = StepFeatures(bucket, decode_tokens=count, decode_kv=count * reads(context))
        times[f"decode_{count}_row{'s' * (count > 1)}_ms"] = 1e3 * latency.predict(step)
    largest = sizes.buckets[-1]
    chunk = StepFeatures(
        largest,
        prefill_tokens=largest,
        chunk_kv=largest,
        attention_pairs=reads.pairs(largest, min(largest, context)),
    )
    times["prefill_tokens_per_s"] = largest / latency.predict(chunk)
    return times


def finetuning_alone(planned: PlannedEngine, job: Job) -> float:
    """Tokens/s of a job while no request comes."""
    engine = _engine(planned, job, 0)
    engine.advance(_ALONE_S)
    return engine.finetune_tokens / engine.now


def split_arrivals(
    planned: PlannedEngine, arrivals: Sequence[Arrival]
) -> tuple[list[Arrival], int]:
    """The requests that such an engine serves, and how many it would refuse: those longer than its
    context or its pages."""
    most = min(planned.sizes.max_model_len, planned.kv_tokens)
    served = [a for a in arrivals if a.prompt_tokens + a.output_tokens <= most]
    return served, len(arrivals) - len(served)


def simulate_load(
    planned: PlannedEngine,
    arrivals: Sequence[Arrival],
    engines: int,
    job: Job | None,
    until: float | None = None,
) -> dict[str, Any]:
    """What `engines` such engines make of the requests, each beside a job of its own; finetuning
    tokens/s are those of all, `until` a moment or else until the last answer."""
    slo = slo_classes(planned.config)["standard"]
    fleet = Fleet(lambda index: _engine(planned, job, index), engines, LeastLoaded())
    for index, arrival in enumerate(arrivals):
        fleet.submit(request_of(arrival, str(index), slo))
    last, trained = arrivals[-1].arrival_s, None
    if until is not None:
        fleet.advance(until)
        trained = sum(engine.finetune_tokens for engine in fleet.engines) / until
    fleet.finish(deadline=last + _PATIENCE_S)
    ends = (t.last_token_at or 0.0 for engine in fleet.engines for t in engine.timings)
    span_s = max(last, *ends, 0.0)
    fleet.advance(span_s)
    made = report(fleet.engines, slo, span_s)
    counted = {} if trained is None else {"finetune_tokens_per_s": trained}
    return {
        "engines": engines,
        "devices": engines * planned.sizes.devices,
        **(figures(made) | counted),
        "unfinished": made["inference"]["failed"],
        "busy": made["engine"]["busy"],
        "preemptions": made["engine"]["preemptions"],
    }


def size_fleet(
    planned: PlannedEngine,
    arrivals: Sequence[Arrival],
    job: Job | None,
    target: float,
    progress: Callable[[int], None] = lambda engines: None,
) -> list[dict[str, Any]]:
    """Results of ever more engines, ascending, the last but for one the fewest whose attainment is
    at least `target` (or the most that were tried); and one more than that."""
    results: dict[int, dict[str, Any]] = {}

    def enough(engines: int) -> bool:
        if engines not in results:
            progress(engines)
            results[engines] = simulate_load(planned, arrivals, engines, job)
        return (results[engines]["slo_attainment"] or 0.0) >= target

    high = 1
    while not enough(high) and high < _MOST_ENGINES:
        high *= 2
    low = high // 2  # too few, or none
    while high - low > 1 and enough(high):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    enough(high + 1)
    return [results[engines] for engines in sorted(results) if engines <= high + 1]


def _engine(planned: PlannedEngine, job: Job | None, index: int) -> SimulatedEngine:
    config, sizes, truth = planned.config, planned.sizes, planned.latency
    # Simulated prompts are lengths: all would have the same prefix.
    cache = config.cache.model_copy(update={"prefix_caching": False})
    log = config.log.model_copy(update={"plans": False})
    config = config.model_copy(update={"cache": cache, "log": log})
    slo = slo_classes(config)["standard"]
    scheduler, _ = make_scheduler(config, sizes, planned.num_pages, slo, truth.copy())
    return SimulatedEngine(
        scheduler,
        truth,
        _supply(sizes.finetune_slots, sizes.unit_tokens, job, index) if job else None,
        noise=_NOISE,
        seed=index,
        leaps=True,
        sample_s=None,
    )


def _supply(slots: int, unit_tokens: int, job: Job, index: int) -> FinetuneSupply:
    half = max(unit_tokens, slots // 2 // unit_tokens * unit_tokens)  # as `finetune.job` packs
    lengths = Lengths(min(job.mean_tokens, slots), job.cv, slots)
    drawn = lengths.draw(np.random.default_rng([index, 7]), 2000)
    return FinetuneSupply(drawn.tolist(), half, job.batch)
