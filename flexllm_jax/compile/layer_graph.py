"""Graph pruning (FlexLLM, section 5): what the backward of a layer needs of its forward.

The gradient of one decoder layer with its bypass is traced, and everything here is read from that
trace: an array depends on the layer's input, on the output's gradient, or on neither (weights).
What operations of the gradient read of the forward is what a framework keeps. Frozen weights get no
gradient, and following only what the adapters' gradients and the input's gradient need leaves less:
pruning. `remat` chooses which of it to save.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from flexllm_jax.compile import whole_layer as layers
from flexllm_jax.compile.whole_layer import (
    ATTENTION,
    DELTA,
    PAGES,
    MakeBypass,
    delta_flops,
    whole_layer,
)
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.spec import AttentionSpec, LayerSpec

INPUT = "x"  # the name of the layer's input
_VIEWS = (
    *("name", "reshape", "transpose", "squeeze", "expand_dims", "copy"),
    "optimization_barrier",
)
_MOVES = ("broadcast_in_dim", "concatenate", "convert_element_type", "slice", "pad", "gather")
_PACKAGE = Path(__file__).parents[1]
_OWN_FILES = (Path(__file__), Path(layers.__file__))  # whose lines say nothing of the model


@dataclass(frozen=True)
class Activation:
    """An array that the forward computes.

    label: its tap, or the operation that makes it. shape and dtype: of all tokens traced. flops: of
    the operation that makes it.
    """

    label: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    flops: float
    where: str


@dataclass(frozen=True)
class _Operation:
    inputs: tuple[int, ...]
    flops: float


@dataclass
class LayerGraph:
    """The forward of a layer and what its gradient reads of it. Arrays are numbered.

    tokens: how many were traced. kept: arrays that gradients of everything read, weights included.
    needed: those that the gradients of the adapter and of the layer's input read. named: arrays by
    tap.
    """

    tokens: int
    input: int
    activations: dict[int, Activation] = field(default_factory=dict)
    producers: dict[int, _Operation] = field(default_factory=dict)
    named: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept: tuple[int, ...] = ()
    needed: tuple[int, ...] = ()

    def recomputed(
        self, saved: Iterable[str], wanted: Iterable[int] | None = None
    ) -> tuple[float, tuple[int, ...]]:
        """FLOPs of computing again what is needed, or wanted, when only these taps are saved (and
        the input, keys and values), and which arrays that makes."""
        have = {self.input, *chain.from_iterable(self.named.get(n, ()) for n in (PAGES, *saved))}
        operations: dict[int, _Operation] = {}
        made, waiting = set(), list(self.needed if wanted is None else wanted)
        while waiting:
            array = waiting.pop()
            operation = self.producers.get(array)
            if array in have or array in made or operation is None:
                continue
            made.add(array)
            operations[id(operation)] = operation
            waiting += operation.inputs
        return sum(op.flops for op in operations.values()), tuple(sorted(made))

    def bytes_of(self, arrays: Iterable[int]) -> int:
        """Bytes of arrays, each counted once."""
        return sum(self.activations[array].bytes for array in set(arrays))

    def bytes_saved(self, saved: Iterable[str]) -> int:
        """Bytes of taps."""
        return self.bytes_of(chain.from_iterable(self.named[name] for name in saved))

    @property
    def candidates(self) -> tuple[str, ...]:
        """Taps that a plan may save or not."""
        return tuple(name for name in self.named if name not in (INPUT, PAGES))


def trace_layer(
    decoder: Decoder,
    spec: LayerSpec,
    layer_params: Any,
    adapter: Any,
    bypass: MakeBypass,
    tokens: int,
) -> LayerGraph:
    """Trace the gradient of one layer with a bypass; nothing is computed.

    Args:
        decoder: the model's functions.
        spec: of the layer.
        layer_params: the layer's frozen parameters, or their shapes.
        adapter: the bypass's trainable arrays in this layer, or their shapes; any pytree.
        bypass: makes the bypass of them; whatever maps a projection's input and outputs to outputs
            will do, a `Bypass` also takes part in attention.
        tokens: T, one sequence; attention's FLOPs grow with its square, or with the window.
    """
    x = jax.ShapeDtypeStruct((tokens, decoder.config.d_model), decoder.dtype)
    positions = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    mixer, angles = spec.mixer, None
    window = mixer.options.window if isinstance(mixer, AttentionSpec) else None
    if isinstance(mixer, AttentionSpec):
        angles = jax.eval_shape(lambda positions: decoder.angles(positions, mixer), positions)

    width = spec.token_width
    own = None if width is None else jax.ShapeDtypeStruct((tokens, width), decoder.dtype)

    def function(x, adapter, layer_params, angles, own):
        return whole_layer(
            decoder.layer(layer_params, spec),
            x,
            angles,
            adapter,
            bypass,
            lambda name, value: checkpoint_name(value, name),
            own=own,
        )

    return trace(function, x, adapter, layer_params, (angles, own), window)


def trace(
    function: Callable,
    x: jax.ShapeDtypeStruct,
    adapter: Any,
    frozen: Any,
    others: tuple = (),
    window: int | None = None,
) -> LayerGraph:
    """The graph of `function(x, adapter, frozen, *others)`, one array, and of its gradients.

    `jax.ad_checkpoint.checkpoint_name` names the arrays that may be saved.
    `window`: most keys that a query sees.
    """

    def gradients(x, adapter, frozen, others, d_output):
        output, pull = jax.vjp(lambda *wrt: function(*wrt, *others), x, adapter, frozen)
        return pull(d_output.astype(output.dtype))

    d_output = jax.eval_shape(function, x, adapter, frozen, *others)
    closed, shapes = jax.make_jaxpr(gradients, return_shape=True)(
        x, adapter, frozen, others, d_output
    )
    reader = _Reader(x.shape[0], window)
    count = len(closed.jaxpr.invars)
    # Arguments are flattened in order: the layer's input first, the output's gradient last.
    inputs = [reader.new(closed.jaxpr.invars[0].aval, forward=True)]
    inputs += [reader.new(var.aval) for var in closed.jaxpr.invars[1 : count - 1]]
    inputs += [reader.new(closed.jaxpr.invars[-1].aval, backward=True)]
    constants = [reader.new(var.aval) for var in closed.jaxpr.constvars]
    outputs = reader.read(closed.jaxpr, constants + inputs)
    trainable = 1 + len(jax.tree.leaves(shapes[1]))
    return reader.graph(inputs[0], outputs, outputs[:trainable])


class _Reader:
    """Walks a jaxpr into numbered arrays and operations; nested functions are looked into."""

    def __init__(self, tokens: int, window: int | None = None):
        self._tokens, self._window = tokens, window
        self._avals: list[Any] = []
        self._forward: set[int] = set()
        self._backward: set[int] = set()
        self._operations: list[tuple[_Operation, tuple[int, ...], str, str]] = []
        self._known: dict[tuple, tuple[int, ...]] = {}
        self._named: dict[str, list[int]] = {}

    def new(self, aval: Any, *, forward: bool = False, backward: bool = False) -> int:
        """A number for an array."""
        self._avals.append(aval)
        array = len(self._avals) - 1
        if backward:
            self._backward.add(array)
        elif forward:
            self._forward.add(array)
        return array

    def read(self, jaxpr: Any, inputs: list[int]) -> list[int]:
        """Add the operations of a jaxpr given its constants and inputs; returns its outputs."""
        arrays: dict[Any, int] = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

        def number(atom: Any) -> int:
            return self.new(atom.aval) if isinstance(atom, core.Literal) else arrays[atom]

        for eqn in jaxpr.eqns:
            own = [number(atom) for atom in eqn.invars]
            arrays |= zip(eqn.outvars, self._equation(eqn, own), strict=True)
        return [number(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[int]) -> list[int]:
        name = eqn.primitive.name
        if name in _VIEWS:
            if name == "name":
                self._named.setdefault(eqn.params["name"], []).append(inputs[0])
            return inputs
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        label = eqn.params.get("name", name) if inner is not None else name
        if (
            inner is not None
            and label not in (*ATTENTION, *DELTA)
            and name in ("jit", "pjit", "closed_call")
        ):
            closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            constants = [self.new(var.aval) for var in closed.jaxpr.constvars]
            return self.read(closed.jaxpr, constants + inputs)
        literals = [str(a) for a in eqn.invars if isinstance(a, core.Literal)]
        variables = [
            i for i, a in zip(inputs, eqn.invars, strict=True) if not isinstance(a, core.Literal)
        ]
        key = (label, tuple(variables), tuple(literals), str(eqn.params))
        if key not in self._known:
            backward = any(i in self._backward for i in inputs)
            forward = any(i in self._forward for i in inputs)
            outputs = tuple(
                self.new(var.aval, forward=forward, backward=backward) for var in eqn.outvars
            )
            operation = _Operation(tuple(inputs), self._flops(label, eqn))
            where = _where(eqn)
            self._operations.append((operation, outputs, label, where))
            self._known[key] = outputs
        return list(self._known[key])

    def _flops(self, label: str, eqn: Any) -> float:
        if label in ATTENTION:  # of queries and the keys that they see: two products, or five
            tokens, heads, head_dim = eqn.invars[0].aval.shape
            products = 2 if label == "attention_forward" else 5
            most = min(self._window or tokens, tokens)
            pairs = most * (most + 1) / 2 + (tokens - most) * most
            return products * 2.0 * heads * head_dim * pairs
        if label in DELTA:
            return delta_flops(label, *(eqn.invars[i].aval.shape for i in (0, 2)))
        if label == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            return 2.0 * summed * eqn.outvars[0].aval.size
        if label in _MOVES:
            return 0.0
        return float(max(v.aval.size for v in (*eqn.invars, *eqn.outvars)))

    def graph(self, x: int, outputs: list[int], trainable: list[int]) -> LayerGraph:
        """What is left of the forward, and what the gradients read of it."""
        graph = LayerGraph(self._tokens, x)
        aval = self._avals[x]
        graph.activations[x] = _activation(aval, INPUT, 0.0, "the layer's input")
        taps = {array: name for name, arrays in self._named.items() for array in arrays}
        for operation, made, label, where in self._operations:
            for array in made:
                if array in self._forward:
                    graph.producers[array] = operation
                    text = taps.get(array, label)
                    graph.activations[array] = _activation(
                        self._avals[array], text, operation.flops, where
                    )
        graph.named = {
            name: tuple(dict.fromkeys(arrays))
            for name, arrays in self._named.items()
            if all(array in self._forward for array in arrays)
        }
        graph.kept, graph.needed = self._read_by(outputs), self._read_by(trainable)
        return graph

    def _read_by(self, outputs: list[int]) -> tuple[int, ...]:
        """Arrays of the forward that operations of the gradient read on the way to outputs."""
        live, read = set(outputs), set()
        for operation, made, _, _ in reversed(self._operations):
            if live.isdisjoint(made) or self._backward.isdisjoint(made):
                continue
            live.update(operation.inputs)
            read.update(i for i in operation.inputs if i in self._forward)
        return tuple(sorted(read))


def _activation(aval: Any, label: str, flops: float, where: str) -> Activation:
    size = aval.size * aval.dtype.itemsize
    return Activation(label, tuple(aval.shape), str(aval.dtype), size, flops, where)


def _where(eqn: Any) -> str:
    """File, line and function of the innermost line of this package that made an operation."""
    frames = eqn.source_info.traceback
    for frame in frames.frames if frames else ():
        file = Path(frame.file_name)
        if _PACKAGE in file.parents and file not in _OWN_FILES:
            return f"{file.name}:{frame.line_num} {frame.function_name.rsplit('.', 1)[-1]}"
    return ""
