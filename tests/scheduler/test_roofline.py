"""The roofline against sums done by hand, and a cold engine that keeps its objective on one."""

from __future__ import annotations

import pytest

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import Sampling, StepFeatures
from scheduler.latency.roofline import (
    A100,
    LLAMA_3_1_8B,
    QWEN2_5_14B,
    QWEN2_5_32B,
    QWEN3_5_4B,
    QWEN3_5_9B,
    QWEN3_5_27B,
    Efficiency,
    find_device,
    roofline,
)
from scheduler.request import Slo
from scheduler.simulation.engine import SimulatedEngine, replay, report
from scheduler.simulation.supply import FinetuneSupply
from scheduler.simulation.workload import Lengths, make_arrivals

BUCKETS = (16, 128, 512, 2048)
PERFECT = Efficiency(compute=1.0, memory=1.0, sharpness=64.0, step_s=0.0, unit_s=0.0)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        (LLAMA_3_1_8B, 8.03),
        (QWEN2_5_14B, 14.8),
        (QWEN2_5_32B, 32.8),
        (QWEN3_5_4B, 4.21 + 0.64),  # with a second table of embeddings, which it has not
        (QWEN3_5_9B, 8.95),
        (QWEN3_5_27B, 26.9),
    ],
)
def test_parameters_are_those_of_the_models(model, billions):
    embedding = model.head_parameters
    total = model.layers * model.layer_parameters + model.head_parameters + embedding
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


def test_small_steps_read_the_weights_and_large_ones_compute():
    model = roofline(A100, LLAMA_3_1_8B, BUCKETS, 512, efficiency=PERFECT)
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    read_s = 2 * (layers + 128256 * 4096) / 2.039e12
    assert model.predict(StepFeatures(16)) == pytest.approx(read_s, rel=1e-3)
    compute_s = 2 * 2048 * layers / 312e12
    assert model.predict(StepFeatures(2048)) == pytest.approx(compute_s, rel=1e-3)
    kv_s = 32 * 2 * 8 * 128 * 2 / 2.039e12
    assert model.coefficients["decode_kv"] == pytest.approx(kv_s)
    unit_s = 2 * 512 * layers / 32 / 312e12
    assert model.coefficients["layer_units"] == pytest.approx(unit_s)


def test_a_hybrid_reads_and_writes_its_states_and_has_keys_in_few_layers():
    model = roofline(A100, QWEN3_5_9B, BUCKETS, 512, efficiency=PERFECT)
    one = StepFeatures(128, decode_tokens=1, decode_kv=1000)
    more_s = model.predict(one) - model.predict(StepFeatures(128))
    states, keys = 24 * 2 * 2**21, 1000 * 8 * 2 * 4 * 256 * 2
    assert more_s == pytest.approx((states + keys) / 2.039e12, rel=1e-6)
    # A chunk's token costs what it costs however long the sequence is.
    head = 3 * 2 * 128 * 128 + 2 * 2 * 64 * 128
    chunk_s = model.predict(StepFeatures(2048, prefill_tokens=2000))
    chunk_s -= model.predict(StepFeatures(2048))
    assert chunk_s == pytest.approx(2000 * 24 * 32 * head / 312e12, rel=1e-6)
    pair_s = 0.5 * 4 * 16 * 256 / 312e12
    assert model.coefficients["attention_pairs"] == pytest.approx(8 * pair_s)
    assert model.coefficients["backward_pairs"] == pytest.approx(2.5 * pair_s * 8 / 32)


def test_sampling_costs_what_its_passes_over_the_logits_read():
    model = roofline(A100, LLAMA_3_1_8B, BUCKETS, 512, efficiency=PERFECT)
    step, row_s = StepFeatures(2048, most_rows=256), 4 * 128256 / 2.039e12
    greedy_s = model.predict(step)
    for sampling, passes in {
        Sampling.ADJUSTED: 4,
        Sampling.DRAWN: 4 + 8,
        Sampling.FILTERED: 4 + 8 + 36,
    }.items():
        more_s = model.predict(step._replace(sampling=sampling)) - greedy_s
        assert more_s == pytest.approx(256 * passes * row_s, rel=1e-6)
    few = StepFeatures(16, most_rows=256)
    more_s = model.predict(few._replace(sampling=Sampling.ADJUSTED)) - model.predict(few)
    assert more_s == pytest.approx(16 * 4 * row_s, rel=1e-6)


def test_tensor_parallel_devices_share_the_work_and_pay_for_reducing():
    one = roofline(A100, QWEN2_5_14B, BUCKETS, 512, efficiency=PERFECT)
    free = Efficiency(**{**vars(PERFECT), "all_reduce_s": 0.0})
    two = roofline(A100, QWEN2_5_14B, BUCKETS, 512, tp=2, efficiency=free)
    moved_s = 48 * 2 * (16 * 5120 * 2) / 300e9
    half_s = one.predict(StepFeatures(16)) / 2
    assert two.predict(StepFeatures(16)) == pytest.approx(half_s + moved_s, rel=1e-6)


def test_an_unknown_device_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"no data sheet of 'TPU v4'.*scheduler.latency=profile"):
        find_device("TPU v4")


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_a_cold_start_on_a_wrong_roofline_keeps_the_slo(factor):
    """The device is three times slower or faster than its data sheet says."""
    slo = Slo(0.15, 5.0)
    limits = SchedulerConfig(
        max_sequences=64,
        max_tokens_per_step=512,
        max_model_len=8192,
        token_buckets=(16, 64, 128, 256, 512),
        num_pages=20_000,
        prefix_caching=False,
        num_layers=32,
        unit_tokens=256,
        slo=slo,
        idle_step_s=0.1,
    )
    believed = roofline(A100, LLAMA_3_1_8B, limits.token_buckets, 256)
    engine = SimulatedEngine(
        Scheduler(limits, believed),
        believed.copy(scale=factor),
        FinetuneSupply([1000, 3000], 4096),
        noise=0.05,
        host_s=1e-3,
    )
    arrivals = make_arrivals(
        "poisson", 1.0, 60.0, 3, prompt_tokens=Lengths(200), output_tokens=Lengths(100)
    )
    replay(engine, arrivals)
    made = report([engine], slo, engine.now)
    assert made["inference"]["slo_attainment"] >= 0.98
    assert made["finetune"]["finetune"]["tokens"] > 10_000
