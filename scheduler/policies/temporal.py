"""Temporal sharing: steps of inference and steps of finetuning take turns (the paper's baselines).

A finetuning step is a whole microbatch, forward and backward, without inference: what a training
framework does when it has the device. Fixed: after every N inference steps. Dynamic: as soon as the
slack of the running requests lets a whole microbatch pass. A device without requests finetunes.
"""

from __future__ import annotations

import bisect
import math

from scheduler.choice import NOTHING, Allowance
from scheduler.latency.model import StepFeatures
from scheduler.policies.policy import Step, slack
from scheduler.progress import Progress
from scheduler.request import Microbatch, StepPlan


class FixedTemporal:
    """One finetuning step after every `period` inference steps."""

    overlap = False

    def __init__(self, period: int) -> None:
        self.period = period
        self._left = period  # inference steps until the next finetuning step

    def serves(self, step: Step) -> bool:
        """Whether it is not finetuning's turn."""
        return not (self._left <= 0 and (step.in_work or step.queued))

    def token_limit(self, step: Step) -> int:
        """No limit: nothing shares a step with inference."""
        return step.config.max_tokens_per_step

    def allowance(self, step: Step) -> Allowance:
        """Everything in a step without inference."""
        return NOTHING if step.serving else Allowance(math.inf)

    def planned(self, step: Step, plan: StepPlan) -> None:
        """Count inference steps; begin anew when a microbatch is done."""
        if plan.backward and plan.backward.done:
            self._left = self.period
        elif step.serving:
            self._left -= 1

    def repeats(self) -> int:
        """Until it is finetuning's turn."""
        return max(0, self._left - 1)

    def repeated(self, count: int) -> None:
        """Count them."""
        self._left -= count


class DynamicTemporal:
    """A finetuning step whenever no request would be late for it."""

    overlap = False

    def __init__(self) -> None:
        self._microbatch: Microbatch | None = None  # the last one: the next will be like it
        self._own_turn = True  # the first is taken to find out

    def serves(self, step: Step) -> bool:
        """Whether a microbatch is not under way, nor fits in the slack."""
        if not (step.in_work or step.queued):
            return True
        if not self._own_turn and self._microbatch and step.running:
            slack_s, _ = slack(step, step.running + step.waiting[:1])
            needed_s = _seconds(Progress(self._microbatch, step.config, step.latency), step)
            self._own_turn = needed_s <= slack_s * step.latency.margin
        return not self._own_turn

    def token_limit(self, step: Step) -> int:
        """No limit: nothing shares a step with inference."""
        return step.config.max_tokens_per_step

    def allowance(self, step: Step) -> Allowance:
        """Everything in a step without inference."""
        return NOTHING if step.serving else Allowance(math.inf)

    def planned(self, step: Step, plan: StepPlan) -> None:
        """Learn how large microbatches are; inference's turn again when one is done."""
        if plan.forward:
            self._microbatch = plan.forward.microbatch
        if plan.backward and plan.backward.done:
            self._own_turn = False

    def repeats(self) -> int:
        """The slack changes with every step."""
        return 0

    def repeated(self, count: int) -> None:
        """It never is."""


def _seconds(progress: Progress, step: Step) -> float:
    """Predicted seconds of a microbatch's forward and backward by itself."""
    buckets, seconds = step.config.token_buckets, 0.0
    while not progress.forward_done:
        tokens = progress.next_forward(buckets[-1])
        bucket = buckets[bisect.bisect_left(buckets, tokens)]
        seconds += step.latency.forward_s(progress.with_forward(StepFeatures(), tokens, bucket))
        progress.forwarded += tokens
    return seconds + step.latency.unit_s(progress.with_units(StepFeatures(), progress.total_units))
