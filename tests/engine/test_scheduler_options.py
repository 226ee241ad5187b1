"""What the engine makes of the scheduler's options: policies, classes, pausing, logs, profiles."""

from __future__ import annotations

import time

import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.engine.device import profile
from scheduler.latency.model import StepFeatures
from scheduler.plan_log import replay
from tests.engines import (
    job_config,
    letter_rows,
    random_prompts,
    reference_greedy,
    start_engine,
    write_rows,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(20))


@pytest.mark.parametrize("policy", ["published", "temporal_64", "temporal_dynamic"])
def test_every_policy_gives_the_same_tokens_and_trains(
    policy, llama, llama_reference, rows, tmp_path
):
    fields = {"scheduler": {"policy": policy}, "log": {"plans": True}}
    with start_engine(llama, tmp_path, **fields) as llm:
        job = llm.finetune(job_config("mine", rows, steps=4))
        prompts = random_prompts([5, 60, 31], seed=9)
        outputs = llm.generate(prompts, SamplingParams(max_tokens=80, ignore_eos=True))
        assert job.wait(120).status == "succeeded", job.reason
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == reference_greedy(llama_reference, prompt, 80)
    plans = list(replay(tmp_path / "plans.jsonl"))
    assert len(plans) > 80 and all(logged == planned for logged, planned in plans)


def test_policies_train_the_same_adapter(llama, rows, tmp_path):
    losses = []
    for policy in ("coserving", "coserving_no_overlap", "published"):
        with start_engine(llama, tmp_path / policy, scheduler={"policy": policy}) as llm:
            job = llm.finetune(job_config("mine", rows, steps=6, batch_tokens=200)).wait(120)
            losses.append(job.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_paused_job_waits_and_goes_on(llm, rows):
    job = llm.finetune(job_config("patient", rows, steps=400, batch_tokens=60))
    while not job.steps:
        time.sleep(0.001)
    job.pause()
    assert job.status == "paused"
    time.sleep(0.1)  # what was under way is read
    steps = job.steps
    time.sleep(0.2)
    assert job.steps == steps < 400
    job.resume()
    assert job.status == "running"
    while job.steps == steps:
        time.sleep(0.001)
    job.cancel()
    assert job.status == "cancelled"


def test_weights_share_the_engine(llm, rows):
    fields = {"steps": 2000, "batch_tokens": 60}
    heavy, light = (
        llm.finetune(job_config(name, rows, weight=weight, **fields))
        for name, weight in (("heavy", 3.0), ("light", 1.0))
    )
    while light.steps < 15:
        assert light.status == heavy.status == "running"
        time.sleep(0.01)
    ratio = heavy.tokens / light.tokens
    heavy.cancel()
    light.cancel()
    assert 2.0 < ratio < 4.5


def test_classes_of_service_reach_the_scheduler(llm):
    engine = llm.engine
    assert {name: slo.weight for name, slo in engine.slos.items()} == {
        "standard": 1.0,
        "interactive": 2.0,
        "batch": 0.5,
    }
    with pytest.raises(ValueError, match="slo_class='fast' must be one of standard, interactive"):
        llm._loop.call(engine.add_request, [5, 6], SamplingParams(), slo_class="fast")


def test_the_profile_is_kept_and_its_costs_are_real(llama, tmp_path, monkeypatch):
    fields = {"compile": {"cache_dir": str(tmp_path / "cache")}}
    with start_engine(llama, tmp_path, **fields) as llm:
        first = llm.engine.scheduler.latency
        assert first.coefficients["layer_units"] + first.coefficients["backward_pairs"] > 0
        assert first.predict(StepFeatures(48, prefill_tokens=48)) > 0
    (kept,) = (tmp_path / "cache" / "latency").glob("*.json")
    monkeypatch.setattr(profile, "measure", lambda *args, **kwargs: pytest.fail("measured again"))
    with start_engine(llama, tmp_path, **fields) as llm:
        assert llm.engine.scheduler.latency.bases == first.bases
    kept.write_text("broken")
    monkeypatch.setattr(profile, "measure", lambda *args, **kwargs: first)
    with start_engine(llama, tmp_path, **fields) as llm:
        assert llm.engine.scheduler.latency is first


def test_a_cold_start_from_the_data_sheet(llama, llama_reference, tmp_path):
    with start_engine(llama, tmp_path, scheduler={"latency": "roofline"}) as llm:
        (prompt,) = random_prompts([20])
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))
        assert output.token_ids == reference_greedy(llama_reference, prompt, 30)
        errors = llm.engine.scheduler.latency.errors()
    assert errors["observations"] >= 30
