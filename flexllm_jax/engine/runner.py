"""The device's side of the engine: its arrays, its compiled programs, and one method for each thing
a step does.

Every method dispatches a program and returns at once; arrays stay on the device and are donated
from one program to the next. Nothing here waits for a result or compiles one after `__init__`.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flexllm_jax.compile.buckets import (
    CompilationCounter,
    Program,
    compile_programs,
    token_buckets,
    use_persistent_cache,
)
from flexllm_jax.config import Config
from flexllm_jax.engine import sampler
from flexllm_jax.engine.batch import BatchShape
from flexllm_jax.engine.cache import device_memory, page_shapes, plan_memory, tree_bytes
from flexllm_jax.engine.step import forward_step
from flexllm_jax.finetune.backward import (
    flow_shapes,
    layer_unit,
    loss_unit,
    saved_columns,
    saved_shapes,
)
from flexllm_jax.finetune.optimizer import HYPERPARAMETERS, commit, job_state_shapes, optimizer_step
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder, optional_activations
from flexllm_jax.models.hf_weights import load_parameters
from flexllm_jax.peft.adapter import TARGET_MODULES
from flexllm_jax.peft.bank import BankShape, copy_row, scale_shapes, weight_shapes, write_row

# Most packed finetuning sequences whose tokens one step's forward may hold.
FINETUNE_SEQUENCES = 32
_INT = jax.ShapeDtypeStruct((), jnp.int32)


class Runner:
    """Arrays and programs of one model on one device.

    Sizes come from the configuration: `buckets` (token slots of the forward programs),
    `max_model_len`, `num_pages`.
    """

    def __init__(self, config: Config, *, progress: bool = True):
        use_persistent_cache(config.compile.cache_dir)
        self.config = config
        self.model = ModelConfig.from_hf(config.model.path)
        self.device = jax.devices()[0]
        dtype = jnp.dtype(config.model.dtype)
        self.decoder = Decoder(self.model, dtype)
        longest = self.model.max_position_embeddings
        self.max_model_len = min(config.model.max_model_len or longest, longest)
        self.page_size = config.cache.page_size
        self.pages_per_sequence = -(-self.max_model_len // self.page_size)
        self.rows = config.scheduler.max_sequences
        self.slots = config.finetune.max_tokens
        self.window = config.finetune.window
        self.buckets = config.compile.token_buckets or token_buckets(
            config.scheduler.max_tokens_per_step
        )
        self.batch_shapes = {bucket: self._batch_shape(bucket) for bucket in self.buckets}
        self.bank_shape = BankShape(
            rows=config.adapters.slots - 1,
            rank=config.adapters.max_rank,
            modules=tuple(TARGET_MODULES[name] for name in config.adapters.target_modules),
        )
        self.params = load_parameters(config.model.path, self.model, dtype, self.device)
        self._allocate(dtype)
        started = time.monotonic()
        self._programs = compile_programs(self._list_programs(), progress=progress)
        self.compile_s = time.monotonic() - started
        self.compilations = CompilationCounter()

    # -- arrays -----------------------------------------------------------------------------------

    def _allocate(self, dtype: jnp.dtype) -> None:
        shape, model = self.bank_shape, self.model
        bank = {
            "weights": weight_shapes(model, shape, shape.rows, dtype),
            "scales": scale_shapes(model, shape, shape.rows),
        }
        self.job_state_shapes = job_state_shapes(weight_shapes(model, shape, None, jnp.float32))
        saved = self.config.finetune.saved
        optional = tuple(optional_activations(model))
        names = {"all": optional, "inputs": ()}[saved] if isinstance(saved, str) else saved
        if unknown := set(names) - set(optional):
            raise ValueError(
                f"finetune.saved names {', '.join(sorted(unknown))}, which this model does not "
                f"have: use all, inputs or some of {', '.join(optional)}"
            )
        self.columns = saved_columns(model, names)
        finetune = {
            "saved": saved_shapes(model, dtype, self.slots, self.columns),
            "flow": flow_shapes(model, dtype, self.slots),
        }
        pending = {"gradients": self.job_state_shapes["gradients"], "totals": _floats(2)}
        page = page_shapes(model, dtype, 1, self.page_size)
        wanted = self.rows * self.pages_per_sequence + self.slots // self.page_size
        wanted += FINETUNE_SEQUENCES  # packed sequences end within a page
        self.memory = plan_memory(
            int(device_memory(self.device) * self.config.cache.memory_fraction),
            weights=tree_bytes(self.params),
            adapters=tree_bytes(bank),
            finetuning=tree_bytes((finetune, pending)),
            page_bytes=tree_bytes(page),
            wanted_pages=wanted,
            fixed_pages=self.config.cache.num_pages,
        )
        self.num_pages = self.memory.num_pages
        self.bank = self.zeros(bank)
        self.finetune = self.zeros(finetune)
        self.pending = self.zeros(pending)
        self.pages = self.zeros(page_shapes(model, dtype, self.num_pages, self.page_size))
        self.last_tokens = self.zeros(jax.ShapeDtypeStruct((self.rows,), jnp.int32))
        history = (self.rows, model.vocab_size)
        self.history = self.zeros(
            {
                "counts": jax.ShapeDtypeStruct(history, jnp.int32),
                "prompt": jax.ShapeDtypeStruct(history, jnp.bool_),
            }
        )

    def zeros(self, shapes):
        """Arrays of zeros on the device, without compiling anything."""
        return jax.tree.map(
            lambda s: jax.device_put(np.zeros(s.shape, s.dtype), self.device), shapes
        )

    def _batch_shape(self, bucket: int) -> BatchShape:
        return BatchShape(
            tokens=bucket,
            sequences=min(bucket, self.rows + FINETUNE_SEQUENCES),
            pages=self.pages_per_sequence,
            samples=min(bucket, self.rows),
        )

    # -- programs ---------------------------------------------------------------------------------

    def _list_programs(self) -> list[Program]:
        decoder, window = self.decoder, self.window
        shapes = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        params, pages, bank = shapes(self.params), shapes(self.pages), shapes(self.bank)
        finetune, pending = shapes(self.finetune), shapes(self.pending)
        last_tokens, history = shapes(self.last_tokens), shapes(self.history)
        head = _head(params)
        d_model, vocab_size = self.model.d_model, self.model.vocab_size
        hidden_dtype = decoder.dtype
        programs = []
        for bucket in self.buckets:
            shape = self.batch_shapes[bucket]
            forward = partial(forward_step, decoder, shape, self.columns)
            vector = _ints(shape.size)
            for variant, extra in (("base", (None, None)), ("adapters", (bank, finetune))):
                arguments = (params, extra[0], pages, extra[1], last_tokens, vector)
                programs.append(Program(f"forward/{variant}/{bucket}", forward, arguments, (2, 3)))
            hidden = jax.ShapeDtypeStruct((bucket, d_model), hidden_dtype)
            programs.append(
                Program(
                    f"prompt_logprobs/{bucket}",
                    partial(sampler.prompt_logprobs, decoder),
                    (head, hidden, _ints(bucket)),
                )
            )
        for rows in sorted({self.batch_shapes[bucket].samples for bucket in self.buckets}):
            hidden = jax.ShapeDtypeStruct((rows, d_model), hidden_dtype)
            packed = _ints(sampler.PACKED_ROWS, rows)
            greedy, full = (
                partial(sample, decoder) for sample in (sampler.sample_greedy, sampler.sample_full)
            )
            arguments = (head, hidden, last_tokens)
            programs += [
                Program(f"sample/greedy/{rows}", greedy, (*arguments, packed), (2,)),
                Program(f"sample/full/{rows}", full, (*arguments, history, packed), (2, 3)),
            ]
        counts, prompt = _ints(vocab_size), jax.ShapeDtypeStruct((vocab_size,), jnp.bool_)
        row = shapes(weight_shapes(self.model, self.bank_shape, None, jnp.float32))
        scale_row = scale_shapes(self.model, self.bank_shape, None)
        weights, scales = bank["weights"], bank["scales"]
        table = _ints(4, self.slots)
        state = self.job_state_shapes
        adapter = {
            "weights": state["master"][0],
            "scales": dict.fromkeys(self.bank_shape.modules, _floats(1)),
        }
        layer_arguments = (params["layers"][0], adapter, pages[0], finetune["saved"][0])
        return [
            *programs,
            Program("write_history", sampler.write_history, (history, _INT, counts, prompt), (0,)),
            Program("write_row", write_row, (weights, scales, _INT, row, scale_row), (0, 1)),
            Program("copy_row", copy_row, (weights, scales, _INT, _INT), (0, 1)),
            Program(
                "loss_unit",
                _marked(partial(loss_unit, decoder, window)),
                (head, finetune["flow"], pending["totals"], table, _INT),
                (1, 2),
            ),
            Program(
                "layer_unit",
                _marked(partial(layer_unit, decoder, window, self.columns)),
                (
                    *layer_arguments,
                    finetune["flow"],
                    pending["gradients"][0],
                    table,
                    _INT,
                ),
                (4, 5),
            ),
            Program("begin_microbatch", _begin_microbatch, (finetune["flow"], pending), (0, 1)),
            Program("clear", _clear, (finetune,), (0,)),
            Program("commit", commit, (pending["gradients"], pending["totals"], state), (2,)),
            Program("copy_totals", _copy, (pending["totals"],)),
            Program("copy_state", _copy, ({k: state[k] for k in ("master", "optimizer")},)),
            Program(
                "optimizer_step",
                optimizer_step,
                (weights, state, _INT, _floats(len(HYPERPARAMETERS))),
                (0, 1),
            ),
        ]

    # -- a step -----------------------------------------------------------------------------------

    def forward(self, variant: str, bucket: int, vector: Int[np.ndarray, " X"]):
        """Run the forward program; returns the outputs [T, D] and those of the sampled rows [R, D].

        `variant`: "base", or "adapters" when a token has an adapter or is a finetuning token.
        """
        bank, finetune = (None, None) if variant == "base" else (self.bank, self.finetune)
        self.pages, finetune, hidden, sampled = self._programs[f"forward/{variant}/{bucket}"](
            self.params, bank, self.pages, finetune, self.last_tokens, vector
        )
        if finetune is not None:
            self.finetune = finetune
        return hidden, sampled

    def sample(self, sampled: jax.Array, rows: sampler.SamplingRows, *, full: bool) -> dict:
        """Sample; returns {"tokens"} and, when `full`, the log-probabilities too."""
        count = sampled.shape[0]
        head, packed = _head(self.params), rows.packed()
        if not full:
            tokens, self.last_tokens = self._programs[f"sample/greedy/{count}"](
                head, sampled, self.last_tokens, packed
            )
            return {"tokens": tokens}
        report, self.last_tokens, self.history = self._programs[f"sample/full/{count}"](
            head, sampled, self.last_tokens, self.history, packed
        )
        return report

    def prompt_logprobs(self, hidden: jax.Array, targets: Int[np.ndarray, " T"]) -> dict:
        """Log-probabilities of the targets given the outputs of a forward."""
        program = self._programs[f"prompt_logprobs/{hidden.shape[0]}"]
        return program(_head(self.params), hidden, targets)

    def write_history(self, row: int, counts: np.ndarray, prompt: np.ndarray) -> None:
        """Tell the penalties what a row's request has said and was asked."""
        self.history = self._programs["write_history"](self.history, np.int32(row), counts, prompt)

    # -- adapters ---------------------------------------------------------------------------------

    def write_adapter(self, slot: int, values: list, scales: list) -> None:
        """Load an adapter (`bank.to_rows`) in a slot."""
        self.bank["weights"], self.bank["scales"] = self._programs["write_row"](
            self.bank["weights"], self.bank["scales"], np.int32(slot - 1), values, scales
        )

    def copy_adapter(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        self.bank["weights"], self.bank["scales"] = self._programs["copy_row"](
            self.bank["weights"], self.bank["scales"], np.int32(source - 1), np.int32(target - 1)
        )

    def read_adapter(self, slot: int) -> list:
        """A slot's weights on the host, float32; waits for the device."""
        row = slot - 1
        return jax.tree.map(lambda w: np.asarray(w)[row].astype(np.float32), self.bank["weights"])

    # -- finetuning -------------------------------------------------------------------------------

    def begin_microbatch(self) -> None:
        """Forget what an unfinished microbatch has accumulated."""
        self.finetune["flow"], self.pending = self._programs["begin_microbatch"](
            self.finetune["flow"], self.pending
        )

    def clear_finetune(self) -> None:
        """Zero the finetuning buffers after a microbatch that left values which are not finite."""
        self.finetune = self._programs["clear"](self.finetune)

    def loss_unit(self, table: jax.Array, start: int) -> jax.Array:
        """Loss of one window and its gradient; returns a scalar that is ready when it is done."""
        self.finetune["flow"], self.pending["totals"], done = self._programs["loss_unit"](
            _head(self.params),
            self.finetune["flow"],
            self.pending["totals"],
            table,
            np.int32(start),
        )
        return done

    def layer_unit(
        self, layer: int, table: jax.Array, weights: list, scales: list, start: int
    ) -> jax.Array:
        """Backward of one layer for one window; returns a scalar that is ready when it is done.

        weights, scales: the job's adapter, by layer, as `finetune.backward.layer_unit` takes it.
        """
        adapter = {"weights": weights[layer], "scales": scales[layer]}
        program = self._programs["layer_unit"]
        self.finetune["flow"], self.pending["gradients"][layer], done = program(
            self.params["layers"][layer],
            adapter,
            self.pages[layer],
            self.finetune["saved"][layer],
            self.finetune["flow"],
            self.pending["gradients"][layer],
            table,
            np.int32(start),
        )
        return done

    def commit(self, state: dict) -> dict:
        """Add the finished microbatch's gradients to its job's state."""
        return self._programs["commit"](self.pending["gradients"], self.pending["totals"], state)

    def totals(self) -> jax.Array:
        """A copy of the microbatch's sum of losses and number of labels."""
        return self._programs["copy_totals"](self.pending["totals"])

    def optimizer_step(
        self, state: dict, slot: int, values: Float[np.ndarray, " 6"]
    ) -> tuple[dict, dict]:
        """Update a job's adapter in its slot; returns its state and the step's metrics."""
        self.bank["weights"], state, metrics = self._programs["optimizer_step"](
            self.bank["weights"], state, np.int32(slot - 1), values
        )
        return state, metrics

    def copy_state(self, state: dict) -> dict:
        """A copy of the parts of a job's state that a checkpoint keeps."""
        return self._programs["copy_state"]({k: state[k] for k in ("master", "optimizer")})


def _head(params: dict) -> dict:
    """The parameters that turn outputs into logits."""
    return {name: params[name] for name in ("embed", "norm", "head") if name in params}


def _marked(unit: Callable) -> Callable:
    """A backward unit that also returns a scalar to wait on: its other outputs are donated on."""

    def run(*arguments):
        flow, totals = unit(*arguments)
        return flow, totals, flow["dx"][0, 0]

    return run


def _begin_microbatch(flow: dict, pending: dict) -> tuple[dict, dict]:
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
