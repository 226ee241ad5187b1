"""The scheduler under random requests, cancels, microbatches, stops and tiny pools."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency import LatencyModel
from scheduler.request import Microbatch, Slo
from tests.scheduler.simulated_device import SimulatedEngine, request

MAX_MODEL_LEN = 24

# Two token values: prompts then often begin alike, and outputs repeat prompts.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)
actions = st.one_of(
    st.tuples(
        st.just("request"),
        prompts,
        st.integers(1, 8),  # max_tokens
        st.sampled_from([None, None, 1, 2, 3]),  # stop after
        st.sampled_from([None, "adapter"]),
    ),
    st.tuples(st.just("microbatch"), st.lists(st.integers(1, 12), min_size=1, max_size=4)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("cancel_microbatch"), st.sampled_from([None, 0, 1])),
    st.tuples(st.just("step"), st.integers(1, 6)),
)
configs = st.builds(
    SchedulerConfig,
    max_sequences=st.integers(1, 4),
    max_tokens_per_step=st.just(8),
    max_model_len=st.just(MAX_MODEL_LEN),
    token_buckets=st.sampled_from([(8,), (4, 8), (1, 2, 4, 8), (5, 7, 8)]),
    num_pages=st.integers(2, 20),
    page_size=st.integers(1, 4),
    prefix_caching=st.booleans(),
    num_layers=st.integers(1, 3),
    backward_window=st.integers(1, 8),
    max_finetune_segments=st.integers(1, 3),
    slo=st.sampled_from([Slo(), Slo(0.05, 0.5), Slo(0.001, 0.001)]),
    idle_step_s=st.sampled_from([math.inf, 0.05, 1e-9]),
)
latencies = st.sampled_from(
    [
        ({}, {}),
        ({1: 0.01, 8: 0.04}, {"layer_units": 0.01, "loss_units": 0.02, "kv_tokens": 1e-4}),
        ({4: 10.0}, {"layer_units": 10.0}),
    ]
)


@settings(max_examples=250, deadline=None)
@given(
    config=configs,
    latency=latencies,
    ahead=st.integers(0, 2),
    step_s=st.sampled_from([0.0, 0.02, 1.0]),
    program=st.lists(actions, max_size=30),
)
def test_any_history_keeps_every_invariant_and_ends(config, latency, ahead, step_s, program):
    scheduler = Scheduler(config, LatencyModel(*latency))
    engine = SimulatedEngine(scheduler, ahead=ahead, step_s=step_s)
    expected: dict[str, int] = {}
    microbatches: list[int] = []
    work = 0
    for name, *arguments in program:
        if name == "request":
            prompt, max_tokens, stop, salt = arguments
            request_id = str(len(expected))
            pages = -(-(len(prompt) + max_tokens - 1) // config.page_size)
            if pages > config.num_pages:
                continue
            scheduler.add(
                request(request_id, prompt, max_tokens, arrival=engine.now, cache_salt=salt)
            )
            expected[request_id] = min(max_tokens, stop or max_tokens)
            work += len(prompt) + max_tokens
            if stop:
                engine.stop_after[request_id] = stop
        elif name == "microbatch":
            (lengths,) = arguments
            if sum(-(-length // config.page_size) for length in lengths) > config.num_pages:
                continue
            scheduler.add(Microbatch(len(microbatches), tuple(lengths)))
            microbatches.append(len(microbatches))
            work += sum(lengths) * (2 + config.num_layers)
        elif name == "cancel":
            (index,) = arguments
            if scheduler.cancel(str(index)):
                assert str(index) not in engine.finished
                del expected[str(index)]
                expected[f"cancelled {index}"] = -1  # keeps the next ids fresh
        elif name == "cancel_microbatch":
            head = scheduler.num_microbatches and next(iter(scheduler._finetuning._queue))
            target = arguments[0]
            if scheduler.cancel_microbatch(target):
                microbatches[head.microbatch_id if target is None else target] = -1
        else:
            for _ in range(arguments[0]):
                engine.step()
        engine.check_state()

    engine.drain(limit=50 + 20 * work)

    assert {
        request_id: len(sequence.output) for request_id, sequence in engine.finished.items()
    } == {request_id: tokens for request_id, tokens in expected.items() if tokens >= 0}
    assert engine.microbatches_done == [index for index in microbatches if index >= 0]
    assert scheduler.pool.num_free == config.num_pages
    for sequence in engine.finished.values():
        on_device = engine.device[sequence].tokens
        assert sequence.tokens == on_device[: len(sequence.tokens)]
