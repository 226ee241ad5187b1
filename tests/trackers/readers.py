"""What trackers have written, read back with each tool's own reader."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]


def read_tensorboard(folder: Path) -> tuple[Series, dict[str, str]]:
    """Scalars and texts of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}
    texts = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    return scalars, texts


def read_mlflow(uri: str, experiment: str) -> list[tuple[Any, Series]]:
    """Runs of an experiment, and their metrics."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    found = []
    for run in client.search_runs([known.experiment_id]):
        series = {
            key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        found.append((run, series))
    return found


def read_wandb(folder: Path) -> tuple[list[Any], Series]:
    """Records of `run` and the history of all offline runs in a folder, oldest first."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    runs, series = [], {}
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in _records(file):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                for key, value in items.items():
                    if isinstance(value, int | float) and "/" in key:
                        series.setdefault(key, []).append((items["step"], value))
    return runs, series


def _records(file: Path) -> Iterator[bytes]:
    """Of W&B's file, which is LevelDB's log behind a head of 7 bytes."""
    data, record = file.read_bytes(), b""
    at, block = 7, 32 * 1024
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
