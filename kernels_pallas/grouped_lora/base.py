"""The contract of the grouped low-rank product, and its XLA reference.

The reference multiplies every token with every adapter's A, keeps the rank rows of the token's own
adapter, and multiplies with all B at once: two dense products, exact, and differentiable by JAX
itself. It costs in proportion to the slots of the bank, which is right for a few adapters; the work
for a token of no adapter is zeros.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_lora(
    x: Float[Array, "T D"],
    a: Float[Array, "A D R"],
    b: Float[Array, "A R E"],
    scale: Float[Array, " A"],
    adapter: Int[Array, " T"],
) -> Float[Array, "T E"]:
    """scale[i] * (x @ a[i]) @ b[i] with i = adapter[t] for each token t; zero where adapter[t] < 0.

    Args:
        x: inputs of the base projection.
        a: down projections of all adapters; adapters of a smaller rank are padded with zeros.
        b: up projections.
        scale: LoRA's alpha / r (or alpha / sqrt(r)) of each adapter; float32.
        adapter: row of a, b and scale for each token, or -1; int32.

    Returns:
        The adapters' contribution, in x's dtype. Differentiable in x, a and b.
    """
    num_adapters, _, rank = a.shape
    shrunk = jnp.einsum("td,adr->tar", x, a.astype(x.dtype), preferred_element_type=jnp.float32)
    own = adapter[:, None] == jnp.arange(num_adapters)
    shrunk = jnp.where(own[:, :, None], shrunk * scale[:, None], 0.0).astype(x.dtype)
    expanded = b.astype(x.dtype).reshape(num_adapters * rank, -1)
    return shrunk.reshape(-1, num_adapters * rank) @ expanded
