"""Dropout of what LoRA reads, as PEFT trains with it: of a module's input x, each element is zero
with probability p, and else x / (1 - p).

A mask is a hash and no state: whether element f of what module m of layer l reads is kept for a
token is decided by (the token's key, l, m, f) alone. So a microbatch has the same masks in whatever
steps, units and devices its tokens fall, and the backward draws them again instead of reading them.
The functions take numpy's functions or jax.numpy's, so that a test can hand torch the same masks.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from flexllm_jax.models.collectives import Axes
from flexllm_jax.peft.adapter import TARGET_MODULES

_MODULES = tuple(TARGET_MODULES.values())
_GOLDEN = np.uint32(0x9E3779B9)  # odd, near 2**32 / golden ratio: counters far apart


def token_keys(sequence: tuple[int, ...], length: int) -> UInt[np.ndarray, " T"]:
    """Keys of the tokens of a sequence, which `sequence`, numbers from 0, tells from all others."""
    (key,) = np.random.SeedSequence(sequence).generate_state(1)
    return _mix(key + np.arange(length, dtype=np.uint32) * _GOLDEN)


def kept(key: Any, layer: Any, module: str, feature: Any, rate: Any, xp: ModuleType = jnp) -> Array:
    """Which features (numbers [D], of those that the module reads) a token keeps: bool [T, D].
    `rate`: p of each token [T]."""
    layers_before = xp.asarray(layer).reshape(1).astype(xp.uint32)
    site = layers_before * np.uint32(len(_MODULES)) + np.uint32(1 + _MODULES.index(module))
    own = _mix(key + site * _GOLDEN)
    bits = _mix(own[:, None] + xp.asarray(feature).astype(xp.uint32) * _GOLDEN)
    uniform = (bits >> np.uint32(8)).astype(xp.float32) * np.float32(2**-24)
    return uniform >= rate[:, None]


def _mix(x: Any) -> Any:
    """MurmurHash3's last step: every bit of a 32-bit number depends on all of them."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


@dataclass(frozen=True)
class Dropout:
    """The dropout of one layer over a batch of tokens.

    key: of each token. rate: p of each, 0 for those that nothing is dropped of. axes: those that
    the model is split over.
    """

    key: UInt[Array, " T"]
    rate: Float[Array, " T"]
    layer: Any
    axes: Axes = ()

    def factors(self, module: str, width: int, *, split: bool = False) -> Float[Array, "T D"]:
        """What the input of a module is multiplied with; `split`: of each device's own features."""
        first = lax.axis_index(self.axes) * width if split and self.axes else 0
        kept_ = kept(self.key, self.layer, module, first + jnp.arange(width), self.rate)
        return jnp.where(kept_, 1 / (1 - self.rate[:, None]), 0.0)

    def __call__(
        self, x: Float[Array, "T D"], module: str, *, split: bool = False
    ) -> Float[Array, "T D"]:
        """The input of a module with dropout, rounded once."""
        factors = self.factors(module, x.shape[1], split=split)
        return (x.astype(jnp.float32) * factors).astype(x.dtype)


class JobDropout(NamedTuple):
    """What the device knows of the dropout of a microbatch: the key of each token slot [S] uint32
    (`token_keys`), and the job's p, a float32 scalar."""

    key: Any
    rate: Any

    @classmethod
    def shapes(cls, slots: int) -> "JobDropout":
        """For so many token slots."""
        return cls(
            jax.ShapeDtypeStruct((slots,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.float32)
        )

    def of_layer(self, slot: Int[Array, " T"], layer: Any, axes: Axes) -> Dropout:
        """Over the tokens of these slots; those past the end are no finetuning tokens."""
        inside = slot < len(self.key)
        key = self.key[jnp.minimum(slot, len(self.key) - 1)]
        return Dropout(key, jnp.where(inside, self.rate, 0.0), layer, axes)
