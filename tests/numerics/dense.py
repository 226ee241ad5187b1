"""A decoder as one would write it on a blackboard: a whole sequence at once, no pages, no slices.

It shares no code with the engine. Its gradients with respect to an adapter are what token-level
finetuning must arrive at; run it in float64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def _norm(x, weight, eps):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rotary_frequencies(rope, head_dim):
    half = head_dim // 2
    frequency = rope.theta ** (-np.arange(half) / half)
    scaling = rope.scaling
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    original = scaling.original_max_position_embeddings
    long, short = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    blend = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequency / scaling.factor + blend * frequency
    scaled = np.where(wavelength > long, frequency / scaling.factor, between)
    return np.where(wavelength < short, frequency, scaled)


def _rotate(x, angles):  # x [N, T, H]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def logits(config, params, adapter, scales, tokens):
    """Logits [T, V] of one sequence.

    `adapter`: {(layer, module): {"a", "b"}}; `scales`: {(layer, module): float}.
    """

    def project(i, name, x):
        own = params["layers"][i][name]
        y = x @ own["kernel"] + own.get("bias", 0.0)
        if (i, name) in adapter:
            y += scales[i, name] * (x @ adapter[i, name]["a"]) @ adapter[i, name]["b"]
        return y

    length, eps = len(tokens), config.layers[0].norm.eps
    place = np.arange(length)
    behind = place[:, None] - place  # of the key, behind the query
    x = params["embed"]["weight"][np.asarray(tokens)]
    for i, (layer, spec) in enumerate(zip(params["layers"], config.layers, strict=True)):
        attention = spec.mixer
        options = attention.options
        visible = (behind >= 0) & (behind < (options.window or length))
        h = _norm(x, layer["pre_attn_norm"]["weight"], eps)
        q, k, v = (
            project(i, name, h).reshape(length, -1, attention.head_dim).swapaxes(0, 1)
            for name in ("q", "k", "v")
        )
        if attention.qk_norm:
            q = _norm(q, layer["q_norm"]["weight"], eps)
            k = _norm(k, layer["k_norm"]["weight"], eps)
        group = q.shape[0] // k.shape[0]
        if attention.rope is not None:
            angles = np.outer(place, _rotary_frequencies(attention.rope, attention.head_dim))
            q, k = _rotate(q, angles), _rotate(k, angles)
        k, v = (jnp.repeat(part, group, axis=0) for part in (k, v))
        scale = options.scale or 1 / math.sqrt(attention.head_dim)
        scores = scale * (q @ k.swapaxes(1, 2))
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        x = x + project(i, "o", (weights @ v).swapaxes(0, 1).reshape(length, -1))
        h = _norm(x, layer["pre_mlp_norm"]["weight"], eps)
        inner = jax.nn.silu(project(i, "gate", h)) * project(i, "up", h)
        x = x + project(i, "down", inner)
    head = params["embed" if config.head.tied else "head"]["weight"]
    return _norm(x, params["norm"]["weight"], eps) @ head.T


def loss(config, params, scales, sequences, adapter):
    """Cross-entropy summed over the labels of (tokens, loss mask) sequences."""
    total = 0.0
    for tokens, mask in sequences:
        logprobs = jax.nn.log_softmax(logits(config, params, adapter, scales, tokens), axis=-1)
        ahead = logprobs[np.arange(len(tokens) - 1), np.asarray(tokens)[1:]]
        total -= jnp.sum(jnp.where(np.asarray(mask)[1:], ahead, 0.0))
    return total
