"""The latency model recovers known costs, stays monotone, and corrects itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scheduler.latency import LatencyModel, StepFeatures


def profile(noise=0.0, seed=0):
    """Samples of a known device: 8 ms + 20 us per slot, and costs for everything else."""
    generator = np.random.default_rng(seed)
    samples = []
    for bucket, kv, units, adapters in itertools.product(
        (64, 256, 1024), (0, 100_000), (0, 4, 16), (False, True)
    ):
        features = StepFeatures(
            token_bucket=bucket,
            decode_tokens=32,
            kv_tokens=kv,
            attention_pairs=bucket * 100,
            layer_units=units,
            loss_units=units // 4,
            adapters=adapters,
        )
        samples.append((features, device_seconds(features) * (1 + noise * generator.normal())))
    return samples


def device_seconds(features):
    return (
        8e-3
        + 20e-6 * features.token_bucket
        + 2e-8 * features.kv_tokens
        + 1e-3 * features.layer_units
        + 3e-3 * features.loss_units
        + 1e-6 * features.token_bucket * features.adapters
    )


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
    from scheduler.latency import _nonnegative_least_squares

    generator = np.random.default_rng(0)
    for _ in range(30):
        matrix = generator.normal(size=(12, 6))
        target = generator.normal(size=12)
        expected, _ = scipy.nnls(matrix, target)
        np.testing.assert_allclose(_nonnegative_least_squares(matrix, target), expected, atol=1e-8)


def test_observations_correct_the_prediction_and_widen_the_margin():
    model = LatencyModel({64: 0.01}, {"layer_units": 1e-3})
    features = StepFeatures(token_bucket=64)
    before = model.margin
    for _ in range(5):
        model.observe(features, 0.013)
    assert model.margin < before
    for _ in range(300):
        model.observe(features, 0.013)
    assert model.predict(features) == pytest.approx(0.013, rel=1e-3)
    assert model.margin > 0.95
    # Steps with backward units are corrected apart.
    assert model.predict(StepFeatures(layer_units=5)) == pytest.approx(0.005)


def test_one_outlier_moves_little():
    model = LatencyModel({64: 0.01})
    model.observe(StepFeatures(token_bucket=64), 60.0)
    assert model.predict(StepFeatures(token_bucket=64)) <= 0.0106


def test_save_and_load(tmp_path):
    model = LatencyModel.fit(profile())
    model.save(tmp_path / "profile.json")
    loaded = LatencyModel.load(tmp_path / "profile.json")
    assert (loaded.bases, loaded.coefficients) == (model.bases, model.coefficients)


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
