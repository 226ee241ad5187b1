"""How inference and finetuning share a device: ours, the paper's, and the paper's baselines."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.policies.coserving import CoServing
from scheduler.policies.policy import Policy, Step
from scheduler.policies.published import Published
from scheduler.policies.solo import FinetuningOnly, InferenceOnly
from scheduler.policies.temporal import DynamicTemporal, FixedTemporal

POLICIES: dict[str, Callable[[], Policy]] = {
    "coserving": CoServing,
    "coserving_no_slack": lambda: CoServing(use_slack=False),
    "coserving_no_filling": lambda: CoServing(fill_buckets=False),
    "coserving_no_overlap": lambda: CoServing(overlap=False),
    "published": Published,
    "temporal_64": lambda: FixedTemporal(64),
    "temporal_128": lambda: FixedTemporal(128),
    "temporal_512": lambda: FixedTemporal(512),
    "temporal_dynamic": DynamicTemporal,
    "inference_only": InferenceOnly,
    "finetuning_only": FinetuningOnly,
}

__all__ = ["POLICIES", "Policy", "Step", "make_policy"]


def make_policy(name: str) -> Policy:
    """The policy of that name. ValueError lists the names for one that is unknown."""
    if name not in POLICIES:
        raise ValueError(f"scheduler.policy={name!r} must be one of {', '.join(POLICIES)}")
    return POLICIES[name]()
