"""Every program runs once before service: what a device prepares for a program at its first run
(modules, CUDA graphs, their memory) costs no request its latency, and fails at the start if at all.
"""

import jax
import numpy as np

from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.memory.step_inputs import StepInputs, page_writes
from flexllm_jax.engine.sampling.sampler import SamplingRows, row_biases
from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.optimizer import HYPERPARAMETERS
from flexllm_jax.peft.dropout import JobDropout
from scheduler.latency.model import Sampling


def run_all(runner: Runner) -> None:
    """Run every program on padding: all arrays end as they were, zeros. Waits for the device."""
    _run_steps(runner)
    _run_finetuning(runner)
    jax.block_until_ready((runner.pages, runner.bank, runner.finetune, runner.history))


def _run_steps(runner: Runner) -> None:
    sizes, model = runner.sizes, runner.model
    kv_slots = runner.num_pages * sizes.page_size
    dropout = empty_dropout(runner)
    for places in page_writes([(0, 0, [0])], runner.page_tables.shape):
        runner.write_pages(places)
    if sizes.recurrent:
        runner.copy_slot(0, 0)
    for bucket, shape in sizes.step_shapes.items():
        _, vector = StepInputs.empty(shape, kv_slots, sizes.finetune_slots)
        for variant in ("base", "adapters"):
            hidden, sampled = runner.forward(variant, bucket, vector)
        if dropout:
            runner.forward("adapters", bucket, vector, dropout)
        targets = np.zeros((2, bucket), np.int32)
        targets[1] = -1
        runner.prompt_logprobs(hidden, targets)
        rows = SamplingRows.neutral(shape.samples, no_row=sizes.rows)
        for kind in Sampling:
            runner.sample(sampled, rows, kind=kind, logprobs=True)
    nothing = np.zeros(model.vocab_size, np.int32)
    runner.write_history(0, nothing, nothing.astype(bool), row_biases({}))


def empty_dropout(runner: Runner) -> JobDropout | None:
    """That of a microbatch without tokens, on the device, if jobs may have dropout."""
    if not runner.sizes.dropout:
        return None
    keys = np.zeros(runner.sizes.finetune_slots, np.uint32)
    return runner.put(JobDropout(keys, np.float32(0.5)))


def _run_finetuning(runner: Runner) -> None:
    sizes = runner.sizes
    values, scales = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tuple(sizes.adapter_row))
    runner.write_adapter(1, values, scales)
    runner.copy_adapter(1, 1)
    runner.read_adapter(1)
    own_scales = runner.put(scales)
    state = runner.new_job_state({})
    weights = state["master"]
    packed = MicrobatchTable.empty(sizes.finetune_slots)[1]
    table, loss = runner.put((packed, Loss.of().packed()))
    runner.begin_backward()
    for dropout in (None, empty_dropout(runner))[: 1 + sizes.dropout]:
        runner.score_unit(table, weights, own_scales, 0, dropout)
        runner.loss_unit(table, loss, weights, own_scales, 0, dropout)
        runner.layer_unit(0, table, weights, own_scales, 0, dropout)
    for count in sizes.units_at_once:
        start = (count - 1) * sizes.unit_tokens
        runner.layer_unit(0, table, weights, own_scales, start, None, count)
    runner.read_logprobs()
    ranks = runner.put([np.zeros(s.shape, s.dtype) for s in sizes.trained_ranks])
    runner.commit(state, np.bool_(True), ranks)
    values = np.full(len(HYPERPARAMETERS), 0.5, np.float32)
    for optimizer in sizes.optimizers:
        state, _ = runner.optimizer_step(
            runner.new_job_state({}, optimizer), 1, ranks, values, optimizer
        )
        runner.copy_state(state, optimizer)
    runner.begin_backward()
    runner.clear_finetune()
