"""What bypasses work on."""

import jax

Outputs = dict[str, jax.Array]  # projection (q, k, v, o, gate, up or down) -> its output [T, d_out]
