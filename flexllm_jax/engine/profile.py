"""The start-up profile: a few real steps of every bucket and unit, timed, for the latency model.

What is timed are the engine's own programs on its own arrays. They write to pages and slots that
nothing uses yet.
"""

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from rich.progress import track

from flexllm_jax.engine.batch import Batch
from flexllm_jax.engine.runner import Runner
from flexllm_jax.engine.sampler import SamplingRows
from scheduler.latency import LatencyModel, StepFeatures

_REPEATS = 3
_LONG_CONTEXT = 256


def measure(runner: Runner, *, progress: bool) -> LatencyModel:
    """Time the runner's programs and fit the model to the fastest of a few repeats."""
    cases = list(_cases(runner))
    samples = []
    for features, run in track(cases, "profiling", disable=not progress, transient=True):
        jax.block_until_ready(run())
        seconds = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - started)
        samples.append((features, min(seconds)))
    runner.begin_backward()
    runner.clear_finetune()
    return LatencyModel.fit(samples)


def _cases(runner: Runner) -> Iterator[tuple[StepFeatures, Callable[[], object]]]:
    longest = min(
        _LONG_CONTEXT, runner.sizes.max_model_len, runner.num_pages * runner.sizes.page_size
    )
    for bucket in runner.sizes.buckets:
        decodes = min(bucket, runner.sizes.rows)
        for context in (1, longest):
            features = StepFeatures(bucket, decode_tokens=decodes, decode_kv=decodes * context)
            yield features, _forward(runner, bucket, "base", [(context - 1, 1)] * decodes)
        chunk = min(bucket, longest)
        for variant in ("base", "adapters"):
            features = StepFeatures(
                bucket,
                prefill_tokens=chunk,
                attention_pairs=chunk * chunk,
                adapters=variant == "adapters",
            )
            yield features, _forward(runner, bucket, variant, [(0, chunk)])
    table = np.zeros((4, runner.sizes.slots), np.int32)
    table[3] = runner.sizes.slots  # padding: the products are the same, no key is visible
    table = jax.device_put(table, runner.device)
    units = runner.model.num_layers
    weights = runner.zeros(runner.sizes.job_state["master"])
    scales = [{m: np.ones(1, np.float32) for m in layer} for layer in weights]
    yield (
        StepFeatures(layer_units=units),
        lambda: [runner.layer_unit(layer, table, weights, scales, 0) for layer in range(units)][-1],
    )
    yield StepFeatures(loss_units=2), lambda: [runner.loss_unit(table, 0) for _ in range(2)][-1]


def _forward(
    runner: Runner, bucket: int, variant: str, chunks: list[tuple[int, int]]
) -> Callable[[], object]:
    """A forward and a sample of sequences with (cached, new) tokens, all in the same pages."""
    shape = runner.sizes.batch_shapes[bucket]
    batch, vector = Batch.empty(
        shape, runner.num_pages * runner.sizes.page_size, runner.sizes.slots
    )
    at = 0
    for s, (cached, new) in enumerate(chunks):
        batch.position[at : at + new] = np.arange(cached, cached + new)
        batch.kv_lengths[s] = cached + new
        batch.page_tables[s] = np.arange(runner.sizes.pages_per_sequence) % runner.num_pages
        at += new
        batch.query_starts[s + 1 :] = at
    batch.num_decode[...] = sum(new == 1 for _, new in chunks)
    batch.num_sequences[...] = len(chunks)
    rows = SamplingRows.neutral(shape.samples, no_row=runner.sizes.rows)

    def run() -> object:
        _, sampled = runner.forward(variant, bucket, vector)
        return runner.sample(sampled, rows, full=False)

    return run
