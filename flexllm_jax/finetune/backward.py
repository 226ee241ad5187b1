"""Token-level backward (FlexLLM, section 6): one layer of the backward for one slice of tokens.

A microbatch is S token slots of packed sequences of one job (`buffers`). The forward leaves, for
every layer, its input and what the plan of saved activations names (`compile.remat`), and the last
layer's output in `stream`; a layer unit computes again what it needs of the rest. The microbatch is
cut in slices of `finetune.unit_tokens` tokens, and a unit works on one. A loss unit (`loss`) turns
a slice of `stream` from outputs into the loss's gradient; a layer unit takes a slice of `stream`
from the gradient of the layer's output to that of its input. The loss units come first, in any
order. Then come the layers, from the last to the first, and in each its slices, from the last to
the first, at any later time. Frozen weights are never differentiated, and no residual leaves a
program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.finetune.mixing import Slice, unit_mixing
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.spec import LayerSpec
from flexllm_jax.peft.adapter import TARGET_MODULES
from flexllm_jax.peft.bypass import Bypass
from flexllm_jax.peft.dropout import Dropout, JobDropout
from kernels_pallas.backend import Backend
from kernels_pallas.rows import Recalled, Rows, as_array, from_stored, to_stored

LORA_MODULES = frozenset(TARGET_MODULES.values())


def job_bypass(
    adapter: dict,
    is_token: Bool[Array, " U"],
    backend: Backend,
    dropout: Dropout | None = None,
    sums: dict | None = None,
    layer: Int[Array, ""] | int = 0,
) -> Bypass:
    """The bypass of one job's adapter in a layer of its stack ({"weights", "scales"}, see
    `layer_unit`) over tokens of which some are padding; sums: of its LoRA's gradients
    (`peft.lora.lora`)."""
    weights, scales = (
        jax.tree.map(lambda w: w[:, None], adapter[n]) for n in ("weights", "scales")
    )
    row = jnp.where(is_token, 0, -1)
    return Bypass(weights, scales, row, backend, dropout, sums, layer)


def layer_unit(
    decoder: Decoder,
    spec: LayerSpec,
    unit_tokens: int,
    columns: dict[str, slice],
    backend: Backend,
    layer_params: dict,
    adapter: dict,
    cache: dict,
    saved: dict,
    flow: dict,
    gradients: dict,
    table: Int[Array, "10 S"],
    index: Int[Array, ""],
    start: Int[Array, ""],
    dropout: JobDropout | None = None,
    layer_number: Int[Array, ""] | None = None,
) -> tuple[dict, dict]:
    """One layer of the backward for one slice of tokens.

    Args:
        decoder: the model's functions.
        spec: of the layer, static.
        unit_tokens: U, tokens of the slice, static.
        columns: the layer's of `saved_columns`, static.
        backend: which kernels to use, static.
        layer_params: the layer's frozen parameters.
        adapter: the job's adapter in the layer's stack: {"weights": site -> name -> float32
            [L, ...], "scales": site -> [L]}.
        cache: what the layer keeps of sequences: of attention its {"k", "v"} pages, or those of the
            layer whose keys it reads.
        saved: what the forward kept of this layer (`saved_shapes`).
        flow: `flow_shapes`; stream[start:start+U] goes in as the gradient of the layer's output
            and comes out as that of its input; donated.
        gradients: like the adapter's weights, added to; donated.
        table: the microbatch (`MicrobatchTable`).
        index: the layer's place in its stack.
        start: first token slot of the slice.
        dropout: of the microbatch, as the forward had it; None: of nothing.
        layer_number: which layer it is, for `dropout` alone.

    Returns:
        The updated flow and gradients.
    """
    layer = decoder.layer(layer_params, spec)

    def slice_of(x: jax.Array) -> jax.Array:
        return from_stored(lax.dynamic_slice_in_dim(x, start, unit_tokens))

    def with_slice(x: jax.Array, rows: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, to_stored(rows, x.dtype), start, axis=0)

    whole = MicrobatchTable.unpack(table)
    sequence_start = slice_of(whole.sequence_start)
    is_token = sequence_start < whole.label.shape[0]
    # Padding may hold NaN of an earlier microbatch: its rows read as zeros.
    kept = {
        name: Rows(saved["activations"], start, is_token, (where.start, where.stop))
        for name, where in columns.items()
    }

    def tap(name: str, value: jax.Array) -> jax.Array | Recalled:
        return Recalled(value, kept[name]) if name in kept else value

    def recalled(known: jax.Array | Rows, computed: jax.Array) -> jax.Array | Recalled:
        return Recalled(computed, known) if isinstance(known, Rows) else computed

    def differentiable(known: jax.Array | Rows) -> jax.Array:
        """What the gradient of what is known is of; of what was kept nobody reads it."""
        return jnp.zeros(known.shape, known.dtype) if isinstance(known, Rows) else known

    # LoRA adds its gradients to `sums` itself, in the half of the layer that has the module.
    own = {
        site: jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, index, 1), weights)
        for site, weights in adapter["weights"].items()
        if site not in LORA_MODULES
    }
    sums = {site: g for site, g in gradients.items() if site in LORA_MODULES}
    first, second = (
        {site: g for site, g in sums.items() if (site in spec.mixer.projected) == before}
        for before in (True, False)
    )
    dropped = None
    if dropout is not None:
        slots = start + jnp.arange(unit_tokens)
        dropped = dropout.of_layer(slots, layer_number, decoder.axes)

    def bypass(own: dict, sums: dict) -> Bypass:
        changed = adapter | {"weights": adapter["weights"] | own}
        return job_bypass(changed, is_token, backend, dropped, sums, index)

    mixing = unit_mixing(
        *(decoder, layer, Slice(whole, start, slice_of, is_token)),
        *(cache, saved, kept, bypass(own, {}), backend),
    )
    x, factor = kept["x"], mixing.query_factor
    (projected, gate, _), pull_inputs = jax.vjp(
        lambda own_x, *own: layer.project(recalled(x, own_x), bypass(*own), tap, None, factor),
        *(differentiable(x), own, first),
    )
    mixed, pull_mixing = mixing.forward(projected)
    token = as_array(kept["token"]) if "token" in kept else None
    _, pull_outputs = jax.vjp(
        lambda own_x, own_mixed, gate, *own: layer.after_mixing(
            *(recalled(x, own_x), recalled(mixed, own_mixed), gate, bypass(*own), tap, kept, token)
        ),
        *(differentiable(x), differentiable(mixed), gate, own, second),
    )
    d_residual, d_mixed, d_gate, d_own_outputs, second = pull_outputs(slice_of(flow["stream"]))
    which = decoder.config.mixers.index(spec.mixer.carried)
    pulled = pull_mixing(d_mixed, flow["carried"][which])
    d_input, d_own_inputs, first = pull_inputs((pulled.projected, d_gate, d_residual))
    carried = list(flow["carried"])
    carried[which] = pulled.carried
    flow = flow | {"stream": with_slice(flow["stream"], d_input), "carried": carried}

    def add(stack: jax.Array, *parts: jax.Array) -> jax.Array:
        total = lax.dynamic_slice_in_dim(stack, index, 1) + sum(parts)
        return lax.dynamic_update_slice_in_dim(stack, total, index, axis=0)

    others = jax.tree.map(
        add,
        {site: gradients[site] for site in own},
        d_own_outputs,
        d_own_inputs | pulled.adapter,
    )
    return flow, others | first | second


def layer_units(
    unit: Callable[..., tuple[dict, dict]],
    count: int,
    unit_tokens: int,
    layer_params: dict,
    adapter: dict,
    pages: dict,
    saved: dict,
    flow: dict,
    gradients: dict,
    table: Int[Array, "10 S"],
    index: Int[Array, ""],
    start: Int[Array, ""],
) -> tuple[dict, dict]:
    """`unit`, a `layer_unit` with its static arguments, of `count` slices of tokens, from the one
    at `start` down to the first: one program, where a step has the time. A device has room for some
    programs in its queue (32 on a GPU), and whoever dispatches one more waits."""
    kept = (layer_params, adapter, pages, saved)

    def next_slice(i: Int[Array, ""], carry: tuple[dict, dict]) -> tuple[dict, dict]:
        return unit(*kept, carry[0], carry[1], table, index, start - i * unit_tokens)

    return lax.fori_loop(0, count, next_slice, (flow, gradients))
