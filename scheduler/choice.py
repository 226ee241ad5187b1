"""Chooses a step's finetuning: the token bucket, forward tokens, and backward units.

Inference's part of the step is given and takes its time whether or not finetuning comes along. The
step's (bucket, forward tokens, units) shall maximize finetuning progress per second within the
budget. With one microbatch forward and one backward, neither shall wait for the other in the end,
so progress is that of the lane that falls behind,

    min(tokens / tokens left, units / units left) / seconds of the step

which spreads the forward evenly over the steps of the backward: a few tokens in every step are
nearly free as long as reading weights bounds it, and many in one are not. With one lane alone,

    (tokens x what a token costs in a full step + seconds of units) / seconds of the step

counts the work in seconds that it would take by itself. Either way padding gets filled, larger
buckets are taken as long as their tokens are cheap, and units get the rest of the budget, as more
work then shares the fixed cost of a step. For a given bucket the best forward is the longest and
the best number of units the largest that fits, so trying every bucket finds the optimum (a test
compares with brute force).
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

from scheduler.config import SchedulerConfig
from scheduler.latency import LatencyModel, StepFeatures
from scheduler.progress import Progress, UnitCosts


class Allowance(NamedTuple):
    """What a policy lets finetuning have in a step.

    budget_s   seconds the whole step may take, inference included; inf takes whole buckets and all
               units, whatever the latency model says
    forward_s  seconds its forward program may take: requests get their tokens before units run
    tokens, units   most forward tokens and backward units
    least      if nothing fits, the smallest bucket of tokens or one unit is granted all the same
    """

    budget_s: float
    forward_s: float = math.inf
    tokens: float = math.inf
    units: float = math.inf
    least: bool = False


NOTHING = Allowance(0.0, tokens=0, units=0)


class Choice(NamedTuple):
    """Forward tokens and units of a step, and its features with them."""

    tokens: int
    units: int
    features: StepFeatures


def choose(
    features: StepFeatures,
    forward: Progress | None,
    backward: Progress | None,
    allowance: Allowance,
    config: SchedulerConfig,
    latency: LatencyModel,
) -> Choice:
    """The best finetuning for a step of inference `features`.

    forward    the microbatch that goes forward, or None when none may
    backward   the microbatch that goes backward, or None: then `forward` may begin to when the step
               completes its forward
    """
    if allowance.budget_s == math.inf:
        return _largest(features, forward, backward, allowance, config)
    costs = unit_costs(latency)
    token_s = _token_s(latency, config)
    free_s = latency.forward_s(features)
    limit_s = max(free_s, min(allowance.forward_s, allowance.budget_s))
    both = forward is not None and backward is not None
    left_tokens = forward.left_after(0) if forward else 0
    left_units = backward.total_units - backward.units_done if backward else 0
    best, best_merit = Choice(0, 0, features), (0.0, 0.0, 0, 0)
    for tokens, candidate in _forwards(features, forward, allowance, config):
        forward_s = latency.forward_s(candidate)
        if tokens and forward_s > limit_s:
            continue
        lane = backward or (forward if forward and forward.left_after(tokens) == 0 else None)
        units = 0
        if lane:
            affordable = lane.affordable(allowance.budget_s - forward_s, costs)
            units = int(min(affordable, allowance.units))
            candidate = lane.with_units(candidate, units)
        unit_s = latency.unit_s(candidate)
        step_s = forward_s + unit_s
        value = tokens * token_s + unit_s
        if both:
            progress = min(tokens / left_tokens, units / left_units)
        else:
            progress = value
        merit = (progress / step_s if step_s else progress, value, tokens, units)
        if merit > best_merit:
            best, best_merit = Choice(tokens, units, candidate), merit
    if allowance.least and not best.tokens and not best.units:
        return _smallest(features, forward, backward, config)
    return best


def unit_costs(latency: LatencyModel) -> UnitCosts:
    """Seconds of units, as the latency model has them now."""
    by, correction = latency.coefficients, latency.unit_correction
    return UnitCosts(
        by["loss_units"] * correction,
        by["layer_units"] * correction,
        by["backward_pairs"] * correction,
    )


def _token_s(latency: LatencyModel, config: SchedulerConfig) -> float:
    """Seconds of a forward token in a step that is full of them."""
    slots = config.max_tokens_per_step
    return latency.forward_s(StepFeatures(slots, finetune_tokens=slots, adapters=True)) / slots


def _forwards(
    features: StepFeatures,
    forward: Progress | None,
    allowance: Allowance,
    config: SchedulerConfig,
) -> list[tuple[int, StepFeatures]]:
    """For every bucket the longest forward it has room for, and none; with the step's features."""
    candidates = [(0, features)]
    if forward is None:
        return candidates
    used, longest = features.decode_tokens + features.prefill_tokens, 0
    for bucket in config.token_buckets:
        tokens = forward.next_forward(int(min(bucket - used, allowance.tokens)))
        if tokens > longest:
            longest = tokens
            candidates.append((tokens, forward.with_forward(features, tokens, bucket)))
    return candidates


def _largest(
    features: StepFeatures,
    forward: Progress | None,
    backward: Progress | None,
    allowance: Allowance,
    config: SchedulerConfig,
) -> Choice:
    tokens, features = _forwards(features, forward, allowance, config)[-1]
    lane, units = backward, 0
    if not lane and forward and forward.left_after(tokens) == 0:
        lane = forward
    if lane:
        units = int(min(lane.total_units - lane.units_done, allowance.units))
        features = lane.with_units(features, units)
    return Choice(tokens, units, features)


def _smallest(
    features: StepFeatures,
    forward: Progress | None,
    backward: Progress | None,
    config: SchedulerConfig,
) -> Choice:
    if backward:
        return Choice(0, 1, backward.with_units(features, 1))
    used = features.decode_tokens + features.prefill_tokens
    index = bisect.bisect_right(config.token_buckets, used)
    if forward is None or index == len(config.token_buckets):
        return Choice(0, 0, features)
    bucket = config.token_buckets[index]
    tokens = forward.next_forward(bucket - used)
    return Choice(tokens, 0, forward.with_forward(features, tokens, bucket))
