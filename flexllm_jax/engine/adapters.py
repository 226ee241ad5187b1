"""The adapters that an engine serves: loaded, published, read and forgotten between two steps."""

from pathlib import Path

from flexllm_jax.engine.device.out_of_memory import OutOfMemory, room_for
from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.bank import AdapterRow, from_row, to_row
from flexllm_jax.peft.directory import BankDirectory, Published
from flexllm_jax.peft.hf.peft import load_adapter


class ServedAdapters:
    """The bank's arrays (`runner`) and who has which of its slots (`directory`), kept together.

    `base`: folder of the base model.
    """

    def __init__(self, runner: Runner, slots: int, base: Path):
        self._runner, self._base = runner, base
        self.directory = BankDirectory(slots)

    def load(self, name: str, path) -> Published:
        """Load a PEFT folder as a new version of `name`."""
        adapter = load_adapter(path, self._runner.model, self._base)
        return self.publish(name, adapter)

    def to_row(self, name: str, adapter: Adapter) -> AdapterRow:
        """What `publish` writes to the bank: may be made in another thread beforehand."""
        return to_row(adapter, self._runner.model, self._runner.sizes.bank, name)

    def publish(self, name: str, adapter: Adapter, row: AdapterRow | None = None) -> Published:
        """Serve an adapter as a new version of `name`; requests to the old one finish on it."""
        weights, scales = row or self.to_row(name, adapter)
        published = self.directory.publish(name, adapter.config, adapter.shapes)
        try:
            with room_for(f"adapter {name!r}"):
                self._runner.write_adapter(published.bank_slot, weights, scales)
        except OutOfMemory:
            self.directory.unload(name)
            raise
        return published

    def publish_job(self, job: FinetuneJob) -> Published:
        """Serve what a job has learnt so far under its name: a copy of its slot on the device.
        ValueError when it has ended: its slot may be another's."""
        if not job.running:
            raise ValueError(f"job {job.name!r} has ended: load its adapter from its folder")
        published = self.directory.publish(job.name, job.peft, job.shapes)
        self._runner.copy_adapter(job.bank_slot, published.bank_slot)
        return published

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that use it finish."""
        self.directory.unload(name)

    def read(self, name: str) -> Adapter:
        """A served adapter's weights on the host; waits for the device."""
        published = self.directory.lookup(name)
        values = self._runner.read_adapter(published.bank_slot)
        stacks = self._runner.sizes.stacks
        return from_row(values, published.config, published.shapes, stacks)
