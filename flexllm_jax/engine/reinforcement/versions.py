"""Versions of adapters that jobs answer with: each stays as it was when it was frozen.

A version is a slot of the bank. Where slots are short it waits in the host's memory, and comes back
with the same numbers, in the order in which versions are wanted; one that a request runs on stays
where it is.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.peft.directory import BankDirectory, NoFreeSlot, Published


@dataclass(eq=False)
class Version:
    """One of them. `published`: what requests name; it has a slot unless `weights` has what is to
    be written in one. `scales`: of its job's adapter."""

    published: Published
    scales: list
    weights: list | None = None
    yields_until: float = 0.0  # no more requests until then: others want its slot

    @property
    def placed(self) -> bool:
        """Whether it has a slot."""
        return self.weights is None

    @property
    def spillable(self) -> bool:
        """Whether it has a slot and no request."""
        return self.placed and self.published.users == 1


class Versions:
    """All versions of an engine's jobs; the engine's thread alone uses it.

    spilled, returned: how often one went to the host's memory, and came back.
    """

    def __init__(self, runner: Runner, directory: BankDirectory):
        self._runner, self._directory = runner, directory
        self._all: list[Version] = []  # the last to get its slot comes last
        self._wanted: deque[Version] = deque()  # on the host; the first came first
        self.spilled = self.returned = 0
        directory.rooms.append(self)

    def freeze(self, job: FinetuneJob) -> Version:
        """A job's adapter as it is now; held until `release`."""
        version = self._new(job, job.scales)
        if self._place(version):
            self._runner.copy_adapter(job.bank_slot, version.published.bank_slot)
        else:
            self._spill(version, self._runner.read_adapter(job.bank_slot))
        return version

    def thaw(self, job: FinetuneJob, weights: list, scales: list) -> Version:
        """An earlier version of a job's adapter; held until `release`."""
        version = self._new(job, scales)
        if self._place(version):
            self._runner.write_adapter(version.published.bank_slot, weights, scales)
        else:
            self._spill(version, weights)
        return version

    def read(self, version: Version) -> list:
        """Its weights on the host; waits for the device."""
        if version.weights is not None:
            return version.weights
        return self._runner.read_adapter(version.published.bank_slot)

    def bring(self, version: Version) -> bool:
        """Whether requests to it can be sent: it has a slot, or gets one now in its turn."""
        if version.weights is None:
            return version.yields_until < time.monotonic()
        if version not in self._wanted:
            self._wanted.append(version)
        if not self._place(version):
            return False
        self._wanted.popleft()
        self._runner.write_adapter(version.published.bank_slot, version.weights, version.scales)
        version.weights = None
        self.returned += 1
        return True

    def forgo(self, version: Version) -> None:
        """It is not wanted for now."""
        if version in self._wanted:
            self._wanted.remove(version)

    def release(self, version: Version) -> None:
        """Nobody will ask for it any more."""
        self.forgo(version)
        self._all.remove(version)
        if version.placed:
            self._directory.release(version.published)

    @property
    def num_on_host(self) -> int:
        """Versions without a slot."""
        return sum(not version.placed for version in self._all)

    @property
    def due(self) -> bool:
        """Whether a version that is wanted can get a slot."""
        return bool(self._wanted) and self._directory.num_to_be_had > 0

    # -- what others want -------------------------------------------------------------------------

    @property
    def num_to_be_had(self) -> int:
        """Slots that versions can give up (`bank.Room`)."""
        return sum(version.spillable for version in self._all)

    def make(self) -> bool:
        """Let the version that has had its slot the longest wait in the host's memory."""
        version = next((v for v in self._all if v.spillable), None)
        if version is None:
            return False
        self._spill(version, self.read(version))
        self._directory.release(version.published)
        return True

    def yield_oldest(self, seconds: float) -> None:
        """Others wait for a slot: the version that has had one the longest takes no more requests
        for a while, so that it can be had."""
        placed = [version for version in self._all if version.placed]
        if placed:
            placed[0].yields_until = time.monotonic() + seconds

    # ---------------------------------------------------------------------------------------------

    def _new(self, job: FinetuneJob, scales: list) -> Version:
        name = f"{job.name}/rollouts"
        version = Version(self._directory.number(name, job.peft, job.shapes), scales)
        self._all.append(version)
        return version

    def _place(self, version: Version) -> bool:
        if self._wanted and self._wanted[0] is not version:
            return False  # others were first
        try:
            self._directory.hold(version.published)
        except NoFreeSlot:
            return False
        self._all.remove(version)
        self._all.append(version)
        return True

    def _spill(self, version: Version, weights: list) -> None:
        version.weights = weights
        self.spilled += 1
