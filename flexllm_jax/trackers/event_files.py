"""TensorBoard: event files in a folder a run.

Every start writes a file of its own; what is in the run's other files says how far it is.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from flexllm_jax.config.sections.trackers import TensorboardSection
from flexllm_jax.trackers.tracker import Logged, Run, Sample

_TEXT = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))


class TensorboardTracker:
    """Writes event files."""

    def __init__(self, section: TensorboardSection):
        self._folder = section.folder
        self.where = ""

    def start(self, run: Run) -> Logged:
        """Open a new event file in the run's folder."""
        folder = (self._folder or run.folder / "tensorboard") / run.id
        self.where = str(folder)
        logged = _read_logged(folder)
        self._writer = EventFileWriter(self.where)
        if logged == Logged():
            text = json.dumps(run.config, indent=2, default=str)
            self._text("configuration", 0, f"```\n{text}\n```")
        return logged

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event, with a scalar a metric."""
        self._scalars("train", step, metrics)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event, with a scalar a metric."""
        self._scalars("validation", step, metrics)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A table."""
        rows = [Sample("prompt", "expected", "answer"), Sample("---", "---", "---"), *samples]
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
        self._text("samples", step, "\n".join(lines))

    def flush(self) -> None:
        """To disk."""
        self._writer.flush()

    def finish(self, status: str | None) -> None:
        """Close the file."""
        self._writer.close()

    def _scalars(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        values = [
            Summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in metrics.items()
        ]
        self._write(step, values)

    def _text(self, tag: str, step: int, text: str) -> None:
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        self._write(step, [Summary.Value(tag=tag, tensor=tensor, metadata=_TEXT)])

    def _write(self, step: int, values: Sequence[Summary.Value]) -> None:
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.add_event(event)


def _read_logged(folder: Path) -> Logged:
    """The last step of each kind in a run's files."""
    last = {"train": 0, "validation": 0, "samples": 0}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for data in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(data)
            for value in event.summary.value:
                kind = value.tag.split("/")[0]
                if kind in last:
                    last[kind] = max(last[kind], event.step)
    return Logged(last["train"], last["validation"], last["samples"])


def _cell(text: str) -> str:
    return "<br>".join(text.replace("|", "\\|").splitlines())
