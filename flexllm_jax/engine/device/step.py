"""The forward program of a step: decode tokens, prefill chunks and finetuning tokens through the
model together.

Keys and values are written to their pages and the finetuning tokens' activations to their slots, in
place: `pages`, `saved` and `flow` are donated. Layers are unrolled, so that XLA copies no weights.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexllm_jax.engine.device.mixing import StepMixing
from flexllm_jax.engine.memory.step_inputs import StepInputs, StepShape
from flexllm_jax.finetune.buffers import Columns
from flexllm_jax.models.bypass import no_bypass
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.bypass import Bypass
from flexllm_jax.peft.dropout import JobDropout
from flexllm_jax.peft.stacks import LayerStacks
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import LowRankSum
from kernels_pallas.layer_passes import write_rows
from kernels_pallas.rows import as_array, set_rows


def forward_step(
    decoder: Decoder,
    shape: StepShape,
    columns: Columns,
    backend: Backend,
    stacks: LayerStacks,
    params: dict,
    bank: dict | None,
    pages: list[dict],
    finetune: dict | None,
    last_tokens: Int[Array, " Q"],
    page_tables: Int[Array, "X M"],
    vector: Int[Array, " X"],
    dropout: JobDropout | None = None,
) -> tuple[list[dict], dict | None, Float[Array, "T D"], Float[Array, "R D"]]:
    """Run a step's tokens through the model.

    Args:
        decoder: the model's functions.
        shape: the bucket, static.
        columns: what to keep of finetuning tokens (`finetune.buffers.saved_columns`), static.
        backend: which kernels to use, static.
        stacks: which layers share the bank's arrays, static.
        params: frozen parameters.
        bank: {"weights", "scales"} lists of stacks, or None: a step without adapters runs a program
            without bypasses.
        pages: what each layer keeps of sequences (`cache.page_shapes`), of a `stored_dtype`;
            donated.
        finetune: {"saved": per layer, "flow"} (see `finetune.buffers`), or None for a step
            without finetuning tokens; donated.
        last_tokens: newest token of each request row.
        page_tables: pages of each request row, and of finetuning sequences.
        vector: packed `StepInputs`.
        dropout: of the microbatch that the step's finetuning tokens are of; None: of nothing.

    Returns:
        pages, finetune, the last layer's outputs before the final norm, and those of the sampled
        rows.
    """
    inputs = StepInputs.cut(vector, shape)
    page_tables = page_tables[inputs.table]
    from_device = last_tokens[jnp.maximum(-1 - inputs.token, 0)]
    token = jnp.where(inputs.token < 0, from_device, inputs.token)
    # Without adapters XLA makes a pass a part of the split sums of the product before it, which is
    # fewer launches than kernels of ours.
    passes = XLA if bank is None else backend
    decoder = replace(decoder, backend=passes)
    config = decoder.config
    mixing = StepMixing(decoder, inputs, page_tables, last_tokens.shape[0], backend, passes)
    x = decoder.embed(params, token)
    token_inputs = decoder.token_inputs(params, token, x)

    @partial(jax.jit, static_argnums=0)
    def run_layer(
        spec, layer_params, adapter_stack, layer_pages, layer_saved, layer_number, x, y, own
    ):
        # A function of its own, so that it is traced and lowered once for layers that are alike:
        # that would take most of a start. XLA inlines the calls.
        layer = decoder.layer(layer_params, spec)
        adapters = None
        if adapter_stack is not None:
            weights, scales, index = adapter_stack
            dropped = None
            if dropout is not None:
                dropped = dropout.of_layer(inputs.saved_row, layer_number, decoder.axes)
            adapters = Bypass(weights, scales, inputs.adapter, backend, dropped, layer=index)
        bypass = adapters or no_bypass
        kept = () if layer_saved is None else columns[config.kinds.index(spec)]
        activations = {}

        def tap(name, value):
            if name in kept and isinstance(value, LowRankSum):
                value.keep()
            return activations.setdefault(name, value)

        factor = mixing.query_factor(spec.mixer)
        projected, gate, x = layer.project(x, bypass, tap, y, factor)
        activations |= {"x": x, "token": own}
        mixed = mixing(layer, projected, layer_pages, layer_saved, adapters)
        activations |= mixed.rows
        x, y = layer.summands(x, mixed.output, gate, bypass, tap, (), own)
        new_saved = None
        if layer_saved is not None:
            values = {n: [activations[n]] for n in layer_saved if n in activations}
            values["activations"] = [as_array(activations[name]) for name in kept]
            slots = [layer_saved[name] for name in values]
            written = write_rows(slots, inputs.saved_row, list(values.values()), passes)
            new_saved = mixed.saved | dict(zip(values, written, strict=True))
            # Written before the next layer: else XLA writes all layers' at the end, and holds what
            # it writes until then.
            x, new_saved = jax.lax.optimization_barrier((x, new_saved))
        return mixed.cache, new_saved, x, y

    new_pages, new_saved = list(pages), []
    y = None if config.layers[0].scalar else jnp.zeros_like(x)
    for i, layer_params in enumerate(params["layers"]):
        adapter_stack = None
        if bank is not None:
            stack, index = stacks.place(i)
            adapter_stack = (bank["weights"][stack], bank["scales"][stack], index)
        layer_saved = None if finetune is None else finetune["saved"][i]
        number = None if dropout is None else i
        source = config.cache_of[i]
        read, layer_saved, x, y = run_layer(
            *(config.layers[i], layer_params, adapter_stack, new_pages[source], layer_saved),
            *(number, x, y, token_inputs[i]),
        )
        if source == i:
            new_pages[i] = read
        new_saved.append(layer_saved)
    x = x if y is None else x + as_array(y)
    if finetune is not None:
        outputs = set_rows(finetune["flow"]["stream"], inputs.saved_row, x)
        finetune = {"saved": new_saved, "flow": finetune["flow"] | {"stream": outputs}}
    return new_pages, finetune, x, x[inputs.sample]


def write_pages(page_tables: Int[Array, "X M"], places: Int[Array, "2 W"]) -> Int[Array, "X M"]:
    """Page tables (donated) with the pages of `step_inputs.page_writes`."""
    flat = page_tables.reshape(-1)
    written = flat.at[places[0]].set(places[1], mode="drop", unique_indices=True)
    return written.reshape(page_tables.shape)
