"""How long the scheduler takes to plan a step, on its own, by the number of running requests.

All requests decode, with contexts of 500 tokens, beside a finetuning microbatch.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import LatencyModel
from scheduler.request import Microbatch, Request, Slo

STEPS = 100


def plan_ms(requests: int, steps: int = STEPS) -> tuple[float, float]:
    """Median milliseconds of thread time of `plan` and of `complete`, over so many steps."""
    largest = max(2048, 2 * requests)
    config = SchedulerConfig(
        max_sequences=requests,
        max_tokens_per_step=largest,
        max_model_len=8192,
        token_buckets=(256, 512, 1024, 2048, *((largest,) if largest > 2048 else ())),
        num_pages=80 * requests + 4000,
        num_layers=32,
        slo=Slo(0.05, 60.0),
    )
    costs = {"layer_units": 1e-3, "loss_units": 1e-3, "decode_kv": 1e-11, "finetune_tokens": 1e-8}
    scheduler = Scheduler(config, LatencyModel({256: 0.01, largest: 0.04}, costs))
    for index in range(requests):
        prompt = tuple(range(index, index + 500))
        scheduler.add(Request(str(index), prompt, 700, 0.0, cache_salt="adapter"))
    ids = itertools.count()
    scheduler.add(Microbatch(next(ids), (8192,)))
    gc.collect()
    gc.freeze()  # as the engine does
    outstanding, plans, completes, now = [], [], [], 0.0
    while len(plans) < steps:
        if scheduler.num_microbatches < 2:
            scheduler.add(Microbatch(next(ids), (8192,)))
        started = time.thread_time()
        plan = scheduler.plan(now)
        elapsed = time.thread_time() - started
        if plan is None:
            raise RuntimeError("nothing is planned while requests run")
        outstanding.append(plan)
        now += 0.045
        if len(outstanding) == 2:
            oldest = outstanding.pop(0)
            chunks = (*oldest.decode, *oldest.prefill)
            sampled = {c.sequence.request_id: 7 for c in chunks if c.samples}
            started = time.thread_time()
            scheduler.complete(oldest, sampled, (), now)
            if len(plan.decode) == requests:
                plans.append(elapsed)
                completes.append(time.thread_time() - started)
    return statistics.median(plans) * 1e3, statistics.median(completes) * 1e3
