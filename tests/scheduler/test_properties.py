"""The scheduler under random requests, cancels, microbatches, stops and tiny pools.

Everything is drawn small and tight, so that most histories meet full pools, preemptions, parks and
shared prefixes; the simulated device finds any page that does not hold what it should.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import LatencyModel
from scheduler.policies import POLICIES, make_policy
from scheduler.request import Microbatch, Slo
from tests.scheduler.simulated_device import SimulatedEngine, request

# Policies that always get to all work in the end.
ANY_POLICY = ("coserving_no_slack", "coserving_no_overlap", "published", "temporal_64")
PATTERN = (0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0)

# Prompts begin alike, so that prefixes are shared.
prompts = st.builds(
    lambda length, tail: PATTERN[:length] + tuple(tail),
    st.integers(1, len(PATTERN)),
    st.lists(st.integers(0, 1), max_size=3),
)
add_request = st.tuples(
    st.just("request"),
    prompts,
    st.integers(1, 9),  # max_tokens
    st.sampled_from([None, None, 1, 2, 3]),  # stop after
    st.sampled_from([None, "adapter"]),
    st.sampled_from([None, None, "a"]),  # job
    st.sampled_from([0, 0, 1, 4]),  # drafts
)
add_microbatch = st.tuples(
    st.just("microbatch"),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.booleans(),  # with backward
    st.sampled_from(["", "", "a"]),  # job
    st.booleans(),  # the first of another batch
)
step = st.tuples(st.just("step"), st.integers(1, 5))
cancel = st.tuples(st.just("cancel"), st.integers(0, 9))
cancel_microbatch = st.tuples(st.just("cancel_microbatch"), st.sampled_from([0, 1]))
pause = st.tuples(st.just("pause"), st.sampled_from(["", "a"]), st.booleans())
actions = st.one_of(
    *(add_request, step) * 3, *(add_microbatch,) * 2, cancel, cancel_microbatch, pause
)
configs = st.builds(
    lambda every, page_size, **fields: SchedulerConfig(
        snapshot_every=every * page_size, page_size=page_size, **fields
    ),
    every=st.integers(1, 4),
    state_snapshots=st.sampled_from([0, 1, 2, 5]),
    max_sequences=st.integers(1, 5),
    max_tokens_per_step=st.just(8),
    max_model_len=st.just(24),
    token_buckets=st.sampled_from([(8,), (4, 8), (1, 2, 4, 8), (5, 7, 8)]),
    num_pages=st.integers(4, 12),
    page_size=st.integers(1, 3),
    prefix_caching=st.sampled_from([True, True, True, False]),
    num_layers=st.integers(1, 3),
    unit_tokens=st.integers(1, 8),
    finetune_slots=st.sampled_from([56, 64, 112]),
    max_finetune_segments=st.integers(1, 3),
    slo=st.sampled_from([Slo(), Slo(0.05, 0.5), Slo(0.001, 0.001)]),
    idle_step_s=st.sampled_from([math.inf, 0.05, 1e-9]),
    finetune_floor=st.sampled_from([0.0, 0.0, 0.3]),
)
latencies = st.sampled_from(
    [
        ({}, {}),
        ({1: 0.01, 8: 0.04}, {"layer_units": 0.01, "loss_units": 0.02, "decode_kv": 1e-4}),
        ({4: 10.0}, {"layer_units": 10.0}),
        *(({1: 1e-3, 8: 1.01e-3}, {}),) * 2,  # drafts cost next to nothing
    ]
)


@dataclass
class History:
    """Applies actions to a scheduler, and knows what must come of them."""

    engine: SimulatedEngine
    tokens: dict[str, int] = field(default_factory=dict)  # output tokens of uncancelled requests
    microbatches: dict[int, str] = field(default_factory=dict)  # ids not cancelled, and the job
    batches: Counter[str] = field(default_factory=Counter)
    work: int = 0  # bounds the steps that all of it may take
    ids: itertools.count = field(default_factory=itertools.count)

    def request(self, prompt, max_tokens, stop, salt, job, drafts):
        scheduler, request_id = self.engine.scheduler, str(next(self.ids))
        room = scheduler.config.num_pages * scheduler.config.page_size
        max_tokens = min(max_tokens, room)
        prompt = prompt[: room - max_tokens + 1]
        self.tokens[request_id] = min(max_tokens, stop or max_tokens)
        self.engine.stop_after[request_id] = stop or 0
        self.work += len(prompt) + max_tokens
        fields = {"arrival": self.engine.now, "cache_salt": salt, "job": job}
        fields |= {"drafts": 0 if scheduler.config.state_snapshots else drafts}
        scheduler.add(request(request_id, prompt, max_tokens, **fields))

    def microbatch(self, lengths, backward, job, new_batch):
        scheduler = self.engine.scheduler
        while sum(map(scheduler.pool.pages_for, lengths)) > scheduler.config.num_pages:
            lengths = [length - 1 for length in lengths if length > 1]
        self.batches[job] += new_batch
        microbatch = Microbatch(next(self.ids), tuple(lengths), backward, job, self.batches[job])
        self.microbatches[microbatch.microbatch_id] = job
        self.work += microbatch.tokens * (2 + scheduler.config.num_layers)
        scheduler.add(microbatch)

    def pause(self, job, paused):
        scheduler = self.engine.scheduler
        scheduler.add_job(job)
        (scheduler.pause_job if paused else scheduler.resume_job)(job)

    def cancel(self, index):
        known = str(index) in self.tokens and str(index) not in self.engine.finished
        assert self.engine.scheduler.cancel(str(index)) == known
        if known:
            del self.tokens[str(index)]

    def cancel_microbatch(self, index):
        queued = [i for i in self.microbatches if i not in self.engine.microbatches_done]
        target = queued[index] if len(queued) > index else -1
        assert self.engine.scheduler.cancel_microbatch(target) == (target >= 0)
        self.engine.attempts.pop(target, None)
        self.microbatches.pop(target, None)

    def step(self, count):
        for _ in range(count):
            self.engine.step()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=configs,
    latency=latencies,
    policy=st.sampled_from(["coserving"] * 4 + [name for name in POLICIES if name in ANY_POLICY]),
    ahead=st.integers(0, 2),
    step_s=st.sampled_from([0.0, 0.02, 1.0]),
    memory=st.integers(0, 2),
    program=st.lists(actions, min_size=5, max_size=40),
)
def test_any_history_keeps_every_invariant_and_ends(
    config, latency, policy, ahead, step_s, memory, program
):
    scheduler = Scheduler(config, LatencyModel(*latency), make_policy(policy))
    engine = SimulatedEngine(scheduler, ahead=ahead, step_s=step_s, memory=memory)
    history = History(engine)
    for name, *arguments in program:
        getattr(history, name)(*arguments)
        engine.check_state()

    for job in ("", "a"):
        history.pause(job, False)
    engine.drain(limit=50 + 20 * history.work)

    outputs = {name: len(sequence.output) for name, sequence in engine.finished.items()}
    assert outputs == history.tokens
    for job in ("", "a"):
        done = [i for i in engine.microbatches_done if history.microbatches.get(i) == job]
        assert done == [i for i, owner in history.microbatches.items() if owner == job]
    assert scheduler.pool.num_free == config.num_pages
    for sequence in engine.finished.values():
        assert sequence.tokens == engine.device[sequence].tokens[: len(sequence.tokens)]
