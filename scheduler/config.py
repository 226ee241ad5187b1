"""The limits of the engine that the scheduler plans for, checked once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from scheduler.request import Slo
from scheduler.windows import KeyReads


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the engine; ValueError, naming the field, when they contradict each other.

    max_sequences          rows: requests running at once; each decodes one token per step
    max_tokens_per_step    token slots of a step; equals the largest bucket
    max_model_len          prompt + output tokens of a request, tokens of a finetuning sequence
    token_buckets          token slots of the compiled forward programs, ascending
    num_pages, page_size, prefix_caching   the KV page pool
    state_snapshots        slots for snapshots of recurrent state; 0 for a model without any
    snapshot_every         tokens from one snapshot to the next, in whole pages
    windows                (share of the bytes of keys, window) of layers whose queries see only
                           so many keys
    num_layers, unit_tokens   a microbatch of t tokens is cut in n = ceil(t / unit_tokens) slices,
                           and has n loss units and num_layers * n layer units
    finetune_slots         tokens of all microbatches in work, each rounded up to whole slices
    max_finetune_segments  packed finetuning sequences one step may touch
    slo                    objectives of requests that bring none
    idle_step_s            time budget in seconds of a step without inference; inf takes whole
                           buckets and all units, and such plans depend on no clock
    finetune_floor         share of the device's time that finetuning gets under any load, although
                           requests may then be late
    """

    max_sequences: int
    max_tokens_per_step: int
    max_model_len: int
    token_buckets: tuple[int, ...]
    num_pages: int
    page_size: int = 16
    prefix_caching: bool = True
    state_snapshots: int = 0
    snapshot_every: int = 1024
    windows: tuple[tuple[float, int], ...] = ()
    num_layers: int = 1
    unit_tokens: int = 256
    finetune_slots: int = 1 << 14
    max_finetune_segments: int = 16
    slo: Slo = field(default_factory=Slo)
    idle_step_s: float = 0.1
    finetune_floor: float = 0.0

    @property
    def reads(self) -> KeyReads:
        """How many keys attention reads."""
        return KeyReads(self.windows)

    def __post_init__(self) -> None:
        for name in (
            "max_sequences",
            "max_model_len",
            "num_pages",
            "page_size",
            "num_layers",
            "unit_tokens",
            "finetune_slots",
            "max_finetune_segments",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        buckets = self.token_buckets
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in itertools.pairwise(buckets)):
            raise ValueError(f"token_buckets={buckets} must be positive and strictly ascending")
        if buckets[-1] != self.max_tokens_per_step:
            raise ValueError(
                f"max_tokens_per_step={self.max_tokens_per_step} must equal the largest of"
                f" token_buckets={buckets}"
            )
        if self.max_sequences > self.max_tokens_per_step:
            raise ValueError(
                f"max_sequences={self.max_sequences} must not exceed max_tokens_per_step="
                f"{self.max_tokens_per_step}: every running sequence decodes in every step"
            )
        if self.state_snapshots < 0:
            raise ValueError(f"state_snapshots={self.state_snapshots} must be at least 0")
        if self.state_snapshots and (
            self.snapshot_every < 1 or self.snapshot_every % self.page_size
        ):
            raise ValueError(
                f"snapshot_every={self.snapshot_every} must be a multiple of page_size="
                f"{self.page_size}: snapshots are taken at the ends of pages"
            )
        if not self.idle_step_s > 0:
            raise ValueError(f"idle_step_s={self.idle_step_s} must be more than 0 seconds")
        if not 0 <= self.finetune_floor < 1:
            raise ValueError(f"finetune_floor={self.finetune_floor} must be in [0, 1)")
