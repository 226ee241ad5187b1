"""Simulations from a configuration: every arrangement of inference and finetuning, and the load."""

import pytest

from flexllm_jax.config import ConfigError, build_config
from flexllm_jax.experiments.simulation.simulate import (
    ARRANGEMENTS,
    SimulationConfig,
    select_arrivals,
    simulate,
)

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
