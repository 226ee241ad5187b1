"""Admission control: refuses what could never run, with the reason, before it is queued.

Whatever passes these checks finishes when it is alone in the engine, so queueing it is safe.
"""

from __future__ import annotations

from scheduler.config import SchedulerConfig
from scheduler.request import Microbatch, Request


def check_request(request: Request, config: SchedulerConfig) -> None:
    """ValueError if `request` is empty, too long for the model, or too large for the page pool."""
    name = f"request {request.request_id!r}"
    prompt, output = len(request.prompt), request.max_tokens
    if not prompt or output < 1:
        raise ValueError(
            f"{name}: prompt of {prompt} tokens and max_tokens={output} must both be at least 1"
        )
    if prompt + output > config.max_model_len:
        raise ValueError(
            f"{name}: prompt of {prompt} tokens + max_tokens={output} exceeds"
            f" max_model_len={config.max_model_len}"
        )
    # The last sampled token is never an input, so its key and value are never stored.
    _check_pages(name, -(-(prompt + output - 1) // config.page_size), config)


def check_microbatch(microbatch: Microbatch, config: SchedulerConfig) -> None:
    """ValueError if `microbatch` is empty, too long for the model, or too large for the pool."""
    name = f"microbatch {microbatch.microbatch_id}"
    lengths = microbatch.lengths
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{name}: lengths={lengths} must not be empty, and each at least 1")
    if (longest := max(microbatch.keys)) > config.max_model_len:
        raise ValueError(
            f"{name}: a sequence of {longest} tokens exceeds max_model_len={config.max_model_len}"
        )
    slices = -(-microbatch.tokens // config.unit_tokens)
    if slices * config.unit_tokens > config.finetune_slots:
        raise ValueError(
            f"{name}: {microbatch.tokens} tokens in slices of {config.unit_tokens} exceed"
            f" finetune_slots={config.finetune_slots}"
        )
    _check_pages(name, sum(-(-length // config.page_size) for length in lengths), config)


def _check_pages(name: str, pages: int, config: SchedulerConfig) -> None:
    if pages > config.num_pages:
        raise ValueError(
            f"{name} needs {pages} KV pages of {config.page_size} tokens, but the pool has"
            f" {config.num_pages}: enlarge the pool (cache) or shorten it"
        )
