"""The adapter bank: every adapter that a step may use, in fixed slots on the device.

Per site the bank stacks the weights of all layers and rows, padded to the largest that an adapter
may have (for LoRA A [L, rows, d_in, R] and B [L, rows, R, d_out]), and a number [L, rows]. Layers
of one shape share a stack (`stacks`). What a row's adapter does not have is zero. Slot 0 means "no
adapter" and has no row; slot s lives in row s - 1.
A published adapter is a slot and a version. Publishing again takes a new slot, so requests to the
old version finish on it; its slot is free when the last of them is done.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
    """

    rows: int
    rank: int
    modules: tuple[str, ...]
    kinds: tuple[str, ...] = ("lora",)
    bottleneck: int = 64
    prefix: int = 32

    def sites(self, config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
        """What a layer has of one adapter: site -> name -> padded shape."""
        sites = {}
        if "lora" in self.kinds:
            sites |= {m: self._factors(config, m) for m in self.modules if m != "head"}
        if "ia3" in self.kinds:
            for site, width in ia3.site_widths(config).items():
                sites[site] = {"scale": (width,)}
        if "bottleneck" in self.kinds:
            for site in bottleneck.FOLLOWS:
                sites[site] = bottleneck.shapes(config, self.bottleneck)
        if "prefix" in self.kinds:
            sites[prefix.SITE] = prefix.shapes(config, self.prefix)
        return sites

    def by_layer(self, config: ModelConfig) -> list[dict[str, dict[str, tuple[int, ...]]]]:
        """`sites` of all layers; one more entry holds the output head's, if it may have LoRA."""
        layers = [self.sites(config)] * config.num_layers
        if self.has_head:
            layers.append({"head": self._factors(config, "head")})
        return layers

    def stacks(self, config: ModelConfig) -> LayerStacks:
        """Which of those layers share their arrays; the head's is the last of them."""
        return LayerStacks.of(self.by_layer(config))

    @property
    def has_head(self) -> bool:
        """Whether there is room for LoRA on the output head."""
        return "lora" in self.kinds and "head" in self.modules

    def _factors(self, config: ModelConfig, module: str) -> dict[str, tuple[int, ...]]:
        d_in, d_out = config.linear_shapes[module]
        return {"a": (d_in, self.rank), "b": (self.rank, d_out)}


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
        for key, array in own.items():
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


@dataclass
class Published:
    """One version of a named adapter and the slot it is served from."""

    name: str
    version: int
    bank_slot: int
    config: AdapterConfig
    shapes: Shapes
    users: int = 0


class NoFreeSlot(AdapterError):
    """All slots are in use at this moment."""


@dataclass
class BankDirectory:
    """Which slot holds what (host side). Slots 1..num_slots-1 can hold an adapter."""

    num_slots: int
    current: dict[str, Published] = field(default_factory=dict)
    retired: list[Published] = field(default_factory=list)
    training: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    # Slots whose content is not in use and can be brought back; frees one of them, if there is one.
    num_evictable: Callable[[], int] = lambda: 0
    evict: Callable[[], bool] = lambda: False

    def _used(self) -> set[int]:
        published = {p.bank_slot for p in [*self.current.values(), *self.retired]}
        return published | set(self.training.values())

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return self.num_slots - 1 - len(self._used())

    @property
    def num_to_be_had(self) -> int:
        """Slots that hold nothing, or nothing that must stay."""
        return self.num_free + self.num_evictable()

    def _free_slot(self, purpose: str) -> int:
        used = self._used()
        for slot in range(1, self.num_slots):
            if slot not in used:
                return slot
        if self.evict():
            return self._free_slot(purpose)
        raise NoFreeSlot(
            f"no free slot for {purpose}: all {self.num_slots - 1} of adapters.slots "
            f"({self.num_slots}, slot 0 is no adapter) are taken; raise adapters.slots or "
            f"unload an adapter"
        )

    def publish(self, name: str, config: AdapterConfig, shapes: Shapes) -> Published:
        """A new version of `name` in a free slot, current from now on."""
        slot = self._free_slot(f"adapter {name!r}")
        self.versions[name] = self.versions.get(name, 0) + 1
        self._retire(name)
        self.current[name] = Published(name, self.versions[name], slot, config, shapes)
        return self.current[name]

    def snapshot(self, name: str, config: AdapterConfig, shapes: Shapes) -> Published:
        """A version in a free slot that nobody can ask for by `name`, held until `release`."""
        slot = self._free_slot(f"a version of {name!r}")
        self.versions[name] = self.versions.get(name, 0) + 1
        own = Published(name, self.versions[name], slot, config, shapes, users=1)
        self.retired.append(own)
        return own

    def unload(self, name: str) -> None:
        """Forget `name`; requests that use it finish."""
        self.lookup(name)
        self._retire(name)

    def _retire(self, name: str) -> None:
        old = self.current.pop(name, None)
        if old is not None and old.users:
            self.retired.append(old)

    def lookup(self, name: str) -> Published:
        """The current version of `name`."""
        if name not in self.current:
            known = ", ".join(sorted(self.current)) or "none"
            raise AdapterError(f"adapter {name!r} is not loaded; loaded adapters: {known}")
        return self.current[name]

    def acquire(self, name: str) -> Published:
        """The current version of `name`, held until `release`."""
        published = self.lookup(name)
        published.users += 1
        return published

    def release(self, published: Published) -> None:
        """One user of a version is done."""
        published.users -= 1
        if published.users == 0 and published in self.retired:
            self.retired.remove(published)

    def start_training(self, job: str) -> int:
        """A slot for a job to train in. ValueError when it has one already."""
        if job in self.training:
            raise ValueError(f"job {job!r} is running already: use another name")
        self.training[job] = self._free_slot(f"job {job!r} to train in")
        return self.training[job]

    def stop_training(self, job: str) -> None:
        """Free a job's slot."""
        self.training.pop(job, None)
