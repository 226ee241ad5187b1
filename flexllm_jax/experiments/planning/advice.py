"""What would help: single changes of a configuration, each planned again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flexllm_jax.compile.mesh import Mesh, ParallelError
from flexllm_jax.config import Config, ConfigError, build_config
from flexllm_jax.experiments.planning.engine import PlannedEngine, plan_engine
from flexllm_jax.experiments.planning.load import Job, finetuning_alone

_WORTH = 1.03  # what a change must give to be told, where the engine fits without it
_ROOMY = 0.97  # of the memory, for an engine that takes less by default


@dataclass(frozen=True)
class Advice:
    """A change (fields with their values), and the engine that it makes; finetuning in tokens/s of
    one engine alone, None where it does not fit."""

    change: dict[str, Any]
    planned: PlannedEngine
    finetuning: float | None

    @property
    def text(self) -> str:
        """As it is given to a script."""
        return " ".join(
            f"--set {field}={str(value).replace(' ', '')}" for field, value in self.change.items()
        )


def advise(planned: PlannedEngine, job: Job, finetuning: float | None) -> list[Advice]:
    """The changes that make it fit, or, where it does, that give more room for keys and values or a
    faster job (`finetuning`: tokens/s without any). In the order of `changes`."""
    found = []
    for change in changes(planned):
        try:
            changed = plan_engine(_changed(planned.config, change), planned.device.name)
        except ConfigError:  # this configuration has another reason against it
            continue
        if not changed.fits:
            continue
        speed = finetuning_alone(changed, job)
        if (
            finetuning is None
            or changed.kv_tokens > _WORTH * planned.kv_tokens
            or speed > _WORTH * finetuning
        ):
            found.append(Advice(change, changed, speed))
    return found


def changes(planned: PlannedEngine) -> Iterator[dict[str, Any]]:
    """What may help, the cheapest to the user first; at last, where nothing fits, all that
    makes it smaller at once."""
    config, sizes = planned.config, planned.sizes
    smaller: dict[str, Any] = {}
    for saved in ("all", "attention", []):
        if saved != config.finetune.saved:
            yield {"finetune.saved": saved}
    smaller["finetune.saved"] = []
    if planned.jobs > max(1, len(config.finetune.jobs)):
        smaller["server.max_running_jobs"] = max(1, len(config.finetune.jobs))
        yield {"server.max_running_jobs": smaller["server.max_running_jobs"]}
    half = config.finetune.max_tokens // 2
    longest = max((job.max_seq_len or 0 for job in config.finetune.jobs), default=0)
    if half >= longest and half % sizes.unit_tokens == 0 and half:
        smaller["finetune.max_tokens"] = half
        yield {"finetune.max_tokens": half}
    if sizes.recurrent:
        fewer = {"scheduler.max_sequences": -(-sizes.rows // 2)}
        if sizes.snapshots:
            fewer["cache.state_snapshots"] = sizes.snapshots // 2
        for field, value in fewer.items():
            yield {field: value}
        smaller |= fewer
    if config.cache.budget_gb is None and config.cache.memory_fraction < _ROOMY:
        smaller["cache.memory_fraction"] = _ROOMY
        yield {"cache.memory_fraction": _ROOMY}
    if config.cache.num_pages is not None:
        yield {"cache.num_pages": None}
    if _divides(planned, 2 * sizes.devices):
        yield {"parallel.tp": 2 * sizes.devices}
    if not planned.fits:
        yield smaller


def _divides(planned: PlannedEngine, tp: int) -> bool:
    """Whether so many devices can share the model."""
    try:
        Mesh.of(planned.sizes.model, tp)
    except ParallelError:
        return False
    return not planned.sizes.bank.has_head


def _changed(config: Config, change: dict[str, Any]) -> Config:
    tree = config.model_dump(mode="python", exclude_unset=True)
    for field, value in change.items():
        section, name = field.split(".")
        tree.setdefault(section, {})[name] = value
    return build_config(tree)
