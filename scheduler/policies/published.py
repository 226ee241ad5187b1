"""Co-serving as FlexLLM's published code does it: fixed amounts instead of a latency model.

Every step has a budget of 256 tokens: inference first, the rest is one finetuning sequence going
forward. A sequence whose forward is complete goes backward at a fixed number of layers a step, all
its slices at once; the next one starts after it. The artifact's step times and throughputs
(`flexllm_artifact_e2e_results.csv`) fit one layer a step.
"""

from __future__ import annotations

import math

from scheduler.choice import Allowance
from scheduler.policies.policy import STEADY, Step
from scheduler.request import StepPlan


class Published:
    """Fixed token budget and fixed backward layers a step."""

    overlap = False

    def __init__(self, tokens: int = 256, layers: int = 1) -> None:
        self.tokens, self.layers = tokens, layers

    def serves(self, step: Step) -> bool:
        """Always."""
        return True

    def token_limit(self, step: Step) -> int:
        """The fixed budget, as far as the programs allow."""
        return max(min(self.tokens, step.config.max_tokens_per_step), len(step.decode))

    def allowance(self, step: Step) -> Allowance:
        """What inference leaves of the budget, or the fixed layers, the loss with the first."""
        limit = min(self.tokens, step.config.max_tokens_per_step)
        used = len(step.decode) + sum(chunk.length for chunk in step.prefill)
        if not step.in_backward:
            return Allowance(math.inf, tokens=max(0, limit - used), units=0)
        progress = step.in_work[0]
        loss = progress.slices if not progress.units_done else 0
        return Allowance(math.inf, tokens=0, units=loss + self.layers * progress.slices)

    def planned(self, step: Step, plan: StepPlan) -> None:
        """Nothing to note."""

    def repeats(self) -> int:
        """It decides by counts alone."""
        return STEADY

    def repeated(self, count: int) -> None:
        """Nothing to note."""
