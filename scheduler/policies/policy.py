"""What a policy decides; everything else about a step is the scheduler's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.choice import Allowance
from scheduler.config import SchedulerConfig
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.progress import Progress
from scheduler.request import Chunk, Decode, Sequence, StepPlan

_NO_DECODE, _NO_FEATURES = Decode(), StepFeatures()
STEADY = 64  # steps that may be taken as alike: contexts hardly grow meanwhile


@dataclass(slots=True)
class Step:
    """What is known of the step being planned, at each of a policy's decisions.

    start      when the device will begin it, seconds on the clock of `plan(now)`
    running, waiting   the requests that hold pages, and those that do not, most urgent first
    in_work    finetuning's microbatches in work, oldest first
    queued     whether another microbatch could be started
    decode, prefill, features   the step's inference so far
    backlog    a prefill found no room in the step
    """

    config: SchedulerConfig
    latency: LatencyModel
    start: float
    running: list[Sequence]
    waiting: list[Sequence]
    in_work: list[Progress]
    queued: bool
    decode: Decode = field(default_factory=lambda: _NO_DECODE)
    prefill: list[Chunk] = field(default_factory=list)
    features: StepFeatures = _NO_FEATURES
    backlog: bool = False

    @property
    def idle(self) -> bool:
        """Whether nothing of inference can be done, now or when the step is over."""
        return not (self.decode or self.prefill or self.waiting)

    @property
    def serving(self) -> bool:
        """Whether the step holds inference."""
        return bool(self.decode or self.prefill)

    @property
    def in_backward(self) -> bool:
        """Whether a microbatch waits for nothing but units."""
        return bool(self.in_work) and self.in_work[0].forward_done


class Policy(Protocol):
    """Shares a device between inference and finetuning; one instance for each scheduler.

    The scheduler asks in the order of the methods. overlap: whether a microbatch may go forward
    while the one before goes backward.
    """

    overlap: bool

    def serves(self, step: Step) -> bool:
        """Whether the step holds inference at all; `decode` and `prefill` are not known yet."""
        ...

    def token_limit(self, step: Step) -> int:
        """Most token slots that decode and prefill may fill together; `decode` is known, and
        `features` without prefill."""
        ...

    def allowance(self, step: Step) -> Allowance:
        """What finetuning may have in the step; all of `step` is known."""
        ...

    def planned(self, step: Step, plan: StepPlan) -> None:
        """Take note of the plan that was made."""
        ...

    def repeats(self) -> int:
        """How many more times it would decide as it did last, if requests stayed the same."""
        ...

    def repeated(self, count: int) -> None:
        """Take note that it did so `count` times."""
        ...


def slack(
    step: Step, sequences: Iterable[Sequence], decode: Decode | None = None
) -> tuple[float, float]:
    """Seconds the step may take before a next token of `sequences` or `decode` is late, and their
    smallest TPOT objective; inf for none."""
    due, tpot_s = (decode.due, decode.tpot_s) if decode else (math.inf, math.inf)
    for sequence in sequences:
        due = min(due, sequence.due)
        tpot_s = min(tpot_s, sequence.tpot_s)
    return due - step.start, tpot_s
