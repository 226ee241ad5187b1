"""What the HTTP process and the engine process say to each other, as msgpack over ZeroMQ.

Commands go one way and events the other, each over a PUSH/PULL pair of its own, so neither side
ever waits for the other. Requests are numbered by the HTTP process; every output sequence is a
request. Times are time.monotonic, which the processes of one machine share; to an engine on
another machine a `Submit` says when it was sent.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.server.engines.training_messages import (
    TrainingCall,
    TrainingModelState,
    TrainingResult,
)

BAD_INPUT = 2  # an engine's exit status: the configuration, or a file it names, cannot be used


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A message; arrays on the wire, told apart by the class's name."""


# -- commands -------------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, array_like=True):
    """One output sequence to generate. `params.n` and `params.stop` are not looked at: the HTTP
    process asks for each output on its own, and finds stop strings while detokenizing. An adapter
    that is not on the device is loaded from `adapter_path`."""

    request_id: int
    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    adapter_path: str | None
    arrival: float
    seed_offset: int
    slo_class: str


class Submit(Message, frozen=True):
    """Requests to queue at once. `sent`: when, for an engine with another clock."""

    requests: list[Generate]
    sent: float | None = None


class Cancel(Message, frozen=True):
    """Drop requests; nothing more is said of them."""

    request_ids: list[int]


class Call(Message, frozen=True):
    """Run a method of `EngineCalls`; answered by a `Reply` with the same number."""

    call_id: int
    method: str
    arguments: dict[str, Any]


class Acknowledge(Message, frozen=True):
    """The facts of a job's run up to `number` are written down: they need not be told again."""

    name: str
    run: str
    number: int


class Stop(Message, frozen=True):
    """End: unfinished requests are dropped, running jobs write a checkpoint."""


class Train(Message, frozen=True):
    """Calls of a model that is trained by calls, numbered by the HTTP process. The calls of a model
    are carried out in the order they are sent; each is answered by a `Trained`."""

    model: str
    calls: list[tuple[int, TrainingCall]]


Command = Submit | Cancel | Call | Acknowledge | Train | Stop


# -- events ---------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """The engine serves. What a request must fit: tokens, and KV pages of `page_size` tokens."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_pages: int
    page_size: int
    adapter_slots: int
    startup_s: float
    pid: int
    node: str


class Output(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of a request: one a step, and more where drafts of its tokens are right.

    logprobs         per new token: token id -> log-probability; empty when not asked for
    prompt_logprobs  with the first token, if asked for; None for the prompt's first token
    finish_reason    "stop" or "length" with the last token; None before it
    queued_s         with the first token: seconds from arrival to the first step with it
    cached_tokens    with the first token: those of the prompt that were in the prefix cache
    error            why nothing more will come; then `invalid` tells a bad request from a failure,
                     and `busy` what can be tried again later
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[dict[int, float]] = []
    prompt_logprobs: list[dict[int, float] | None] | None = None
    finish_reason: str | None = None
    error: str | None = None
    invalid: bool = False
    queued_s: float | None = None
    cached_tokens: int = 0
    busy: bool = False


class Outputs(Message, frozen=True):
    """What a step brought."""

    outputs: list[Output]


class Reply(Message, frozen=True):
    """The answer to a `Call`. `error` is one line; `invalid`: the call's fault."""

    call_id: int
    result: Any = None
    error: str | None = None
    invalid: bool = False


class Step(msgspec.Struct, frozen=True, array_like=True):
    """An engine's step as observed on the device, seconds."""

    decode_tokens: int
    prefill_tokens: int
    forward_tokens: int
    backward_units: int
    preempted: int
    measured_s: float
    predicted_s: float
    drafts: int
    draft_tokens: int
    accepted_tokens: int


class AdapterState(msgspec.Struct, frozen=True, array_like=True):
    """A served adapter: its version, and the requests that use it."""

    name: str
    version: int
    users: int


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """Something that has happened to a job; `number` counts those of a run from 1.

    step        optimizer step `step` is done: `metrics`, as the job's method measures them
    validation  after optimizer step `step`: `metrics`
    started     this run goes on from `step`; 0: from the beginning
    checkpoint  of `step`: its adapter is on disk
    message     a warning: `text`
    ended       for good: `status`; `text` is why, if it did not succeed
    """

    number: int
    kind: Literal["step", "validation", "started", "checkpoint", "message", "ended"]
    step: int = 0
    metrics: dict[str, float] = {}
    text: str | None = None
    status: str = ""


class JobReport(msgspec.Struct, frozen=True, array_like=True):
    """How a job is that an engine has, and what has happened to it: the first `facts` that are not
    acknowledged, in order. They are told until they are.

    run                     a name that no other run of the job has
    status                  running, paused, succeeded, failed or cancelled
    forwarded, backwarded   tokens computed in this run, validation's and repeated ones included
    answered                tokens computed for its own answers in this run, prompts too
    tokens                  tokens of all finished optimizer steps, earlier runs' too
    metrics                 of the last optimizer step
    """

    name: str
    run: str
    status: str
    step: int
    total_steps: int
    forwarded: int
    backwarded: int
    tokens: int
    tokens_per_s: float
    metrics: dict[str, float]
    eta_s: float | None
    resumed_from: int
    facts: list[Fact]
    answered: int = 0


class States(Message, frozen=True):
    """Recurrent state: slots of running requests and of snapshots, how many of them are in use, and
    how many snapshots there were until now: `saved`, `read` by a request that began from one,
    `evicted`."""

    requests: int
    request_slots: int
    snapshots: int
    snapshot_slots: int
    saved: int
    read: int
    evicted: int


class Stats(Message, frozen=True):
    """How the engine is, sent several times a second. `idle`: it has nothing to do; `quiet_s`:
    seconds since its last step; `call_waits_s`: how long the oldest call has waited for a worker;
    `steps`: those since the last message. CPU time, seconds since the start: `step_cpu_s` of the
    thread that plans and dispatches steps and tells their tokens, `message_cpu_s` of those that
    talk to the HTTP process. `free_slots`: of the bank of adapters. Versions that jobs answer with
    are `on_host` now; so many went there and came back: `spilled`, `returned`. `states`: of
    models with recurrent layers."""

    idle: bool
    quiet_s: float
    call_waits_s: float
    num_running: int
    num_waiting: int
    pages_used: int
    num_pages: int
    prefix_queries: int
    prefix_hits: int
    recompiles: int
    steps: list[Step]
    adapters: list[AdapterState]
    jobs: list[JobReport]
    training: list[TrainingModelState] = []
    step_cpu_s: float = 0.0
    message_cpu_s: float = 0.0
    free_slots: int = 0
    on_host: int = 0
    spilled: int = 0
    returned: int = 0
    states: States | None = None


class Trained(Message, frozen=True):
    """The answer to a call of a `Train`, or why there is none: one line, and whose fault it is.
    Those of a model come in the order of its calls, but what is saved may come later."""

    call_id: int
    result: TrainingResult | None = None
    error: str | None = None
    category: Literal["user", "server"] = "server"


Event = Ready | Outputs | Reply | Stats | Trained
