"""What of the metrics one key's owner sees."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

ADAPTER_LISTS = ("running_lora_adapters", "waiting_lora_adapters")


class VisibleMetrics(Collector):
    """Metrics without the jobs and adapters that are not to be seen."""

    def __init__(self, registry: CollectorRegistry, sees: Callable[[str], bool]):
        self._registry, self._sees = registry, sees

    def collect(self) -> Iterator[Metric]:
        """All families."""
        for family in self._registry.collect():
            shown, others = [], Counts[tuple]()
            for sample in family.samples:
                name = sample.labels.get("job", sample.labels.get("adapter"))
                if name is None or (name and self._sees(name)):
                    shown.append(sample._replace(labels=self._names(sample.labels)))
                elif sample.name.endswith("_total"):
                    rest = {**sample.labels, "job": ""}
                    others[sample.name, tuple(rest.items())] += sample.value  # type: ignore[assignment]
            shown += [Sample(name, dict(rest), total) for (name, rest), total in others.items()]
            family.samples = shown
            yield family

    def _names(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Labels with lists of adapters, of which those to be seen stay."""
        return {
            label: ",".join(filter(self._sees, text.split(","))) if label in ADAPTER_LISTS else text
            for label, text in labels.items()
        }
