"""The shapes of an engine's arrays, from the configuration alone.

Nothing here touches a device: the runner allocates these shapes, `programs` compiles for them, and
both do so for a GPU that is not there.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from flexllm_jax.compile.buckets import token_buckets
from flexllm_jax.config import Config
from flexllm_jax.engine.memory.cache import page_shapes, tree_bytes
from flexllm_jax.engine.memory.placement import ALL, Placement
from flexllm_jax.engine.memory.step_inputs import StepShape
from flexllm_jax.engine.sampling.params import BIASES
from flexllm_jax.finetune.buffers import Columns, flow_shapes, saved_columns, saved_shapes
from flexllm_jax.finetune.optimizer import job_state_shapes, optimizer_program
from flexllm_jax.models.checkpoints.dtype import engine_dtype
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.spec import AttentionSpec
from flexllm_jax.peft import prefix
from flexllm_jax.peft.adapter import named_modules
from flexllm_jax.peft.bank import AdapterRow, BankShape, scale_shapes, weight_shapes
from flexllm_jax.peft.stacks import LayerStacks
from kernels_pallas.backend import Backend
from kernels_pallas.rows import stored_dtype

# Most packed finetuning sequences whose tokens one step's forward may hold.
FINETUNE_SEQUENCES = 32


@dataclass(frozen=True)
class EngineSizes:
    """The sizes that all arrays and programs of an engine follow from.

    rows: most running requests. finetune_slots: tokens of the microbatches in work. unit_tokens:
    tokens of a backward unit. buckets: token slots of the forward programs. columns: where a
    saved activation lies in its row (`finetune.buffers.saved_columns`), on one device. placement:
    where arrays lie when the model is split over devices; None: whole, on one. dropout: whether a
    job may have dropout. snapshots: slots for copies of recurrent state, if it has any.
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
    columns: Columns
    placement: Placement | None = None
    dropout: bool = False
    optimizers: tuple[str, ...] = ("adamw",)
    snapshots: int = 0

    @classmethod
    def from_config(
        cls,
        config: Config,
        model: ModelConfig,
        platform: str,
        backend: Backend,
        placement: Placement | None = None,
    ) -> "EngineSizes":
        """What the configuration asks for, but for `finetune.saved`, of which
        `engine.memory.activations.choose_saved` takes care: these are the sizes of `attention`.

        platform: the device's. ValueError for what the model or its placement does not have."""
        dtype = engine_dtype(config.model.dtype, config.model.path, platform)
        bank = bank_shape(config, model)
        if placement and bank.has_head:
            raise ValueError(
                "adapters.target_modules: lm_head cannot have LoRA with parallel.tp > 1; drop it"
            )
        for spec in model.kinds if "prefix" in bank.kinds else ():
            if what := prefix.unsupported(spec.mixer):
                raise ValueError(
                    f"adapters.kinds: this model has {what}, where prefix is none; drop it"
                )
        if "prefix" in bank.kinds and len(model.mixers) > 1:
            raise ValueError(
                "adapters.kinds: prefix has keys and values of one shape, and this model's layers "
                "have several, or read those of others; drop it"
            )
        if "ia3" in bank.kinds and not all(
            isinstance(spec.mixer, AttentionSpec)
            and {"k", "v", "up"} <= spec.kernel_shapes(model.d_model).keys()
            for spec in model.kinds
        ):
            raise ValueError(
                "adapters.kinds: ia3 scales keys, values and inner activations apart, and this "
                "model's projections of them are fused, or not in every layer; drop it"
            )
        if placement and "muon" in config.finetune.all_optimizers:
            raise ValueError(
                "optimizer.type=muon needs parallel.tp=1, as it reads whole factors of LoRA: use "
                "adamw, and take muon out of finetune.optimizers"
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
            buckets=step_buckets(config, platform),
            bank=bank,
            columns=saved_columns(
                Decoder(placement.local if placement else model, dtype), ("attended",)
            ),
            placement=placement,
            dropout=config.finetune.with_dropout,
            optimizers=config.finetune.all_optimizers,
            snapshots=_snapshots(config),
        )

    @property
    def devices(self) -> int:
        """Over how many devices the model is split."""
        return self.placement.plan.mesh.tp if self.placement else 1

    @cached_property
    def decoder(self) -> Decoder:
        """The model's functions, as programs use them: over one device's part of the model."""
        if self.placement:
            return Decoder(self.placement.local, self.dtype, ALL, self.backend)
        return Decoder(self.model, self.dtype, backend=self.backend)

    @property
    def units_at_once(self) -> tuple[int, ...]:
        """How many slices of tokens one program may take through a layer, besides one; on a CPU,
        which has no queue of programs that fills, always one."""
        slices = self.finetune_slots // self.unit_tokens
        many = (2, 4, 8) if self.backend.implementation == "pallas" else ()
        return tuple(count for count in many if count <= slices)

    @property
    def stored(self) -> jnp.dtype:
        """What the arrays that are written row by row are made of."""
        return stored_dtype(self.dtype, self.backend)

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
                samples=min(bucket, self.rows),
            )
            for bucket in self.buckets
        }

    @cached_property
    def bank_arrays(self) -> dict:
        """The adapter bank: {"weights", "scales"}, lists of stacks."""
        weights = weight_shapes(self.model, self.bank, self.bank.rows, self.stored)
        if self.placement:
            weights = self.placement.adapters(weights, lead=2)
        return {
            "weights": weights,
            "scales": scale_shapes(self.model, self.bank, self.bank.rows),
        }

    @cached_property
    def stacks(self) -> LayerStacks:
        """Which layers' adapters share their arrays."""
        return self.bank.stacks(self.model)

    @cached_property
    def adapter_row(self) -> AdapterRow:
        """One adapter in the bank's padded shapes, float32."""
        weights = weight_shapes(self.model, self.bank, None, jnp.float32)
        if self.placement:
            weights = self.placement.adapters(weights, lead=1)
        return AdapterRow(weights, scale_shapes(self.model, self.bank, None))

    @cached_property
    def job_state(self) -> dict:
        """The state on the device of a finetuning job with AdamW: no optimizer has a larger one."""
        return self.job_states["adamw"]

    @cached_property
    def job_states(self) -> dict[str, dict]:
        """That of jobs, by optimizer."""
        weights, place = self.adapter_row.weights, self.placement
        states = {name: job_state_shapes(weights, name) for name in self.optimizers}
        return {name: place.job_state(s) if place else s for name, s in states.items()}

    @property
    def trained_ranks(self) -> list:
        """See `bank.trained_ranks`."""
        stacks = zip(self.stacks.layers, self.adapter_row.scales, strict=True)
        return [ints(len(layers), len(sites)) for layers, sites in stacks]

    @cached_property
    def finetune_arrays(self) -> dict:
        """The buffers of the microbatches in work: {"saved": by layer, "flow"}."""
        model = self.decoder.config
        saved = saved_shapes(
            model, self.stored, self.finetune_slots, self.unit_tokens, self.columns
        )
        flow = flow_shapes(model, self.stored, self.finetune_slots)
        if self.placement:
            saved = self.placement.own(saved)
            flow["carried"] = self.placement.own(flow["carried"])
        return {"saved": saved, "flow": flow}

    @cached_property
    def pending_arrays(self) -> list:
        """The gradients that the microbatch that goes backward has accumulated."""
        return self.job_state["gradients"]

    @cached_property
    def request_arrays(self) -> dict:
        """By request row: its newest token, its pages (behind those, of finetuning sequences),
        and what the sampler keeps of it."""
        history = (self.rows, self.model.vocab_size)
        return {
            "last_tokens": ints(self.rows),
            "page_tables": ints(self.rows + FINETUNE_SEQUENCES, self.pages_per_sequence),
            "history": {
                "counts": ints(*history),
                "prompt": jax.ShapeDtypeStruct(history, jnp.bool_),
                "biases": ints(2, self.rows, BIASES),
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
            **{
                f"job_state/{optimizer_program('optimizer', name)}": state["optimizer"]
                for name, state in self.job_states.items()
            },
        }

    @cached_property
    def page_bytes(self) -> int:
        """Of one more page, in all layers."""
        return tree_bytes(self.pages(2)) - tree_bytes(self.pages(1))

    @property
    def state_slots(self) -> int:
        """X: slots of recurrent state. Those of the rows come first, then two of finetuning: a step
        reads one while it writes the other. Then come snapshots."""
        return self.snapshot_slot(self.snapshots)

    def snapshot_slot(self, number: int) -> int:
        """The slot of a snapshot."""
        return self.rows + 2 + number

    def planned_slot(self, number: int) -> int:
        """The slot of a number in `StepPlan.state_copies`."""
        return number if number < self.rows else self.snapshot_slot(number - self.rows)

    @cached_property
    def recurrent(self) -> tuple[int, ...]:
        """The layers that keep a state and no keys."""
        return tuple(i for i, cache in enumerate(self.pages(0)) if "state" in cache)

    @property
    def states_bytes(self) -> int:
        """Of all slots, in all layers."""
        return tree_bytes([self.pages(0)[i] for i in self.recurrent])

    def pages(self, num_pages: int) -> list:
        """The KV pages of all layers."""
        pages = page_shapes(self.model, self.stored, num_pages, self.page_size, self.state_slots)
        return self.placement.pages(pages) if self.placement else pages


def step_buckets(config: Config, platform: str) -> tuple[int, ...]:
    """The sizes of steps. A CPU has fewer by default, and smaller ones: it takes seconds to compile
    each, and more tokens at once make it no faster."""
    if config.compile.token_buckets:
        return config.compile.token_buckets
    usual, ratio = (256, 6) if platform == "cpu" else (512, 4)
    scheduler = config.scheduler
    largest = scheduler.max_tokens_per_step or max(usual, scheduler.max_sequences)
    return token_buckets(largest, ratio=ratio)


def _snapshots(config: Config) -> int:
    if not config.cache.prefix_caching:
        return 0
    given, rows = config.cache.state_snapshots, config.scheduler.max_sequences
    return -(-rows // 2) if given is None else given


def bank_shape(config: Config, model: ModelConfig) -> BankShape:
    """The size of the adapter bank that the configuration asks for."""
    return BankShape(
        rows=config.adapters.slots - 1,
        rank=config.adapters.max_rank,
        modules=named_modules(config.adapters.target_modules, model),
        kinds=config.adapters.kinds,
        bottleneck=config.adapters.max_bottleneck,
        prefix=config.adapters.max_prefix,
        devices=config.parallel.tp,
    )


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """An int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
