"""MLflow: a run a job, found again by a tag."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from flexllm_jax.config.sections.trackers import MlflowSection
from flexllm_jax.trackers.tracker import Logged, Run, Sample, flat

_TAG = "flexllm_jax.run"
_MOST_PARAM = 500  # characters of a value, in all of MLflow's stores
_MOST_PARAMS = 100  # of a batch
_STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MlflowTracker:
    """Tells a tracking server, or writes a folder."""

    def __init__(self, section: MlflowSection):
        self._section = section
        self.where = ""

    def start(self, run: Run) -> Logged:
        """Make a run, or find the one of this id."""
        uri = self._section.uri or (run.folder / "mlruns").absolute().as_uri()
        if "://" not in uri or uri.startswith("file:"):
            # MLflow 3 wants to be told that a folder is meant, which the configuration says.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(self._section.experiment)
        experiment = (
            known.experiment_id if known else client.create_experiment(self._section.experiment)
        )
        found = client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            tags = {_TAG: run.id} | dict.fromkeys(run.tags, "")
            self._id = client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
            params = [Param(key, str(v)[:_MOST_PARAM]) for key, v in flat(run.config).items()]
            for first in range(0, len(params), _MOST_PARAMS):
                client.log_batch(self._id, params=params[first : first + _MOST_PARAMS])
        self.where = f"{uri} (run {self._id})"
        samples = client.get_run(self._id).data.tags.get("samples", "0")
        return Logged(self._last("train/loss"), self._last("validation/loss"), int(samples))

    def _last(self, key: str) -> int:
        history = self._client.get_metric_history(self._id, key)
        return max((metric.step for metric in history), default=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """In the group `train`."""
        self._log("train", step, metrics)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """In the group `validation`."""
        self._log("validation", step, metrics)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """An artifact of JSON."""
        rows = [sample._asdict() for sample in samples]
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        self._client.log_text(self._id, text, f"samples/step-{step}.json")
        self._client.log_batch(self._id, tags=[RunTag("samples", str(step))])

    def flush(self) -> None:
        """Every call was answered by the store."""

    def finish(self, status: str | None) -> None:
        """Say how the job ended."""
        if status in _STATUS:
            self._client.set_terminated(self._id, status=_STATUS[status])

    def _log(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1e3)
        entries = [Metric(f"{group}/{k}", float(v), now, step) for k, v in metrics.items()]
        self._client.log_batch(self._id, metrics=entries)
