"""All families as one decoder; their differences are fields of `spec.LayerSpec` and ModelConfig.

A layer is two functions with its mixing between them, because that reads what the step
program owns, and because token-level finetuning differentiates the two halves apart. The same code
runs forward and backward:

- `bypass(x, outputs, join)` adds what an adapter contributes to the outputs, by name, of the
  projections that read `x`; `join` makes them whole where the model is split over devices;
- `tap(name, value)` sees the activations that the backward may want: the forward records them, the
  backward puts the recorded ones in their place (`rows.Recalled`). What was needed only to compute
  the value of a recorded one is then not computed again; what its gradient needs still is.

`split` turns the modules into plain pytrees once; the step programs merge them back while tracing.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flexllm_jax.models.bypass import BypassFunction, no_bypass, whole_already
from flexllm_jax.models.collectives import (
    Axes,
    argmax_columns,
    gather_columns,
    rows_of,
    share_input,
    sum_outputs,
)
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.layers import Linear, RMSNorm, unit_norm
from flexllm_jax.models.mixers import Tap, mixer_of
from flexllm_jax.models.rope import Angles, rotary_angles
from flexllm_jax.models.spec import AttentionSpec, LayerSpec, NormSpec
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import Ahead
from kernels_pallas.layer_passes import gated
from kernels_pallas.rows import Recalled, as_array


def no_tap(name: str, value: jax.Array) -> jax.Array:
    """The tap of a layer of which nothing is recorded or recalled."""
    return value


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a number that is not rounded to its dtype before."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class DecoderLayer(nnx.Module):
    """Attention and a gated feed-forward network, each after a norm and with a residual.

    With `axes` it is what one device has of a layer split over them: two all-reduces forward (after
    o and down) and two backward (of the gradients of the inputs of q, k, v and of gate, up).
    """

    def __init__(
        self,
        d_model: int,
        spec: LayerSpec,
        dtype: jnp.dtype,
        axes: Axes = (),
        backend: Backend = XLA,
    ):
        mixer, norm = mixer_of(spec.mixer), partial(RMSNorm, spec=spec.norm, dtype=dtype)
        pre, post = spec.norm.pre, spec.norm.post
        behind = replace(spec.norm, eps=spec.norm.post_eps or spec.norm.eps)
        self.pre_attn_norm = norm(d_model) if pre else None
        self.pre_mlp_norm = norm(d_model) if pre and not spec.parallel else None
        self.post_attn_norm, self.post_mlp_norm = (
            norm(d_model, spec=behind) if post else None for _ in range(2)
        )
        biased, out = spec.mixer.biased, spec.mixer.output
        for name, width in spec.mixer.projected.items():
            setattr(self, name, Linear(d_model, width, dtype, name in biased))
        setattr(self, out, Linear(spec.mixer.inner, d_model, dtype, out in biased, axes))
        mixer.add_parameters(self, spec.mixer, norm, dtype)
        if spec.token_width is not None:
            self.token_gate = Linear(d_model, spec.token_width, dtype)
            self.token_projection = Linear(spec.token_width, d_model, dtype)
            self.token_norm = norm(d_model)
        if spec.scalar:
            self.scalar = nnx.Param(jnp.ones((1,), dtype))
        for name, width in spec.mlp.projected.items():
            setattr(self, name, Linear(d_model, width, dtype))
        self.down = Linear(spec.mlp.d_ff, d_model, dtype)
        self.spec, self.axes, self.backend = spec, axes, backend

    def project(
        self,
        x: Float[Array, "T D"] | Recalled,
        bypass: BypassFunction = no_bypass,
        tap: Tap = no_tap,
        y: Float[Array, "T D"] | None = None,
        query_factor: Float[Array, "T 1 1"] | None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, Float[Array, "T D"]]:
        """What of x + y is mixed, and the gate of what comes out (`Mixer.inputs`); and the input as
        `after_mixing` takes it: through here go all of its gradients."""
        names = self.spec.mixer.projected
        x, (*readers, h) = self._normed(
            self.pre_attn_norm, x, y, 1 + len(names), bypass.ahead(names)
        )
        outputs = self._projections(names, h, readers, bypass)
        inputs, gate = mixer_of(self.spec.mixer).inputs(self, outputs, tap, query_factor)
        return inputs, gate, x

    def _projections(
        self,
        names: Collection[str],
        h: Float[Array, "T D"],
        inputs: list[Float[Array, "T D"]],
        bypass: BypassFunction,
    ) -> dict[str, jax.Array]:
        """The outputs of projections that read the same, each from an array of its own, with what
        an adapter that reads `h` adds."""
        outputs = {name: getattr(self, name)(x) for name, x in zip(names, inputs, strict=True)}
        return bypass(h, outputs)

    def after_mixing(
        self,
        x: Float[Array, "T D"] | Recalled,
        mixed: Float[Array, "T N H"] | Recalled,
        gate: jax.Array | None,
        bypass: BypassFunction = no_bypass,
        tap: Tap = no_tap,
        recalled: Collection[str] = (),
        own: Float[Array, "T E"] | None = None,
    ) -> Float[Array, "T D"]:
        """The layer's output, from its input, what the mixing returned, its gate, and what tokens
        have for this layer alone; `recalled`: names of what the tap replaces."""
        x, y = self.summands(x, mixed, gate, bypass, tap, recalled, own)
        return x if y is None else x + as_array(y)

    def summands(
        self,
        x: Float[Array, "T D"] | Recalled,
        mixed: Float[Array, "T N H"] | Recalled,
        gate: jax.Array | None,
        bypass: BypassFunction = no_bypass,
        tap: Tap = no_tap,
        recalled: Collection[str] = (),
        own: Float[Array, "T E"] | None = None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"] | None]:
        """What `after_mixing` adds up: the next layer's norm can do so as it reads them. None:
        there is nothing to be added."""

        join = partial(sum_outputs, axes=self.axes) if self.axes else whole_already
        mixed, out = mixer_of(self.spec.mixer).gated(self, mixed, gate), self.spec.mixer.output
        y = bypass(mixed, {out: getattr(self, out)(as_array(mixed))}, join)[out]
        y = self._branch(self.post_attn_norm, y, "attention_branch", tap)
        names = self.spec.mlp.projected
        readers = 1 + len(names)
        if self.spec.parallel:
            x, normed = self._normed(self.pre_attn_norm, x, None, readers)
            x = x + as_array(y)
        elif "residual" in recalled:  # then the norm is of what was recalled
            x = tap("residual", as_array(x) + as_array(y))
            x, normed = self._normed(self.pre_mlp_norm, x, None, readers)
        else:
            x, normed = self._normed(self.pre_mlp_norm, x, y, readers, bypass.ahead(names))
            x = as_array(tap("residual", x))
        *inputs, h = normed
        outputs = tuple(self._projections(names, h, inputs, bypass).values())
        if self.spec.mlp.fused:
            gate, up = jnp.split(as_array(outputs[0]), 2, axis=1)
        else:
            gate, up = outputs
        factors = tap("gate", gate), tap("up", up)
        inner, low = gated(
            *(*factors, self.backend, 2, self.spec.mlp.activation), bypass.ahead(["down"])
        )
        y = bypass(low, {"down": self.down(inner)}, join)["down"]
        y = self._branch(self.post_mlp_norm, y, "mlp_branch", tap)
        if own is not None:
            x = x + as_array(y)
            y = self._token_branch(x, own, bypass, tap)
        if not self.spec.scalar:
            return x, y
        return (x + as_array(y)) * self.scalar[...], None

    def _token_branch(
        self,
        x: Float[Array, "T D"],
        own: Float[Array, "T E"],
        bypass: BypassFunction,
        tap: Tap,
    ) -> Float[Array, "T D"]:
        """What tokens have for this layer alone, in the measure that the stream asks for it."""
        gate = bypass(x, {"token_gate": self.token_gate(x)})["token_gate"]
        factors = tap("token_gate", gate), as_array(own)
        inner = gated(*factors, self.backend, 1, self.spec.mlp.activation)[0]
        name = "token_projection"
        y = bypass(inner, {name: self.token_projection(inner)})[name]
        return self.token_norm(as_array(tap("token_branch", y)))

    def _branch(
        self, norm: RMSNorm | None, y: Float[Array, "T D"], name: str, tap: Tap
    ) -> Float[Array, "T D"]:
        """What is added to the residual, from what attention or the feed-forward network gave."""
        if norm is not None:
            y = norm(as_array(tap(name, y)))
        factor = self.spec.residual_scale
        return y if factor == 1.0 else scaled(as_array(y), factor)

    def _normed(
        self,
        norm: RMSNorm | None,
        x: Float[Array, "T D"] | Recalled,
        y: Float[Array, "T D"] | None,
        readers: int,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "T D"], list[Float[Array, "T D"]]]:
        """x + y, and its norm for each of its readers, of which the last begins with what is
        `ahead`; where the model is split over devices, the gradients of all are added up before
        they are shared."""
        if norm is None:
            x = as_array(x) if y is None else as_array(x) + as_array(y)
            return x, [share_input(x, self.axes)] * readers
        if not self.axes:
            x, *normed = norm.join(x, y, self.backend, readers, ahead)
            return x, normed
        x, h = norm.join(x, y, self.backend, 1)
        return x, [share_input(h, self.axes)] * readers


@dataclass(frozen=True)
class Decoder:
    """The decoder's functions over plain parameter pytrees (the layout of `hf_weights`).

    With `axes`, over one device's part of them; `config` is then what that device has. `backend`:
    which kernels to use.
    """

    config: ModelConfig
    dtype: jnp.dtype
    axes: Axes = ()
    backend: Backend = XLA

    def layer(self, params: dict, spec: LayerSpec) -> DecoderLayer:
        """A layer's module holding these parameters; call it while tracing."""
        graph = _layer_graph(self.config.d_model, spec, self.dtype, self.axes, self.backend)
        return nnx.merge(graph, params)

    def taps(self, spec: LayerSpec) -> dict[str, int]:
        """Name and width of each array of a layer that the forward may save for the backward:
        attention's output, and what the layer taps."""
        d_model = self.config.d_model
        widths = {"attended": spec.mixer.inner} if isinstance(spec.mixer, AttentionSpec) else {}

        def tap(name: str, value: jax.Array) -> jax.Array:
            widths[name] = value.shape[-1]
            return value

        def both_halves(x, mixed, own):
            layer = DecoderLayer(d_model, spec, self.dtype)
            _, gate, x = layer.project(x, tap=tap)
            return layer.after_mixing(x, mixed, gate, tap=tap, own=own)

        widths_in = (d_model, spec.mixer.inner, spec.token_width)
        rows = [None if n is None else jax.ShapeDtypeStruct((1, n), self.dtype) for n in widths_in]
        jax.eval_shape(both_halves, *rows)
        return widths

    def embed(self, params: dict, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Token embeddings."""
        x = rows_of(params["embed"]["weight"], tokens, self.axes)
        if self.config.embed_norm is not None:
            x = unit_norm(x, self.config.embed_norm)
        scale = self.config.embed_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def token_inputs(
        self, params: dict, tokens: Int[Array, " T"], x: Float[Array, "T D"]
    ) -> list[Float[Array, "T E"] | None]:
        """What the tokens, of embeddings x, have for each layer alone: of E numbers, (norm(x W
        D^-0.5) + embedding E^0.5) 2^-0.5, as of Gemma 4. None where they have nothing."""
        width, layers = self.config.layers[0].token_width, self.config.num_layers
        if width is None:
            return [None] * layers
        own = params["token_inputs"]
        embedded = rows_of(own["embed"]["weight"], tokens, self.axes)
        embedded = embedded * jnp.asarray(width**0.5, x.dtype)
        projected = scaled(x @ own["projection"]["kernel"], self.config.d_model**-0.5)
        graph = _norm_graph(width, self.config.layers[0].norm, self.dtype)
        by_layer = (x.shape[0], layers, width)
        normed = nnx.merge(graph, own["norm"])(projected.reshape(by_layer))
        both = scaled(normed + embedded.reshape(by_layer), 2**-0.5)
        return list(jnp.unstack(both, axis=1))

    def angles(self, positions: Int[Array, " T"], spec: AttentionSpec) -> Angles:
        """Rotary angles of the positions in attention."""
        return rotary_angles(spec.rope, spec.head_dim, positions)

    def final_norm(self, params: dict, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """What the output head reads: normalized, and scaled as the logits are to be."""
        spec = self.config.final_norm or self.config.layers[-1].norm
        graph = _norm_graph(self.config.d_model, spec, self.dtype)
        norm = nnx.merge(graph, params["norm"])
        return scaled(norm.join(x, None, self.backend, 1)[1], self.config.head.scale)

    def head(self, params: dict) -> Float[Array, "V D"]:
        """The output head's rows; the embedding's when they are tied."""
        return params["embed" if self.config.head.tied else "head"]["weight"]

    def logits(
        self, params: dict, x: Float[Array, "T D"], bypass: BypassFunction = no_bypass
    ) -> Float[Array, "T V"]:
        """Float32 logits of last-layer outputs; the bypass is that of "head"."""
        return gather_columns(self._own_logits(params, x, bypass), self.axes)

    def most_likely(
        self, params: dict, x: Float[Array, "T D"], bypass: BypassFunction = no_bypass
    ) -> Int[Array, " T"]:
        """The token with the largest logit, the first of equals."""
        return argmax_columns(self._own_logits(params, x, bypass), self.axes).astype(jnp.int32)

    def _own_logits(
        self, params: dict, x: Float[Array, "T D"], bypass: BypassFunction
    ) -> jax.Array:
        h = self.final_norm(params, x)
        logits = jnp.einsum("td,vd->tv", h, self.head(params), preferred_element_type=jnp.float32)
        return self.config.head.cap(as_array(bypass(h, {"head": logits})["head"]))


@cache
def _layer_graph(
    d_model: int, spec: LayerSpec, dtype: jnp.dtype, axes: Axes, backend: Backend
) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(d_model, spec, dtype, axes, backend)))[0]


@cache
def _norm_graph(d_model: int, spec: NormSpec, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: RMSNorm(d_model, spec, dtype)))[0]
