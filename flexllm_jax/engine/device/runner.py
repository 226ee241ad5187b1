"""The device's side of the engine: its arrays, its compiled programs, and one method for each thing
a step does.

Every method dispatches a program and returns at once; arrays stay on the device and are donated
from one program to the next. Nothing here waits for a result or compiles one after `__init__`.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Int

from flexllm_jax.compile.buckets import CompilationCounter, compile_programs, use_persistent_cache
from flexllm_jax.compile.kept import KeptPrograms
from flexllm_jax.config import Config
from flexllm_jax.engine.device.programs import (
    check_lattice,
    head_parameters,
    layer_program,
    list_programs,
    sampling_program,
)
from flexllm_jax.engine.memory.activations import choose_saved
from flexllm_jax.engine.memory.placement import plan_placement
from flexllm_jax.engine.memory.plan import (
    MemoryPlan,
    choose_backend,
    compiled_temporaries,
    memory_budget,
    plan_memory,
)
from flexllm_jax.engine.memory.sizes import EngineSizes, bank_shape, step_buckets
from flexllm_jax.engine.sampling import sampler
from flexllm_jax.engine.sampling.params import WANTED
from flexllm_jax.engine.sampling.structured_outputs import mask_words
from flexllm_jax.finetune.optimizer import checkpointed, optimizer_program
from flexllm_jax.models.checkpoints.dtype import engine_dtype
from flexllm_jax.models.checkpoints.hf_weights import load_parameters
from flexllm_jax.models.checkpoints.random_weights import random_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.dropout import JobDropout
from scheduler.latency.model import Sampling

log = logging.getLogger(__name__)


class Runner:
    """Arrays and programs of one model on one device, or split over several; `sizes` says how large
    they are and where they lie."""

    def __init__(self, config: Config, *, progress: bool = True):
        use_persistent_cache(config.compile.cache_dir)
        self.model = ModelConfig.from_hf(config.model.path, config.model.max_model_len)
        self.device = jax.local_devices()[0]
        backend = choose_backend(config, self.device)
        platform, available = self.device.platform, memory_budget(config, self.device)
        placement = plan_placement(
            config,
            self.model,
            bank_shape(config, self.model),
            step_buckets(config, platform)[-1],
            engine_dtype(config.model.dtype, config.model.path, platform),
        )
        sizes = EngineSizes.from_config(config, self.model, platform, backend, placement)
        self.sizes = choose_saved(config, sizes, available)
        memory = plan_memory(config, self.sizes, available)
        self.start_seconds: dict[str, float] = {}
        with self._timed("weights"):
            self.params = jax.block_until_ready(self._load(config))
        # Before the pages take what memory there is: XLA tries kernels out on arrays of its own.
        with self._timed("programs"):
            self.memory, self.programs = self._compile(config, memory, progress)
        self.num_pages = self.memory.num_pages
        check_lattice(self.sizes, self.programs.keys())
        with self._timed("arrays"):
            self._allocate()
            jax.block_until_ready(self.pages)
        self.compilations = CompilationCounter()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Note in `start_seconds` how long a phase of the start takes."""
        started = time.monotonic()
        yield
        self.start_seconds[phase] = time.monotonic() - started

    def _compile(
        self, config: Config, memory: MemoryPlan, progress: bool
    ) -> tuple[MemoryPlan, dict[str, jax.stages.Compiled]]:
        """The programs, for as many pages as they leave room for while they run: those that need
        more of it than was reckoned are compiled again, for fewer."""
        while True:
            kept = self._kept(config, memory.num_pages)
            listed = list_programs(self.sizes, memory.num_pages)
            programs = compile_programs(listed, progress=progress, kept=kept)
            temporaries = compiled_temporaries(programs.values())
            measured = replace(memory, parts={**memory.parts, "temporaries": temporaries})
            if measured.total <= memory.available:
                return measured, programs
            log.info(
                "compiled programs need %.1f MiB while they run, %.1f were reckoned: they are "
                "compiled again for fewer KV pages",
                *(temporaries / 2**20, memory.parts["temporaries"] / 2**20),
            )
            memory = plan_memory(config, self.sizes, memory.available, temporaries)

    def _kept(self, config: Config, num_pages: int) -> KeptPrograms | None:
        folder = config.compile.cache_dir
        if folder is None or self.sizes.placement:  # those of one device alone
            return None
        return KeptPrograms(folder, repr((self.sizes, num_pages)), self.device)

    # -- arrays -----------------------------------------------------------------------------------

    def _load(self, config: Config) -> dict:
        placement = self.sizes.placement
        where = self._shardings(self.sizes.parameters) if placement else self.device
        if config.model.load_format == "dummy":
            return random_parameters(self.model, self.sizes.dtype, where)
        return load_parameters(config.model.path, self.model, self.sizes.dtype, where)

    def _allocate(self) -> None:
        self.bank, self.finetune, self.pending, self.pages, requests = (
            self._zeros(name) for name in ("bank", "finetune", "pending", "pages", "requests")
        )
        self.last_tokens, self.history = requests["last_tokens"], requests["history"]
        self.page_tables = requests["page_tables"]
        words = mask_words(self.model.vocab_size)
        self._unasked = {  # all are allowed, and no log-probabilities wanted but the likeliest
            rows: self.put([np.full((rows, n), -1, np.int32) for n in (words, WANTED)])
            for rows in {shape.samples for shape in self.sizes.step_shapes.values()}
        }

    def _zeros(self, name: str):
        """New arrays of one kind (`EngineSizes.zeroed`)."""
        return self.programs[f"zeros/{name}"]()

    def _put(self, tree, shapes):
        """Arrays of the host on the device, sharded as `shapes` are; without those, the same on
        every device."""
        placement = self.sizes.placement
        if not placement:
            return jax.device_put(tree, self.device)
        shardings = self._shardings(shapes or tree)
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
            tree,
            shardings,
        )

    def put(self, tree):
        """Arrays of the host on every device."""
        return self._put(tree, None)

    def _shardings(self, shapes):
        placement = self.sizes.placement
        assert placement is not None
        return jax.tree.map(lambda s: getattr(s, "sharding", None) or placement.replicated, shapes)

    # -- a step -----------------------------------------------------------------------------------

    def forward(
        self,
        variant: str,
        bucket: int,
        vector: Int[np.ndarray, " X"],
        dropout: JobDropout | None = None,
    ):
        """Run the forward program; returns the outputs [T, D] and those of the sampled rows [R, D].

        `variant`: "base", or "adapters" when a token has an adapter or is a finetuning token.
        `dropout`: of its finetuning tokens; None: of nothing.
        """
        bank, finetune = (None, None) if variant == "base" else (self.bank, self.finetune)
        more = () if dropout is None else (dropout,)
        program = self.programs[f"forward/{'dropout' if more else variant}/{bucket}"]
        inputs = (self.last_tokens, self.page_tables, vector, *more)
        self.pages, finetune, hidden, sampled = program(
            self.params, bank, self.pages, finetune, *inputs
        )
        if finetune is not None:
            self.finetune = finetune
        return hidden, sampled

    def sample(
        self,
        sampled: jax.Array,
        rows: sampler.SamplingRows,
        *,
        kind: Sampling,
        logprobs: bool = False,
        allowed: Int[np.ndarray, "R W"] | None = None,
        wanted: Int[np.ndarray, "R K"] | None = None,
    ) -> dict:
        """Sample; returns {"tokens"} and, when asked for, what `sampler.logprobs` tells of them and
        of those `wanted`. `allowed`: that may be drawn, see `Constraints.allowed`; None: all."""
        count, packed = sampled.shape[0], rows.packed()
        arguments = (head_parameters(self.params), self._head_bank, sampled, self.last_tokens)
        program = self.programs[sampling_program(kind, count)]
        if kind == Sampling.GREEDY:
            tokens, self.last_tokens = program(*arguments, packed)
        else:
            bits = self._unasked[count][0] if allowed is None else allowed
            tokens, self.last_tokens, self.history = program(*arguments, self.history, packed, bits)
        if not logprobs:
            return {"tokens": tokens}
        more = (rows.adapter, rows.scale, self._unasked[count][1] if wanted is None else wanted)
        report = self.programs[f"logprobs/{count}"](*arguments[:3], tokens, *more)
        read = {n: x for n, x in report.items() if n != "wanted" or wanted is not None}
        return {"tokens": tokens, **read}

    def prompt_logprobs(self, hidden: jax.Array, targets: Int[np.ndarray, "2 T"]) -> dict:
        """Log-probabilities of targets (tokens, and rows of the bank) given a forward's outputs."""
        program = self.programs[f"prompt_logprobs/{hidden.shape[0]}"]
        return program(head_parameters(self.params), self._head_bank, hidden, targets)

    @property
    def _head_bank(self) -> dict | None:
        """The output head's part of the bank."""
        if not self.sizes.bank.has_head:
            return None
        return {name: stacks[-1] for name, stacks in self.bank.items()}

    def write_history(self, row: int, *of_row: np.ndarray) -> None:
        """Tell the sampler of a row's request, see `sampler.write_history`."""
        self.history = self.programs["write_history"](self.history, np.int32(row), *of_row)

    def write_pages(self, places: Int[np.ndarray, "2 W"]) -> None:
        """Put new pages in the page tables, see `step_inputs.page_writes`."""
        self.page_tables = self.programs["write_pages"](self.page_tables, places)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy recurrent state from one slot to another, in all layers that have any."""
        layers = self.sizes.recurrent
        states = [self.pages[layer] for layer in layers]
        states = self.programs["copy_slot"](states, np.int32(source), np.int32(target))
        for layer, state in zip(layers, states, strict=True):
            self.pages[layer] = state

    # -- adapters ---------------------------------------------------------------------------------

    def write_adapter(self, bank_slot: int, values: list, scales: list) -> None:
        """Load an adapter (`bank.to_row`) in a slot of the bank."""
        values = self._put(values, self.sizes.adapter_row.weights)
        self.bank["weights"], self.bank["scales"] = self.programs["write_row"](
            self.bank["weights"], self.bank["scales"], np.int32(bank_slot - 1), values, scales
        )

    def copy_adapter(self, source: int, target: int) -> None:
        """Copy one slot of the bank to another."""
        self.bank["weights"], self.bank["scales"] = self.programs["copy_row"](
            self.bank["weights"], self.bank["scales"], np.int32(source - 1), np.int32(target - 1)
        )

    def read_adapter(self, bank_slot: int) -> list:
        """A slot's weights on the host, float32; waits for the device."""
        program, row = self.programs["read_row"], np.int32(bank_slot - 1)
        return jax.device_get(program(self.bank["weights"], row))

    def to_host(self, array: jax.Array) -> np.ndarray:
        """An array on the host, whole, however it is sharded; waits for the device."""
        placement = self.sizes.placement
        if placement and not (array.is_fully_addressable or array.is_fully_replicated):
            array = placement.gather(array)
        return np.asarray(array)

    # -- finetuning -------------------------------------------------------------------------------

    def new_job_state(self, kept: dict, optimizer: str = "adamw") -> dict:
        """A job's state: the parts in `kept`, from the host, and zeros for the others."""
        shapes = self.sizes.job_states[optimizer]
        own = {"optimizer": optimizer_program("optimizer", optimizer)}
        zeros = {n: self._zeros(f"job_state/{own.get(n, n)}") for n in shapes if n not in kept}
        return zeros | self._put(kept, {name: shapes[name] for name in kept})

    def begin_backward(self) -> None:
        """Forget what a microbatch that did not finish its backward has accumulated."""
        self.finetune["flow"], self.pending = self.programs["begin_backward"](
            self.finetune["flow"], self.pending
        )

    def clear_finetune(self) -> None:
        """Zero the finetuning buffers."""
        self.finetune = self.programs["clear"](self.finetune)

    def score_unit(
        self,
        table: jax.Array,
        weights: list,
        scales: list,
        start: int,
        dropout: JobDropout | None = None,
    ) -> jax.Array:
        """Log-probabilities of one slice of tokens; returns a scalar, ready when it is done.

        weights, scales, dropout: as of `loss_unit`.
        """
        adapter = self._head_adapter(weights, scales)
        more = (dropout,) if dropout and adapter else ()
        program = self.programs[f"unit/score{'/dropout' if more else ''}"]
        head, flow = head_parameters(self.params), self.finetune["flow"]
        self.finetune["flow"], done = program(head, adapter, flow, table, np.int32(start), *more)
        return done

    def loss_unit(
        self,
        table: jax.Array,
        loss: jax.Array,
        weights: list,
        scales: list,
        start: int,
        dropout: JobDropout | None = None,
    ) -> jax.Array:
        """Loss of one slice of tokens and its gradient; returns a scalar, ready when it is done.

        loss: `Loss.packed`. weights, scales: the job's adapter, by stack, of which the output
        head's is taken. dropout: of the microbatch; None: of nothing.
        """
        adapter = self._head_adapter(weights, scales)
        gradients = self.pending[-1] if adapter else None
        more = (dropout,) if dropout and adapter else ()
        program = self.programs[f"unit/loss{'/dropout' if more else ''}"]
        head, flow = head_parameters(self.params), self.finetune["flow"]
        self.finetune["flow"], gradients, done = program(
            head, adapter, flow, gradients, table, loss, np.int32(start), *more
        )
        if adapter:
            self.pending[-1] = gradients
        return done

    def _head_adapter(self, weights: list, scales: list) -> dict | None:
        if not self.sizes.bank.has_head:
            return None
        return {"weights": weights[-1], "scales": scales[-1]}

    def layer_unit(
        self,
        layer: int,
        table: jax.Array,
        weights: list,
        scales: list,
        start: int,
        dropout: JobDropout | None = None,
        count: int = 1,
    ) -> jax.Array:
        """Backward of a layer for `count` slices, from `start` down; returns a scalar to wait for.

        weights, scales: the job's adapter, by stack, as `finetune.backward.layer_unit` takes it.
        dropout: of the microbatch; None: of nothing. count: 1, or of `EngineSizes.units_at_once`.
        """
        stack, index = self.sizes.stacks.place(layer)
        adapter = {"weights": weights[stack], "scales": scales[stack]}
        more = (dropout, np.int32(layer)) if dropout else ()
        kind = "/dropout" if more else f"/slices-{count}" if count > 1 else ""
        program = self.programs[f"{layer_program(self.model.kind_of[layer])}{kind}"]
        self.finetune["flow"], self.pending[stack], done = program(
            self.params["layers"][layer],
            adapter,
            self.pages[self.model.cache_of[layer]],
            self.finetune["saved"][layer],
            self.finetune["flow"],
            self.pending[stack],
            table,
            np.int32(index),
            np.int32(start),
            *more,
        )
        return done

    def commit(self, state: dict, first: np.bool_, trained_ranks: list) -> dict:
        """Add a finished microbatch's gradients, the `first` since the last step, to its job's."""
        totals = self.programs["commit"](self.pending, state["gradients"], first, trained_ranks)
        return state | {"gradients": totals}

    def read_logprobs(self) -> jax.Array:
        """A copy of the log-probabilities of the labels in all finetuning slots, float32 [S]."""
        return self.programs["read_logprobs"](self.finetune["flow"]["logprob"])

    def optimizer_step(
        self, state: dict, slot: int, ranks: list, values: np.ndarray, optimizer: str = "adamw"
    ) -> tuple[dict, dict]:
        """Update a job's adapter in its slot; returns its state and the step's metrics."""
        program = self.programs[optimizer_program("optimizer_step", optimizer)]
        weights, row = self.bank["weights"], np.int32(slot - 1)
        self.bank["weights"], state, metrics = program(weights, state, row, ranks, values)
        return state, metrics

    def copy_state(self, state: dict, optimizer: str = "adamw") -> dict:
        """A copy, whole on every device, of what a checkpoint keeps of a job's state."""
        program = self.programs[optimizer_program("copy_state", optimizer)]
        return program(checkpointed(state))

    def close(self) -> None:
        """Nothing is called any more."""
        self.compilations.close()
