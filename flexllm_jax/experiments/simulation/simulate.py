"""Simulations from a YAML file: engines of a device and a model nobody has at hand.

`simulate` makes the engines of a configuration, runs the scheduler's own code on them
(`scheduler.simulation.engine`) and returns what the engine would report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexllm_jax.config import ConfigError
from flexllm_jax.errors import UserError
from flexllm_jax.experiments.simulation.config import (
    SEPARATE,
    SPATIAL,
    RolloutsSection,
    SimulationConfig,
    SupplySection,
)
from flexllm_jax.launch.replay import read_arrivals
from scheduler.config import SchedulerConfig
from scheduler.coserving import Scheduler
from scheduler.latency import roofline as sheets
from scheduler.latency.model import LatencyModel
from scheduler.latency.roofline import Efficiency, roofline
from scheduler.policies import make_policy
from scheduler.request import Slo
from scheduler.simulation.engine import (
    PerfectModel,
    SimulatedEngine,
    rare_collections,
    report,
    request_of,
)
from scheduler.simulation.fleet import ROUTERS, Fleet, ReplicaChange
from scheduler.simulation.parallel import ProcessLost, Run, simulate_in_processes
from scheduler.simulation.rollouts import ROWS_LEFT, RolloutBatch, RolloutSupply
from scheduler.simulation.supply import FinetuneSupply, Supply
from scheduler.simulation.workload import Arrival, Lengths

DEVICES = {"a100": sheets.A100, "h100": sheets.H100, "h200": sheets.H200}
MODELS = {name.lower(): model for name, model in sheets.MODELS.items()}
_PATIENCE_S = 300.0  # after the last arrival; what is unanswered then has failed
_BATCHES = 20  # of answers, until they come again


@dataclass(frozen=True)
class Simulation:
    """A simulation that has run: its engines, the span it is counted over, and its report."""

    config: SimulationConfig
    arrivals: list[Arrival]
    engines: list[SimulatedEngine]
    span_s: float
    report: dict[str, Any]

    def series(self, bin_s: float) -> dict[str, np.ndarray]:
        """Per whole bin of `bin_s` seconds: its end, and the rates of arrivals, output tokens and
        finetuning tokens, all per second."""
        edges = np.arange(0.0, self.span_s, bin_s)
        output, finetune = np.zeros(len(edges)), np.zeros(len(edges))
        for engine in self.engines:
            if engine.samples:
                at, tokens, trained = np.array(engine.samples, dtype=float).T
                output += np.interp(edges, at, tokens, left=0.0)
                finetune += np.interp(edges, at, trained, left=0.0)
        arrived = np.histogram([a.arrival_s for a in self.arrivals], edges)[0]
        return {
            "at_s": edges[1:],
            "arrivals_per_s": arrived / bin_s,
            "output_tokens_per_s": np.diff(output) / bin_s,
            "finetune_tokens_per_s": np.diff(finetune) / bin_s,
        }


def simulate(
    config: SimulationConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> Simulation:
    """Run a simulation; `progress(requests sent, all)` is called now and then."""
    with rare_collections():
        return _simulate(config, progress)


def _simulate(config: SimulationConfig, progress: Callable[[int, int], None]) -> Simulation:
    arrivals = select_arrivals(config)
    slo = Slo(config.slo.tpot_ms / 1e3, config.slo.ttft_ms / 1e3, config.slo.weight)
    engines = config.fleet.engines
    serves = engines - round(engines * SEPARATE.get(config.policy, 0.0))
    if config.policy in SPATIAL:
        engines, serves = 2 * engines, engines

    def make_engine(index: int) -> SimulatedEngine:
        return _make_engine(config, slo, index, finetunes_only=index >= serves)

    def sent(number: int) -> None:
        progress(number, len(arrivals))

    if config.fleet.processes > 1:
        table = np.array([(a.arrival_s, a.prompt_tokens, a.output_tokens) for a in arrivals])
        run = Run(table, slo, serves, _PATIENCE_S)
        new = [make_engine(index) for index in range(engines)]
        try:
            ran, span_s = simulate_in_processes(new, run, config.fleet.processes, sent)
        except ProcessLost as error:
            raise UserError(f"fleet.processes={config.fleet.processes}: {error}") from error
    else:
        fleet = Fleet(
            make_engine,
            engines,
            ROUTERS[config.fleet.router](),
            serves=lambda index: index < serves or index >= engines,
            changes=[ReplicaChange(r.at_s, r.change) for r in config.fleet.replicas],
            startup_s=config.fleet.startup_s,
        )
        ran, span_s = fleet.engines, _send(fleet, arrivals, slo, sent)
    sent(len(arrivals))
    made = report(ran, slo, span_s)
    made["engine"]["policy"] = config.policy
    made["simulation"] = config.model_dump(mode="json")
    return Simulation(config, arrivals, ran, span_s, made)


def _send(
    fleet: Fleet, arrivals: Sequence[Arrival], slo: Slo, sent: Callable[[int], None]
) -> float:
    """Send the requests through a fleet until all are answered; returns when that was."""
    for index, arrival in enumerate(arrivals):
        fleet.submit(request_of(arrival, str(index), slo))
        if index % 1000 == 0:
            sent(index)
    last = arrivals[-1].arrival_s
    fleet.finish(deadline=last + _PATIENCE_S)
    span_s = max([last, *(t.last_token_at or 0.0 for e in fleet.engines for t in e.timings)])
    fleet.advance(span_s)
    return span_s


def at_rate(arrivals: list[Arrival], rate: float) -> list[Arrival]:
    """The requests thinned evenly, or replayed by several at once, to `rate` per second.
    ConfigError for too few to have one."""
    span = arrivals[-1].arrival_s - arrivals[0].arrival_s if arrivals else 0.0
    if not span:
        raise ConfigError("workload: requests that arrive at one time have no rate; leave rate out")
    wanted = rate * span / (len(arrivals) - 1)
    # Request i is there as often as the wanted count rises over it: evenly, and no draw.
    counts = np.diff(np.floor(np.arange(len(arrivals) + 1) * wanted + 1e-9)).astype(int)
    return [a for a, count in zip(arrivals, counts, strict=True) for _ in range(count)]


def select_arrivals(config: SimulationConfig) -> list[Arrival]:
    """The requests to simulate."""
    arrivals = read_arrivals(config.workload)[: config.workload.max_requests]
    if config.rate is not None:
        arrivals = at_rate(arrivals, config.rate)
    limit = math.inf if config.duration_s is None else config.duration_s
    arrivals = [a for a in arrivals if a.arrival_s < limit]
    if not arrivals:
        raise ConfigError("workload: no request arrives; raise rate or duration_s")
    return arrivals


def _make_engine(
    config: SimulationConfig, slo: Slo, index: int, *, finetunes_only: bool
) -> SimulatedEngine:
    share = SPATIAL.get(config.policy)
    policy, alone = config.policy, config.policy in SEPARATE or share is not None
    if alone:
        policy = "finetuning_only" if finetunes_only else "inference_only"
    sizes, supply = config.engine, config.finetune
    pages = sizes.num_pages if share is None else sizes.num_pages // 2
    limits = SchedulerConfig(
        max_sequences=sizes.max_sequences,
        max_tokens_per_step=sizes.token_buckets[-1],
        max_model_len=sizes.max_model_len,
        token_buckets=sizes.token_buckets,
        num_pages=pages,
        page_size=sizes.page_size,
        prefix_caching=supply is not None and supply.rollouts is not None,
        num_layers=MODELS[config.model].layers,
        unit_tokens=sizes.unit_tokens,
        finetune_slots=sizes.finetune_slots,
        slo=slo,
        idle_step_s=slo.tpot_s,
        finetune_floor=sizes.finetune_floor,
    )
    truth = device_latency(config, share and (1 - share if finetunes_only else share))
    believed = truth.copy(scale=config.believed_scale, online=config.knowledge == "learnt")
    if config.knowledge == "perfect":
        believed = PerfectModel(truth.bases, truth.coefficients)
    trains = supply is not None and policy != "inference_only"
    return SimulatedEngine(
        Scheduler(limits, believed, make_policy(policy)),
        truth,
        _supply(supply, limits, config.seed + index) if trains and supply else None,
        noise=config.noise,
        host_s=config.host_s,
        seed=config.seed + index,
        leaps=config.leaps,
        sample_s=None if config.leaps and config.fleet.engines > 16 else 1.0,
    )


def device_latency(config: SimulationConfig, share: float | None = None) -> LatencyModel:
    """The true step times: of the whole device, or of a partition with `share` of its processors.

    A partition has that share of the FLOP/s, and of the memory's bandwidth up to twice as much, as
    few processors can ask for more than their part; the other partition's traffic is not taken off,
    which flatters spatial sharing.
    """
    if config.latency_file is not None:
        loaded = LatencyModel.load(config.latency_file)
        if loaded is None:
            raise ConfigError(f"latency_file: {config.latency_file} is of something else")
        return loaded
    efficiency = config.efficiency.model_dump()
    if share is not None:
        efficiency["compute"] *= share
        efficiency["memory"] *= min(1.0, 2 * share)
    return roofline(
        DEVICES[config.device],
        MODELS[config.model],
        config.engine.token_buckets,
        config.engine.unit_tokens,
        tp=config.tp,
        efficiency=Efficiency(**efficiency),
        spread=0.1,
    )


def _supply(section: SupplySection, limits: SchedulerConfig, seed: int) -> Supply:
    if (rollouts := section.rollouts) is not None:
        return _rollouts(rollouts, section.microbatch_tokens, limits, seed)
    lengths = Lengths(section.mean_tokens, section.cv, section.max_tokens)
    drawn = lengths.draw(np.random.default_rng([seed, 7]), 2000)
    return FinetuneSupply(
        np.maximum(drawn, section.min_tokens).tolist(),
        section.microbatch_tokens,
        section.accumulation,
    )


def _rollouts(
    section: RolloutsSection, microbatch_tokens: int, limits: SchedulerConfig, seed: int
) -> RolloutSupply:
    lengths = Lengths(section.mean_tokens, section.cv, section.max_tokens)
    each = section.prompts * section.generations
    drawn = lengths.draw(np.random.default_rng([seed, 7]), _BATCHES * each)
    batches = [
        RolloutBatch.of(
            [(section.prompt_tokens, own) for own in batch], microbatch_tokens, limits.page_size
        )
        for batch in drawn.reshape(_BATCHES, section.prompts, section.generations).tolist()
    ]
    rows = limits.max_sequences
    return RolloutSupply(
        batches,
        rows - max(1, rows // ROWS_LEFT),
        Slo(1.0, 60.0, limits.slo.weight / 2),
        section.steps_ahead,
        limits.page_size,
    )
