"""Prefix tuning (arXiv 2101.00190) as a bypass of attention: every query also attends to an
adapter's own keys and values, in each layer.

What attention returns for the sequence's own tokens, with the logarithm of its softmax's
denominator, is joined with the attention to the prefix: both parts are weighted by their share of
the denominator. Prefix keys are not rotated, and the sequence's first token has position P, as with
PEFT on transformers.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.spec import AttentionSpec, MixerSpec
from flexllm_jax.peft.adapter import AdapterConfig, AdapterError, Weights
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import from_stored

SITE = "prefix"


@dataclass(frozen=True)
class PrefixConfig(AdapterConfig):
    """PEFT's prefix tuning: `num_virtual_tokens` keys and values in each layer."""

    num_virtual_tokens: int

    kind: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        count = self.num_virtual_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise AdapterError(f"num_virtual_tokens={count!r} must be a positive integer")

    @property
    def prefix_tokens(self) -> int:
        """Positions taken before the first token."""
        return self.num_virtual_tokens

    def scale(self, layer: int, site: str) -> float:
        """Tokens of the prefix."""
        return float(self.num_virtual_tokens)

    def initialize(self, model: ModelConfig, seed: int) -> Weights:
        """Normal with deviation 1, as PEFT's embedding of the prefix."""
        weights = {}
        for layer in range(model.num_layers):
            random = np.random.default_rng([seed, layer])
            weights[layer, SITE] = {
                name: random.standard_normal(shape, np.float32)
                for name, shape in shapes(model, self.num_virtual_tokens).items()
            }
        return weights


def shapes(model: ModelConfig, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's keys and values."""
    shape = (tokens, model.num_kv_heads, model.head_dim)
    return {"k": shape, "v": shape}


def unsupported(attention: MixerSpec) -> str | None:
    """What of a model's attention has no meaning here yet; None: nothing. transformers counts the
    prefix among the keys of a window, and caps its scores too."""
    if not isinstance(attention, AttentionSpec):
        return "layers that do not attend"
    if attention.options.window is not None:
        return "a sliding window"
    if attention.rope is not None and attention.rope.reorders(attention.head_dim):
        return "rotary embeddings of some elements or of neighbours"
    return None if attention.options.soft_cap is None else "a soft cap of scores"


def join_prefix(
    weights: dict,
    lengths: Float[Array, " A"],
    adapter: Int[Array, " T"],
    query: Float[Array, "T N H"],
    attended: Float[Array, "T N H"],
    lse: Float[Array, "T N"],
    options: AttentionOptions = FULL,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention to the sequence's own tokens, joined with that to the prefix.

    Args:
        weights: {"k", "v"} [A, P, K, H].
        lengths: tokens of each adapter's prefix; 0 for adapters of other kinds.
        adapter: row of the weights for each token, or -1.
        query: rotated queries.
        attended: what attention to the sequence's own tokens returned.
        lse: logarithm of its softmax's denominator, float32.
        options: of that attention; what `unsupported` names is not computed.

    Returns:
        attended and lse of both together; those of tokens without a prefix as they were.
    """
    scores = _scores(weights, lengths, adapter, query, options)
    joined = (adapter >= 0) & (lengths[adapter] > 0)
    denominator = jax.nn.logsumexp(scores, axis=-1).reshape(lse.shape)
    total = jnp.where(joined[:, None], jnp.logaddexp(lse, denominator), lse)
    from_prefix = jnp.einsum(
        "tkgp,pkh->tkgh",
        _share(scores, total),
        _flat(weights["v"]),
        precision=jax.lax.Precision.HIGHEST,
    )
    own = attended.astype(jnp.float32) * jnp.exp(lse - total)[..., None]
    both = (own + from_prefix.reshape(own.shape)).astype(attended.dtype)
    return jnp.where(joined[:, None, None], both, attended), total


def join_prefix_backward(
    weights: dict,
    lengths: Float[Array, " A"],
    adapter: Int[Array, " T"],
    query: Float[Array, "T N H"],
    attended: Float[Array, "T N H"],
    lse: Float[Array, "T N"],
    d_attended: Float[Array, "T N H"],
    options: AttentionOptions = FULL,
) -> tuple[Float[Array, "T N H"], dict]:
    """What `join_prefix` adds to the query's gradient, and the gradients of the prefix.

    attended and lse are those that `join_prefix` returned. With p the share of a prefix token:
    dv = p^T dO, ds = p (dO v^T - sum(dO * O)), dq = ds k scale, dk = ds^T q scale.
    """
    exact = jax.lax.Precision.HIGHEST
    scores = _scores(weights, lengths, adapter, query, options)
    heads, share = scores.shape[1], _share(scores, lse)
    d_out = _grouped(d_attended.astype(jnp.float32), heads)
    mean = jnp.sum(d_out * _grouped(attended.astype(jnp.float32), heads), axis=-1)
    k, v = _flat(weights["k"]), _flat(weights["v"])
    d_share = jnp.einsum("tkgh,pkh->tkgp", d_out, v, precision=exact)
    scale = options.scale_of(query.shape[-1])
    d_scores = share * (d_share - mean[..., None]) * scale
    q = _grouped(query.astype(jnp.float32), heads)
    d_query = jnp.einsum("tkgp,pkh->tkgh", d_scores, k, precision=exact)
    gradients = {
        "k": jnp.einsum("tkgp,tkgh->pkh", d_scores, q, precision=exact),
        "v": jnp.einsum("tkgp,tkgh->pkh", share, d_out, precision=exact),
    }
    return d_query.reshape(query.shape).astype(query.dtype), {
        name: gradient.reshape(weights[name].shape) for name, gradient in gradients.items()
    }


def _scores(weights, lengths, adapter, query, options) -> Float[Array, "T K G AP"]:
    """Scores of all adapters' prefixes, -inf for those that are not the token's own."""
    rows, tokens, heads, size = weights["k"].shape
    scale = options.scale_of(size)
    scores = jnp.einsum(
        "tkgh,pkh->tkgp",
        _grouped(query.astype(jnp.float32), heads),
        _flat(weights["k"]),
        precision=jax.lax.Precision.HIGHEST,
    )
    row, place = jnp.divmod(jnp.arange(rows * tokens), tokens)
    own = (row == adapter[:, None]) & (place < lengths[row])
    return jnp.where(own[:, None, None], scores * scale, -jnp.inf)


def _share(
    scores: Float[Array, "T K G AP"], total: Float[Array, "T N"]
) -> Float[Array, "T K G AP"]:
    """Softmax weights with a given logarithm of the denominator; 0 where the score is -inf."""
    shares = jnp.exp(scores - total.reshape(*scores.shape[:3], 1))
    return jnp.where(scores > -jnp.inf, shares, 0.0)


def _flat(values: Float[Array, "A P K H"]) -> Float[Array, "AP K H"]:
    return from_stored(values).astype(jnp.float32).reshape(-1, *values.shape[2:])


def _grouped(values: Float[Array, "T N H"], heads: int) -> Float[Array, "T K G H"]:
    return values.reshape(values.shape[0], heads, -1, values.shape[-1])
