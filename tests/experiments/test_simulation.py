"""Simulations from a configuration: every arrangement of inference and finetuning, and the load."""

import multiprocessing

import pytest

from flexllm_jax.config import ConfigError, build_config
from flexllm_jax.errors import UserError
from flexllm_jax.experiments.simulation.config import ARRANGEMENTS, SimulationConfig
from flexllm_jax.experiments.simulation.simulate import select_arrivals, simulate

ARRIVALS = {"process": "poisson", "rate": 2, "duration_s": 20, "prompt_tokens": 100}
TREE = {"workload": {"arrivals": ARRIVALS}, "slo": {"tpot_ms": 50}}


def config(**changes) -> SimulationConfig:
    return build_config(TREE | changes, root=SimulationConfig)


@pytest.mark.parametrize("policy", [name for name in ARRANGEMENTS if name != "finetuning_only"])
def test_every_arrangement_runs(policy):
    made = simulate(config(policy=policy, fleet={"engines": 4}, leaps=True))
    inference = made.report["inference"]
    assert inference["completed"] == inference["requests"] == len(made.arrivals)
    trained = sum(job["tokens"] for job in made.report["finetune"].values())
    assert (trained > 0) == (policy != "inference_only")
    series = made.series(5.0)
    counted = sum(a.arrival_s < series["at_s"][-1] for a in made.arrivals)
    assert series["arrivals_per_s"].sum() * 5 == pytest.approx(counted) and counted > 20


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        # More engines than arrivals are held for, and fewer, on which requests wait.
        (2, {"leaps": True, "fleet": {"engines": 71}, "rate": 30, "duration_s": 5}),
        (2, {"leaps": True, "fleet": {"engines": 5}, "rate": 20}),
        (3, {"fleet": {"engines": 4}, "rate": 6}),
        (
            3,
            {"leaps": True, "fleet": {"engines": 3}, "policy": "separate_75"},
        ),  # one of them serves
        (2, {"leaps": True, "fleet": {"engines": 2}, "policy": "spatial_50", "rate": 20}),
    ],
)
def test_processes_give_exactly_what_one_gives(processes, changes):
    one = simulate(config(**changes))
    fleet = changes["fleet"] | {"processes": processes}
    made = simulate(config(**changes | {"fleet": fleet}))
    assert made.report.pop("simulation")["fleet"].pop("processes") == processes
    assert one.report.pop("simulation")["fleet"].pop("processes") == 1
    assert made.report == one.report and made.span_s == one.span_s
    assert [e.timings for e in made.engines] == [e.timings for e in one.engines]
    assert [e.samples for e in made.engines] == [e.samples for e in one.engines]


@pytest.mark.parametrize(
    ("happens", "error", "message"),
    [
        (lambda: multiprocessing.active_children()[0].kill(), UserError, "processes=2: process . "),
        (lambda: pytest.fail("stop"), pytest.fail.Exception, "stop"),  # as Ctrl-C does
    ],
)
def test_no_process_outlives_a_simulation_that_ends_early(happens, error, message):
    with pytest.raises(error, match=message):
        simulate(config(fleet={"engines": 2, "processes": 2}), lambda done, total: happens())
    assert not multiprocessing.active_children()


def test_what_fails_in_a_process_is_told():
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"request '0': prompt of 77 tokens .*=50"):
            fleet = {"engines": 2, "processes": processes}
            simulate(config(fleet=fleet, finetune=None, engine={"max_model_len": 50}))


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"processes": 2}, "processes=2 must be at most engines=1"),
        ({"processes": 2, "engines": 2, "router": "round_robin"}, "needs router=least_loaded"),
        (
            {"processes": 2, "engines": 2, "replicas": [{"at_s": 1, "change": 1}]},
            "no replicas",
        ),
    ],
)
def test_fleets_that_processes_cannot_share_are_refused(fleet, message):
    with pytest.raises(ConfigError, match=message):
        config(fleet=fleet)


@pytest.mark.parametrize("leaps", [False, True])
def test_a_job_that_learns_from_rewards_is_load(leaps):
    rollouts = {"prompts": 8, "generations": 4, "mean_tokens": 100, "steps_ahead": 1}
    made = simulate(config(finetune={"rollouts": rollouts}, leaps=leaps))
    inference, job = made.report["inference"], made.report["finetune"]["finetune"]
    assert inference["completed"] == inference["requests"] == len(made.arrivals)
    assert 0 < job["sampled_tokens"] < job["tokens"] < 5 * job["sampled_tokens"]


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_the_rate_thins_a_trace_or_repeats_it(rate):
    arrivals = select_arrivals(config(rate=rate))
    span = arrivals[-1].arrival_s - arrivals[0].arrival_s
    assert (len(arrivals) - 1) / span == pytest.approx(rate, rel=0.1)
    with pytest.raises(ConfigError, match="no request arrives"):
        select_arrivals(config(duration_s=1e-9))
