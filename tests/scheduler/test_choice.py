"""The chosen finetuning of a step is the best there is: compared with trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.choice import Allowance, choose
from scheduler.config import SchedulerConfig
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.progress import Progress
from scheduler.request import Microbatch


def config(buckets):
    return SchedulerConfig(
        max_sequences=2,
        max_tokens_per_step=buckets[-1],
        max_model_len=64,
        token_buckets=buckets,
        num_pages=64,
        num_layers=3,
        unit_tokens=4,
    )


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_it_is_what_brute_force_finds(data):
    draw = data.draw
    buckets = draw(st.sampled_from([(2, 4, 8, 16), (3, 5, 16), (16,)]))
    limits = config(buckets)
    steps = [draw(st.floats(0, 0.02)) for _ in buckets]
    bases = dict(zip(buckets, itertools.accumulate(steps, initial=0.01), strict=False))
    latency = LatencyModel(
        bases,
        {
            "layer_units": draw(st.floats(1e-4, 0.01)),
            "loss_units": draw(st.floats(1e-4, 0.01)),
            "backward_pairs": draw(st.floats(0, 1e-4)),
        },
    )
    latency.unit_correction = draw(st.sampled_from([1.0, 1.3]))
    decode = draw(st.integers(0, 2))
    bucket = next(b for b in buckets if b >= decode) if decode else 0
    features = StepFeatures(bucket, decode_tokens=decode)
    forward = Progress(Microbatch(0, draw(lengths)), limits, latency)
    forward.forwarded = draw(st.integers(0, forward.tokens - 1))
    backward = None
    if draw(st.booleans()):
        backward = Progress(Microbatch(1, draw(lengths)), limits, latency)
        backward.forwarded = backward.tokens
        backward.units_done = draw(st.integers(0, backward.total_units - 1))
    budget_s = draw(st.floats(0, 0.15))
    allowance = Allowance(budget_s, forward_s=draw(st.sampled_from([math.inf, 0.02])))

    choice = choose(features, forward, backward, allowance, limits, latency)

    full = StepFeatures(buckets[-1], finetune_tokens=buckets[-1], adapters=True)
    token_s = latency.forward_s(full) / buckets[-1]

    def merit(tokens, units, seconds, unit_s):
        if not tokens and not units:
            return 0.0
        if backward and decode:
            left = backward.total_units - backward.units_done
            return min(tokens / forward.left_after(0), units / left)
        return (tokens * token_s + unit_s) / seconds

    best = 0.0
    inference_s = latency.forward_s(features)
    for tokens in range(forward.tokens - forward.forwarded + 1):
        fits = next((b for b in buckets if b >= decode + tokens), None)
        if fits is None:
            break
        with_forward = forward.with_forward(features, tokens, fits) if tokens else features
        forward_s = latency.forward_s(with_forward)
        if tokens and forward_s > max(inference_s, min(budget_s, allowance.forward_s)):
            continue
        lane = backward or (forward if forward.left_after(tokens) == 0 else None)
        units = unit_s = 0
        for more in range(1, (lane.total_units - lane.units_done if lane else 0) + 1):
            more_s = latency.unit_s(lane.with_units(with_forward, more))
            if forward_s + more_s <= budget_s * (1 + 1e-9):
                units, unit_s = more, more_s
        best = max(best, merit(tokens, units, forward_s + unit_s, unit_s))

    unit_s = latency.unit_s(choice.features)
    seconds = latency.predict(choice.features)
    assert merit(choice.tokens, choice.units, seconds, unit_s) == pytest.approx(best, rel=1e-6)
    if not choice.tokens and not choice.units:
        return
    assert choice.features.finetune_tokens == choice.tokens
    assert choice.features.loss_units + choice.features.layer_units == choice.units
    if choice.units:
        assert seconds <= budget_s * (1 + 1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_the_cost_of_units_is_the_sum_of_single_ones(dropout):
    costs = {"loss_units": 0.3, "layer_units": 0.1, "backward_pairs": 1e-3, "dropout_units": 0.05}
    latency = LatencyModel({}, costs)
    progress = Progress(Microbatch(0, (9, 5, 7), dropout=dropout), config((16,)), latency)
    progress.forwarded = progress.tokens
    single, total = [], progress.total_units
    for unit in range(total):
        progress.units_done = unit
        single.append(latency.unit_s(progress.with_units(StepFeatures(), 1)))
    assert single[-1] == pytest.approx(0.15 if dropout else 0.1, abs=0.02)
    for first in range(total):
        progress.units_done = first
        for count in range(total - first + 1):
            spent = sum(single[first : first + count])
            assert progress.cost(first + count) - progress.cost(first) == pytest.approx(spent)
            together = latency.unit_s(progress.with_units(StepFeatures(), count))
            assert together == pytest.approx(spent)
            assert progress.affordable(spent * (1 + 1e-9)) == count
            if count:
                assert progress.affordable(spent * (1 - 1e-6)) == count - 1


def test_pairs_of_slices_see_the_keys_of_their_own_sequence_only():
    latency = LatencyModel({}, {"backward_pairs": 1.0})
    progress = Progress(Microbatch(0, (6, 3)), config((16,)), latency)
    # Slices of 4 over 6 + 3 tokens: [0, 4) of the first; [4, 6) of it and [0, 2) of the second;
    # and its last token.
    pairs = [1 * 3, 2 * 6 + 2 * 2, 4 * 4]
    costs = [progress.cost(3 + i + 1) - progress.cost(3 + i) for i in range(3)]
    assert costs == pairs


def test_pairs_of_sequences_that_go_on_from_another_are_with_its_keys_too():
    latency = LatencyModel({}, {"backward_pairs": 1.0})
    progress = Progress(Microbatch(0, (4, 6, 3), before=(0, 4, 4)), config((16,)), latency)
    # Slices of 4: the last token of the third, two of the second and third each, four of the
    # second, and the first, which both go on from.
    pairs = [1 * 7, 2 * 10 + 2 * 6, 4 * 8, 4 * 4]
    costs = [progress.cost(4 + i + 1) - progress.cost(4 + i) for i in range(4)]
    assert costs == pairs
