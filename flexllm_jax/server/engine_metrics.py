"""What Prometheus is told of an engine's recurrent state, and how the totals that an engine counts
become counters."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from flexllm_jax.server.engines.protocol import States


def add_total(counter: Counter, totals: dict[Any, float], key: Any, total: float) -> float:
    """Bring a counter to an engine's total; what that adds."""
    new = max(0, total - totals.get(key, 0))
    counter.inc(new)
    totals[key] = total
    return new


class StateMetrics:
    """Slots and snapshots of recurrent state; nothing of engines whose model has none."""

    def __init__(self, registry: CollectorRegistry):
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"flexllm:{name}", text, ("of", "engine"), registry=registry)

        self.slots = gauge("state_slots", "Slots of recurrent state, of requests and snapshots.")
        self.used = gauge("state_slots_used", "Of these, those that hold one.")
        self.snapshots = Counter(
            "flexllm:state_snapshots",
            "Snapshots of recurrent state: saved, read by a request that begins there, evicted.",
            ("event", "engine"),
            registry=registry,
        )

        self._known: set[str] = set()

    def lost(self, engine: str) -> None:
        """Nothing is in use in an engine that has ended."""
        if engine in self._known:
            for of in ("requests", "snapshots"):
                self.used.labels(of, engine).set(0)

    def take(self, engine: str, states: States | None, totals: dict[Any, float]) -> None:
        """Take in what an engine says; `totals` are its counts until now."""
        if states is None:
            return
        self._known.add(engine)
        for of, used, slots in (
            ("requests", states.requests, states.request_slots),
            ("snapshots", states.snapshots, states.snapshot_slots),
        ):
            self.used.labels(of, engine).set(used)
            self.slots.labels(of, engine).set(slots)
        for event in ("saved", "read", "evicted"):
            counter, total = self.snapshots.labels(event, engine), getattr(states, event)
            add_total(counter, totals, ("snapshots", event), total)
