"""One kind of work alone: what a cluster of its own does, and the limits of sharing."""

from __future__ import annotations

from scheduler.choice import NOTHING, Allowance
from scheduler.policies.coserving import CoServing
from scheduler.policies.policy import STEADY, Step
from scheduler.request import StepPlan


class InferenceOnly:
    """Serves requests as co-serving does, and never finetunes."""

    overlap = False

    def __init__(self) -> None:
        self._inference = CoServing()

    def serves(self, step: Step) -> bool:
        """Always."""
        return True

    def token_limit(self, step: Step) -> int:
        """As co-serving: prefill makes no decoding sequence late."""
        return self._inference.token_limit(step)

    def allowance(self, step: Step) -> Allowance:
        """Nothing."""
        return NOTHING

    def planned(self, step: Step, plan: StepPlan) -> None:
        """Nothing to note."""

    def repeats(self) -> int:
        """It decides the same always."""
        return STEADY

    def repeated(self, count: int) -> None:
        """Nothing to note."""


class FinetuningOnly:
    """Finetunes, and lets requests wait for ever."""

    overlap = True

    def serves(self, step: Step) -> bool:
        """Never."""
        return False

    def token_limit(self, step: Step) -> int:
        """Not asked."""
        return 0

    def allowance(self, step: Step) -> Allowance:
        """Steps as an idle engine takes them."""
        return Allowance(step.config.idle_step_s, least=True)

    def planned(self, step: Step, plan: StepPlan) -> None:
        """Nothing to note."""

    def repeats(self) -> int:
        """It decides the same always."""
        return STEADY

    def repeated(self, count: int) -> None:
        """Nothing to note."""
