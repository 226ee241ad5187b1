"""The latency model recovers known costs, stays monotone, and corrects itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scheduler.latency.least_squares import nonnegative_least_squares
from scheduler.latency.model import LatencyModel, Sampling, StepFeatures


def profile(noise=0.0, seed=0):
    """Samples of a known device with a cost for every feature."""
    generator = np.random.default_rng(seed)
    samples = []
    for bucket, units, adapters in itertools.product((64, 256, 1024), (0, 4, 16), (False, True)):
        for _ in range(4):
            features = StepFeatures(
                token_bucket=bucket,
                decode_tokens=int(generator.integers(32)),
                prefill_tokens=int(generator.integers(32)),
                finetune_tokens=int(generator.integers(bucket // 2)) * adapters,
                decode_kv=int(generator.integers(100_000)),
                chunk_kv=int(generator.integers(100_000)),
                attention_pairs=int(generator.integers(1_000_000)),
                layer_units=units,
                loss_units=int(generator.integers(4)) if units else 0,
                backward_pairs=int(generator.integers(1_000_000)) if units else 0,
                adapters=adapters,
                sampling=int(generator.integers(4)),
                logprobs=bool(generator.integers(2)),
                most_rows=100,
                dropout=adapters and bool(generator.integers(2)),
                dropout_units=int(generator.integers(units + 1)),
            )
            samples.append((features, device_seconds(features) * (1 + noise * generator.normal())))
    return samples


COSTS = {
    "decode_tokens": 1e-6,
    "prefill_tokens": 2e-6,
    "finetune_tokens": 4e-6,
    "decode_kv": 2e-8,
    "chunk_kv": 3e-8,
    "attention_pairs": 1e-9,
    "layer_units": 1e-3,
    "loss_units": 3e-3,
    "backward_pairs": 2e-9,
    "adapter_slots": 1e-6,
    "dropout_slots": 7e-7,
    "dropout_units": 4e-4,
    "adjusted_rows": 1e-6,
    "drawn_rows": 3e-6,
    "filtered_rows": 2e-5,
    "logprob_rows": 5e-6,
}


def device_seconds(features):
    rows = min(features.token_bucket, features.most_rows)
    values = features._asdict() | {
        "adapter_slots": features.token_bucket * features.adapters,
        "dropout_slots": features.token_bucket * features.dropout,
        "adjusted_rows": rows if features.sampling >= Sampling.ADJUSTED else 0,
        "drawn_rows": rows if features.sampling >= Sampling.DRAWN else 0,
        "filtered_rows": rows if features.sampling == Sampling.FILTERED else 0,
        "logprob_rows": rows if features.logprobs else 0,
    }
    base = 8e-3 + 20e-6 * features.token_bucket
    return base + sum(cost * values[name] for name, cost in COSTS.items())


def test_fit_recovers_an_exact_profile():
    samples = profile()
    model = LatencyModel.fit(samples)
    for features, seconds in samples:
        assert model.predict(features) == pytest.approx(seconds, rel=1e-6)


def test_a_bucket_never_profiled_is_interpolated_and_extrapolated():
    model = LatencyModel({64: 0.01, 128: 0.02})
    assert model.predict(StepFeatures(token_bucket=96)) == pytest.approx(0.015)
    assert model.predict(StepFeatures(token_bucket=32)) == pytest.approx(0.01)
    assert model.predict(StepFeatures(token_bucket=256)) == pytest.approx(0.04)
    assert model.predict(StepFeatures(layer_units=3)) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_more_work_never_predicts_less_time(seed):
    model = LatencyModel.fit(profile(noise=0.3, seed=seed))
    assert min(model.coefficients.values()) >= 0
    assert list(model.bases.values()) == sorted(model.bases.values())


def test_fit_matches_scipy_on_random_problems():
    scipy = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    for _ in range(30):
        matrix = generator.normal(size=(12, 6))
        target = generator.normal(size=12)
        expected, _ = scipy.nnls(matrix, target)
        np.testing.assert_allclose(nonnegative_least_squares(matrix, target), expected, atol=1e-8)


def test_a_prediction_is_its_forward_and_its_units():
    model = LatencyModel.fit(profile(noise=0.1))
    for features, seconds in profile(seed=1):
        model.observe(features, 1.3 * seconds)
        parts = model.forward_s(features) + model.unit_s(features)
        assert model.predict(features) == parts
        without = features._replace(layer_units=0, loss_units=0, backward_pairs=0, dropout_units=0)
        assert model.unit_s(without) == 0


def test_observations_correct_the_prediction_and_narrow_the_margin():
    model = LatencyModel({64: 0.01}, {"layer_units": 1e-3}, spread=0.5)
    features = StepFeatures(token_bucket=64)
    before = model.margin
    for _ in range(300):
        model.observe(features, 0.013)
    assert model.predict(features) == pytest.approx(0.013, rel=1e-3)
    assert model.margin > before
    # The units are corrected apart, by what the forward leaves of the time.
    assert model.unit_s(StepFeatures(layer_units=5)) == pytest.approx(0.005)
    both = StepFeatures(token_bucket=64, layer_units=5)
    for _ in range(300):
        model.observe(both, 0.013 + 0.010)
    assert model.forward_s(both) == pytest.approx(0.013, rel=1e-2)
    assert model.unit_s(both) == pytest.approx(0.010, rel=1e-2)


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_a_cold_model_that_is_wrong_by_far_is_right_after_ten_steps(factor):
    model, truth = LatencyModel({64: 0.01, 256: 0.02}, spread=1.0), {64: 0.01, 256: 0.02}
    for step in range(10):
        bucket = (64, 256)[step % 2]
        model.observe(StepFeatures(token_bucket=bucket), factor * truth[bucket])
    for bucket, seconds in truth.items():
        predicted = model.predict(StepFeatures(token_bucket=bucket))
        assert predicted == pytest.approx(factor * seconds, rel=0.15)


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_a_bucket_that_always_has_units_is_corrected_too(factor):
    model = LatencyModel({64: 0.01}, {"layer_units": 1e-3}, spread=1.0)
    features = StepFeatures(token_bucket=64, layer_units=10)
    for _ in range(60):
        model.observe(features, factor * 0.02)
    assert model.predict(features) == pytest.approx(factor * 0.02, rel=0.1)


def test_noise_does_not_inflate_units_that_are_a_small_part_of_the_step():
    model, generator = LatencyModel({64: 0.02}, {"layer_units": 1e-3}), np.random.default_rng(0)
    for step in range(2000):
        features = StepFeatures(token_bucket=64, layer_units=step % 2)
        noise = 1 + 0.05 * generator.standard_normal()
        model.observe(features, noise * (0.02 + 1e-3 * (step % 2)))
    assert model.unit_correction == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_the_margin_lets_85_percent_of_the_steps_stay_within_a_budget(sigma):
    model, generator = LatencyModel({64: 0.01}), np.random.default_rng(0)
    features, within = StepFeatures(token_bucket=64), []
    for _ in range(6000):
        seconds = 0.01 * generator.lognormal(0, sigma)
        within.append(seconds <= model.predict(features) / model.margin)
        model.observe(features, seconds)
    assert np.mean(within[1000:]) == pytest.approx(0.85, abs=0.03)
    errors = model.errors()
    assert errors["observations"] == 6000
    assert errors["p50"] < errors["p95"] and abs(errors["signed"]) < errors["p50"]


def test_without_online_correction_errors_are_only_tracked():
    model = LatencyModel({64: 0.01}, online=False)
    features = StepFeatures(token_bucket=64)
    for _ in range(50):
        model.observe(features, 0.02)
    assert model.predict(features) == 0.01
    assert model.errors()["signed"] == pytest.approx(1.0)


def test_a_bucket_that_looked_slow_once_is_tried_again():
    model = LatencyModel({64: 0.01, 256: 0.02})
    for _ in range(3):
        model.observe(StepFeatures(token_bucket=256), 1.0)
    slow = model.predict(StepFeatures(token_bucket=256))
    for _ in range(400):
        model.observe(StepFeatures(token_bucket=64), 0.01)
    again = model.predict(StepFeatures(token_bucket=256))
    assert slow > 0.03 and again == pytest.approx(0.02, rel=0.1)


def test_one_outlier_moves_little():
    model, features = LatencyModel({64: 0.01}), StepFeatures(token_bucket=64)
    for _ in range(50):
        model.observe(features, 0.01)
    model.observe(features, 60.0)
    assert model.predict(features) <= 0.0106


def test_save_and_load(tmp_path):
    model, key = LatencyModel.fit(profile()), {"device": "cpu", "model": "m", "jax": "1"}
    model.save(tmp_path / "profile.json", key)
    loaded = LatencyModel.load(tmp_path / "profile.json", key)
    assert loaded is not None
    assert (loaded.bases, loaded.coefficients) == (model.bases, model.coefficients)
    assert LatencyModel.load(tmp_path / "profile.json", key | {"jax": "2"}) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"bases": {"a": 1}, "coefficients": {}}'])
def test_a_broken_profile_is_named(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"profile\.json is not a latency profile"):
        LatencyModel.load(path)


@pytest.mark.parametrize(
    ("bases", "coefficients", "message"),
    [
        ({1: -1.0}, {}, "nonnegative"),
        ({1: 2.0, 2: 1.0}, {}, "must not decrease"),
        ({}, {"speed": 1.0}, "unknown latency coefficients"),
    ],
)
def test_a_model_that_is_not_monotone_is_refused(bases, coefficients, message):
    with pytest.raises(ValueError, match=message):
        LatencyModel(bases, coefficients)


def test_a_profile_needs_positive_times():
    with pytest.raises(ValueError, match="at least one sample"):
        LatencyModel.fit([])
    with pytest.raises(ValueError, match="positive seconds"):
        LatencyModel.fit([(StepFeatures(token_bucket=1), 0.0)])
