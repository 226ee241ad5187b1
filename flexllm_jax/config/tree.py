"""The whole configuration, and what one section says about another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from flexllm_jax.config.fields import ConfigError, Section, ranks_taken, room_for
from flexllm_jax.config.sections.finetune import FinetuneSection
from flexllm_jax.config.sections.graders import GradersSection
from flexllm_jax.config.sections.memory import AdaptersSection, CacheSection
from flexllm_jax.config.sections.model import ModelSection, ParallelSection
from flexllm_jax.config.sections.scheduler import CompileSection, SchedulerSection
from flexllm_jax.config.sections.server import LogSection, RaySection, ServerSection
from flexllm_jax.config.sections.trackers import TrackersSection
from flexllm_jax.config.sections.workload import WorkloadSection


class Config(Section):
    """The whole tree."""

    model: ModelSection = Field(description="The base model.")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="Devices.")
    kernels: Literal["auto", "xla", "pallas", "mosaic"] = Field(
        default="auto",
        description="Attention and adapter kernels. auto: pallas on a GPU, xla elsewhere. pallas "
        "without a GPU runs in an interpreter, slowly. mosaic: as pallas, and on H100 and H200 the "
        "backward of attention (bfloat16, heads of 64 or 128) in a kernel that is not timed yet.",
    )
    cache: CacheSection = Field(default_factory=CacheSection, description="KV pages.")
    adapters: AdaptersSection = Field(default_factory=AdaptersSection, description="Adapter bank.")
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection, description="Steps.")
    compile: CompileSection = Field(default_factory=CompileSection, description="Programs.")
    finetune: FinetuneSection = Field(default_factory=FinetuneSection, description="Finetuning.")
    graders: GradersSection = Field(
        default_factory=GradersSection, description="What graders may take of the machine."
    )
    trackers: TrackersSection = Field(
        default_factory=TrackersSection, description="Where the progress of jobs is written."
    )
    workload: WorkloadSection | None = Field(default=None, description="Requests to replay.")
    server: ServerSection = Field(default_factory=ServerSection, description="HTTP server.")
    ray: RaySection = Field(default_factory=RaySection, description="Replicas.")
    log: LogSection = Field(default_factory=LogSection, description="Logs.")
    output_dir: Path = Field(
        default=Path("runs/default"), description="Folder for reports, checkpoints and adapters."
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for problem in self._disagreements():
            raise ValueError(problem)
        return self

    def _disagreements(self) -> Iterator[str]:
        buckets, adapters, jobs = self.compile.token_buckets, self.adapters, self.finetune.jobs
        largest = self.scheduler.max_tokens_per_step
        if buckets and largest and buckets[-1] != largest:
            yield (
                f"compile.token_buckets: the last bucket is {buckets[-1]}; it must equal "
                f"scheduler.max_tokens_per_step, which is {largest}"
            )
        if buckets and buckets[-1] < self.scheduler.max_sequences:
            yield (
                f"compile.token_buckets: the last bucket is {buckets[-1]}, less than "
                f"scheduler.max_sequences, which is {self.scheduler.max_sequences}; every running "
                f"request needs a token slot"
            )
        preloaded = {adapter.name for adapter in adapters.preload}
        needed = 1 + len(preloaded) + sum(job.slots for job in jobs)
        if needed > adapters.slots:
            yield (
                f"adapters.slots: got {adapters.slots}; slot 0 is `no adapter`, every preloaded "
                f"adapter and job needs one, and a reinforcement job one for each version that "
                f"answers: set it to {needed} or more"
            )
        for index, job in enumerate(jobs):
            field = f"finetune.jobs.{index}"
            if job.name in preloaded:
                yield f"{field}.name: {job.name!r} is also a preloaded adapter; rename one of them"
            if job.peft.type not in adapters.kinds:
                yield f"{field}.peft.type: {job.peft.type} is not in adapters.kinds; add it there"
            times = ranks_taken(job.peft.init)
            rank = times * max((job.peft.r, *job.peft.rank_pattern.values()))
            own_rank = f"init: {job.peft.init} takes twice the rank," if times > 1 else "r: rank"
            for kind, own, value, most in (
                ("lora", own_rank, rank, "max_rank"),
                ("bottleneck", "bottleneck_size:", job.peft.bottleneck_size, "max_bottleneck"),
                ("prefix", "num_virtual_tokens:", job.peft.num_virtual_tokens, "max_prefix"),
            ):
                limit = getattr(adapters, most)
                if job.peft.type == kind and value > limit:
                    yield (
                        f"{field}.peft.{own} {value} is more than adapters.{most}, which is "
                        f"{limit}; raise that or lower it"
                    )
            for module in job.peft.target_modules if job.peft.type == "lora" else ():
                if not room_for(module, adapters.target_modules):
                    yield (
                        f"{field}.peft.target_modules: {module} is not in adapters.target_modules; "
                        "add it there or drop it here"
                    )
        known = preloaded | {job.name for job in jobs}
        wanted = self.workload.adapter if self.workload else None
        if wanted and wanted not in known:
            yield (
                f"workload.adapter: {wanted!r} is neither a preloaded adapter nor a job "
                f"({', '.join(sorted(known)) or 'there are none'})"
            )

        classes = {"standard", *self.scheduler.slo_classes}
        if self.workload and self.workload.slo_class not in classes:
            yield (
                f"workload.slo_class: {self.workload.slo_class!r} is not one of "
                f"{', '.join(sorted(classes))}; add it to scheduler.slo_classes"
            )

    def require_inputs(self) -> None:
        """Raise ConfigError naming the first input file or folder that does not exist.

        Scripts call it first: a mistyped path must not cost minutes of loading and compiling.
        """
        inputs: dict[str, Path | None] = {"model.path": self.model.path}
        for index, adapter in enumerate(self.adapters.preload):
            inputs[f"adapters.preload.{index}.path"] = adapter.path
        for index, job in enumerate(self.finetune.jobs):
            for field in ("dataset", "validation", "init_adapter"):
                inputs[f"finetune.jobs.{index}.{field}"] = getattr(job, field)
        if self.workload:
            inputs["workload.trace"] = self.workload.trace
            inputs["workload.prompts"] = self.workload.prompts
        for field, path in inputs.items():
            if path is not None and not path.exists():
                raise ConfigError(f"{field}: {path} does not exist (paths start at {Path.cwd()})")
