"""What the engine's programs need of a device's memory while they run, reckoned without compiling.

The page pool is sized before anything is compiled, as programs are compiled for its size. These are
upper bounds of what XLA has been seen to allocate: a forward's widest moment is its feed-forward, a
backward unit's the feed-forward's gradients, beside what a gated delta net has mixed, or those of
its states; sampling and a loss unit hold rows of logits. Once programs are compiled the engine
takes their own numbers (`plan.plan_memory`).
"""

from math import prod

from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.engine.sampling.sampler import ROWS_AT_ONCE
from flexllm_jax.finetune.loss import logits_at_once
from flexllm_jax.models.spec import AttentionSpec, GatedDeltaSpec
from kernels_pallas.gated_delta import CHUNK

_SLACK = 1.05
_FLOAT = 4  # bytes of a float32
# Rows of attention's outputs that decode keeps besides, float32: it splits long contexts.
_PARTIAL_ROWS = 1024
# Of the references, which stand in for the kernels on a CPU: rows that they work on at once, arrays
# of them, and arrays of all rows.
_ROWS_AT_ONCE, _BLOCK_ARRAYS, _ROW_ARRAYS = 64, 6, 4


def reckon_temporaries(sizes: EngineSizes) -> dict[str, int]:
    """Bytes on each device, by kind of program."""
    local, item = sizes.decoder.config, sizes.dtype.itemsize
    width, inner = local.d_model, local.d_ff
    queries, vocabulary = max(kind.mixer.inner for kind in local.kinds), sizes.model.vocab_size
    shape = sizes.step_shapes[sizes.buckets[-1]]
    tokens, unit = shape.tokens, sizes.unit_tokens
    rows = max(shape.samples, min(ROWS_AT_ONCE, tokens))
    scored, chunk = logits_at_once(sizes.backend, unit, vocabulary // sizes.devices)
    on_cpu = sizes.backend.implementation == "xla"
    loss = 3 * _FLOAT * unit * width + scored * chunk * (10 if on_cpu else _FLOAT + item)
    if on_cpu:
        loss += item * chunk * width  # the chunk of the head, copied

    forward = item * tokens * 3 * (inner + width) + _FLOAT * _PARTIAL_ROWS * queries
    layer = item * unit * (7 * inner + 4 * width)
    mixers = [kind.mixer for kind in local.kinds]
    attentions = [mixer for mixer in mixers if isinstance(mixer, AttentionSpec)]
    deltas = [mixer for mixer in mixers if isinstance(mixer, GatedDeltaSpec)]
    if deltas:
        layer = max(layer, *(_delta_unit(mixer, unit, item, width, inner) for mixer in deltas))
        kept = max((mixer.width - 1) * mixer.channels for mixer in deltas)
        forward += item * shape.sequences * kept  # the convolution's inputs before the step
    if sizes.backend.mosaic:  # keys and values are gathered, queries and a gradient copied
        keys = max((m.kv_heads * m.head_dim for m in attentions), default=0)
        layer += 2 * item * (sizes.finetune_slots * keys + unit * queries)
    if sizes.dropout:  # each projection reads an input of its own
        forward += item * tokens * inner
        layer += 2 * item * unit * inner
    if on_cpu:
        blocks = _FLOAT * _BLOCK_ARRAYS * _ROWS_AT_ONCE * queries
        saved = max(columns.stop for own in sizes.columns for columns in own.values())
        forward += blocks + _FLOAT * _ROW_ARRAYS * (tokens + _ROWS_AT_ONCE) * queries
        forward += item * tokens * saved  # side by side, before they are kept
        layer += blocks + _FLOAT * _ROW_ARRAYS * unit * queries
    reckoned = {
        "forward": forward,
        "sample": 2.4 * _FLOAT * rows * vocabulary,
        "unit/loss": loss,
        "unit/layer": layer,
        "optimizer_step": tree_bytes(sizes.adapter_row.weights),
    }
    if "muon" in sizes.optimizers:  # it iterates on the products of factors
        reckoned["optimizer_step/muon"] = 2.5 * tree_bytes(sizes.adapter_row.weights)
    return {name: int(_SLACK * size) for name, size in reckoned.items()}


def _delta_unit(mixer: GatedDeltaSpec, unit: int, item: int, width: int, inner: int) -> int:
    """Of a backward unit of a layer with a gated delta net: what it read and returned, and either
    the feed-forward's gradients, or the states before and their gradients after its chunks, and
    float32 gradients of queries and keys of all heads, and of the convolution."""
    mixed = item * unit * (4 * width + 3 * mixer.channels + 4 * mixer.inner)
    states = 2 * _FLOAT * -(-unit // CHUNK) * prod(mixer.state)
    gradients = _FLOAT * unit * (2 * mixer.value_heads * mixer.key_dim + mixer.channels)
    return mixed + max(item * unit * 7 * inner, states + gradients)
