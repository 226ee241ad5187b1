"""An engine of a configuration on a chip that is not there.

Its memory is planned by the engine's own planner, from the same shapes; its step times are a
roofline of the chip's data sheet with what the engine was measured to reach of one
(`scheduler.latency.roofline.MEASURED`). Nothing is compiled or allocated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from flexllm_jax.config import Config
from flexllm_jax.engine.device.profile import model_cost
from flexllm_jax.engine.memory.activations import choose_saved, recomputed, saved_names
from flexllm_jax.engine.memory.cache import CacheError
from flexllm_jax.engine.memory.placement import Placement, split
from flexllm_jax.engine.memory.plan import (
    choose_backend,
    fixed_parts,
    memory_budget,
    plan_memory,
    planned_jobs,
)
from flexllm_jax.engine.memory.sizes import EngineSizes, bank_shape, step_buckets
from flexllm_jax.experiments.gpu.compile import TARGETS
from flexllm_jax.models.checkpoints.dtype import engine_dtype
from flexllm_jax.models.config import ModelConfig
from scheduler.latency import roofline as sheets
from scheduler.latency.model import LatencyModel
from scheduler.latency.roofline import MEASURED, DeviceSpec, roofline

CHIPS = {"a100": sheets.A100, "h100": sheets.H100, "h200": sheets.H200}
_JAX_SHARE = 0.92  # XLA_CLIENT_MEM_FRACTION, as `flexllm_jax` sets it
_SPREAD = 0.1  # of what the scheduler believes, before it has measured anything


@dataclass(frozen=True)
class AbsentDevice:
    """What the engine asks a device, of one that is not there."""

    name: str
    platform: str = "gpu"

    @property
    def spec(self) -> DeviceSpec:
        """Its data sheet."""
        return CHIPS[self.name]

    @property
    def device_kind(self) -> str:
        """As JAX names it."""
        return self.spec.name

    def memory_stats(self) -> dict[str, int]:
        """The memory that JAX would take."""
        text = (TARGETS / f"{self.name}.txtpb").read_text(encoding="utf-8")
        found = re.search(r"device_memory_size: (\d+)", text)
        assert found is not None, f"{self.name}.txtpb says nothing of memory"
        return {"bytes_limit": int(int(found[1]) * _JAX_SHARE)}


@dataclass(frozen=True)
class PlannedEngine:
    """Bytes are of each device. parts: by purpose (`engine.memory.plan.fixed_parts`). problem: why
    it does not fit: as the engine would say, or its pages are too few for what is to run."""

    config: Config
    device: AbsentDevice
    sizes: EngineSizes
    available: int
    parts: dict[str, int]
    num_pages: int
    problem: str | None

    @property
    def fits(self) -> bool:
        """Whether such an engine would start, and could run what it is configured for."""
        return self.problem is None

    @property
    def jobs(self) -> int:
        """Jobs that may run at once."""
        return planned_jobs(self.config)

    @cached_property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return self.sizes.page_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that the pages hold."""
        return self.num_pages * self.sizes.page_size

    @property
    def saved(self) -> list[str]:
        """The activations that the finetuning forward keeps."""
        return list(saved_names(self.sizes))

    @cached_property
    def latency(self) -> LatencyModel:
        """How long its steps would take."""
        sizes, cost = self.sizes, model_cost(self.sizes)
        parameters = cost.layers * cost.layer_parameters
        again = recomputed(sizes) / (2 * parameters * sizes.finetune_slots)
        return roofline(
            self.device.spec,
            cost,
            self.sizes.buckets,
            self.sizes.unit_tokens,
            tp=self.sizes.devices,
            rank=self.sizes.bank.rank,
            efficiency=replace(MEASURED, recompute=again),
            spread=_SPREAD,
        )


def plan_engine(config: Config, chip: str) -> PlannedEngine:
    """The engine of a configuration on a chip of `CHIPS`. UserErrors for what no chip could do."""
    device, model = (
        AbsentDevice(chip),
        ModelConfig.from_hf(config.model.path, config.model.max_model_len),
    )
    backend = choose_backend(config, device)
    shared = split(
        config,
        model,
        bank_shape(config, model),
        step_buckets(config, device.platform)[-1],
        engine_dtype(config.model.dtype, config.model.path, device.platform),
    )
    placement = Placement.without_devices(model, shared) if shared else None
    sizes = EngineSizes.from_config(config, model, device.platform, backend, placement)
    available = memory_budget(config, device)
    sizes = choose_saved(config, sizes, available)
    num_pages, problem = 0, None
    try:
        memory = plan_memory(config, sizes, available)
    except CacheError as error:
        problem, parts = str(error), fixed_parts(config, sizes)
    else:
        num_pages, parts = memory.num_pages, dict(memory.parts)
    least = max(sizes.pages_per_sequence, sizes.finetune_slots // sizes.page_size)
    if problem is None and num_pages < least:
        problem = (
            f"cache: room for {num_pages:,} KV pages of {sizes.page_size} tokens, and a longest "
            f"request (model.max_model_len {sizes.max_model_len:,}) or the finetuning slots "
            f"(finetune.max_tokens {sizes.finetune_slots:,}) fill {least:,}"
        )
    return PlannedEngine(config, device, sizes, available, parts, num_pages, problem)
