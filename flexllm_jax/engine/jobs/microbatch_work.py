"""A microbatch on the device, and the units of its backward."""

from dataclasses import dataclass

import jax
import numpy as np

from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.peft.dropout import JobDropout
from scheduler.request import BackwardUnits


@dataclass(frozen=True)
class MicrobatchInWork:
    """A microbatch on the device: whose it is, the first of its finetuning slots, its pages, where
    each token's key is, its table (`finetune.buffers.MicrobatchTable`), its loss (`Loss.packed`),
    and its dropout, None where nothing is dropped: in every pass that trains nothing."""

    job: FinetuneJob
    packed: PackedMicrobatch
    first_token_slot: int
    pages: tuple[tuple[int, ...], ...]
    kv_slot: np.ndarray
    table: jax.Array
    loss: jax.Array
    dropout: JobDropout | None


def dispatch_units(runner: Runner, in_work: MicrobatchInWork, work: BackwardUnits) -> jax.Array:
    """Dispatch backward units; returns what is ready when they are.

    Units count as the scheduler does (`scheduler.request.BackwardUnits`); those of a layer that
    a step has the time for go in few programs.
    """
    unit_tokens, first = runner.sizes.unit_tokens, in_work.first_token_slot
    slices = -(-in_work.packed.tokens // unit_tokens)
    weights, scales = in_work.job.state["master"], in_work.job.scales
    table, dropout = in_work.table, in_work.dropout
    scoring = slices * work.microbatch.scored
    if not work.units.start:
        runner.begin_backward()
    unit = work.units.start
    while unit < work.units.stop:
        count = 1
        if unit < scoring:
            start = first + unit * unit_tokens
            done = runner.score_unit(table, weights, scales, start, dropout)
        elif unit < scoring + slices:
            start = first + (unit - scoring) * unit_tokens
            done = runner.loss_unit(table, in_work.loss, weights, scales, start, dropout)
        else:
            layers, later_slices = divmod(unit - scoring - slices, slices)
            start = first + (slices - 1 - later_slices) * unit_tokens
            layer = runner.model.num_layers - 1 - layers
            if dropout is None:
                most = min(slices - later_slices, work.units.stop - unit)
                count = max(n for n in (1, *runner.sizes.units_at_once) if n <= most)
            done = runner.layer_unit(layer, table, weights, scales, start, dropout, count)
        unit += count
    return done
