"""The memory of finetuning, as compilers count it: without optimization, pruned, with
rematerialization, and token by token (FlexLLM, figure 13).

Everything is measured from `memory_analysis()` of compiled programs with abstract shapes; nothing
is allocated and no GPU is needed. All stages use the same attention kernels, whose probabilities
are never kept.

- no optimization: what `jax.vjp` of a layer keeps when every weight gets a gradient, for all
  layers, and logits of all tokens at once;
- pruning: what it keeps when only the adapter and the layer's input do;
- rematerialization: the engine's programs with one slice as long as the sequence: the plan's
  activations, keys and values, and the loss in chunks of the vocabulary;
- token-level: the same with short slices.

Each is what is held for all layers at once plus the most that one program needs on top: its
temporaries and its gradients. Weights, adapters and the optimizer's state are counted apart.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from flexllm_jax.compile.buckets import Program
from flexllm_jax.compile.whole_layer import whole_layer
from flexllm_jax.config import ConfigError, Section, TargetModule
from flexllm_jax.config.fields import Float, Int
from flexllm_jax.engine.device.programs import head_parameters, layer_program, list_programs
from flexllm_jax.engine.memory.activations import recomputed, with_saved
from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.finetune.backward import job_bypass
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder, no_tap
from flexllm_jax.models.rope import Angles
from flexllm_jax.peft.adapter import named_modules
from flexllm_jax.peft.bank import KINDS, BankShape
from flexllm_jax.peft.stacks import shapes_of_one
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.gpu_target import Target, lower_only

Row = dict[str, Any]
STAGES: tuple[str, ...] = ("no optimization", "pruning", "rematerialization", "token-level")
_PAGE = 64


class BypassSection(Section):
    """A kind of adapter."""

    kind: Literal[KINDS] = Field(  # type: ignore[valid-type]
        description=f"One of {', '.join(KINDS)}."
    )
    r: Int = Field(default=16, ge=1, description="Rank of LoRA.")
    target_modules: tuple[TargetModule, ...] = Field(
        default=("down_proj",), min_length=1, description="Modules that get LoRA."
    )
    bottleneck_size: Int = Field(default=64, ge=1, description="Width of a bottleneck.")
    num_virtual_tokens: Int = Field(default=32, ge=1, description="Length of a prefix.")

    def bank(self, model: ModelConfig) -> BankShape:
        """A bank of one adapter of this kind for a model."""
        return BankShape(
            rows=1,
            rank=self.r,
            modules=named_modules(self.target_modules, model),
            kinds=(self.kind,),
            bottleneck=self.bottleneck_size,
            prefix=self.num_virtual_tokens,
        )


class MemoryCaseSection(Section):
    """One panel of the figure."""

    model: str = Field(description="A name of `models`.")
    tokens: Int = Field(ge=16, description="Length of the sequence.")
    unit_tokens: Int = Field(ge=16, description="Tokens of a backward unit; must divide `tokens`.")
    bypasses: tuple[str, ...] = Field(min_length=1, description="Names of `bypasses`.")
    stages: tuple[str, ...] = Field(
        default=STAGES,
        min_length=1,
        description="What is counted. The first two are of a model whose layers are all alike.",
    )
    paper_bytes: dict[str, tuple[Float, Float, Float, Float]] = Field(
        default={}, description="Bypass -> the paper's bytes of the four stages."
    )
    target_gb: Float | None = Field(default=None, description="Most GB with everything on.")
    inference_tokens: Int | None = Field(
        default=None,
        ge=0,
        description="Also compare everything that lies in memory with finetuning without "
        "optimization plus a separate copy for inference; each with KV pages for so many tokens of "
        "requests.",
    )
    target_saved: Float | None = Field(
        default=None, description="Least part of that memory that co-serving saves."
    )


class MemorySection(Section):
    """An experiment on memory."""

    target: Path | None = Field(
        description="Description of the GPU to compile for (XLA's GpuTargetConfigProto as text; "
        "needs jax-cuda12-plugin and jax-cuda12-pjrt). null: the CPU backend counts instead, with "
        "the reference kernels."
    )
    models: dict[str, dict[str, Any]] = Field(description="Name -> fields of an HF config.json.")
    bypasses: dict[str, BypassSection] = Field(description="Name -> adapter.")
    saved: tuple[str, ...] = Field(
        default=(), description="What rematerialization saves besides the layers' inputs."
    )
    cases: tuple[MemoryCaseSection, ...] = Field(min_length=1, description="The panels.")

    @model_validator(mode="after")
    def _everything_needs_all(self) -> MemorySection:
        for case in self.cases:
            if unknown := set(case.stages) - set(STAGES):
                raise ValueError(f"cases: stages has {unknown}; use some of {', '.join(STAGES)}")
            if case.inference_tokens is not None and set(case.stages) != set(STAGES):
                raise ValueError("cases: inference_tokens compares all stages; leave stages out")
        return self

    def model(self, name: str) -> ModelConfig:
        """A model of `models`."""
        if name not in self.models:
            raise ConfigError(f"memory.cases: {name!r} is not one of memory.models; add it there")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(self.models[name]))
            return ModelConfig.from_hf(folder)


@dataclass(frozen=True)
class Compiler:
    """Compiles for a chip, and says what a program takes. `target` None: this CPU."""

    target: Target | None

    @classmethod
    def of(cls, file: Path | None) -> Compiler:
        """A compiler for the chip that a file describes."""
        jax.config.update("jax_platforms", "cpu")  # nothing runs: a GPU would only be initialized
        if file is None:
            return cls(None)
        if not file.exists():
            raise ConfigError(f"memory.target: {file} does not exist; null counts with the CPU's")
        try:
            return cls(Target.read(file))
        except Exception as error:  # jax raises several kinds where the plugin is not installed
            raise ConfigError(
                f"memory.target: this installation cannot compile for {file.stem} "
                f"({' '.join(str(error).split())[:120]}): install jax-cuda12-plugin and "
                f"jax-cuda12-pjrt of jax's version, or set memory.target=null"
            ) from None

    @property
    def backend(self) -> Backend:
        """The kernels of the chip."""
        return Backend("pallas", self.target.name) if self.target else XLA

    @property
    def name(self) -> str:
        """For tables."""
        return f"compiled for {self.target.name}" if self.target else "the CPU backend's count"

    def memory(self, function: Callable, arguments: tuple, donated: tuple[int, ...] = ()) -> Any:
        """`memory_analysis()` of the compiled function."""
        if self.target:
            lowered = lower_only(self.target, function, arguments, donated)
            return lowered.compile().memory_analysis()
        jitted = jax.jit(function, donate_argnums=donated)
        return jitted.lower(*arguments).compile().memory_analysis()


@dataclass(frozen=True)
class StageMemory:
    """Bytes: held for all layers at once, of which keys and values, and recurrent states; needed by
    one program on top, and by which; and what must be computed again, FLOPs a token of all layers.
    """

    held: int
    kv: int
    states: int
    working: int
    largest: str
    recomputed: float

    @property
    def total(self) -> int:
        """All of it."""
        return self.held + self.working


def make_sizes(
    model: ModelConfig, bank: BankShape, tokens: int, unit_tokens: int, backend: Backend
) -> EngineSizes:
    """An engine that finetunes one sequence of that many tokens, and nothing else."""
    return EngineSizes(
        model=model,
        dtype=jnp.dtype(jnp.bfloat16),
        backend=backend,
        max_model_len=tokens,
        page_size=_PAGE,
        rows=1,
        finetune_slots=tokens,
        unit_tokens=unit_tokens,
        buckets=(unit_tokens,),
        bank=bank,
        columns=tuple({"x": slice(0, model.d_model)} for _ in model.kinds),
    )


def measure_whole(compiler: Compiler, sizes: EngineSizes, *, pruned: bool) -> StageMemory:
    """Finetuning as frameworks do it: forward through all layers, then backward."""
    model, tokens = sizes.model, sizes.finetune_slots
    decoder = Decoder(model, sizes.dtype)
    params = abstract_parameters(model, sizes.dtype)
    weights, scales = (shapes_of_one(stacks[0]) for stacks in sizes.adapter_row)
    x = jax.ShapeDtypeStruct((tokens, model.d_model), sizes.dtype)
    # In the model's dtype: all layers share them, and no layer keeps a cast of its own.
    angle = jax.ShapeDtypeStruct((tokens, 1, model.head_dim), sizes.dtype)
    angles = Angles(angle, angle)  # pyright: ignore[reportArgumentType]: shapes stand for arrays
    others = (params["layers"][0], weights, scales, angles, x)

    def bypass(adapter):
        return job_bypass(adapter, jnp.ones(tokens, bool), sizes.backend)

    def pullback(layer_params, weights, scales, angles, x):
        def layer(x, weights, layer_params):
            adapter = {"weights": weights, "scales": scales}
            own = decoder.layer(layer_params, model.layers[0])
            return whole_layer(own, x, angles, adapter, bypass, no_tap, sizes.backend)

        if pruned:
            return jax.vjp(lambda x, w: layer(x, w, layer_params), x, weights)
        return jax.vjp(layer, x, weights, layer_params)

    def forward(*arguments):
        output, pull = pullback(*arguments)
        given = {id(leaf) for leaf in jax.tree.leaves(arguments)}
        kept = {id(leaf): leaf for leaf in jax.tree.leaves(pull) if id(leaf) not in given}
        return output, list(kept.values())

    def backward(pull, d_output):
        return pull(d_output)[:2]  # frozen weights get no gradient, whatever was kept for one

    rows = tree_bytes(x)
    ahead = compiler.memory(forward, others)
    kept = ahead.output_size_in_bytes - rows  # beside the next layer's input
    _, pull = jax.eval_shape(pullback, *others)
    back = compiler.memory(backward, (pull, x))
    head = compiler.memory(
        lambda head, x, labels: jax.value_and_grad(_loss, argnums=2)(decoder, head, x, labels),
        (head_parameters(params), x, jax.ShapeDtypeStruct((tokens,), jnp.int32)),
    )
    working = {
        "forward": ahead.temp_size_in_bytes + rows,
        "loss": head.temp_size_in_bytes + 2 * rows,
        "backward": back.temp_size_in_bytes + 2 * rows,
    }
    largest = max(working, key=lambda name: working[name])
    kv = 2 * tokens * model.num_kv_heads * model.head_dim * sizes.dtype.itemsize
    layers = model.num_layers
    return StageMemory(layers * (kept + rows), layers * kv, 0, working[largest], largest, 0.0)


def _loss(decoder: Decoder, head: dict, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy from the logits of all tokens at once."""
    logprobs = jax.nn.log_softmax(decoder.logits(head, x), axis=-1)
    return -jnp.sum(jnp.take_along_axis(logprobs, labels[:, None], axis=1))


def measure_engine(compiler: Compiler, sizes: EngineSizes) -> StageMemory:
    """Finetuning as the engine does it: forward and backward in slices of tokens."""
    num_pages = sizes.finetune_slots // sizes.page_size
    layer_units = [layer_program(kind) for kind in range(len(sizes.model.kinds))]
    wanted = (f"forward/adapters/{sizes.unit_tokens}", "unit/loss", *layer_units)
    working: dict[str, int] = {}
    for program in list_programs(sizes, num_pages):
        if program.name in wanted:
            memory = compiler.memory(program.function, program.arguments, program.donated)
            _check_in_place(program, memory)
            working[program.name] = memory.temp_size_in_bytes
    largest = max(working, key=lambda name: working[name])
    again = recomputed(sizes) / sizes.finetune_slots
    return StageMemory(*held(sizes), working[largest], largest, again)


def held(sizes: EngineSizes) -> tuple[int, int, int]:
    """Bytes that the engine holds for all layers at once, of which keys and values, and recurrent
    states: of the slices of the sequence, and of slots."""
    slots, saved = sizes.states_bytes, sizes.finetune_arrays["saved"]
    slices = tree_bytes([(saved[i]["state"], saved[i]["tail"]) for i in sizes.recurrent])
    pages = tree_bytes(sizes.pages(sizes.finetune_slots // sizes.page_size))
    return tree_bytes(sizes.finetune_arrays) + pages, pages - slots, slices + slots


def _check_in_place(program: Program, memory: Any) -> None:
    """What is held is counted once, so no program may copy it."""
    donated = tree_bytes([program.arguments[i] for i in program.donated])
    if memory.alias_size_in_bytes < donated:
        raise RuntimeError(
            f"{program.name} updates {memory.alias_size_in_bytes:,} of {donated:,} bytes in place"
        )


def measure(section: MemorySection, case: MemoryCaseSection, compiler: Compiler) -> Iterator[Row]:
    """A row for each bypass and stage, and one for everything in memory where that is asked for."""
    model = section.model(case.model)
    for name in case.bypasses:
        if name not in section.bypasses:
            raise ConfigError(f"memory.cases: {name!r} is not one of memory.bypasses; add it there")
        bank = section.bypasses[name].bank(model)
        whole, sliced = (
            make_sizes(model, bank, case.tokens, unit_tokens, compiler.backend)
            for unit_tokens in (case.tokens, case.unit_tokens)
        )
        engines = (with_saved(sizes, section.saved) for sizes in (whole, sliced))
        counts: tuple[Callable[[], StageMemory], ...] = (
            partial(measure_whole, compiler, whole, pruned=False),
            partial(measure_whole, compiler, whole, pruned=True),
            *(partial(measure_engine, compiler, sizes) for sizes in engines),
        )
        stages = {
            stage: count()
            for stage, count in zip(STAGES, counts, strict=True)
            if stage in case.stages
        }
        paper = dict(zip(STAGES, case.paper_bytes.get(name, (None,) * len(STAGES)), strict=True))
        same = {
            "model": case.model,
            "tokens": case.tokens,
            "unit_tokens": case.unit_tokens,
            "window": case.unit_tokens,  # what reports called it first
            "bypass": name,
        }
        for stage, memory in stages.items():
            yield same | {
                "stage": stage,
                "bytes": memory.total,
                "held": memory.held,
                "kv": memory.kv,
                "states": memory.states,
                "working": memory.working,
                "largest_program": memory.largest,
                "recomputed_flops_per_token": memory.recomputed,
                "paper_bytes": paper[stage],
            }
        if case.inference_tokens is not None:
            both = stages[STAGES[0]], stages[STAGES[-1]]
            whole_memory = everything(sliced, *both, case.inference_tokens)
            yield same | {"stage": "everything in memory", "parts": whole_memory}


def everything(
    sizes: EngineSizes, unoptimized: StageMemory, ours: StageMemory, inference_tokens: int
) -> dict[str, dict[str, int]]:
    """Bytes by purpose of co-serving, and of finetuning without optimization beside a separate copy
    that serves."""
    pages = tree_bytes(sizes.pages(-(-inference_tokens // sizes.page_size)))
    weights = tree_bytes(abstract_parameters(sizes.model, sizes.dtype))
    adapter = {
        "adapter, its gradients and the optimizer": tree_bytes(
            (sizes.job_state, sizes.pending_arrays)
        )
    }
    return {
        "separate": {
            "weights": weights,
            "weights of the copy for inference": weights,
            "adapters served": tree_bytes(sizes.bank_arrays),
            "KV of requests": pages,
            "activations": unoptimized.total,
            **adapter,
        },
        "co-serving": {
            "weights": weights,
            "adapters served": tree_bytes(sizes.bank_arrays),
            "KV of requests": pages,
            "activations": ours.total,
            **adapter,
        },
    }
