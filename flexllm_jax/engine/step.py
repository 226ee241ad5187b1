"""The forward program of a step: decode tokens, prefill chunks and finetuning tokens through the
model together.

Keys and values are written to their pages and the finetuning tokens' activations to their slots, in
place: `pages`, `saved` and `flow` are donated. Layers are unrolled, so that XLA copies no weights.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexllm_jax.engine.step_inputs import StepInputs, StepShape
from flexllm_jax.models.bypass import no_bypass
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.backend import Backend
from kernels_pallas.ragged_paged_attention import ragged_paged_attention


def forward_step(
    decoder: Decoder,
    shape: StepShape,
    columns: dict[str, slice],
    backend: Backend,
    params: dict,
    bank: dict | None,
    pages: list[dict],
    finetune: dict | None,
    last_tokens: Int[Array, " Q"],
    vector: Int[Array, " X"],
) -> tuple[list[dict], dict | None, Float[Array, "T D"], Float[Array, "R D"]]:
    """Run a step's tokens through the model.

    Args:
        decoder: the model's functions.
        shape: the bucket, static.
        columns: what to keep of finetuning tokens (`finetune.buffers.saved_columns`), static.
        backend: which kernels to use, static.
        params: frozen parameters.
        bank: {"weights", "scales"} lists by layer, or None: a step without adapters runs a program
            without bypasses.
        pages: per layer {"k", "v"} [P, B, K, H]; donated.
        finetune: {"saved": per layer, "flow"} (see `finetune.buffers`), or None for a step
            without finetuning tokens; donated.
        last_tokens: newest token of each request row.
        vector: packed `StepInputs`.

    Returns:
        pages, finetune, the last layer's outputs before the final norm, and those of the sampled
        rows.
    """
    inputs = StepInputs.cut(vector, shape)
    from_device = last_tokens[jnp.maximum(-1 - inputs.token, 0)]
    token = jnp.where(inputs.token < 0, from_device, inputs.token)
    angles = decoder.angles(inputs.position)
    x = decoder.embed(params, token)
    saved_layers, new_pages = [], []
    for i, layer_params in enumerate(params["layers"]):
        layer = decoder.layer(layer_params)
        adapters = None
        if bank is not None:
            adapters = Bypass(bank["weights"][i], bank["scales"][i], inputs.adapter, backend)
        bypass = adapters or no_bypass
        activations = {"x": x}
        q, k, v = layer.before_attention(x, angles, bypass, activations.setdefault)
        own_pages = {
            "k": _write(pages[i]["k"], inputs.kv_slot, k),
            "v": _write(pages[i]["v"], inputs.kv_slot, v),
        }
        attended, lse = ragged_paged_attention(
            q,
            own_pages["k"],
            own_pages["v"],
            inputs.query_starts,
            inputs.kv_lengths,
            inputs.page_tables,
            inputs.num_decode,
            inputs.num_sequences,
            backend=backend,
        )
        if adapters:
            attended, lse = adapters.attend(q, attended, lse)
        activations["attended"] = attended
        x = layer.after_attention(x, attended, bypass, activations.setdefault)
        new_pages.append(own_pages)
        if finetune is not None:
            kept = [activations[name].reshape(x.shape[0], -1) for name in columns]
            values = {"activations": jnp.concatenate(kept, axis=1), "lse": lse}
            saved_layers.append(
                {
                    name: slots.at[inputs.saved_row].set(values[name], mode="drop")
                    for name, slots in finetune["saved"][i].items()
                }
            )
    if finetune is not None:
        outputs = finetune["flow"]["stream"].at[inputs.saved_row].set(x, mode="drop")
        finetune = {"saved": saved_layers, "flow": finetune["flow"] | {"stream": outputs}}
    return new_pages, finetune, x, x[inputs.sample]


def _write(
    pages: Float[Array, "P B K H"], slots: Int[Array, " T"], values: Float[Array, "T K H"]
) -> Float[Array, "P B K H"]:
    """Put each token's row in its slot of the pages; slots past the end are padding."""
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat.at[slots].set(values, mode="drop").reshape(pages.shape)
