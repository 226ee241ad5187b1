"""A step from its dispatch to its end: what will have to be read of it, and what was observed."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.plan_step import PlannedStep, PromptTargets
from flexllm_jax.engine.request import RequestState, top_logprobs
from flexllm_jax.models.text.detokenizer import Detokenizer
from scheduler.request import StepPlan


@dataclass(frozen=True)
class StepObservation:
    """What a step held, and the seconds it took and was predicted to take on the device."""

    decode_tokens: int
    prefill_tokens: int
    forward_tokens: int
    backward_units: int
    preempted: int
    measured_s: float
    predicted_s: float
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def of(cls, step: "StepInFlight", measured_s: float) -> "StepObservation":
        """What was observed of a step."""
        plan = step.plan
        drafts = [chunk.drafts for chunk in plan.prefill if chunk.drafts]
        return cls(
            len(plan.decode),
            sum(chunk.length for chunk in plan.prefill),
            plan.forward.length if plan.forward else 0,
            len(plan.backward.units) if plan.backward else 0,
            len(plan.preempted),
            measured_s,
            plan.predicted_s,
            len(drafts),
            sum(map(len, drafts)),
            step.accepted_tokens,
        )


@dataclass
class StepInFlight:
    """A dispatched step: what will have to be read, and what to do with it."""

    plan: StepPlan
    started: float
    sampled: list[RequestState]
    report: dict | None  # from the sampler
    prompt_logprobs: list[tuple[PromptTargets, dict]]
    last_unit: jax.Array | None  # ready when the step's backward units are done
    hidden: jax.Array | None
    drafts: dict[int, int] = field(default_factory=dict)  # as of `PlannedStep`
    accepted_tokens: int = 0  # of drafts
    after: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class BucketUse:
    """How often a bucket's program ran, and how many tokens were in its slots."""

    steps: int = 0
    tokens: int = 0

    def count(self, plan: StepPlan) -> None:
        """Another step."""
        self.steps += 1
        self.tokens += plan.num_tokens


@dataclass
class ReadTokens:
    """What a step's outputs are.

    sampled     the next token of each request
    accepted    those after it, where a draft is right
    stopped     requests that these end
    failed      those that cannot go on, and why
    progressed   of each request that has new tokens, how many
    """

    sampled: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, list[int]] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    failed: list[tuple[RequestState, str]] = field(default_factory=list)
    progressed: list[tuple[RequestState, int]] = field(default_factory=list)


def read_tokens(step: StepInFlight, detokenizer: Detokenizer) -> ReadTokens:
    """Give the requests their tokens; waits for the device."""
    read = ReadTokens()
    if step.report is None:
        return read
    report = jax.tree.map(np.asarray, step.report)
    over = None  # whose other outputs follow a token that did not come
    for i, state in enumerate(step.sampled):
        if state is over:
            continue
        token, request_id = int(report["tokens"][i]), state.request_id
        if request_id in read.sampled:
            read.accepted.setdefault(request_id, []).append(token)
            step.accepted_tokens += 1
        else:
            read.sampled[request_id] = token
        if step.drafts.get(i, token) != token:
            over = state
        if state.finished:
            continue
        if state.params.logprobs is not None:
            state.take_logprobs(token, report, i)
        if state.append(token, detokenizer):
            read.stopped.add(request_id)
            over = state
        elif state.constraint and (reason := state.constraint.failure()):
            read.failed.append((state, reason))
        count = 1 + len(read.accepted.get(request_id, ()))
        if count > 1:
            read.progressed.pop()
        read.progressed.append((state, count))
    return read


def request_prompt_logprobs(runner: Runner, step: StepInFlight, planned: PlannedStep) -> None:
    """Send off the log-probabilities of the prompt tokens whose outputs the step has."""
    if step.hidden is None or not planned.prompt_targets:
        return
    targets = np.zeros((2, step.plan.token_bucket), np.int32)
    targets[1] = -1
    for target in planned.prompt_targets:
        where = slice(target.first_output, target.first_output + len(target.tokens))
        targets[0, where], targets[1, where] = target.tokens, target.state.bank_row
    report = runner.prompt_logprobs(step.hidden, targets)
    # Few ask for more than one token at a place: each is another run over the step's outputs.
    most = max((len(own) for t in planned.prompt_targets for own in t.others), default=0)
    report["others"] = []
    for number in range(most):
        targets = targets.copy()
        for target in planned.prompt_targets:
            for at, own in enumerate(target.others, target.first_output):
                if number < len(own):
                    targets[0, at] = own[number]
        report["others"].append(runner.prompt_logprobs(step.hidden, targets)["logprobs"])
    step.prompt_logprobs = [(target, report) for target in planned.prompt_targets]


def read_prompt_logprobs(step: StepInFlight) -> None:
    """Give the requests the log-probabilities of their prompt tokens; waits for the device."""
    step.prompt_logprobs = [(t, jax.tree.map(np.asarray, r)) for t, r in step.prompt_logprobs]
    for target, report in step.prompt_logprobs:
        state = target.state
        for i, token in enumerate(target.tokens):
            at = target.first_output + i
            own = top_logprobs(
                token,
                float(report["logprobs"][at]),
                report["top_tokens"][at],
                report["top_logprobs"][at],
                state.params.prompt_logprobs or 0,
            )
            others = target.others[i] if target.others else ()
            for other, found in zip(others, report["others"], strict=False):  # of whom asks most
                own[other] = float(found[at])
            state.prompt_logprobs[target.position + i] = own
