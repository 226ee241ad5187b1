"""The adapter bank: every adapter that a step may use, in fixed slots on the device.

Per layer and target module the bank stacks A [rows, d_in, R], B [rows, R, d_out] and the scale
[rows]. Slot 0 means "no adapter" and has no row; slot s lives in row s - 1. A published adapter is
a slot and a version. Publishing again takes a new slot, so requests to the old version finish on
it; its slot is free when the last of them is done.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import Adapter, AdapterError, LoraConfig, LoraWeights


@dataclass(frozen=True)
class BankShape:
    """Size of the bank: `rows` adapters of rank up to `rank` on `modules` (short names) of every
    layer."""

    rows: int
    rank: int
    modules: tuple[str, ...]


def weight_shapes(
    config: ModelConfig, shape: BankShape, rows: int | None, dtype: jnp.dtype
) -> list[dict[str, dict[str, jax.ShapeDtypeStruct]]]:
    """Per layer: module -> {"a", "b"}; with a leading axis of `rows`, or without it when `rows` is
    None."""
    lead = () if rows is None else (rows,)

    def factors(module: str) -> dict[str, jax.ShapeDtypeStruct]:
        d_in, d_out = config.kernel_shapes[module]
        return {
            "a": jax.ShapeDtypeStruct((*lead, d_in, shape.rank), dtype),
            "b": jax.ShapeDtypeStruct((*lead, shape.rank, d_out), dtype),
        }

    return [{m: factors(m) for m in shape.modules} for _ in range(config.num_layers)]


def scale_shapes(
    config: ModelConfig, shape: BankShape, rows: int | None
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Per layer: module -> scale [rows] float32, or a scalar when `rows` is None."""
    lead = () if rows is None else (rows,)
    scale = jax.ShapeDtypeStruct(lead, jnp.float32)
    return [dict.fromkeys(shape.modules, scale) for _ in range(config.num_layers)]


def write_row(weights: list, scales: list, row: jax.Array, values: list, factors: list):
    """Put one adapter's weights and scales in a row of the bank (donated)."""
    weights = jax.tree.map(lambda w, v: w.at[row].set(v.astype(w.dtype)), weights, values)
    return weights, jax.tree.map(lambda s, v: s.at[row].set(v), scales, factors)


def read_row(weights: list, row: jax.Array) -> list:
    """One row of the bank, float32."""
    return jax.tree.map(lambda w: w[row].astype(jnp.float32), weights)


def copy_row(weights: list, scales: list, source: jax.Array, target: jax.Array):
    """Copy one row of the bank (donated) to another, on the device."""
    return jax.tree.map(lambda w: w.at[target].set(w[source]), (weights, scales))


def to_rows(
    adapter: Adapter, config: ModelConfig, shape: BankShape, name: str
) -> tuple[list, list]:
    """An adapter padded to the bank's shapes, float32 on the host: (weights, scales) of one row.

    Raises AdapterError when its rank or modules do not fit the bank.
    """
    outside = sorted({m for _, m in adapter.weights} - set(shape.modules))
    if outside:
        raise AdapterError(
            f"adapter {name!r} changes {', '.join(outside)}, and the bank holds only "
            f"{', '.join(shape.modules)}: add them to adapters.target_modules"
        )
    largest = max((w.a.shape[1] for w in adapter.weights.values()), default=0)
    if largest > shape.rank:
        raise AdapterError(
            f"adapter {name!r} has rank {largest}, the bank holds at most {shape.rank}: "
            f"raise adapters.max_rank"
        )
    if not all(np.isfinite(w.a).all() and np.isfinite(w.b).all() for w in adapter.weights.values()):
        raise AdapterError(f"adapter {name!r} has weights that are not finite: train it again")
    values = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), weight_shapes(config, shape, None, jnp.float32)
    )
    factors = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), scale_shapes(config, shape, None))
    for (layer, module), own in adapter.weights.items():
        rank = own.a.shape[1]
        values[layer][module]["a"][:, :rank] = own.a
        values[layer][module]["b"][:rank] = own.b
        factors[layer][module] = np.float32(adapter.config.scale(layer, module))
    return values, factors


def from_row(values: list, config: LoraConfig, like: Mapping[tuple[int, str], int]) -> Adapter:
    """The adapter in one row's weights; `like` gives the rank of each (layer, module) it has."""
    return Adapter(
        config=config,
        weights={
            (layer, module): LoraWeights(
                a=np.array(values[layer][module]["a"][:, :rank], np.float32),
                b=np.array(values[layer][module]["b"][:rank], np.float32),
            )
            for (layer, module), rank in like.items()
        },
    )


@dataclass
class Published:
    """One version of a named adapter and the slot it is served from."""

    name: str
    version: int
    slot: int
    config: LoraConfig
    ranks: Mapping[tuple[int, str], int]
    users: int = 0


@dataclass
class BankDirectory:
    """Which slot holds what (host side). Slots 1..num_slots-1 can hold an adapter."""

    num_slots: int
    current: dict[str, Published] = field(default_factory=dict)
    retired: list[Published] = field(default_factory=list)
    training: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    # Names an adapter to unload when all slots are taken, if one may be: it can be loaded again.
    evict: Callable[[], str | None] | None = None

    def _free_slot(self, purpose: str) -> int:
        used = {p.slot for p in [*self.current.values(), *self.retired]}
        used |= set(self.training.values())
        for slot in range(1, self.num_slots):
            if slot not in used:
                return slot
        name = self.evict() if self.evict else None
        if name is not None:
            self.unload(name)
            return self._free_slot(purpose)
        raise AdapterError(
            f"no free slot for {purpose}: all {self.num_slots - 1} of adapters.slots "
            f"({self.num_slots}, slot 0 is no adapter) are taken; raise adapters.slots or "
            f"unload an adapter"
        )

    def publish(
        self, name: str, config: LoraConfig, ranks: Mapping[tuple[int, str], int]
    ) -> Published:
        """A new version of `name` in a free slot, current from now on."""
        slot = self._free_slot(f"adapter {name!r}")
        self.versions[name] = self.versions.get(name, 0) + 1
        self._retire(name)
        self.current[name] = Published(name, self.versions[name], slot, config, ranks)
        return self.current[name]

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
