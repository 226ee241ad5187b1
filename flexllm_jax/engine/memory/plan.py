"""The memory of a device: what an engine will put there, planned before anything is.

What is allocated in service is planned: arrays, a state and a copy of it for every job that may run
at once, adapters on their way into the bank, and what compiled programs need while they run
(`temporaries`). KV pages take what all that leaves, and no more than the requests and the
microbatches could ever use at once. `scripts/plan.py` asks the same of devices that are not there.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from flexllm_jax.config import Config
from flexllm_jax.engine.memory.cache import CacheError, device_memory, tree_bytes
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.engine.memory.temporaries import reckon_temporaries
from flexllm_jax.engine.sampling.structured_outputs import mask_words
from flexllm_jax.errors import UserError
from flexllm_jax.finetune.optimizer import checkpointed
from kernels_pallas.backend import Backend, select_backend

# Steps whose outputs are on the device at once: one runs, one is read.
_STEPS_IN_FLIGHT = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    available: what the engine may use. parts: by purpose, all but the pages (`fixed_parts`). jobs:
    how many may run at once. page_bytes: of one page in all layers.
    """

    available: int
    parts: Mapping[str, int]
    jobs: int
    page_bytes: int
    num_pages: int

    @property
    def pages(self) -> int:
        """Bytes of the pool."""
        return self.page_bytes * self.num_pages

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(self.parts.values()) + self.pages

    def describe(self) -> str:
        """One line for the start-up log."""
        named = {f"{self.jobs} {k}" if k == "jobs" else k: v for k, v in self.parts.items()}
        named[f"{self.num_pages} KV pages"] = self.pages
        parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in named.items())
        return f"memory, MiB: {parts}; {self.total / 2**20:,.1f} of {self.available / 2**20:,.1f}"


def choose_backend(config: Config, device: Any) -> Backend:
    """The kernels that a device gets. UserError where it cannot run those that are asked for."""
    try:
        return select_backend(config.kernels, device)
    except ValueError as error:
        raise UserError(str(error)) from None


def memory_budget(config: Config, device: Any) -> int:
    """Bytes of each device that the engine may use. CacheError where nobody says how many there
    are."""
    own, given = device_memory(device), config.cache.budget_gb
    if given is None:
        if own is None:
            raise CacheError(
                f"cache.budget_gb: {device.device_kind} does not say how much memory it has "
                f"(XLA_PYTHON_CLIENT_ALLOCATOR may be the reason); give it here"
            )
        return int(_least_of_all(own) * config.cache.memory_fraction)
    if own is not None and given * 1e9 > own:
        raise CacheError(
            f"cache.budget_gb: {given:g} is more than the {own / 1e9:.1f} that JAX may use of "
            f"{device.device_kind}; lower it, or leave it out"
        )
    return int(given * 1e9)


def planned_jobs(config: Config) -> int:
    """Jobs whose state is on the device at once: those that are configured, or as many as a server
    runs, and models that clients train; each trains in a slot of the bank."""
    most = max(len(config.finetune.jobs), config.server.max_running_jobs)
    return min(most + models_at_once(config), config.adapters.slots - 1)


def models_at_once(config: Config) -> int:
    """Models that clients train which are on the device at once. Of the bank's slots, one is left
    to their samplers, and the first is no adapter."""
    tinker = config.server.tinker
    return max(1, min(tinker.models_at_once, config.adapters.slots - 2)) if tinker.enabled else 0


def fixed_parts(
    config: Config, sizes: EngineSizes, temporaries: int | None = None
) -> dict[str, int]:
    """Bytes on each device by purpose, of everything but the pages. `temporaries`: what compiled
    programs say they need; None: what is reckoned."""
    jobs, state = planned_jobs(config), sizes.job_state
    shapes = sizes.step_shapes
    outputs = _STEPS_IN_FLIGHT * sizes.buckets[-1] * sizes.model.d_model * sizes.dtype.itemsize
    allowed = {shape.samples for shape in shapes.values()}
    # A checkpoint's copy of a job's state is whole on every device; an adapter that is being loaded
    # waits there for its row of the bank.
    kept = _whole_bytes(checkpointed(state))
    states = {"states": sizes.states_bytes} if sizes.recurrent else {}
    return {
        "weights": tree_bytes(sizes.parameters),
        "adapters": tree_bytes(sizes.bank_arrays),
        "finetuning": tree_bytes((sizes.finetune_arrays, sizes.pending_arrays)),
        "requests": tree_bytes(sizes.request_arrays)
        + 4 * mask_words(sizes.model.vocab_size) * sum(allowed)
        + outputs,
        **states,
        "jobs": jobs * tree_bytes(state),
        "copies": jobs * kept + tree_bytes(sizes.adapter_row.weights),
        "temporaries": max(reckon_temporaries(sizes).values())
        if temporaries is None
        else temporaries,
    }


def plan_memory(
    config: Config, sizes: EngineSizes, available: int, temporaries: int | None = None
) -> MemoryPlan:
    """Size the page pool: `cache.num_pages`, or what fits. CacheError when that is too little.

    available, temporaries: as of `MemoryPlan` and `fixed_parts`."""
    parts, page_bytes = fixed_parts(config, sizes, temporaries), sizes.page_bytes
    left = available - sum(parts.values())
    fits, fixed = max(left, 0) // page_bytes, config.cache.num_pages
    num_pages = min(fits, sizes.wanted_pages) if fixed is None else fixed
    if num_pages > fits or num_pages < 1:
        more = "scheduler.max_sequences, cache.state_snapshots, " if sizes.recurrent else ""
        taken = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        raise CacheError(
            f"cache: {num_pages or 1} KV pages of {page_bytes:,} bytes do not fit in the "
            f"{max(left, 0):,} bytes that all else leaves of {available:,} (GB: {taken}): lower "
            f"{more}cache.num_pages, finetune.max_tokens, adapters.slots, adapters.max_rank or "
            f"server.max_running_jobs, or raise cache.memory_fraction or parallel.tp"
        )
    return MemoryPlan(available, parts, planned_jobs(config), page_bytes, num_pages)


def compiled_temporaries(programs: Iterable[jax.stages.Compiled]) -> int:
    """The most bytes that one of the programs needs while it runs; they run one after the other."""
    analyses = [program.memory_analysis() for program in programs]
    return max((a.temp_size_in_bytes for a in analyses if a is not None), default=0)


def _whole_bytes(tree: Any) -> int:
    """Bytes of all arrays, however they are sharded."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _least_of_all(count: int) -> int:
    """The smallest of the processes' numbers, to 2**20."""
    if jax.process_count() == 1:
        return count
    return int(process_allgather(np.int32(count >> 20)).min()) << 20
