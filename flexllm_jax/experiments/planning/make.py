"""A whole plan: the engine, its speed, the load, and what would help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flexllm_jax.config import ArrivalsConfig, Config, WorkloadSection
from flexllm_jax.experiments.planning.advice import advise
from flexllm_jax.experiments.planning.engine import plan_engine
from flexllm_jax.experiments.planning.load import (
    Job,
    finetuning_alone,
    size_fleet,
    split_arrivals,
    step_times,
)
from flexllm_jax.experiments.planning.report import Plan
from flexllm_jax.experiments.simulation.simulate import at_rate
from flexllm_jax.launch.replay import read_arrivals
from scheduler.simulation.workload import Arrival

# Chats where no trace is at hand, as long as ShareGPT's.
_CHATS = {"process": "gamma", "cv": 2.0, "prompt_tokens": 250, "output_tokens": 325}
_DURATION_S = 300.0
_CONTEXT = 1000  # keys of a decoding row, where there is no load to tell


def choose_requests(config: Config, trace: Path | None, rate: float | None) -> list[Arrival]:
    """The requests of a trace, else of `config.workload`, at `rate` per second if one is given;
    with a rate alone made-up chats; with nothing none."""
    workload = config.workload
    if trace is not None:
        others = {"trace": trace, "arrivals": None}
        workload = workload.model_copy(update=others) if workload else WorkloadSection(trace=trace)
    elif rate is not None and (workload is None or workload.arrivals is not None):
        given = workload.arrivals if workload else None
        chats = given.model_dump() if given else _CHATS | {"duration_s": _DURATION_S}
        made = ArrivalsConfig.model_validate(chats | {"rate": rate})
        workload, rate = WorkloadSection(arrivals=made), None
    if workload is None:
        return []
    arrivals = read_arrivals(workload)[: workload.max_requests]
    return at_rate(arrivals, rate) if rate is not None else arrivals


def make_plan(
    name: str,
    config: Config,
    chip: str,
    arrivals: list[Arrival],
    *,
    job: Job,
    target: float,
    progress: Callable[[int], None] = lambda engines: None,
) -> Plan:
    """Plan an engine and let it serve the requests; `progress(engines)` is called before a fleet
    is simulated."""
    engine = plan_engine(config, chip)
    times, alone, load, refused = {}, None, [], 0
    if engine.fits:
        served, refused = split_arrivals(engine, arrivals)
        context = _CONTEXT
        if served:
            context = sum(a.prompt_tokens + a.output_tokens // 2 for a in served) // len(served)
        times = step_times(engine, max(context, 1))
        alone = finetuning_alone(engine, job)
        if served:
            load = size_fleet(engine, served, job, target, progress)
    advice = advise(engine, job, alone)
    return Plan(name, engine, times, alone, load, len(arrivals), refused, target, advice)
