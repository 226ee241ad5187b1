"""A decoder layer over one whole sequence, as one differentiable function of the engine's kernels.

The engine never runs it: its forward is a step's, and its backward is cut in units. `layer_graph`
traces it, and experiments measure what a framework would keep of it: it is the same computation.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flexllm_jax.models.bypass import BypassFunction
from flexllm_jax.models.decoder import Tap
from flexllm_jax.models.mixers.attention import sinks_of
from flexllm_jax.models.mixers.gated_delta import rule_inputs
from flexllm_jax.models.rope import Angles
from flexllm_jax.models.spec import GatedDeltaSpec
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.attention_backward import attention_backward
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.gated_delta import CHUNK, conv_window, delta_window, delta_window_backward
from kernels_pallas.layer_options import AttentionOptions
from kernels_pallas.layer_passes import rotate
from kernels_pallas.ragged_paged_attention import ragged_paged_attention

PAGES = "kv"  # the name of keys and values, which are in their pages
# Operations of the trace that are not looked into.
ATTENTION = ("attention_forward", "attention_gradient")
DELTA = ("delta_forward", "delta_gradient")

MakeBypass = Callable[[Any], BypassFunction]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def causal_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    sinks: Float[Array, " N"] | None,
    adapter: Any,
    bypass: MakeBypass,
    options: AttentionOptions,
    backend: Backend,
) -> Float[Array, "T NH"]:
    """Attention of one whole sequence, and its bypass, with the engine's kernels."""
    return _forward(q, k, v, sinks, adapter, bypass, options, backend)[0]


@partial(jax.jit, static_argnums=(4, 5))
def attention_forward(q, k, v, sinks, options: AttentionOptions, backend: Backend):
    """One operation of the trace."""
    tokens, pages = q.shape[0], (_paged(k), _paged(v))
    zero, one = jnp.int32(0), jnp.int32(1)
    table = jnp.arange(pages[0].shape[0], dtype=jnp.int32)[None]
    starts, lengths = jnp.array([0, tokens], jnp.int32), jnp.array([tokens], jnp.int32)
    return ragged_paged_attention(
        *(q, *pages, starts, lengths, table, zero, one),
        sinks=sinks,
        options=options,
        backend=backend,
    )


@partial(jax.jit, static_argnums=(6, 7))
def attention_gradient(q, k, v, out, lse, d_out, options: AttentionOptions, backend: Backend):
    """One operation of the trace."""
    slots = jnp.arange(q.shape[0], dtype=jnp.int32)
    starts = jnp.zeros_like(slots)
    zeros = jnp.zeros(k.shape, jnp.float32)
    dq, dk, dv = attention_backward(
        q,
        _paged(k),
        _paged(v),
        slots,
        starts,
        jnp.stack([starts, starts]),
        jnp.int32(0),
        out,
        lse,
        d_out,
        zeros,
        zeros,
        options=options,
        backend=backend,
    )
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _paged(x: jax.Array) -> jax.Array:
    page_size = math.gcd(x.shape[0], 64)
    return x.reshape(-1, page_size, *x.shape[1:])


def _forward(q, k, v, sinks, adapter, bypass, options, backend):
    # The names reach the arrays that the backward reads.
    k, v = checkpoint_name(k, PAGES), checkpoint_name(v, PAGES)
    out, lse = attention_forward(q, k, v, sinks, options, backend)
    if isinstance(made := bypass(adapter), Bypass):
        out, lse = made.attend(q, out, lse, options)
    # Flat, as the projection reads it, so that both keep the same array.
    out = checkpoint_name(out.reshape(q.shape[0], -1), "attended")
    return out, (q, k, v, sinks, adapter, out, checkpoint_name(lse, "attended"))


def _backward(bypass, options, backend, residuals, d_out):
    q, k, v, sinks, adapter, out, lse = residuals
    out, d_out = out.reshape(q.shape), d_out.reshape(q.shape)
    dq, dk, dv = attention_gradient(q, k, v, out, lse, d_out, options, backend)
    d_sinks = None
    if sinks is not None:  # the share of a sink, whose value is zero, times what the others lose
        delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        d_sinks = -jnp.sum(jnp.exp(sinks - lse) * delta, axis=0).astype(sinks.dtype)
    if not isinstance(made := bypass(adapter), Bypass):
        return dq, dk, dv, d_sinks, jax.tree.map(jnp.zeros_like, adapter)
    dq, gradients = made.attend_backward(dq, q, out, lse, d_out, options)
    gradients = jax.tree.map(lambda g: g[None], gradients)  # the bypass is of one layer
    weights, pull = jax.vjp(lambda adapter: _weights(bypass(adapter)), adapter)
    return dq, dk, dv, d_sinks, pull(jax.tree.map(jnp.zeros_like, weights) | gradients)[0]


def _weights(bypass: BypassFunction) -> dict:
    assert isinstance(bypass, Bypass)
    return bypass.weights


causal_attention.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def delta_of_sequence(q, k, v, log_decay, beta, backend: Backend) -> Float[Array, "T Hv dv"]:
    """The gated delta rule over one whole sequence, with the engine's kernels."""
    return delta_forward(q, k, v, log_decay, beta, backend)


@partial(jax.jit, static_argnums=5)
def delta_forward(q, k, v, log_decay, beta, backend: Backend):
    """One operation of the trace."""
    return delta_window(q, k, v, log_decay, beta, *_from_zeros(k, v), backend=backend)[0]


@partial(jax.jit, static_argnums=6)
def delta_gradient(q, k, v, log_decay, beta, d_out, backend: Backend):
    """One operation of the trace."""
    rest = _from_zeros(k, v)
    return delta_window_backward(
        *(q, k, v, log_decay, beta, *rest, d_out, jnp.zeros_like(rest[-1])), backend=backend
    )[:5]


def _from_zeros(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens, heads, value_dim = v.shape
    state = jnp.zeros((heads, k.shape[-1], value_dim), jnp.float32)
    return jnp.arange(tokens) == 0, jnp.ones(tokens, bool), state


def _delta_backward(backend, residuals, d_out):
    return delta_gradient(*residuals, d_out, backend)


delta_of_sequence.defvjp(
    lambda *arguments: (delta_of_sequence(*arguments), arguments[:5]), _delta_backward
)


def delta_flops(label: str, keys: tuple[int, ...], values: tuple[int, ...]) -> float:
    """FLOPs of one of `DELTA` in its chunk form, whose products are of a token with its chunk (of
    queries and keys, of keys, of the triangle with keys, of both with values) and with the state
    (three times); two and a half times that backward."""
    (_, _, key_dim), (tokens, heads, value_dim) = keys, values
    forward = 2.0 * tokens * heads * (CHUNK * (3 * key_dim + 2 * value_dim) / 2)
    forward += 6.0 * tokens * heads * key_dim * value_dim
    return forward if label == DELTA[0] else 2.5 * forward


def whole_layer(
    layer: Any,
    x: Float[Array, "T D"],
    angles: Angles | None,
    adapter: Any,
    bypass: MakeBypass,
    tap: Tap,
    backend: Backend = XLA,
    own: Float[Array, "T E"] | None = None,
) -> Float[Array, "T D"]:
    """A `DecoderLayer`'s output for one whole sequence; `bypass` makes its bypass of `adapter`.
    angles: None where the layer does not attend. own: what tokens have for this layer alone. A
    layer that reads the keys and values of another reads zeros here."""
    made = bypass(adapter)
    factor, spec = angles and angles.query_factor, layer.spec.mixer
    projected, gate, x = layer.project(x, made, tap, query_factor=factor)
    mixed: Any
    if isinstance(spec, GatedDeltaSpec):
        u, b, a = projected
        before = jnp.zeros((spec.width - 1, u.shape[1]), u.dtype)
        first = jnp.arange(u.shape[0]) == 0
        convolved = conv_window(u, layer.conv.weight[...], before, first)
        mixed = delta_of_sequence(*rule_inputs(layer, convolved, b, a), backend)
    else:
        assert angles is not None
        q, *kept = projected
        if not spec.own_keys:
            kept = [jnp.zeros((q.shape[0], spec.kv_heads, spec.head_dim), q.dtype)] * 2
        q, k = (rotate(heads, angles.rotation) for heads in (q, kept[0]))
        sinks = sinks_of(layer)
        mixed = causal_attention(q, k, kept[1], sinks, adapter, bypass, spec.options, backend)
    return layer.after_mixing(x, mixed, gate, made, tap, own=own)
