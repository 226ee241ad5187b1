"""Chooses a step's finetuning: the token bucket, forward tokens, and backward units.

Inference's part of the step is given and takes its time whether or not finetuning comes along.
What is chosen is the bucket: it is filled with forward tokens, as padding costs as much, and what
is left of the time budget is filled with units, as more work then shares the fixed cost of the
step. Beside requests, with one microbatch forward and one backward, steps take their whole budget,
and neither microbatch shall wait for the other in the end: the best bucket is that of the largest

    min(tokens / tokens left, units / units left)

which spreads the forward evenly over the steps of the backward: a few tokens in every step are
nearly free as long as reading weights bounds it, and many in one are not. With one lane alone, or
no requests whose step reads the weights anyway, it is that of the most progress per second,

    (tokens x what a token costs in a full step + seconds of units) / seconds of the step

where work counts as the seconds that it would take by itself. Every bucket is tried; a test
compares with brute force.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from scheduler.config import SchedulerConfig
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.progress import Progress


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


_NO_CHOICE = Choice(0, 0, StepFeatures())


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
    budget_s, correction = allowance.budget_s, latency.unit_correction
    inference_s = latency.forward_s(features)
    limit_s = max(inference_s, min(allowance.forward_s, budget_s))
    token_s = _token_s(latency, config)
    spent_s = backward.cost(backward.units_done) if backward else 0.0
    beside = features.token_bucket > 0  # requests
    best_tokens, best_units, best_features = 0, 0, features
    best_merit = (0.0, 0.0, 0, 0)
    for tokens, candidate in _forwards(features, forward, allowance, config):
        forward_s = latency.forward_s(candidate) if tokens else inference_s
        if forward_s > limit_s:
            break  # and so will be all larger buckets
        lane, units, unit_s = _lane(forward, backward, tokens), 0, 0.0
        if lane and correction:
            units = int(min(lane.affordable((budget_s - forward_s) / correction), allowance.units))
            unit_s = (lane.cost(lane.units_done + units) - spent_s) * correction
        value, step_s = tokens * token_s + unit_s, forward_s + unit_s
        if forward and backward and beside:
            left = backward.total_units - backward.units_done
            progress = min(tokens / forward.left_after(0), units / left)
        else:
            progress = value / step_s if step_s else value
        merit = (progress, value, tokens, units)
        if merit > best_merit:
            best_merit = merit
            best_tokens, best_units, best_features = tokens, units, candidate
        elif backward and beside and progress < best_merit[0]:
            break  # tokens grow and units shrink with the bucket: it is past its best
    if not best_tokens and not best_units:
        return _smallest(features, forward, backward, config) if allowance.least else _NO_CHOICE
    if lane := _lane(forward, backward, best_tokens):
        best_features = lane.with_units(best_features, best_units)
    return Choice(best_tokens, best_units, best_features)


def _lane(forward: Progress | None, backward: Progress | None, tokens: int) -> Progress | None:
    """The microbatch whose units may follow a forward of `tokens`."""
    if backward is None and forward is not None and forward.left_after(tokens) == 0:
        return forward
    return backward


def _token_s(latency: LatencyModel, config: SchedulerConfig) -> float:
    """Seconds of a forward token in a step that is full of them."""
    slots = config.max_tokens_per_step
    return latency.forward_s(_full_step(slots)) / slots


@cache
def _full_step(slots: int) -> StepFeatures:
    return StepFeatures(slots, finetune_tokens=slots, adapters=True)


def _forwards(
    features: StepFeatures,
    forward: Progress | None,
    allowance: Allowance,
    config: SchedulerConfig,
) -> Iterator[tuple[int, StepFeatures]]:
    """No forward, then the longest one that each bucket has room for, with the step's features."""
    yield 0, features
    if forward is None:
        return
    used, longest = features.decode_tokens + features.prefill_tokens, 0
    for bucket in config.token_buckets:
        tokens = forward.next_forward(int(min(bucket - used, allowance.tokens)))
        if tokens > longest:
            longest = tokens
            yield tokens, forward.with_forward(features, tokens, bucket)


def _largest(
    features: StepFeatures,
    forward: Progress | None,
    backward: Progress | None,
    allowance: Allowance,
    config: SchedulerConfig,
) -> Choice:
    *_, (tokens, features) = _forwards(features, forward, allowance, config)
    lane, units = _lane(forward, backward, tokens), 0
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
