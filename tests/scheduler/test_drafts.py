"""Drafts: what prompt lookup proposes, and when a step tries it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.drafts import LONGEST, SHORTEST, PromptLookup
from scheduler.latency.model import LatencyModel
from scheduler.plan_log import LoggedScheduler, replay
from scheduler.request import Slo
from tests.scheduler.simulated_device import SimulatedEngine, request

tokens = st.lists(st.integers(0, 2), max_size=30)


def followers(known: list[int], count: int) -> list[int]:
    """What `PromptLookup` has to say, by looking everywhere."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(known) - 1, n - 1, -1):
            if len(known) > n and known[end - n : end] == known[-n:]:
                grown = list(known)
                for i in range(count):
                    grown.append(grown[end + i])
                return grown[len(known) :]
    return []


@given(known=tokens, more=tokens)
def test_a_draft_is_what_followed_the_longest_and_latest_like(known, more):
    lookup = PromptLookup(4)
    for end in range(len(more) + 1):
        text = [*known, *more[:end]]
        assert lookup.propose(text, 4) == followers(text, 4)


def test_the_length_follows_what_is_accepted_and_failures_wait():
    lookup, text = PromptLookup(16), [1, 2, 3, 1, 2]
    assert lookup.propose(text, 16) == [3, 1, 2, 3]
    lookup.learn(len(text), 4, 4)
    assert len(lookup.propose(text, 16)) == 8
    lookup.learn(len(text), 8, 2)
    assert len(lookup.propose(text, 16)) == 3
    lookup.learn(len(text), 3, 0)
    assert lookup.propose(text, 16) == lookup.propose([*text, 3], 16) == []
    assert lookup.propose([*text, 3, 1], 16) == [2]


CONFIG = SchedulerConfig(
    max_sequences=8,
    max_tokens_per_step=16,
    max_model_len=64,
    token_buckets=(1, 2, 4, 8, 16),
    num_pages=200,
    page_size=4,
    slo=Slo(0.05, 1.0),
)
BOUND_BY_MEMORY = LatencyModel({1: 0.01, 16: 0.011}, online=False)


def serve(scheduler, drafts, count=1, memory=1):
    """Requests of whose tokens each follows from a few before it: they repeat, sooner or later."""
    engine = SimulatedEngine(scheduler, memory=memory, keep_plans=True)
    for index in range(count):
        scheduler.add(request(str(index), (index % 3, 1, 2), 40, drafts=drafts))
    engine.drain(400)
    return engine


def test_drafts_end_an_output_in_fewer_steps():
    engine = serve(Scheduler(CONFIG, BOUND_BY_MEMORY), 4)
    assert len(engine.plans) < 20 and 20 < engine.accepted < 40
    assert len(serve(Scheduler(CONFIG, BOUND_BY_MEMORY), 0).plans) == 40


def test_drafts_that_are_wrong_leave_nothing_behind():
    """The simulated device finds any position that was not computed again."""
    engine = serve(Scheduler(CONFIG, BOUND_BY_MEMORY), 4, count=4, memory=3)
    tried = sum(len(chunk.drafts) for plan in engine.plans for chunk in plan.prefill)
    assert 0 < engine.accepted < tried


def test_no_draft_where_it_costs_more_than_it_brings():
    """A device that computes as long as there are tokens: nothing is won, or the next is late."""
    filled = LatencyModel({1: 1e-6}, {"decode_tokens": 0.001, "prefill_tokens": 0.001})
    late = LatencyModel({1: 0.04, 2: 0.06}, online=False)  # beyond the TPOT of 50 ms
    for latency, count in ((filled, 3), (late, 1)):
        engine = serve(Scheduler(CONFIG, latency), 4, count)
        assert engine.accepted == 0 and engine.early < 8  # nor does it cost the head start


def test_a_full_house_leaves_no_rows_for_drafts():
    assert serve(Scheduler(CONFIG, BOUND_BY_MEMORY), 4, count=8).accepted == 0
    assert serve(Scheduler(CONFIG, BOUND_BY_MEMORY), 4, count=5).accepted > 20


def test_a_log_is_replayed_with_them(tmp_path):
    path = tmp_path / "plans.jsonl"
    with path.open("w") as file:
        engine = serve(LoggedScheduler(CONFIG, BOUND_BY_MEMORY, "coserving", file), 4, count=3)
    assert engine.accepted
    for logged, again in replay(path):
        assert logged == again
