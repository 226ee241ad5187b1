"""Weights & Biases: a run a job, at the service or in a folder for `wandb sync`.

The service says how far a run is that is gone on with. Of an offline one that is read from its
files, which may lack what was told last before a kill: it is told again.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from flexllm_jax.config.sections.trackers import WandbSection
from flexllm_jax.errors import UserError
from flexllm_jax.trackers.tracker import Logged, Run, Sample

_ANSWER_S = 20.0  # that the service may take to begin a run; Python cannot end before
_BLOCK, _HEAD = 32 * 1024, struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4  # kinds of pieces


class WandbTracker:
    """Tells wandb's process, which talks to the service."""

    def __init__(self, section: WandbSection):
        if section.mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise UserError(
                "trackers.wandb: WANDB_API_KEY is not set in the environment; set it, or "
                "trackers.wandb.mode to offline"
            )
        self._section = section
        self.where = ""

    def start(self, run: Run) -> Logged:
        """Begin a run, or go on with it by its id."""
        section, folder = self._section, run.folder / "wandb"
        run.folder.mkdir(parents=True, exist_ok=True)
        logged = _read_logged(folder, run.id) if section.mode == "offline" else None
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=run.name,
            id=run.id,
            tags=[*section.tags, *run.tags],
            config=dict(run.config),
            dir=str(run.folder),
            mode=section.mode,
            resume="allow",
            reinit="create_new",  # runs of other jobs in this process go on
            settings=wandb.Settings(
                silent=True,
                init_timeout=_ANSWER_S,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        self.where = (section.mode == "online" and self._run.url) or str(folder)
        last = self._run.starting_step - 1
        return logged or Logged(last, last, last)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """In the section `train`."""
        self._log(step, {f"train/{name}": value for name, value in metrics.items()})

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """In the section `validation`."""
        self._log(step, {f"validation/{name}": value for name, value in metrics.items()})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A table."""
        table = wandb.Table(columns=list(Sample._fields), data=[list(row) for row in samples])
        self._log(step, {"samples": table})

    def flush(self) -> None:
        """wandb's process has all that it was told, and outlives this one."""

    def finish(self, status: str | None) -> None:
        """Wait until wandb's process has written everything."""
        self._run.finish(exit_code=1 if status == "failed" else 0)

    def _log(self, step: int, values: Mapping[str, object]) -> None:
        # wandb's own step never goes back, which validation after a resume would; `step` may.
        self._run.log({"step": step, **values}, step=max(step, self._run.step))


def _read_logged(folder: Path, run_id: str) -> Logged:
    """The last step of each kind in the files of an offline run."""
    last = {"train": 0, "validation": 0, "samples": 0}
    for file in folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"):
        for data in _records(file.read_bytes()):
            record = Record.FromString(data)
            if not record.HasField("history"):
                continue
            values = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            for name in values:
                kind = name.split("/")[0].split(".")[0]
                if kind in last:
                    last[kind] = max(last[kind], int(values["step"]))
    return Logged(last["train"], last["validation"], last["samples"])


def _records(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file, which is a log as LevelDB's (blocks of 32 KiB, in them pieces with
    checksum, length and kind) behind a head of 7 bytes. The last may be cut off by a kill."""
    at, record = 7, b""
    while True:
        if _BLOCK - at % _BLOCK < _HEAD.size:  # no room for a piece
            at += _BLOCK - at % _BLOCK
        if at + _HEAD.size > len(data):
            return
        _, length, kind = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or at + length > len(data):
            return
        record += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
