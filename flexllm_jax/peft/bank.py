"""The adapter bank: every adapter that a step may use, in fixed slots on the device.

Per site the bank stacks the weights of all layers and rows, padded to the largest that an adapter
may have (for LoRA A [L, rows, d_in, R] and B [L, rows, R, d_out]), and a number [L, rows]. Layers
of one shape share a stack (`stacks`). What a row's adapter does not have is zero. Slot 0 means "no
adapter" and has no row; slot s lives in row s - 1.
Who has which slot is told by `directory`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft import bottleneck, ia3, prefix
from flexllm_jax.peft.adapter import Adapter, AdapterConfig, AdapterError, LoraConfig, Site
from flexllm_jax.peft.stacks import LayerStacks
from kernels_pallas.rows import from_stored, to_stored

KINDS = ("lora", "ia3", "bottleneck", "prefix")
Shapes = Mapping[Site, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class BankShape:
    """Size of the bank: `rows` adapters, each of one of `kinds`.

    rank, modules   of LoRA: largest rank, and the projections (short names) there is room for
    bottleneck      largest width of a bottleneck
    prefix          most tokens of a prefix
    devices         that the model is split over
    """

    rows: int
    rank: int
    modules: tuple[str, ...]
    kinds: tuple[str, ...] = ("lora",)
    bottleneck: int = 64
    prefix: int = 32
    devices: int = 1

    def sites(self, config: ModelConfig, layer: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """What a layer has of one adapter: site -> name -> padded shape."""
        sites = {}
        if "lora" in self.kinds:
            sites |= self._factors(config, layer)
        if "ia3" in self.kinds:
            for site, width in ia3.site_widths(config, layer).items():
                sites[site] = {"scale": (width,)}
        if "bottleneck" in self.kinds:
            for site in bottleneck.FOLLOWS:
                sites[site] = bottleneck.shapes(config, self.bottleneck)
        if "prefix" in self.kinds:
            sites[prefix.SITE] = prefix.shapes(config, self.prefix)
        return sites

    def by_layer(self, config: ModelConfig) -> list[dict[str, dict[str, tuple[int, ...]]]]:
        """`sites` of all layers; one more entry holds the output head's, if it may have LoRA."""
        layers = [self.sites(config, layer) for layer in range(config.num_layers)]
        return [*layers, self._factors(config, config.num_layers)] if self.has_head else layers

    def all_sites(self, config: ModelConfig) -> tuple[str, ...]:
        """Sites that some layer has, without the output head's."""
        layers = range(config.num_layers)
        return tuple(dict.fromkeys(site for i in layers for site in self.sites(config, i)))

    def stacks(self, config: ModelConfig) -> LayerStacks:
        """Which of those layers share their arrays; the head's is the last of them."""
        layers = self.by_layer(config)
        parts = [layer.parts for layer in config.layers] + [{}] * self.has_head
        return LayerStacks.of(layers, parts, self.devices)

    @property
    def has_head(self) -> bool:
        """Whether there is room for LoRA on the output head."""
        return "lora" in self.kinds and "head" in self.modules

    def _factors(self, config: ModelConfig, layer: int) -> dict[str, dict[str, tuple[int, ...]]]:
        shapes = config.kernel_shapes(layer)
        return {
            m: {"a": (shapes[m][0], self.rank), "b": (self.rank, shapes[m][1])}
            for m in self.modules
            if m in shapes
        }


class AdapterRow(NamedTuple):
    """What one row of the bank holds, or its shapes: lists of stacks, as `weight_shapes` and
    `scale_shapes` give them."""

    weights: list
    scales: list


def weight_shapes(
    config: ModelConfig, shape: BankShape, rows: int | None, dtype: jnp.dtype
) -> list[dict[str, dict[str, jax.ShapeDtypeStruct]]]:
    """Per stack: site -> name -> weights [L, ...]; [L, rows, ...] unless `rows` is None."""
    return [
        {
            site: {name: jax.ShapeDtypeStruct((*lead, *own), dtype) for name, own in names.items()}
            for site, names in sites.items()
        }
        for lead, sites in _stacks(config, shape, rows)
    ]


def scale_shapes(
    config: ModelConfig, shape: BankShape, rows: int | None
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Per stack: site -> its number [L] float32; [L, rows] unless `rows` is None."""
    return [
        dict.fromkeys(sites, jax.ShapeDtypeStruct(lead, jnp.float32))
        for lead, sites in _stacks(config, shape, rows)
    ]


def _stacks(
    config: ModelConfig, shape: BankShape, rows: int | None
) -> Iterator[tuple[tuple[int, ...], Mapping[str, Any]]]:
    """Leading axes and sites of every stack."""
    layers = shape.by_layer(config)
    for own in shape.stacks(config).layers:
        yield (len(own),) if rows is None else (len(own), rows), layers[own[0]]


def write_row(weights: list, scales: list, row: jax.Array, values: list, factors: list):
    """Put one adapter's weights and scales in a row of the bank (donated)."""
    return set_row(weights, row, values), set_row(scales, row, factors)


def set_row(arrays: list, row: jax.Array, values: list) -> list:
    """One row of arrays of the bank overwritten, rounded to what they hold."""

    def write(array: jax.Array, value: jax.Array) -> jax.Array:
        value = to_stored(value, array.dtype)
        return lax.dynamic_update_index_in_dim(array, value, row, axis=1)

    return jax.tree.map(write, arrays, values)


def read_row(weights: list, row: jax.Array) -> list:
    """One row of the bank, float32."""
    return jax.tree.map(lambda w: from_stored(_row(w, row)).astype(jnp.float32), weights)


def copy_row(weights: list, scales: list, source: jax.Array, target: jax.Array):
    """Copy one row of the bank (donated) to another, on the device."""

    def copy(array: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(array, _row(array, source), target, axis=1)

    return jax.tree.map(copy, (weights, scales))


def _row(array: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, row, axis=1, keepdims=False)


def to_row(adapter: Adapter, config: ModelConfig, shape: BankShape, name: str) -> AdapterRow:
    """An adapter padded to the bank's shapes, float32 on the host.

    Raises AdapterError when it does not fit the bank.
    """
    _check_fits(adapter, shape, name)
    values = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), weight_shapes(config, shape, None, jnp.float32)
    )
    factors = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), scale_shapes(config, shape, None))
    stacks = shape.stacks(config)
    for (layer, site), own in adapter.weights.items():
        stack, at = stacks.place(layer)
        for key, array in stacks.for_devices(stack, {site: dict(own)})[site].items():
            values[stack][site][key][at][_corner(array.shape)] = array
        factors[stack][site][at] = adapter.config.scale(layer, site)
    return AdapterRow(values, factors)


def trained_ranks(config: AdapterConfig, model: ModelConfig, shape: BankShape) -> list[np.ndarray]:
    """How much of LoRA's rank an optimizer may change: per stack int32 [L, M], sites in the order
    of their names."""
    layers, result = shape.by_layer(model), []
    for own in shape.stacks(model).layers:
        sites = sorted(layers[own[0]])
        ranks = np.full((len(own), len(sites)), shape.rank, np.int32)
        if isinstance(config, LoraConfig) and config.from_base:
            for at, layer in enumerate(own):
                for j, site in enumerate(sites):
                    if site in shape.modules:
                        ranks[at, j] = config.trained_rank(layer, site)
        result.append(ranks)
    return result


def from_row(values: list, config: AdapterConfig, shapes: Shapes, stacks: LayerStacks) -> Adapter:
    """The adapter in one row's weights, by `stacks`; `shapes` are those of what it has."""
    layers = stacks.by_layer(values)
    return Adapter(
        config=config,
        weights={
            (layer, site): {
                name: np.array(layers[layer][site][name][_corner(own)], np.float32)
                for name, own in names.items()
            }
            for (layer, site), names in shapes.items()
        },
    )


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where an array lies in its padded one."""
    return tuple(map(slice, shape))


def _check_fits(adapter: Adapter, shape: BankShape, name: str) -> None:
    kind, shapes = adapter.config.kind, adapter.shapes.values()
    if kind not in shape.kinds:
        raise AdapterError(
            f"adapter {name!r} is of kind {kind}, and the bank holds only "
            f"{', '.join(shape.kinds)}: add it to adapters.kinds"
        )
    outside = sorted({m for _, m in adapter.weights} - set(shape.modules))
    if kind == "lora" and outside:
        raise AdapterError(
            f"adapter {name!r} changes {', '.join(outside)}, and the bank holds only "
            f"{', '.join(shape.modules)}: add them to adapters.target_modules"
        )
    measures = {
        "lora": ("rank", "b", shape.rank, "adapters.max_rank"),
        "bottleneck": ("a bottleneck of", "up", shape.bottleneck, "adapters.max_bottleneck"),
        "prefix": ("a prefix of", "k", shape.prefix, "adapters.max_prefix"),
    }
    if kind in measures:
        measure, array, most, field = measures[kind]
        largest = max((own[array][0] for own in shapes), default=0)
        config, doubled = adapter.config, ""
        if isinstance(config, LoraConfig) and config.from_base:
            doubled = f", as init={config.init} takes twice its own,"
        if largest > most:
            raise AdapterError(
                f"adapter {name!r} has {measure} {largest}{doubled}, the bank holds at most "
                f"{most}: raise {field}"
            )
    if not all(np.isfinite(w).all() for own in adapter.weights.values() for w in own.values()):
        raise AdapterError(f"adapter {name!r} has weights that are not finite: train it again")
