"""The latency model an engine starts with: a start-up profile, or the device's data sheet.

The profile times the engine's own programs on its own arrays, a few runs for every coefficient of
the model; they write to pages and slots that nothing uses yet. It is kept on disk for the next
start of the same engine: same device, model, sizes, parallelism and versions.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxlib.version
import numpy as np
from rich.console import Console
from rich.progress import track

from flexllm_jax.config import Config
from flexllm_jax.engine.device.first_runs import empty_dropout
from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.engine.memory.step_inputs import StepInputs, page_writes
from flexllm_jax.engine.sampling.sampler import SamplingRows
from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.models.spec import GatedDeltaSpec, LayerSpec
from flexllm_jax.peft.dropout import JobDropout
from flexllm_jax.version import __version__
from scheduler.latency.model import COEFFICIENTS, LatencyModel, Sampling, StepFeatures
from scheduler.latency.roofline import DeltaCost, LayerCost, ModelCost, find_device, roofline
from scheduler.windows import KeyReads

log = logging.getLogger(__name__)

_REPEATS = 5
_BUDGET_S = 20.0  # after which every case is run once only
_LONG_CONTEXT = 1024


def latency_model(runner: Runner, config: Config, *, progress: bool) -> LatencyModel:
    """The model that `scheduler.latency` asks for; a profile from disk if there is one."""
    if config.scheduler.latency == "roofline":
        return cold_model(runner)
    key, folder = profile_key(runner, config), config.compile.cache_dir
    if folder is None:
        return measure(runner, progress=progress)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / "latency" / f"{digest}.json"
    if file.exists():
        try:
            if found := LatencyModel.load(file, key):
                return found
        except ValueError as error:
            log.warning("%s; profiling anew", error)
    model = measure(runner, progress=progress)
    _save(model, file, key)
    return model


def _save(model: LatencyModel, file: Path, key: dict[str, str]) -> None:
    """Keep a profile; without it the next start takes a little longer."""
    unfinished = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        model.save(unfinished, key)
        unfinished.replace(file)
    except OSError as error:
        log.warning("the latency profile could not be kept in %s: %s", file, error)


def profile_key(runner: Runner, config: Config) -> dict[str, str]:
    """What a profile is valid for."""
    versions = {
        "flexllm_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
    }
    return {
        "device": runner.device.device_kind,
        "model": repr(runner.model),
        "sizes": repr(runner.sizes),
        "num_pages": str(runner.num_pages),
        "tp": str(config.parallel.tp),
        "versions": json.dumps(versions, sort_keys=True),
        "terms": ", ".join(COEFFICIENTS),
    }


def cold_model(runner: Runner) -> LatencyModel:
    """A roofline of the device; ValueError if its data sheet is not known."""
    sizes = runner.sizes
    return roofline(
        find_device(runner.device.device_kind),
        model_cost(sizes),
        sizes.buckets,
        sizes.unit_tokens,
        tp=sizes.devices,
        rank=sizes.bank.rank,
    )


def model_cost(sizes: EngineSizes) -> ModelCost:
    """What a roofline needs to know of the model."""

    def cost(layer: LayerSpec) -> LayerCost | DeltaCost:
        own, ffn = layer.mixer, layer.mlp.d_ff
        if isinstance(own, GatedDeltaSpec):
            return DeltaCost(ffn, own.key_heads, own.value_heads, own.key_dim, own.value_dim)
        attention = own.heads, own.kv_heads, own.head_dim, own.own_keys, own.options.window
        return LayerCost(ffn, *attention, gate=own.gate or own.gate_projection)

    model = sizes.model
    return ModelCost(
        model.architecture,
        model.d_model,
        tuple(map(cost, model.layers)),
        model.vocab_size,
        sizes.dtype.itemsize,
    )


def measure(runner: Runner, *, progress: bool) -> LatencyModel:
    """Time the runner's programs and fit the model to the fastest of a few repeats."""
    _write_page_tables(runner)
    cases = list(_cases(runner))
    samples = []
    started = time.perf_counter()
    bar = {"console": Console(stderr=True), "disable": not progress, "transient": True}
    for features, run in track(cases, "profiling", **bar):
        jax.block_until_ready(run())
        seconds = []
        for _ in range(_REPEATS):
            run_started = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - run_started)
            if time.perf_counter() - started > _BUDGET_S:
                break
        samples.append((features, min(seconds)))
    runner.begin_backward()
    runner.clear_finetune()
    return LatencyModel.fit(samples)


def _write_page_tables(runner: Runner) -> None:
    """Pages of its own for each row while there are enough: shared ones would be read from the
    device's cache, those of real requests are read from its memory."""
    columns = min(runner.sizes.pages_per_sequence, -(-_LONG_CONTEXT // runner.sizes.page_size))
    rows = (
        (row, 0, ((row * columns + np.arange(columns)) % runner.num_pages).tolist())
        for row in range(runner.sizes.rows)
    )
    for places in page_writes(rows, runner.page_tables.shape):
        runner.write_pages(places)


def _cases(runner: Runner) -> Iterator[tuple[StepFeatures, Callable[[], object]]]:
    sizes, reads = runner.sizes, KeyReads(model_cost(runner.sizes).windows)
    longest = min(_LONG_CONTEXT, sizes.max_model_len, runner.num_pages * sizes.page_size)
    for bucket in sizes.buckets:
        decodes = min(bucket, sizes.rows)
        for count in {decodes, max(1, decodes // 2)}:
            for context in (1, longest):
                features = StepFeatures(
                    bucket, decode_tokens=count, decode_kv=count * reads(context)
                )
                yield features, _forward(runner, bucket, [(context - 1, 1)] * count)
        chunk = min(bucket, longest)
        for cached in {0, longest - chunk}:
            features = StepFeatures(
                bucket,
                prefill_tokens=chunk,
                chunk_kv=reads(cached + chunk, chunk),
                attention_pairs=reads.pairs(chunk, cached + chunk),
            )
            yield features, _forward(runner, bucket, [(cached, chunk)])
        chunk = min(chunk, sizes.finetune_slots)
        for slots in {0, chunk}:
            features = StepFeatures(
                bucket,
                prefill_tokens=chunk - slots,
                finetune_tokens=slots,
                chunk_kv=chunk,
                attention_pairs=reads.pairs(chunk, chunk),
                adapters=True,
            )
            yield features, _forward(runner, bucket, [(0, chunk)], "adapters", slots)
        if sizes.dropout:
            run = _forward(runner, bucket, [(0, chunk)], "adapters", chunk, dropout=True)
            yield features._replace(finetune_tokens=chunk, prefill_tokens=0, dropout=True), run
    yield from _sampling_cases(runner)
    yield from _unit_cases(runner)


def _sampling_cases(runner: Runner) -> Iterator[tuple[StepFeatures, Callable[[], object]]]:
    """Every way to sample, of the smallest step with each number of rows."""
    smallest = {
        shape.samples: bucket for bucket, shape in reversed(runner.sizes.step_shapes.items())
    }
    for bucket in smallest.values():
        features = StepFeatures(bucket, decode_tokens=1, decode_kv=1, most_rows=runner.sizes.rows)
        for kind in list(Sampling)[1:]:
            yield features._replace(sampling=kind), _forward(runner, bucket, [(0, 1)], kind=kind)
        yield (
            features._replace(logprobs=True),
            _forward(runner, bucket, [(0, 1)], logprobs=True),
        )


def _unit_cases(runner: Runner) -> Iterator[tuple[StepFeatures, Callable[[], object]]]:
    """Units of one sequence that fills all slots: its first slice of tokens, and its last."""
    sizes, layers = runner.sizes, runner.model.num_layers
    reads = KeyReads(model_cost(sizes).windows)
    positions = np.arange(sizes.finetune_slots, dtype=np.int32)
    rows, packed = MicrobatchTable.empty(sizes.finetune_slots)
    rows.label[:] = rows.sequence_start[:] = rows.pair_start[:] = 0
    rows.shared_start[:] = rows.shared_end[:] = 0
    rows.position[:], rows.kv_slot[:] = positions, positions % (runner.num_pages * sizes.page_size)
    table, loss = runner.put((packed, Loss.of().packed()))
    weights = runner.new_job_state({})["master"]
    scales = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), sizes.adapter_row.scales)

    def layer_units(
        count: int, start: int, dropout: JobDropout | None = None
    ) -> Callable[[], object]:
        return lambda: [
            runner.layer_unit(layer, table, weights, scales, start, dropout)
            for layer in range(count)
        ][-1]

    def loss_units(count: int) -> Callable[[], object]:
        return lambda: [runner.loss_unit(table, loss, weights, scales, 0) for _ in range(count)][-1]

    # Two counts of each kind: from one alone, a unit's time is not told from a step's overhead.
    for start in {0, sizes.finetune_slots - sizes.unit_tokens}:
        for count in {1, layers}:
            pairs = count * reads.pairs(sizes.unit_tokens, start + sizes.unit_tokens)
            yield (
                StepFeatures(layer_units=count, backward_pairs=pairs),
                layer_units(count, start),
            )
    if dropout := empty_dropout(runner):
        pairs = layers * reads.pairs(sizes.unit_tokens, sizes.unit_tokens)
        yield (
            StepFeatures(layer_units=layers, backward_pairs=pairs, dropout_units=layers),
            layer_units(layers, 0, dropout),
        )
    for count in (1, 8):
        yield StepFeatures(loss_units=count), loss_units(count)


def _forward(
    runner: Runner,
    bucket: int,
    chunks: list[tuple[int, int]],
    variant: str = "base",
    finetune: int = 0,
    kind: Sampling = Sampling.GREEDY,
    logprobs: bool = False,
    dropout: bool = False,
) -> Callable[[], object]:
    """A forward and a sample of sequences with (cached, new) tokens; the first `finetune` tokens
    are kept for a backward.

    Sequence s has row s of the page tables.
    """
    sizes = runner.sizes
    shape = sizes.step_shapes[bucket]
    inputs, vector = StepInputs.empty(
        shape, runner.num_pages * sizes.page_size, sizes.finetune_slots
    )
    at = 0
    for s, (cached, new) in enumerate(chunks):
        inputs.position[at : at + new] = np.arange(cached, cached + new)
        inputs.kv_lengths[s] = cached + new
        inputs.table[s] = s
        at += new
        inputs.query_starts[s + 1 :] = at
    inputs.saved_row[:finetune] = np.arange(finetune)
    if variant == "adapters":
        inputs.adapter[:at] = 0
    inputs.num_decode[...] = sum(new == 1 for _, new in chunks)
    inputs.num_sequences[...] = len(chunks)
    rows = SamplingRows.neutral(shape.samples, no_row=sizes.rows)
    dropped = empty_dropout(runner) if dropout else None

    def run() -> object:
        _, sampled = runner.forward(variant, bucket, vector, dropped)
        return runner.sample(sampled, rows, kind=kind, logprobs=logprobs)

    return run
