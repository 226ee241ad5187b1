"""A microbatch under each plan of what to save, on the device at hand, in turns.

Speed, allocated bytes, and how far the gradients are from those of the plan that recomputes least.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.console import Console

from flexllm_jax.compile.layer_graph import INPUT
from flexllm_jax.compile.remat import Plan
from flexllm_jax.config import Config, ConfigError
from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.engine.memory.step_inputs import StepInputs, page_writes
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch

Row = dict[str, Any]


class Microbatch:
    """The finetuning slots filled with sequences of random tokens, and an adapter to train."""

    def __init__(self, runner: Runner):
        self.runner, sizes = runner, runner.sizes
        self.bucket = sizes.buckets[-1]
        self.length = sizes.max_model_len // self.bucket * self.bucket
        count = sizes.finetune_slots // self.length if self.length else 0
        if not count or sizes.finetune_slots % self.length:
            raise ConfigError(
                f"finetune.max_tokens: got {sizes.finetune_slots}; to fill it, it must be a "
                f"multiple of {self.length or self.bucket}, the part of model.max_model_len "
                f"({sizes.max_model_len}) that steps of {self.bucket} tokens fill"
            )
        random = np.random.default_rng(0)
        self.tokens = random.integers(0, runner.model.vocab_size, sizes.finetune_slots)
        self.position = np.tile(np.arange(self.length), count)
        pages = -(-self.length // sizes.page_size)
        self.tables = np.arange(count * pages).reshape(count, pages)
        offset = np.arange(self.length)
        self.kv_slot = (
            self.tables[:, offset // sizes.page_size] * sizes.page_size + offset % sizes.page_size
        ).reshape(-1)
        every = np.ones(self.length, np.float32)
        packed = PackedMicrobatch(
            tuple(Datum.following(own, every) for own in np.split(self.tokens, count)), Loss.of()
        )
        self.table, self.loss = jax.device_put(
            (packed.table(sizes.finetune_slots, 0, self.kv_slot), packed.loss.packed()),
            runner.device,
        )
        values, scales = sizes.adapter_row
        self.weights = jax.tree.map(
            lambda s: random.normal(0, 0.02, s.shape).astype(s.dtype), values
        )
        runner.write_adapter(
            1, self.weights, jax.tree.map(lambda s: np.ones(s.shape, s.dtype), scales)
        )
        self.weights = jax.device_put(self.weights, runner.device)
        ones = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), scales)
        self.scales = jax.device_put(ones, runner.device)
        self.vectors = [self._batch(start) for start in range(0, sizes.finetune_slots, self.bucket)]

    def _batch(self, start: int) -> np.ndarray:
        sizes = self.runner.sizes
        shape = sizes.step_shapes[self.bucket]
        kv_slots = self.runner.num_pages * sizes.page_size
        inputs, vector = StepInputs.empty(shape, kv_slots, sizes.finetune_slots)
        rows = slice(start, start + self.bucket)
        inputs.token[:], inputs.position[:] = self.tokens[rows], self.position[rows]
        inputs.kv_slot[:], inputs.saved_row[:] = (
            self.kv_slot[rows],
            np.arange(rows.start, rows.stop),
        )
        inputs.adapter[:] = 0
        inputs.query_starts[1:] = self.bucket
        inputs.kv_lengths[0] = self.position[rows][-1] + 1
        row = start // self.length
        own = np.asarray(self.tables[row])
        for places in page_writes([(row, 0, own.tolist())], self.runner.page_tables.shape):
            self.runner.write_pages(places)
        inputs.table[0] = row
        inputs.num_sequences[...] = 1
        return vector

    def run(self) -> float:
        """Forward and backward once; seconds."""
        runner, unit_tokens = self.runner, self.runner.sizes.unit_tokens
        starts = list(reversed(range(0, runner.sizes.finetune_slots, unit_tokens)))
        began = time.perf_counter()
        for vector in self.vectors:
            runner.forward("adapters", self.bucket, vector)
        runner.begin_backward()
        for start in starts:
            done = runner.loss_unit(self.table, self.loss, self.weights, self.scales, start)
        for layer in reversed(range(runner.model.num_layers)):
            for start in starts:
                done = runner.layer_unit(layer, self.table, self.weights, self.scales, start)
        jax.block_until_ready(done)
        return time.perf_counter() - began

    def gradients(self) -> np.ndarray:
        """Of the last run, as one vector."""
        leaves = jax.tree.leaves(jax.device_get(self.runner.pending))
        return np.concatenate([leaf.ravel() for leaf in leaves])


def measure(
    config: Config, plans: list[Plan], rounds: int, rows: list[Row], console: Console
) -> None:
    """Add each plan's speed and measured bytes to its row, and how far its gradients are from those
    of the plan that recomputes least."""
    microbatches = []
    for plan in plans:
        console.print(f"compiling: {', '.join((INPUT, *plan.saved))}")
        finetune = config.finetune.model_copy(update={"saved": plan.saved})
        runner = Runner(config.model_copy(update={"finetune": finetune}), progress=False)
        microbatches.append(Microbatch(runner))
        microbatches[-1].run()
    expected = microbatches[-1].gradients()
    seconds = [[one.run() for one in microbatches] for _ in range(rounds)]
    for row, one, own in zip(rows, microbatches, zip(*seconds, strict=True), strict=True):
        slots = one.runner.sizes.finetune_slots
        row["rounds"] = [slots / s for s in own]
        row["tokens_per_s"] = median(row["rounds"])
        row["allocated_bytes"] = tree_bytes(one.runner.finetune["saved"])
        difference = np.linalg.norm(one.gradients() - expected) / np.linalg.norm(expected)
        row["gradient_difference"] = float(difference)
