"""Who has which slot of the adapter bank, and until when.

A published adapter is a slot and a version. Publishing again takes a new slot, so requests to the
old version finish on it; its slot is free when the last of them is done.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from flexllm_jax.peft.adapter import AdapterConfig, AdapterError
from flexllm_jax.peft.bank import Shapes


@dataclass
class Published:
    """One version of a named adapter and the slot it is served from."""

    name: str
    version: int
    bank_slot: int
    config: AdapterConfig
    shapes: Shapes
    users: int = 0
    pins: int = 0  # of its users, those that stay for long: it is neither evicted nor given up


class Room(Protocol):
    """Who has slots whose content is not in use and can be brought back."""

    @property
    def num_to_be_had(self) -> int:
        """How many."""
        ...

    def make(self) -> bool:
        """Free one of them; whether there was one."""
        ...


class NoFreeSlot(AdapterError):
    """All slots are in use at this moment."""


@dataclass
class BankDirectory:
    """Which slot holds what (host side). Slots 1..num_slots-1 can hold an adapter.

    current   what requests get by name
    retired   older versions, until their requests are done
    held      versions that nobody can ask for by name
    training  the slots that jobs train in; answering: of these, who needs others to answer from
    rooms     who can free a slot, in this order
    """

    num_slots: int
    current: dict[str, Published] = field(default_factory=dict)
    retired: list[Published] = field(default_factory=list)
    held: list[Published] = field(default_factory=list)
    training: dict[str, int] = field(default_factory=dict)
    answering: set[str] = field(default_factory=set)
    versions: dict[str, int] = field(default_factory=dict)
    rooms: list[Room] = field(default_factory=list)

    def _used(self) -> set[int]:
        published = {p.bank_slot for p in [*self.current.values(), *self.retired, *self.held]}
        return published | set(self.training.values())

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return self.num_slots - 1 - len(self._used())

    @property
    def num_to_be_had(self) -> int:
        """Slots that hold nothing, or nothing that must stay."""
        return self.num_free + sum(room.num_to_be_had for room in self.rooms)

    def _free_slot(self, purpose: str) -> int:
        used = self._used()
        for slot in range(1, self.num_slots):
            if slot not in used:
                return slot
        if any(room.make() for room in self.rooms):
            return self._free_slot(purpose)
        raise NoFreeSlot(
            f"no free slot for {purpose}: all {self.num_slots - 1} of adapters.slots "
            f"({self.num_slots}, slot 0 is no adapter) are taken; raise adapters.slots or "
            f"unload an adapter"
        )

    def publish(self, name: str, config: AdapterConfig, shapes: Shapes) -> Published:
        """A new version of `name` in a free slot, current from now on."""
        slot = self._free_slot(f"adapter {name!r}")
        published = self.number(name, config, shapes)
        published.bank_slot = slot
        self._retire(name)
        self.current[name] = published
        return published

    def number(self, name: str, config: AdapterConfig, shapes: Shapes) -> Published:
        """The next version of `name`, which has no slot before `hold`."""
        self.versions[name] = self.versions.get(name, 0) + 1
        return Published(name, self.versions[name], 0, config, shapes)

    def hold(self, own: Published) -> None:
        """Give a version a slot until `release`; nobody can ask for it by name. NoFreeSlot."""
        own.bank_slot = self._free_slot(f"a version of {own.name!r}")
        own.users = 1
        self.held.append(own)

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

    def pin(self, name: str) -> Published:
        """The current version of `name`, held for long: until `unpin`. NoFreeSlot when no slot
        would be left to answer from."""
        published = self.lookup(name)
        if not published.pins:
            self._check_left(f"adapter {name!r} to stay loaded", self.answering)
        published.users += 1
        published.pins += 1
        return published

    def unpin(self, published: Published) -> None:
        """One of those that hold a version for long is done."""
        published.pins -= 1
        self.release(published)

    def release(self, published: Published) -> None:
        """One user of a version is done."""
        published.users -= 1
        if not published.users:
            for kept in (self.retired, self.held):
                if published in kept:
                    kept.remove(published)

    def start_training(self, job: str, answers: bool = False) -> int:
        """A slot for a job to train in; `answers`: it needs others, by turns, to answer from.
        ValueError when it has one already, NoFreeSlot when there is none."""
        if job in self.training:
            raise ValueError(f"job {job!r} is running already: use another name")
        self._check_left(f"job {job!r} to train in", self.answering or answers)
        self.training[job] = self._free_slot(f"job {job!r} to train in")
        if answers:
            self.answering.add(job)
        return self.training[job]

    def _check_left(self, purpose: str, answered: Collection[str] | bool) -> None:
        """NoFreeSlot when one more slot kept for long would leave none to answer from."""
        pinned = sum(bool(p.pins) for p in [*self.current.values(), *self.retired])
        if answered and len(self.training) + pinned + 2 > self.num_slots - 1:
            raise NoFreeSlot(
                f"no free slot for {purpose}: of adapters.slots ({self.num_slots}, slot 0 is no "
                "adapter) one is left to what jobs that learn from rewards answer with; raise "
                "adapters.slots or wait for a job"
            )

    def stop_training(self, job: str) -> None:
        """Free a job's slot."""
        self.training.pop(job, None)
        self.answering.discard(job)
