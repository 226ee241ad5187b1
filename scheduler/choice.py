"""Chooses a step's finetuning: the token bucket, forward tokens, and backward units.

Inference's part of the step is given and takes its time whether or not finetuning comes along. The
step's (bucket, forward tokens, units) shall maximize finetuning progress per second,

    (forward tokens x what a token costs in a full step  +  seconds of units) / seconds of the step

within the budget: progress is counted in seconds that the same work would take by itself, so that a
token and a unit are worth what each costs where nothing is shared. What follows from it:

- padding is nearly free, so it is filled with forward tokens;
- a larger bucket is taken where its tokens cost less than elsewhere, that is, as long as the step
  is bound by reading weights; beyond that, tokens and units are worth their time alike;
- the rest of the budget goes to units, as the fixed cost of the step is then shared by more work.

Forward and backward do not wait for each other, as units are of the microbatch before the one that
goes forward. For a given bucket the best forward is the longest and the best number of units the
largest that fits, so trying every bucket finds the optimum (a test compares with brute force).
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
    tokens, units   most forward tokens and backward units
    least      if nothing fits, the smallest bucket of tokens or one unit is granted all the same
    """

    budget_s: float
    tokens: float = math.inf
    units: float = math.inf
    least: bool = False


NOTHING = Allowance(0.0, 0, 0)


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
    best, best_merit = Choice(0, 0, features), (0.0, 0.0, 0, 0)
    for tokens, candidate in _forwards(features, forward, allowance, config):
        forward_s = latency.forward_s(candidate)
        if tokens and forward_s > allowance.budget_s and forward_s > free_s:
            continue
        lane = backward or (forward if forward and forward.left_after(tokens) == 0 else None)
        units = 0
        if lane:
            affordable = lane.affordable(allowance.budget_s - forward_s, costs)
            units = int(min(affordable, allowance.units))
            candidate = lane.with_units(candidate, units)
        unit_s = latency.unit_s(candidate)
        value = tokens * token_s + unit_s
        merit = (value / (forward_s + unit_s) if value else 0.0, value, tokens, units)
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
