"""A job from its configuration: its data, its first adapter, and the source of its work."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flexllm_jax.config import (
    PREFERENCE_METHODS,
    FinetuneConfig,
    FinetuneSection,
    PeftConfig,
    ReinforcementConfig,
)
from flexllm_jax.finetune.data import load_dataset
from flexllm_jax.finetune.dataset import DatasetSource, Method, Supervised
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.preference import Preference
from flexllm_jax.finetune.reinforcement.make import Play, reinforcement_source
from flexllm_jax.models.checkpoints.hf_tensors import read_kernel
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import (
    Adapter,
    AdapterConfig,
    AdapterError,
    LoraConfig,
    init_adapter,
)
from flexllm_jax.peft.bottleneck import BottleneckConfig
from flexllm_jax.peft.hf.peft import load_adapter
from flexllm_jax.peft.ia3 import Ia3Config
from flexllm_jax.peft.prefix import PrefixConfig
from flexllm_jax.peft.principal import initialize_from_base

# By `method.type`: how rows are trained on.
_METHODS: dict[str, Callable[[Any], Method]] = {
    "supervised": lambda _: Supervised(),
    **dict.fromkeys(PREFERENCE_METHODS, Preference),
}


def create_job(
    config: FinetuneConfig,
    model: ModelConfig,
    model_path: Path,
    tokenizer: Any,
    section: FinetuneSection,
    max_model_len: int,
    play: Play | None = None,
) -> FinetuneJob:
    """Load a job's data and its first adapter. `section`: the engine's part of the configuration.
    `play`: who gives the rewards of a reinforcement job.

    Rows that cannot be used are skipped and counted in the job's messages. Raises DatasetError or
    AdapterError, in one line, when nothing can be done with the data or the adapter.
    """
    max_tokens = section.max_tokens
    longest = min(config.max_seq_len or max_tokens, max_tokens, max_model_len)
    if config.init_adapter:
        adapter = load_adapter(config.init_adapter, model, model_path)
        adapter = _with_dropout(adapter, config.peft.lora_dropout)
    else:
        adapter = _fresh_adapter(
            _adapter_config(config.peft, model), model, model_path, config.seed
        )
    if config.optimizer.b_lr_ratio != 1 and adapter.config.kind != "lora":
        raise AdapterError(
            f"optimizer.b_lr_ratio={config.optimizer.b_lr_ratio}: an adapter of kind "
            f"{adapter.config.kind} has no B with a learning rate of its own; leave it out"
        )
    if config.optimizer.type == "muon" and adapter.config.kind != "lora":
        raise AdapterError(
            f"optimizer.type=muon: it changes factors of LoRA, and an adapter of kind "
            f"{adapter.config.kind} has none; use adamw"
        )
    unit = section.unit_tokens
    # Two microbatches shall fit at once, and a unit costs the same however full its slice is.
    half = max(unit, max_tokens // 2 // unit * unit)
    prefix = adapter.config.prefix_tokens
    if isinstance(config.method, ReinforcementConfig):
        source = reinforcement_source(
            config, tokenizer, model.vocab_size, longest, play, max_tokens, half, prefix
        )
    else:
        load = partial(
            load_dataset,
            tokenizer=tokenizer,
            format=config.format,
            max_seq_len=longest,
            train_on=config.train_on,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            pairs=config.method.pairs,
            max_pair_tokens=max_tokens,
        )
        dataset = load(config.dataset)
        validation = load(config.validation) if config.validation else None
        method = _METHODS[config.method.type](config.method)
        source = DatasetSource(config, method, dataset, validation, max_tokens, half, prefix)
    job = FinetuneJob(config, adapter.config, adapter, source)
    told = [
        data
        for data in (source.dataset, source.validation)
        if data and (data.skipped or data.unread)
    ]
    job.messages += [data.summary() for data in told]
    return job


def _fresh_adapter(
    config: AdapterConfig, model: ModelConfig, model_path: Path, seed: int
) -> Adapter:
    if not (isinstance(config, LoraConfig) and config.from_base):
        return init_adapter(config, model, seed)
    config, kernel = config.difference(), partial(read_kernel, model_path, model)
    return Adapter(config, initialize_from_base(config, model, seed, kernel))


def _with_dropout(adapter: Adapter, lora_dropout: float | None) -> Adapter:
    """An adapter of a file, which has the dropout that it was trained with until now unless told
    otherwise."""
    if lora_dropout is None or not isinstance(adapter.config, LoraConfig):
        return adapter
    return replace(adapter, config=replace(adapter.config, lora_dropout=lora_dropout))


def _adapter_config(peft: PeftConfig, model: ModelConfig) -> AdapterConfig:
    """What the adapter of a job is to be."""
    if peft.type == "ia3":
        return Ia3Config()
    if peft.type == "bottleneck":
        return BottleneckConfig(peft.bottleneck_size)
    if peft.type == "prefix":
        return PrefixConfig(peft.num_virtual_tokens)
    return LoraConfig(
        r=peft.r,
        alpha=peft.alpha,
        target_modules=tuple(peft.target_modules),
        use_rslora=peft.use_rslora,
        rank_pattern=peft.rank_pattern,
        alpha_pattern=peft.alpha_pattern,
        layers_to_transform=peft.layers_to_transform,
        init=peft.init,
        lora_dropout=peft.lora_dropout or 0.0,
        names=model.names,
    )
