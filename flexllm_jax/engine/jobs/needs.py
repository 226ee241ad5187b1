"""What a job needs of an engine: programs compiled at its start, or a model on one device."""

from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.peft.adapter import LoraConfig


def check_job(job: FinetuneJob, sizes: EngineSizes) -> None:
    """ValueError, in one line, for a job that an engine of these sizes cannot train."""
    if sizes.placement and isinstance(job.peft, LoraConfig) and job.peft.from_base:
        raise ValueError(
            f"peft.init={job.peft.init} needs parallel.tp=1: how ranks are split over devices "
            "does not know of the half that is not trained; use default or gaussian"
        )
    if job.lora_dropout and not sizes.dropout:
        raise ValueError(
            f"peft.lora_dropout={job.lora_dropout}: this engine has no programs for dropout; "
            "set finetune.dropout: true and start it anew, or train with lora_dropout: 0"
        )
    if job.optimizer not in sizes.optimizers:
        raise ValueError(
            f"optimizer.type={job.optimizer}: this engine has no program for it; add it to "
            "finetune.optimizers and start it anew, or train with adamw"
        )
