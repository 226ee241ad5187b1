"""The engine's programs: each with its function, the shapes it is compiled for (`sizes`), and what
it updates in place.

Nothing here touches a device: the same programs compile for a GPU that is not there.
"""

from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flexllm_jax.compile.buckets import Program
from flexllm_jax.engine.device.step import forward_step, write_pages
from flexllm_jax.engine.memory.cache import copy_slot
from flexllm_jax.engine.memory.placement import GATHERED
from flexllm_jax.engine.memory.sizes import EngineSizes, ints
from flexllm_jax.engine.memory.step_inputs import PAGE_WRITES
from flexllm_jax.engine.sampling import sampler
from flexllm_jax.engine.sampling.params import BIASES, WANTED
from flexllm_jax.engine.sampling.structured_outputs import mask_words
from flexllm_jax.finetune.backward import layer_unit, layer_units
from flexllm_jax.finetune.buffers import TABLE_ROWS
from flexllm_jax.finetune.loss import loss_unit, score_unit
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.optimizer import (
    HYPERPARAMETERS,
    checkpointed,
    commit,
    optimizer_program,
    optimizer_step,
)
from flexllm_jax.peft.bank import copy_row, read_row, write_row
from flexllm_jax.peft.dropout import JobDropout
from scheduler.latency.model import Sampling

# Those without a size in their name.
_ALONE = (
    "write_history",
    "write_pages",
    "write_row",
    "copy_row",
    "read_row",
    "begin_backward",
    "clear",
    "unit/score",
    "unit/loss",
    "commit",
    "read_logprobs",
)
_INT = jax.ShapeDtypeStruct((), jnp.int32)
_BOOL = jax.ShapeDtypeStruct((), jnp.bool_)
_WHOLE = PartitionSpec()  # results that every device has


def head_parameters(params: dict) -> dict:
    """The parameters that turn outputs into logits."""
    return {name: params[name] for name in ("embed", "norm", "head") if name in params}


def sampling_program(kind: Sampling, rows: int) -> str:
    """The name of the program that samples so many rows."""
    return f"sample/{kind.name.lower()}/{rows}"


def layer_program(kind: int) -> str:
    """The name of the program of a backward unit of a layer, by `ModelConfig.kind_of`."""
    return f"unit/layer/{kind}" if kind else "unit/layer"


def list_programs(sizes: EngineSizes, num_pages: int) -> list[Program]:
    """Every program of an engine with that many KV pages."""
    programs = [
        *_forward_programs(sizes, num_pages),
        *_sampling_programs(sizes),
        *_adapter_programs(sizes),
        *_finetuning_programs(sizes, num_pages),
        *_zero_programs(sizes, num_pages),
    ]
    return [sizes.placement.distribute(p) for p in programs] if sizes.placement else programs


def check_lattice(sizes: EngineSizes, compiled: Set[str]) -> None:
    """RuntimeError for a program that a step can ask for and that was not compiled: later it would
    be missing in the middle of a service."""
    shapes = sizes.step_shapes
    rows = {shape.samples for shape in shapes.values()}
    variants: list[str] = ["base", "adapters"]
    alone = [layer_program(kind) for kind in range(len(sizes.model.kinds))]
    many = [f"{unit}/slices-{count}" for unit in alone for count in sizes.units_at_once]
    units: list[str] = [*_ALONE, *alone, *many, *["copy_slot"] * bool(sizes.recurrent)]
    if sizes.dropout:
        variants.append("dropout")
        units += [f"{unit}/dropout" for unit in alone]
        units += ["unit/score/dropout", "unit/loss/dropout"] * sizes.bank.has_head
    wanted = {
        *(f"forward/{variant}/{n}" for variant in variants for n in shapes),
        *(sampling_program(kind, n) for kind in Sampling for n in rows),
        *(f"logprobs/{n}" for n in rows),
        *(f"prompt_logprobs/{n}" for n in shapes),
        *(f"zeros/{name}" for name in sizes.zeroed(1)),
        *units,
        *(
            optimizer_program(name, optimizer)
            for name in ("optimizer_step", "copy_state")
            for optimizer in sizes.optimizers
        ),
    }
    if missing := sorted(wanted - compiled):
        raise RuntimeError(
            f"the engine cannot start without the programs {', '.join(missing)}: "
            f"engine.device.programs.list_programs does not list them for buckets {tuple(shapes)}"
        )


def _forward_programs(sizes: EngineSizes, num_pages: int) -> list[Program]:
    decoder, params, pages = sizes.decoder, sizes.parameters, sizes.pages(num_pages)
    last_tokens, tables = (sizes.request_arrays[name] for name in ("last_tokens", "page_tables"))
    variants = {
        "base": (None, None),
        "adapters": (sizes.bank_arrays, sizes.finetune_arrays),
    }
    if sizes.dropout:
        variants["dropout"] = variants["adapters"]
    written = (tables, ints(2, PAGE_WRITES))
    programs = [Program("write_pages", write_pages, written, (0,), _WHOLE)]
    if sizes.recurrent:
        states = [pages[layer] for layer in sizes.recurrent]
        programs.append(Program("copy_slot", copy_slot, (states, _INT, _INT), (0,), states))
    for bucket, shape in sizes.step_shapes.items():
        forward = partial(forward_step, decoder, shape, sizes.columns, sizes.backend, sizes.stacks)
        for variant, (bank, finetune) in variants.items():
            arguments = (params, bank, pages, finetune, last_tokens, tables, ints(shape.size))
            results = (pages, finetune, _WHOLE, _WHOLE)
            if variant == "dropout":
                arguments += (JobDropout.shapes(sizes.finetune_slots),)
            programs.append(
                Program(f"forward/{variant}/{bucket}", forward, arguments, (2, 3), results)
            )
    return programs


def _sampling_programs(sizes: EngineSizes) -> list[Program]:
    decoder, head = sizes.decoder, head_parameters(sizes.parameters)
    last_tokens, history = (sizes.request_arrays[name] for name in ("last_tokens", "history"))
    bank = None
    if sizes.bank.has_head:
        bank = {name: stacks[-1] for name, stacks in sizes.bank_arrays.items()}

    def hidden(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, sizes.model.d_model), sizes.dtype)

    prompt_logprobs = partial(sampler.prompt_logprobs, decoder)
    programs = [
        Program(
            f"prompt_logprobs/{n}",
            prompt_logprobs,
            (head, bank, hidden(n), ints(2, n)),
            results=_WHOLE,
        )
        for n in sizes.buckets
    ]
    for rows in sorted({shape.samples for shape in sizes.step_shapes.values()}):
        packed, tokens = ints(sampler.PACKED_ROWS, rows), ints(rows)
        arguments = (head, bank, hidden(rows), last_tokens)
        allowed = ints(rows, mask_words(sizes.model.vocab_size))
        greedy = partial(sampler.sample_greedy, decoder)
        programs.append(
            Program(
                sampling_program(Sampling.GREEDY, rows), greedy, (*arguments, packed), (3,), _WHOLE
            )
        )
        for kind in (Sampling.ADJUSTED, Sampling.DRAWN, Sampling.FILTERED):
            programs.append(
                Program(
                    sampling_program(kind, rows),
                    partial(sampler.sample, kind, decoder),
                    (*arguments, history, packed, allowed),
                    (3, 4),
                    _WHOLE,
                )
            )
        programs.append(
            Program(
                f"logprobs/{rows}",
                partial(sampler.logprobs, decoder),
                (*arguments[:3], tokens, tokens, _floats(rows), ints(rows, WANTED)),
                results=_WHOLE,
            )
        )
    counts = ints(sizes.model.vocab_size)
    prompt = jax.ShapeDtypeStruct(counts.shape, jnp.bool_)
    written = (history, _INT, counts, prompt, ints(2, BIASES))
    return [*programs, Program("write_history", sampler.write_history, written, (0,), _WHOLE)]


def _adapter_programs(sizes: EngineSizes) -> list[Program]:
    weights, scales = bank = sizes.bank_arrays["weights"], sizes.bank_arrays["scales"]
    row = sizes.adapter_row
    return [
        Program("write_row", write_row, (*bank, _INT, *row), (0, 1), bank),
        Program("read_row", read_row, (weights, _INT), results=GATHERED),
        Program("copy_row", copy_row, (weights, scales, _INT, _INT), (0, 1), bank),
    ]


def _finetuning_programs(sizes: EngineSizes, num_pages: int) -> list[Program]:
    decoder, unit_tokens, params = sizes.decoder, sizes.unit_tokens, sizes.parameters
    finetune, pending, state = sizes.finetune_arrays, sizes.pending_arrays, sizes.job_state
    flow = finetune["flow"]
    table, loss = ints(TABLE_ROWS, sizes.finetune_slots), _floats(len(Loss.of().packed()))
    head_adapter = head_gradients = None
    if sizes.bank.has_head:
        head_adapter = {"weights": state["master"][-1], "scales": sizes.adapter_row.scales[-1]}
        head_gradients = pending[-1]
    head_units = [
        Program(
            "unit/score",
            _with_done(partial(score_unit, decoder, unit_tokens)),
            (head_parameters(params), head_adapter, flow, table, _INT),
            (2,),
            (flow, _WHOLE),
        ),
        Program(
            "unit/loss",
            _with_done(partial(loss_unit, decoder, unit_tokens)),
            (head_parameters(params), head_adapter, flow, head_gradients, table, loss, _INT),
            (2, 3),
            (flow, head_gradients, _WHOLE),
        ),
    ]
    units = [
        partial(layer_unit, decoder, spec, unit_tokens, columns, sizes.backend)
        for spec, columns in zip(decoder.config.kinds, sizes.columns, strict=True)
    ]
    pages, alone = sizes.pages(num_pages), []
    for kind, unit in enumerate(units):
        layer = sizes.model.kind_of.index(kind)
        stack, _ = sizes.stacks.place(layer)
        adapter = {"weights": state["master"][stack], "scales": sizes.adapter_row.scales[stack]}
        own = (params["layers"][layer], adapter, pages[sizes.model.cache_of[layer]])
        alone.append(
            Program(
                layer_program(kind),
                _with_done(unit),
                (*own, finetune["saved"][layer], flow, pending[stack], table, _INT, _INT),
                (4, 5),
                (flow, pending[stack], _WHOLE),
            )
        )
    many = [
        replace(
            one,
            name=f"{one.name}/slices-{count}",
            function=_with_done(partial(layer_units, unit, count, unit_tokens)),
        )
        for one, unit in zip(alone, units, strict=True)
        for count in sizes.units_at_once
    ]
    with_dropout = []
    if sizes.dropout:
        dropout = JobDropout.shapes(sizes.finetune_slots)
        with_dropout = [_with(unit, dropout, _INT) for unit in alone]
        if sizes.bank.has_head:
            with_dropout += [_with(unit, dropout) for unit in head_units]
    return [
        *head_units,
        *alone,
        *many,
        *with_dropout,
        Program(
            "begin_backward", _begin_backward, (flow, pending), (0, 1), results=(flow, pending)
        ),
        Program("clear", _clear, (finetune,), (0,), finetune),
        Program("commit", commit, (pending, pending, _BOOL, sizes.trained_ranks), (1,), pending),
        Program("read_logprobs", _copy, (flow["logprob"],), results=_WHOLE),
        *_optimizer_programs(sizes),
    ]


def _optimizer_programs(sizes: EngineSizes) -> list[Program]:
    """Those of jobs with each optimizer: all else is the same for any."""
    weights, programs = sizes.bank_arrays["weights"], []
    for name, state in sizes.job_states.items():
        programs += [
            Program(
                optimizer_program("copy_state", name),
                _copy,
                (checkpointed(state),),
                results=GATHERED,
            ),
            Program(
                optimizer_program("optimizer_step", name),
                partial(optimizer_step, name, sizes.placement),
                (weights, state, _INT, sizes.trained_ranks, _floats(len(HYPERPARAMETERS))),
                (0, 1),
                (weights, state, _WHOLE),
            ),
        ]
    return programs


def _zero_programs(sizes: EngineSizes, num_pages: int) -> list[Program]:
    """Zeros made where they are needed: from the host they would take seconds to copy."""
    return [
        Program(f"zeros/{name}", partial(_zeros, shapes), (), results=shapes)
        for name, shapes in sizes.zeroed(num_pages).items()
    ]


def _zeros(shapes):
    def own(s: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(s.sharding.shard_shape(s.shape) if s.sharding else s.shape, s.dtype)

    return jax.tree.map(own, shapes)


def _with(unit: Program, *dropout) -> Program:
    """A unit that also takes the dropout of its microbatch: one of its own, so that others have no
    argument for it and draw no mask."""
    return replace(unit, name=f"{unit.name}/dropout", arguments=(*unit.arguments, *dropout))


def _with_done(unit: Callable) -> Callable:
    """A unit that also returns a scalar to wait on: its other outputs are donated on."""

    def run(*arguments):
        outputs = unit(*arguments)
        flow = outputs if isinstance(outputs, dict) else outputs[0]
        return *(outputs if isinstance(outputs, tuple) else (outputs,)), flow["stream"][0, 0]

    return run


def _begin_backward(flow: dict, pending: list) -> tuple[dict, list]:
    carried = jax.tree.map(jnp.zeros_like, flow["carried"])
    return flow | {"carried": carried}, jax.tree.map(jnp.zeros_like, pending)


def _clear(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
