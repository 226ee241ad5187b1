"""Simulations from a YAML file: engines of a device and a model nobody has at hand.

The configuration (every field is described) names the device's data sheet, what a system makes of
it, the engine's sizes, the policy, the workload and the fleet; `simulate` runs the scheduler's own
code against it (`scheduler.simulation.engine`) and returns what the engine would report.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from flexllm_jax.config import ConfigError, Section, SloSection, WorkloadSection
from flexllm_jax.config.fields import Bool, Float, Int
from flexllm_jax.launch.replay import read_arrivals
from scheduler.config import SchedulerConfig
from scheduler.coserving import Scheduler
from scheduler.latency import roofline as sheets
from scheduler.latency.model import LatencyModel
from scheduler.latency.roofline import Efficiency, roofline
from scheduler.policies import POLICIES, make_policy
from scheduler.request import Slo
from scheduler.simulation.engine import PerfectModel, SimulatedEngine, report, request_of
from scheduler.simulation.fleet import ROUTERS, Fleet, ReplicaChange
from scheduler.simulation.rollouts import ROWS_LEFT, RolloutBatch, RolloutSupply
from scheduler.simulation.supply import FinetuneSupply, Supply
from scheduler.simulation.workload import Arrival, Lengths

DEVICES = {"a100": sheets.A100, "h100": sheets.H100, "h200": sheets.H200}
MODELS = {name.lower(): model for name, model in sheets.MODELS.items()}
_SEPARATE = {f"separate_{percent}": percent / 100 for percent in (25, 50, 75)}
_SPATIAL = {f"spatial_{percent}": percent / 100 for percent in (25, 50, 75)}
_BATCHES = 20  # of answers, until they come again
ARRANGEMENTS = (*POLICIES, *_SEPARATE, *_SPATIAL)


class EfficiencySection(Section):
    """What a system makes of its device; see `scheduler.latency.roofline.Efficiency`."""

    compute: Float = Field(default=0.5, gt=0, le=1, description="Share of the FLOP/s reached.")
    memory: Float = Field(default=0.7, gt=0, le=1, description="Share of the bytes/s reached.")
    sharpness: Float = Field(
        default=4.0, ge=1, description="p of the p-norm of computing and reading weights."
    )
    step_s: Float = Field(default=1e-3, ge=0, description="Seconds of a step besides.")
    unit_s: Float = Field(default=1e-4, ge=0, description="Seconds of a backward unit besides.")
    all_reduce_s: Float = Field(default=2e-5, ge=0, description="Latency of an all-reduce.")
    recompute: Float = Field(
        default=0.0, ge=0, description="Share of the forward that the backward does again."
    )


class EngineSection(Section):
    """Sizes of an engine."""

    token_buckets: tuple[Annotated[Int, Field(ge=1)], ...] = Field(
        default=(16, 64, 128, 192, 256, 320, 384, 512, 1024, 2048),
        min_length=1,
        description="Token slots of the step programs, increasing.",
    )
    max_sequences: Int = Field(default=256, ge=1, description="Requests running at once.")
    max_model_len: Int = Field(default=8192, ge=2, description="Longest prompt plus output.")
    num_pages: Int = Field(default=24_000, ge=1, description="KV pages.")
    page_size: Int = Field(default=16, ge=1, description="Tokens of a page.")
    unit_tokens: Int = Field(default=512, ge=1, description="Tokens of a backward unit.")
    finetune_slots: Int = Field(default=16_384, ge=1, description="Tokens in finetuning work.")
    finetune_floor: Float = Field(default=0.0, ge=0, lt=1, description="As finetune.floor.")


class RolloutsSection(Section):
    """Answers that the job learns from, all of which it trains."""

    prompts: Int = Field(default=16, ge=1, description="Prompts of a batch.")
    generations: Int = Field(default=8, ge=2, description="Answers to each.")
    prompt_tokens: Int = Field(default=256, ge=1, description="Tokens of a prompt.")
    mean_tokens: Float = Field(default=512.0, ge=1, description="Mean length of an answer.")
    cv: Float = Field(default=0.5, ge=0, description="Its coefficient of variation.")
    max_tokens: Int = Field(default=1024, ge=1, description="Longer answers are cut here.")
    steps_ahead: Int = Field(
        default=0, ge=0, le=8, description="Batches that the answering weights may be behind."
    )


class SupplySection(Section):
    """The finetuning job: it never ends. With `rollouts` it learns from rewards."""

    rollouts: RolloutsSection | None = Field(
        default=None, description="What it answers; then lengths and accumulation do not count."
    )
    mean_tokens: Float = Field(default=3263.0, ge=1, description="Mean length of a sequence.")
    cv: Float = Field(default=0.57, ge=0, description="Its coefficient of variation.")
    min_tokens: Int = Field(default=256, ge=1, description="Shorter ones are this long.")
    max_tokens: Int = Field(default=8191, ge=1, description="Longer ones are this long.")
    microbatch_tokens: Int = Field(
        default=4096, ge=1, description="Sequences are packed up to this many tokens."
    )
    accumulation: Int = Field(default=8, ge=1, description="Sequences of an optimizer step.")


class ReplicaSection(Section):
    """Engines that come or go."""

    at_s: Float = Field(ge=0, description="When.")
    change: Int = Field(description="How many come (above 0) or go (below 0).")


class FleetSection(Section):
    """How many engines, and who gets which request."""

    engines: Int = Field(default=1, ge=1, description="Engines at the start.")
    router: Literal["round_robin", "least_loaded", "adapter_affinity"] = Field(
        default="least_loaded", description="Chooses an engine for a request."
    )
    replicas: tuple[ReplicaSection, ...] = Field(default=(), description="Changes, in order.")
    startup_s: Float = Field(default=60.0, ge=0, description="Seconds a new engine needs.")


class SimulationConfig(Section):
    """The whole tree."""

    device: Literal["a100", "h100", "h200"] = Field(default="a100", description="Data sheet.")
    model: Literal["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-14b", "qwen2.5-32b"] = Field(
        default="llama-3.1-8b", description="Base model."
    )
    tp: Int = Field(default=1, ge=1, description="Devices of an engine.")
    efficiency: EfficiencySection = Field(
        default_factory=EfficiencySection, description="What is reached of the data sheet."
    )
    latency_file: Path | None = Field(
        default=None,
        description="A latency profile that an engine saved, in place of a data sheet.",
    )
    policy: str = Field(
        default="coserving", description=f"How work is shared: {', '.join(ARRANGEMENTS)}."
    )
    knowledge: Literal["learnt", "perfect", "fixed"] = Field(
        default="learnt",
        description="What the scheduler knows of step times: the model and what it measures, every "
        "step's time before it runs, or the model alone.",
    )
    believed_scale: Float = Field(
        default=1.0, gt=0, description="Step times the scheduler starts from, over the true ones."
    )
    slo: SloSection = Field(
        default_factory=lambda: SloSection(tpot_ms=50.0), description="Objective."
    )
    engine: EngineSection = Field(default_factory=EngineSection, description="Sizes.")
    finetune: SupplySection | None = Field(
        default_factory=SupplySection, description="The job. null: none."
    )
    workload: WorkloadSection = Field(description="Requests; prompts are lengths only.")
    rate: Float | None = Field(
        default=None,
        gt=0,
        description="Requests per second of the whole fleet: the trace is thinned evenly, or "
        "replayed by several at once. null: the trace as it is.",
    )
    duration_s: Float | None = Field(
        default=None, gt=0, description="Ignore later arrivals. null: all count."
    )
    fleet: FleetSection = Field(default_factory=FleetSection, description="Engines.")
    noise: Float = Field(default=0.03, ge=0, description="Sigma of the logarithm of step times.")
    host_s: Float = Field(default=0.0, ge=0, description="Seconds to plan a step.")
    leaps: Bool = Field(
        default=False, description="Take steps that are alike in one go: for large fleets."
    )
    seed: Int = Field(default=0, ge=0, description="Seeds lengths and step times.")
    output_dir: Path = Field(default=Path("runs/simulation"), description="Folder for reports.")

    @model_validator(mode="after")
    def _known_policy(self) -> Self:
        if self.policy not in ARRANGEMENTS:
            raise ValueError(f"policy: {self.policy!r} must be one of {', '.join(ARRANGEMENTS)}")
        return self


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
    with _rare_collections():
        return _simulate(config, progress)


def _simulate(config: SimulationConfig, progress: Callable[[int, int], None]) -> Simulation:
    arrivals = select_arrivals(config)
    slo = Slo(config.slo.tpot_ms / 1e3, config.slo.ttft_ms / 1e3, config.slo.weight)
    engines = config.fleet.engines
    serves = engines - round(engines * _SEPARATE.get(config.policy, 0.0))
    if config.policy in _SPATIAL:
        engines, serves = 2 * engines, engines
    fleet = Fleet(
        lambda index: _make_engine(config, slo, index, finetunes_only=index >= serves),
        engines,
        ROUTERS[config.fleet.router](),
        serves=lambda index: index < serves or index >= engines,
        changes=[ReplicaChange(r.at_s, r.change) for r in config.fleet.replicas],
        startup_s=config.fleet.startup_s,
    )
    for index, arrival in enumerate(arrivals):
        fleet.submit(request_of(arrival, str(index), slo))
        if index % 1000 == 0:
            progress(index, len(arrivals))
    last = arrivals[-1].arrival_s
    fleet.finish(deadline=last + 300.0)
    progress(len(arrivals), len(arrivals))
    span_s = max([last, *(t.last_token_at or 0.0 for e in fleet.engines for t in e.timings)])
    fleet.advance(span_s)
    made = report(fleet.engines, slo, span_s)
    made["engine"]["policy"] = config.policy
    made["simulation"] = config.model_dump(mode="json")
    return Simulation(config, arrivals, fleet.engines, span_s, made)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for cyclic garbage a hundred times less often: a simulation makes many objects and no
    cycles, and JAX, where it is imported, has something to do at each collection."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
    share = _SPATIAL.get(config.policy)
    policy, alone = config.policy, config.policy in _SEPARATE or share is not None
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
        RolloutBatch.of([(section.prompt_tokens, own) for own in batch], microbatch_tokens)
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
