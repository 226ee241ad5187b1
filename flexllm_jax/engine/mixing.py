"""How a step's tokens are mixed in a layer: what reads and writes that which the layer keeps of its
sequences, and what it keeps of finetuning tokens beside activations."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from flexllm_jax.engine.step_inputs import StepInputs
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.rope import Angles
from flexllm_jax.models.spec import AttentionSpec, MixerSpec
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.backend import Backend, are_merged
from kernels_pallas.layer_passes import rotate, rotate_and_write
from kernels_pallas.ragged_paged_attention import ragged_paged_attention


class Mixed(NamedTuple):
    """What mixing returns.

    output: [T, N, H]. cache: what the layer keeps of sequences. rows: by name, what is kept of each
    finetuning token, [T, ...]. saved: what is kept of them otherwise, already written.
    """

    output: Float[Array, "T N H"]
    cache: dict[str, jax.Array]
    rows: dict[str, jax.Array]
    saved: dict[str, jax.Array]


class StepMixing:
    """The mixing of one step, in layers of any kind; what layers share is made once.

    backend: which kernels to use. passes: which for what goes once over the tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        inputs: StepInputs,
        page_tables: Int[Array, "S M"],
        backend: Backend,
        passes: Backend,
    ):
        self._inputs, self._page_tables = inputs, page_tables
        self._backend, self._passes = backend, passes
        self._d_model = decoder.config.d_model
        ropes = {(a.rope, a.head_dim): a for a in decoder.config.attention}
        self._angles = {
            key: decoder.angles(inputs.position, attention) for key, attention in ropes.items()
        }

    def query_factor(self, spec: MixerSpec) -> Float[Array, "T 1 1"] | None:
        """What a layer's queries are multiplied by."""
        return self._angles_of(spec).query_factor

    def __call__(
        self,
        spec: MixerSpec,
        projected: tuple[jax.Array, ...],
        cache: dict[str, jax.Array],
        adapters: Bypass | None,
    ) -> Mixed:
        """Mix what `DecoderLayer.project` gave, with what the layer keeps in `cache` (donated)."""
        return self._attend(spec, projected, cache, adapters)

    def _angles_of(self, spec: AttentionSpec) -> Angles:
        return self._angles[spec.rope, spec.head_dim]

    def _attend(
        self,
        spec: AttentionSpec,
        projected: tuple[jax.Array, ...],
        cache: dict[str, jax.Array],
        adapters: Bypass | None,
    ) -> Mixed:
        """Write keys and values to their pages, and attend to those of the tokens before."""
        inputs, rotation = self._inputs, self._angles_of(spec).rotation
        pages = [cache["k"], cache["v"]]
        if spec.own_keys:
            q, *pages = rotate_and_write(
                *(*projected, rotation, inputs.kv_slot),
                *pages,
                backend=self._passes,
                merged=self._are_merged(spec, projected),
            )
        else:
            q = rotate(projected[0], rotation)
        attended, lse = ragged_paged_attention(
            q,
            *pages,
            inputs.query_starts,
            inputs.kv_lengths,
            self._page_tables,
            inputs.num_decode,
            inputs.num_sequences,
            options=spec.options,
            backend=self._backend,
        )
        if adapters:
            attended, lse = adapters.attend(q, attended, lse, spec.options)
        rows: dict[str, Any] = {"attended": attended.reshape(attended.shape[0], -1), "lse": lse}
        return Mixed(attended, dict(zip(("k", "v"), pages, strict=True)), rows, {})

    def _are_merged(self, spec: AttentionSpec, projected: tuple[jax.Array, ...]) -> bool:
        """Whether queries, keys and values are columns of one array, as they were projected."""
        changed = spec.qk_norm or spec.v_norm or spec.gate or spec.values == "keys"
        if changed or self.query_factor(spec) is not None:
            return False
        read = jax.ShapeDtypeStruct((len(projected[0]), self._d_model), projected[0].dtype)
        return are_merged(read, [heads[0].size for heads in projected])
