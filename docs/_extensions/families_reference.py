"""The table of model families, made from the families' own rows: what each one's fields say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flexllm_jax.models.families import FAMILIES, WRAPPERS
from flexllm_jax.models.families.family import Family
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.names import HEAD, PROJECTIONS
from flexllm_jax.models.spec import AttentionSpec, HeadSpec, LayerSpec

# What a configuration without defaults must say; twelve layers hold every pattern of kinds.
_SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 12},
    **{"num_attention_heads": 32, "num_key_value_heads": 32},
}


def families_markdown() -> str:
    """Markdown of the table."""
    rows = [_row(family) for family in FAMILIES.values()]
    rows += [
        (
            wrapper.title,
            f"`{wrapper.architecture}`",
            f"the text's part, under `text_config`; `{wrapper.text}` where that does not say",
            "of that part",
        )
        for wrapper in WRAPPERS.values()
    ]
    head = ("family", "`architectures`", "differs from Llama in", "sites of LoRA")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _row(family: Family) -> tuple[str, ...]:
    fields = Fields({**_SIZES, **family.defaults})
    layers, head = family.layers(fields), family.head(fields)
    around = family.around(fields)
    names = dict(PROJECTIONS) | dict(family.names.changed)
    shapes = dict.fromkeys(site for layer in layers for site in layer.kernel_shapes(1))
    sites = [names[site].rpartition(".")[2] for site in shapes]
    usual = [PROJECTIONS[s].rpartition(".")[2] for s in ("q", "k", "v", "o", "gate", "up", "down")]
    what = ", ".join(f"`{site}`" for site in sites if set(usual) - set(sites) or site not in usual)
    if set(usual) <= set(sites):
        what = f"the usual seven, {what}" if what else "the usual seven"
    return (
        family.title,
        f"`{family.architecture}`",
        "; ".join([*_differences(layers), *_ends(around, head)]) or "nothing",
        f"{what}, `{HEAD}`",
    )


def _attending(layers: tuple[LayerSpec, ...]) -> list[LayerSpec]:
    return [layer for layer in layers if isinstance(layer.mixer, AttentionSpec)]


def _differences(layers: tuple[LayerSpec, ...]) -> Iterator[str]:
    """Of the layers, as they are without a configuration that says otherwise."""
    attending = _attending(layers)
    first, kinds = attending[0], [layer.mixer for layer in attending]
    attention, norm = first.mixer, first.norm
    if others := len(layers) - len(attending):
        yield f"a recurrent state in place of attention in {others} of 12 layers"
    windows = sum(kind.options.window is not None for kind in kinds)
    if windows:
        which = "every layer" if windows == len(layers) else f"{windows} of 12 layers"
        yield f"a window in {which}"
    if still := sum(kind.rope is None for kind in kinds):
        yield f"no RoPE in {still} of 12 layers"
    ropes = {kind.rope for kind in kinds} - {None}
    if len(ropes) > 1:
        yield "a RoPE for each kind of layer"
    for rope in list(ropes)[:1]:
        if rope is not None and rope.rotated:
            yield f"RoPE of {rope.rotated} of a head's {attention.head_dim} elements"
        if rope is not None and rope.neighbours:
            yield "RoPE of neighbours"
        if rope is not None and rope.growth:
            yield "queries that grow with their position"
    if attention.qkv_bias:
        yield "biases of q, k and v" + (" and of o" if attention.o_bias else "")
    if attention.gate:
        yield "a gate of what attention returns"
    if attention.qk_norm:
        over = {
            "head": "each head",
            "projection": "all heads together",
            "unit": "each head, without weights",
        }[attention.qk_norm]
        yield f"norms of queries and keys over {over}"
    if attention.gate_projection:
        yield "a gate of attention's output"
    if attention.sinks:
        yield "sinks in the softmax"
    if attention.v_norm:
        yield "values normalized, too"
    if len({(kind.head_dim, kind.kv_heads) for kind in kinds}) > 1:
        yield "heads of two sizes"
    if first.token_width:
        yield "inputs of each token for single layers"
    if first.scalar:
        yield "a stored factor of each layer's output"
    if attention.options.soft_cap:
        yield "a soft cap of scores"
    if attention.options.scale is not None:
        yield "a scale of scores of its own"
    if fused := [
        name for name, part in (("q, k, v", attention), ("gate, up", first.mlp)) if part.fused
    ]:
        yield f"{' and '.join(fused)} in one projection"
    if first.parallel:
        yield "attention and the feed-forward network side by side, behind one norm"
    if norm.centred:
        yield "LayerNorm without a bias"
    if norm.post:
        where = "norms before and behind" if norm.pre else "norms behind alone"
        alike = all(layer.norm.post for layer in layers)
        yield where if alike else f"{where} where layers attend"
    if norm.offset:
        yield "norms' weights are 1 + what is stored"
    if first.mlp.activation != "silu":
        yield f"activation {first.mlp.activation}"


def _ends(around: dict[str, Any], head: HeadSpec) -> Iterator[str]:
    if "embed_norm" in around:
        yield "embeddings normalized"
    if "embed_scale" in around:
        yield "scaled embeddings"
    if head.soft_cap:
        yield "a soft cap of logits"
