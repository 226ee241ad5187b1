"""The engine's programs and the shapes of its arrays, from the configuration alone.

Nothing here touches a device: the runner allocates and compiles these shapes, and the same programs
compile for a GPU that is not there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flexllm_jax.compile.buckets import Program, token_buckets
from flexllm_jax.config import Config
from flexllm_jax.engine import sampler
from flexllm_jax.engine.cache import page_shapes
from flexllm_jax.engine.placement import ALL, GATHERED, Placement
from flexllm_jax.engine.step import forward_step
from flexllm_jax.engine.step_inputs import StepShape
from flexllm_jax.engine.structured_outputs import mask_words
from flexllm_jax.finetune.backward import layer_unit
from flexllm_jax.finetune.buffers import flow_shapes, saved_columns, saved_shapes
from flexllm_jax.finetune.loss import loss_unit
from flexllm_jax.finetune.optimizer import (
    HYPERPARAMETERS,
    LOSSES,
    commit,
    job_state_shapes,
    optimizer_step,
)
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.hf_weights import abstract_parameters
from flexllm_jax.peft.adapter import TARGET_MODULES
from flexllm_jax.peft.bank import (
    AdapterRow,
    BankShape,
    copy_row,
    read_row,
    scale_shapes,
    weight_shapes,
    write_row,
)
from kernels_pallas.backend import Backend

# Most packed finetuning sequences whose tokens one step's forward may hold.
FINETUNE_SEQUENCES = 32
_INT = jax.ShapeDtypeStruct((), jnp.int32)
_WHOLE = PartitionSpec()  # results that every device has


@dataclass(frozen=True)
class EngineSizes:
    """The sizes that all arrays and programs of an engine follow from.

    rows: most running requests. finetune_slots: tokens of the microbatches in work. unit_tokens:
    tokens of a backward unit. buckets: token slots of the forward programs. columns: where a
    saved activation lies in its row (`finetune.buffers.saved_columns`), on one device. placement:
    where arrays lie when the model is split over devices; None: whole, on one.
    """

    model: ModelConfig
    dtype: jnp.dtype
    backend: Backend
    max_model_len: int
    page_size: int
    rows: int
    finetune_slots: int
    unit_tokens: int
    buckets: tuple[int, ...]
    bank: BankShape
    columns: dict[str, slice]
    placement: Placement | None = None

    @classmethod
    def from_config(
        cls,
        config: Config,
        model: ModelConfig,
        backend: Backend,
        placement: Placement | None = None,
    ) -> "EngineSizes":
        """What the configuration asks for, but for `finetune.saved`, of which
        `engine.activations.choose_saved` takes care: these are the sizes of `attention`.

        ValueError for what the model or its placement does not have."""
        dtype = jnp.dtype(config.model.dtype)
        bank = bank_shape(config)
        if placement and bank.has_head:
            raise ValueError(
                "adapters.target_modules: lm_head cannot have LoRA with parallel.tp > 1; drop it"
            )
        return cls(
            model=model,
            dtype=dtype,
            backend=backend,
            max_model_len=model.context_length(config.model.max_model_len),
            page_size=config.cache.page_size,
            rows=config.scheduler.max_sequences,
            finetune_slots=config.finetune.max_tokens,
            unit_tokens=config.finetune.unit_tokens,
            buckets=config.compile.token_buckets
            or token_buckets(config.scheduler.max_tokens_per_step),
            bank=bank,
            columns=saved_columns(
                Decoder(placement.local if placement else model, dtype), ("attended",)
            ),
            placement=placement,
        )

    @property
    def devices(self) -> int:
        """Over how many devices the model is split."""
        return self.placement.plan.mesh.tp if self.placement else 1

    @cached_property
    def decoder(self) -> Decoder:
        """The model's functions, as programs use them: over one device's part of the model."""
        if self.placement:
            return Decoder(self.placement.local, self.dtype, ALL)
        return Decoder(self.model, self.dtype)

    @cached_property
    def parameters(self) -> dict:
        """The frozen parameters."""
        abstract = abstract_parameters(self.model, self.dtype)
        return self.placement.parameters(abstract) if self.placement else abstract

    @property
    def pages_per_sequence(self) -> int:
        """Columns of the page tables."""
        return -(-self.max_model_len // self.page_size)

    @property
    def wanted_pages(self) -> int:
        """KV pages that the largest possible load fills; packed sequences end within a page."""
        finetuning = self.finetune_slots // self.page_size + FINETUNE_SEQUENCES
        return self.rows * self.pages_per_sequence + finetuning

    @cached_property
    def step_shapes(self) -> dict[int, StepShape]:
        """The layout of a step's inputs in each bucket."""
        return {
            bucket: StepShape(
                tokens=bucket,
                sequences=min(bucket, self.rows + FINETUNE_SEQUENCES),
                pages=self.pages_per_sequence,
                samples=min(bucket, self.rows),
            )
            for bucket in self.buckets
        }

    @cached_property
    def bank_arrays(self) -> dict:
        """The adapter bank: {"weights", "scales"}, lists by layer."""
        weights = weight_shapes(self.model, self.bank, self.bank.rows, self.dtype)
        if self.placement:
            weights = self.placement.adapters(weights, rows=True)
        return {
            "weights": weights,
            "scales": scale_shapes(self.model, self.bank, self.bank.rows),
        }

    @cached_property
    def adapter_row(self) -> AdapterRow:
        """One adapter in the bank's padded shapes, float32."""
        weights = weight_shapes(self.model, self.bank, None, jnp.float32)
        if self.placement:
            weights = self.placement.adapters(weights, rows=False)
        return AdapterRow(weights, scale_shapes(self.model, self.bank, None))

    @cached_property
    def job_state(self) -> dict:
        """A finetuning job's state on the device."""
        state = job_state_shapes(self.adapter_row.weights)
        return self.placement.job_state(state) if self.placement else state

    @cached_property
    def finetune_arrays(self) -> dict:
        """The buffers of the microbatches in work: {"saved": by layer, "flow"}."""
        model = self.decoder.config
        saved = saved_shapes(model, self.dtype, self.finetune_slots, self.columns)
        flow = flow_shapes(model, self.dtype, self.finetune_slots)
        if self.placement:
            saved = self.placement.own(saved)
            flow |= self.placement.own({name: flow[name] for name in ("dk", "dv")})
        return {"saved": saved, "flow": flow}

    @cached_property
    def pending_arrays(self) -> dict:
        """What the microbatch that goes backward has accumulated."""
        return {"gradients": self.job_state["gradients"], "losses": LOSSES}

    @cached_property
    def request_arrays(self) -> dict:
        """By request row: its newest token, and what the penalties know of it."""
        history = (self.rows, self.model.vocab_size)
        return {
            "last_tokens": _ints(self.rows),
            "history": {
                "counts": _ints(*history),
                "prompt": jax.ShapeDtypeStruct(history, jnp.bool_),
            },
        }

    def zeroed(self, num_pages: int) -> dict[str, Any]:
        """Everything that begins as zeros, by what it is allocated for; a part of a job's state
        that is not read from a checkpoint is one of them."""
        return {
            "bank": self.bank_arrays,
            "finetune": self.finetune_arrays,
            "pending": self.pending_arrays,
            "pages": self.pages(num_pages),
            "requests": self.request_arrays,
            **{f"job_state/{name}": part for name, part in self.job_state.items()},
        }

    def pages(self, num_pages: int) -> list:
        """The KV pages of all layers."""
        pages = page_shapes(self.model, self.dtype, num_pages, self.page_size)
        return self.placement.pages(pages) if self.placement else pages


def bank_shape(config: Config) -> BankShape:
    """The size of the adapter bank that the configuration asks for."""
    return BankShape(
        rows=config.adapters.slots - 1,
        rank=config.adapters.max_rank,
        modules=tuple(TARGET_MODULES[name] for name in config.adapters.target_modules),
        kinds=config.adapters.kinds,
        bottleneck=config.adapters.max_bottleneck,
        prefix=config.adapters.max_prefix,
    )


def head_parameters(params: dict) -> dict:
    """The parameters that turn outputs into logits."""
    return {name: params[name] for name in ("embed", "norm", "head") if name in params}


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


def _forward_programs(sizes: EngineSizes, num_pages: int) -> list[Program]:
    decoder, params, pages = sizes.decoder, sizes.parameters, sizes.pages(num_pages)
    last_tokens = sizes.request_arrays["last_tokens"]
    variants = {
        "base": (None, None),
        "adapters": (sizes.bank_arrays, sizes.finetune_arrays),
    }
    programs = []
    for bucket, shape in sizes.step_shapes.items():
        forward = partial(forward_step, decoder, shape, sizes.columns, sizes.backend)
        for variant, (bank, finetune) in variants.items():
            arguments = (params, bank, pages, finetune, last_tokens, _ints(shape.size))
            results = (pages, finetune, _WHOLE, _WHOLE)
            programs.append(
                Program(f"forward/{variant}/{bucket}", forward, arguments, (2, 3), results)
            )
    return programs


def _sampling_programs(sizes: EngineSizes) -> list[Program]:
    decoder, head = sizes.decoder, head_parameters(sizes.parameters)
    last_tokens, history = (sizes.request_arrays[name] for name in ("last_tokens", "history"))
    bank = None
    if sizes.bank.has_head:
        bank = {name: layers[-1] for name, layers in sizes.bank_arrays.items()}

    def hidden(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, sizes.model.d_model), sizes.dtype)

    prompt_logprobs = partial(sampler.prompt_logprobs, decoder)
    programs = [
        Program(
            f"prompt_logprobs/{n}",
            prompt_logprobs,
            (head, bank, hidden(n), _ints(2, n)),
            results=_WHOLE,
        )
        for n in sizes.buckets
    ]
    for rows in sorted({shape.samples for shape in sizes.step_shapes.values()}):
        packed = _ints(sampler.PACKED_ROWS, rows)
        greedy, full = (
            partial(sample, decoder) for sample in (sampler.sample_greedy, sampler.sample_full)
        )
        arguments = (head, bank, hidden(rows), last_tokens)
        programs += [
            Program(f"sample/greedy/{rows}", greedy, (*arguments, packed), (3,), _WHOLE),
            Program(
                f"sample/full/{rows}",
                full,
                (*arguments, history, packed, _ints(rows, mask_words(sizes.model.vocab_size))),
                (3, 4),
                _WHOLE,
            ),
        ]
    counts = _ints(sizes.model.vocab_size)
    prompt = jax.ShapeDtypeStruct(counts.shape, jnp.bool_)
    written = (history, _INT, counts, prompt)
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
    flow, weights = finetune["flow"], sizes.bank_arrays["weights"]
    table = _ints(4, sizes.finetune_slots)
    adapter = {
        "weights": state["master"][0],
        "scales": dict.fromkeys(state["master"][0], _floats(1)),
    }
    head_adapter, pending_loss = None, {"losses": pending["losses"], "gradients": None}
    if sizes.bank.has_head:
        head_adapter = {"weights": state["master"][-1], "scales": {"head": _floats(1)}}
        pending_loss["gradients"] = pending["gradients"][-1]
    kept = {k: state[k] for k in ("master", "optimizer")}
    one_layer = (params["layers"][0], adapter, sizes.pages(num_pages)[0], finetune["saved"][0])
    return [
        Program(
            "unit/loss",
            _with_done(partial(loss_unit, decoder, unit_tokens)),
            (head_parameters(params), head_adapter, flow, pending_loss, table, _INT),
            (2, 3),
            (flow, _WHOLE, _WHOLE),
        ),
        Program(
            "unit/layer",
            _with_done(partial(layer_unit, decoder, unit_tokens, sizes.columns, sizes.backend)),
            (*one_layer, flow, pending["gradients"][0], table, _INT),
            (4, 5),
            (flow, pending["gradients"][0], _WHOLE),
        ),
        Program(
            "begin_backward", _begin_backward, (flow, pending), (0, 1), results=(flow, pending)
        ),
        Program("clear", _clear, (finetune,), (0,), finetune),
        Program("commit", commit, (pending["gradients"], pending["losses"], state), (2,), state),
        Program("read_losses", _copy, (pending["losses"],), results=_WHOLE),
        Program("copy_state", _copy, (kept,), results=GATHERED),
        Program(
            "optimizer_step",
            partial(optimizer_step, sizes.placement),
            (weights, state, _INT, _floats(len(HYPERPARAMETERS))),
            (0, 1),
            (weights, state, _WHOLE),
        ),
    ]


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


def _with_done(unit: Callable) -> Callable:
    """A backward unit that also returns a scalar to wait on: its other outputs are donated on."""

    def run(*arguments):
        flow, accumulated = unit(*arguments)
        return flow, accumulated, flow["stream"][0, 0]

    return run


def _begin_backward(flow: dict, pending: dict) -> tuple[dict, dict]:
    zeros = {name: jnp.zeros_like(flow[name]) for name in ("dk", "dv")}
    return flow | zeros, jax.tree.map(jnp.zeros_like, pending)


def _clear(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
