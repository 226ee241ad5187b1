"""Our policy: finetuning gets the slack of the requests (FlexLLM, section 6).

A running request's next token is due at `first token + n x tpot_s`. Time won on earlier tokens is
slack that finetuning may spend now, while the request's TPOT, a mean over its tokens, still meets
the objective. A step's forward must end within the smallest slack. Its units run after the tokens
are out, so they may moreover use part of the time until the next tokens are due, less what the next
forward needs; the rest stays as a reserve for prefills to come. Both limits are scaled by a safety
margin learnt from the latency model's own errors, and a step takes at most one TPOT: a request that
arrives meanwhile waits for one step and no longer, and finetuning gives way to the prefill of a
burst in the very next one.
"""

from __future__ import annotations

import bisect
import math

from scheduler.choice import NOTHING, Allowance
from scheduler.latency.model import StepFeatures
from scheduler.policies.policy import STEADY, Step, slack
from scheduler.request import Decode, Sequence, StepPlan

_AHEAD = 0.5  # of the time between two tokens that units may use before the first is late
_FLOOR_STEP_S = 0.1  # what finetuning is owed by its floor is paid in steps of at least so long


class CoServing:
    """Fills every step up to the objective.

    Parts can be left out, to measure what they bring. `use_slack=False`: every step may take one
    TPOT, whatever was won or lost before. `fill_buckets=False`: finetuning tokens do not go beside
    inference, but in steps of their own. `overlap=False`: one microbatch at a time.
    """

    def __init__(
        self, use_slack: bool = True, fill_buckets: bool = True, overlap: bool = True
    ) -> None:
        self.use_slack, self.fill_buckets, self.overlap = use_slack, fill_buckets, overlap
        self._owed_s = 0.0  # time that finetuning should have had by its floor, and had not
        self._decode_s = 0.0  # seconds of the last step's inference
        self._steady = False  # the budget was one TPOT

    def serves(self, step: Step) -> bool:
        """Yes, unless the step is to be finetuning's own: it is owed one, or may not fill buckets
        and there is time for one."""
        if self._owed(step):
            return False
        if self.fill_buckets or step.waiting or not step.running or step.in_backward:
            return True
        smallest = StepFeatures(step.config.token_buckets[0], adapters=True)
        return self._own_step_s(step) < step.latency.forward_s(smallest)

    def token_limit(self, step: Step) -> int:
        """The largest bucket that makes no decoding sequence late.

        A step of one TPOT keeps pace, so it is allowed also when a sequence is late already; and
        prefill never gets less than a smallest bucket.
        """
        buckets, decoding = step.config.token_buckets, len(step.decode)
        if not decoding or not (step.waiting or decoding < len(step.running)):
            return buckets[-1]
        slack_s, tpot_s = slack(step, (), step.decode)
        budget_s = max(slack_s, tpot_s) * step.latency.margin
        limit = bisect.bisect_right(
            buckets,
            budget_s,
            key=lambda bucket: step.latency.forward_s(
                step.features.with_prefill(bucket, bucket - decoding)
            ),
        )
        least = bisect.bisect_left(buckets, decoding + buckets[0])
        return buckets[min(max(limit - 1, least), len(buckets) - 1)]

    def allowance(self, step: Step) -> Allowance:
        """The slack; `idle_step_s` without requests; nothing while a prefill waits for room."""
        if self._owed(step):
            return Allowance(self._owed_s, least=True)
        if step.idle:
            self._steady = True
            return Allowance(step.config.idle_step_s, least=True)
        if step.backlog:
            return NOTHING
        if not self.fill_buckets and not step.serving:
            return Allowance(self._own_step_s(step))
        concerned = [chunk.sequence for chunk in step.prefill] + step.waiting[:1]
        budget_s, forward_s = self._budget_s(step, concerned, step.decode)
        return Allowance(budget_s, forward_s, tokens=math.inf if self.fill_buckets else 0)

    def planned(self, step: Step, plan: StepPlan) -> None:
        """Keep the accounts of the floor and of a step's inference."""
        floor = step.config.finetune_floor
        if not floor and self.fill_buckets:
            return
        inference_s = step.latency.forward_s(step.features)
        if step.decode:
            self._decode_s = inference_s
        if step.in_work or step.queued:
            self._owed_s += floor * plan.predicted_s - (plan.predicted_s - inference_s)
            self._owed_s = min(max(self._owed_s, -1.0), 1.0)

    def repeats(self) -> int:
        """Many times in a steady state: a budget below one TPOT will soon be another."""
        return STEADY if self._steady else 0

    def repeated(self, count: int) -> None:
        """Nothing to note: the floor's account stands still in a steady state."""

    def _owed(self, step: Step) -> bool:
        return self._owed_s >= _FLOOR_STEP_S and bool(step.in_work or step.queued)

    def _budget_s(
        self, step: Step, sequences: list[Sequence], decode: Decode | None = None
    ) -> tuple[float, float]:
        """Seconds that the step, and that its forward, may take."""
        slack_s, tpot_s = slack(step, sequences, decode)
        if not self.use_slack:
            slack_s = tpot_s
        if tpot_s == math.inf:
            return max(0.0, slack_s * step.latency.margin), math.inf
        margin = step.latency.margin
        ahead_s = _AHEAD * (tpot_s - step.latency.forward_s(step.features))
        budget_s = max(0.0, min((slack_s + ahead_s) * margin, tpot_s))
        self._steady = budget_s == tpot_s
        return budget_s, slack_s * margin

    def _own_step_s(self, step: Step) -> float:
        """Seconds a step without inference may take, so that the one after is still in time."""
        return self._budget_s(step, step.running)[1] - self._decode_s
