"""The layers that decoders are made of, as Flax modules over flat batches of tokens.

Numerics follow transformers: norms run in float32 and are cast back before their weight is applied.
Shapes are [T, ...]: a batch has no padding between its sequences.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flexllm_jax.models.collectives import Axes
from flexllm_jax.models.spec import NormSpec
from kernels_pallas.backend import MERGED_COLUMNS, Backend
from kernels_pallas.grouped_lora import Ahead
from kernels_pallas.layer_passes import add_norm, normed
from kernels_pallas.rows import Recalled, as_array


class Linear(nnx.Module):
    """y = x @ kernel (+ bias); a summand of it when d_in is split over mesh axes."""

    def __init__(
        self, d_in: int, d_out: int, dtype: jnp.dtype, bias: bool = False, axes: Axes = ()
    ):
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,), dtype))
        self.has_bias, self.axes, self.alone = bias, axes, d_out % MERGED_COLUMNS != 0

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """Apply the projection; the dtype is x's."""
        if self.alone:  # XLA would copy the weights of all that read x
            x = jax.lax.optimization_barrier(x)
        y = x @ self.kernel[...]
        if not self.has_bias:
            return y
        bias = self.bias[...]
        if self.axes:  # of the summands, one has the bias
            bias = jnp.where(jax.lax.axis_index(self.axes) == 0, bias, 0)
        return y + bias


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last axis; with the mean taken off before,
    it is LayerNorm (arXiv 1607.06450) without a bias."""

    def __init__(self, size: int, spec: NormSpec, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.spec = spec

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalize in float32; the result has x's dtype."""
        if self.spec.centred:
            return self._centred(x)
        return add_norm(x, None, self._weight, self.spec.eps)[1]

    def join(
        self,
        x: Float[Array, "T D"] | Recalled,
        y: Float[Array, "T D"] | None,
        backend: Backend,
        readers: int,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "T D"], ...]:
        """The residual x + y, and it normalized, for so many readers, of which the last begins
        with what is `ahead`: one pass, and one backward."""
        if self.spec.centred:  # XLA's: the pass has no kernel that takes the mean off
            x = as_array(x) if y is None else as_array(x) + as_array(y)
            return x, *[self._centred(x)] * readers
        return add_norm(x, y, self._weight, self.spec.eps, backend, readers, ahead)

    def _centred(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        return add_norm(wide, None, self._weight, self.spec.eps)[1].astype(x.dtype)

    def part(self, x: Float[Array, "T D"], mean_square: Float[Array, "T 1"]) -> Float[Array, "T D"]:
        """Normalize some of the columns, by the mean square of all; as `__call__` else."""
        wide = x.astype(jnp.float32)
        return normed(wide, mean_square, self._weight, self.spec.eps, x.dtype)

    @property
    def _weight(self) -> Float[Array, " D"]:
        weight = self.weight[...]
        if self.spec.late_cast:
            weight = weight.astype(jnp.float32)
        return 1.0 + weight if self.spec.offset else weight


def unit_norm(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """The norm without a weight."""
    return add_norm(x, None, jnp.ones(x.shape[-1:], x.dtype), eps)[1]
