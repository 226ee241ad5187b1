"""The scheduler of an engine: its limits are the engine's sizes, its objectives are configured."""

from typing import TextIO

from flexllm_jax.config import Config
from flexllm_jax.engine.device.profile import model_cost
from flexllm_jax.engine.memory.sizes import FINETUNE_SEQUENCES, EngineSizes
from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import LatencyModel
from scheduler.plan_log import LoggedScheduler
from scheduler.policies import make_policy
from scheduler.request import Slo


def slo_classes(config: Config) -> dict[str, Slo]:
    """The classes of service that requests may ask for, by name."""
    slos = {"standard": config.scheduler.slo, **config.scheduler.slo_classes}
    return {
        name: Slo(slo.tpot_ms / 1e3, slo.ttft_ms / 1e3, slo.weight, name)
        for name, slo in slos.items()
    }


def make_scheduler(
    config: Config, sizes: EngineSizes, num_pages: int, standard: Slo, latency: LatencyModel
) -> tuple[Scheduler, TextIO | None]:
    """The scheduler, and the file that it logs its plans to, if it shall (`log.plans`)."""
    snapshots = sizes.snapshots if sizes.recurrent else 0
    limits = SchedulerConfig(
        max_sequences=sizes.rows,
        max_tokens_per_step=sizes.buckets[-1],
        max_model_len=sizes.max_model_len,
        token_buckets=sizes.buckets,
        num_pages=num_pages,
        page_size=sizes.page_size,
        # Without a snapshot nobody can go on from where a prefix ends.
        prefix_caching=config.cache.prefix_caching and not (sizes.recurrent and not snapshots),
        state_snapshots=snapshots,
        snapshot_every=config.cache.snapshot_tokens,
        windows=model_cost(sizes).windows,
        num_layers=sizes.model.num_layers,
        unit_tokens=sizes.unit_tokens,
        finetune_slots=sizes.finetune_slots,
        max_finetune_segments=FINETUNE_SEQUENCES,
        slo=standard,
        idle_step_s=config.finetune.idle_step_ms / 1e3,
        finetune_floor=config.finetune.floor,
    )
    policy = config.scheduler.policy
    if not config.log.plans:
        return Scheduler(limits, latency, make_policy(policy)), None
    config.output_dir.mkdir(parents=True, exist_ok=True)
    file = (config.output_dir / "plans.jsonl").open("w", encoding="utf-8")
    return LoggedScheduler(limits, latency, policy, file), file
