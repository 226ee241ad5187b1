"""A decoder of every field that families set, in numpy and float64: one sequence at once, no pages.

Written to be changed: what a test of a family can see is what moves its logits when a field is
another. It follows `models/spec.py` and shares the frequencies of RoPE with the engine, no more.
"""

from typing import Any

import numpy as np

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.rope import RopeSpec, rotary_frequencies
from flexllm_jax.models.spec import AttentionSpec, GatedDeltaSpec, LayerSpec, NormSpec


def logits(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V]; params: float64 arrays in the engine's tree."""
    x = params["embed"]["weight"][tokens]
    if config.embed_norm is not None:
        x = _rms(x, config.embed_norm)
    x = x * config.embed_scale
    own = _token_inputs(config, params, tokens, x)
    kept: dict[str | None, tuple] = {}
    for i, (layer, spec) in enumerate(zip(params["layers"], config.layers, strict=True)):
        x = _layer(layer, spec, x, kept, None if own is None else own[:, i])
    norm = config.final_norm or config.layers[-1].norm
    head = params["embed" if config.head.tied else "head"]["weight"]
    return _capped(
        (_norm(x, params["norm"], norm) * config.head.scale) @ head.T, config.head.soft_cap
    )


def _token_inputs(config, params, tokens, x):
    width = config.layers[0].token_width
    if width is None:
        return None
    own = params["token_inputs"]
    shape = (len(tokens), config.num_layers, width)
    projected = (x @ own["projection"]["kernel"] * config.d_model**-0.5).reshape(shape)
    table = own["embed"]["weight"][tokens].reshape(shape) * width**0.5
    return (_norm(projected, own["norm"], config.layers[0].norm) + table) * 2**-0.5


def _layer(layer: Any, spec: LayerSpec, x: np.ndarray, kept: dict, own: Any) -> np.ndarray:
    norm = spec.norm

    def before(name):
        return _norm(x, layer[name], norm) if norm.pre else x

    def branch(name, y):
        if norm.post:
            y = _norm(y, layer[name], norm, norm.post_eps)
        return y * spec.residual_scale

    mix = _delta if isinstance(spec.mixer, GatedDeltaSpec) else _attention
    h = before("pre_attn_norm")
    x = x + branch("post_attn_norm", mix(layer, spec, h, kept))
    if not spec.parallel:
        h = before("pre_mlp_norm" if "pre_mlp_norm" in layer else "pre_attn_norm")
    if spec.mlp.fused:
        gate, up = np.split(_linear(layer["gate_up"], h), 2, axis=1)
    else:
        gate, up = _linear(layer["gate"], h), _linear(layer["up"], h)
    act = _ACTIVATIONS[spec.mlp.activation]
    x = x + branch("post_mlp_norm", _linear(layer["down"], act(gate) * up))
    if spec.token_width is not None:
        inner = act(_linear(layer["token_gate"], x)) * own
        x = x + _norm(_linear(layer["token_projection"], inner), layer["token_norm"], norm)
    return x * layer["scalar"] if spec.scalar else x


def _attention(layer: Any, spec: LayerSpec, h: np.ndarray, kept: dict) -> np.ndarray:
    a: AttentionSpec = spec.mixer  # type: ignore[assignment]
    options, size, place = a.options, a.head_dim, np.arange(len(h))

    def projected(name):
        y = h @ layer[name]["kernel"]
        return y + layer[name]["bias"] if a.qkv_bias else y

    gate, k, v = None, None, None
    if a.fused:
        q, k, v = np.split(projected("qkv"), [a.inner, a.inner + a.kv_heads * size], axis=1)
    else:
        q = projected("q")
        if a.own_keys:
            k = projected("k")
            v = k if a.values == "keys" else projected("v")
    if q.shape[1] == 2 * a.inner:
        q, gate = (x.reshape(-1, a.inner) for x in np.split(_heads(q, 2 * size), 2, axis=-1))
        gate = gate if a.gate else None
    if a.gate_projection:
        gate = h @ layer["attention_gate"]["kernel"]

    def turned(x, name):
        if a.qk_norm == "projection":
            x = _norm(x, layer[name], spec.norm)
        x = _heads(x, size)
        if a.qk_norm == "head":
            x = _norm(x, layer[name], spec.norm)
        if a.qk_norm == "unit":
            x = _rms(x, spec.norm.eps)
        return x if a.rope is None else _rotated(x, a.rope, place)

    q = turned(q, "q_norm")
    if a.rope is not None and a.rope.growth is not None:
        beta, period = a.rope.growth
        q = q * (1 + beta * np.log1p(place // period))[:, None, None]
    if k is not None:
        v = _heads(v, size)
        kept[a.shared] = turned(k, "k_norm"), _rms(v, spec.norm.eps) if a.v_norm else v
    k, v = (np.repeat(x, a.heads // a.kv_heads, axis=1) for x in kept[a.shared])
    scores = np.einsum("qnh,knh->nqk", q, k) * options.scale_of(size)
    scores = _capped(scores, options.soft_cap)
    behind = place[:, None] - place
    visible = (behind >= 0) & (behind < (options.window or len(h)))
    weights = np.where(visible, np.exp(scores), 0.0)
    total = weights.sum(-1)
    if a.sinks:
        total = total + np.exp(layer["sinks"])[:, None]
    mixed = np.einsum("nqk,knh->qnh", weights / total[..., None], v).reshape(len(h), -1)
    if gate is not None:
        mixed = mixed * _sigmoid(gate)
    return mixed @ layer["o"]["kernel"] + (layer["o"]["bias"] if a.o_bias else 0.0)


def _rotated(x: np.ndarray, rope: RopeSpec, place: np.ndarray) -> np.ndarray:
    """The heads of x [T, N, H], with their pairs turned."""
    size = rope.rotated or x.shape[-1]
    angles = np.outer(place, np.asarray(rotary_frequencies(rope, x.shape[-1]), np.float64))
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    cos, sin = factor * np.cos(angles)[:, None], factor * np.sin(angles)[:, None]
    half = size // 2
    first, second = slice(0, half), slice(half, size)
    if rope.neighbours:
        first, second = slice(0, size, 2), slice(1, size, 2)
    turned = x.copy()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def _delta(layer: Any, spec: LayerSpec, h: np.ndarray, kept: dict) -> np.ndarray:
    """The gated delta rule token by token."""
    d: GatedDeltaSpec = spec.mixer  # type: ignore[assignment]
    *qkv, z, b, a = (_linear(layer[name], h) for name in d.projected)
    u, weight = np.concatenate(qkv, axis=1), layer["conv"]["weight"]
    padded = np.concatenate([np.zeros((d.width - 1, u.shape[1])), u])
    u = _silu(sum(padded[i : i + len(h)] * weight[i] for i in range(d.width)))
    keys = d.key_heads * d.key_dim
    q, k, v = np.split(u, [keys, 2 * keys], axis=1)
    group = d.value_heads // d.key_heads
    q, k = (np.repeat(_unit(_heads(x, d.key_dim)), group, axis=1) for x in (q, k))
    q, v = q * d.key_dim**-0.5, _heads(v, d.value_dim)
    beta = d.beta_scale * _sigmoid(b)
    step = np.log1p(np.exp(a + layer["decay"]["dt_bias"]))
    keep = np.exp(-np.exp(layer["decay"]["log_a"]) * step)
    state, out = np.zeros(d.state), np.zeros(v.shape)
    for t in range(len(h)):
        state = state * keep[t][:, None, None]
        error = v[t] - np.einsum("hkv,hk->hv", state, k[t])
        state = state + np.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    out = _norm(out, layer["out_norm"], d.norm).reshape(len(h), -1)
    return (out * _silu(z)) @ layer[d.output]["kernel"]


def _linear(part: Any, x: np.ndarray) -> np.ndarray:
    return x @ part["kernel"]


def _heads(x: np.ndarray, size: int) -> np.ndarray:
    return x.reshape(len(x), -1, size)


def _rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _norm(x: np.ndarray, part: Any, spec: NormSpec, eps: float | None = None) -> np.ndarray:
    if spec.centred:
        x = x - x.mean(axis=-1, keepdims=True)
    return _rms(x, spec.eps if eps is None else eps) * (part["weight"] + spec.offset)


def _capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}
