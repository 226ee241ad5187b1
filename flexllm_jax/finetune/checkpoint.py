"""Checkpoints of a finetuning job: its arrays and what else it needs to go on, on disk.

A checkpoint is one directory that orbax writes under a temporary name and then renames, so one that
bears a step's name is complete. Older checkpoints are removed only after a newer one is in place.
Every array has a checksum: a checkpoint that reads back differently is passed over for the one
before it. Arrays go in and come out as numpy, so saving never compiles or runs anything in JAX.
"""

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flexllm_jax.errors import UserError

logger = logging.getLogger(__name__)

_COMPLETE = re.compile(r"(0|[1-9]\d*)(?:-([1-9]\d*))?")
_REMOVED = ".removed"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; one line that names the directory."""


@dataclass(frozen=True)
class Checkpoint:
    """What `JobCheckpoints.save` was given: arrays are numpy, info is plain JSON data."""

    step: int
    arrays: Any
    info: dict


class JobCheckpoints:
    """The checkpoints of one job, in a directory of its own.

    Calls return when the work is done. Only one thread, of one process, may save at a time.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        """Nothing is written before the first save.

        Args:
            directory: where the checkpoints go; made with its parents when the first is saved.
            keep: complete checkpoints to keep, at least 1; 2 leave one to fall back on.
        """
        if keep < 1:
            raise CheckpointError(f"keep is {keep}: at least 1 checkpoint has to be kept")
        self.directory = Path(directory).absolute()
        self.keep = keep
        # Of the processes of an engine the first alone has checkpoints: it waits for no other.
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
        )
        self._orbax = ocp.Checkpointer(handler, multiprocessing_options=alone)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        return sorted({step for step, _ in self._complete()})

    def save(self, step: int, arrays: Any, info: dict) -> None:
        """Write a checkpoint, then remove those that `keep` leaves no room for.

        Checkpoints of later steps are removed too: they are of a run that this one replaces. When
        saving fails, the earlier checkpoints stay as they were.

        Args:
            step: optimizer steps done; saving a step again replaces it.
            arrays: pytree of numpy arrays; they are not changed, and not needed after the call.
            info: JSON data; tuples come back as lists.

        Raises:
            CheckpointError: nothing was saved; says why and what to do.
            TypeError: `info` is not JSON data.
        """
        json.dumps(info)  # before anything is written
        leaves = {path: np.asarray(leaf, order="C") for path, leaf in _leaves(arrays)}
        manifest = {
            path: _describe(leaf) | {"crc32": _crc32(leaf)} for path, leaf in leaves.items()
        }
        attempts = [attempt for at, attempt in self._complete() if at == step]
        name = _name(step, max(attempts, default=-1) + 1)
        try:
            self._remove_leftovers()
            self._check_room(sum(leaf.nbytes for leaf in leaves.values()))
            # orbax refuses arrays without elements; their shape says all there is to know.
            composite = ocp.args.Composite(
                arrays=ocp.args.PyTreeSave({p: x for p, x in leaves.items() if x.size}),
                info=ocp.args.JsonSave({"info": info, "arrays": manifest}),
            )
            with _without_tracebacks():
                self._orbax.save(self.directory / name, args=composite)
        except Exception as error:  # orbax and tensorstore raise errors of many kinds
            # Frees the space at once; what writes still under way add to it goes at the next save.
            self._remove_leftovers(ignore_errors=True)
            raise CheckpointError(
                f"{self.directory}: step {step} could not be saved ({_one_line(error)}); earlier "
                "checkpoints are intact: free space on the disk, or let this user write there, "
                "and resume the job"
            ) from error
        self._remove_superseded(name)

    def restore_latest(
        self,
        like: Any,
        refusal: Callable[[dict], str | None] = lambda info: None,
    ) -> Checkpoint | None:
        """The newest checkpoint that can be read; one that is damaged is passed over with a
        warning.

        Args:
            like: pytree of arrays or `jax.ShapeDtypeStruct` that the arrays have to match; or a
                function that gives it from a checkpoint's info.
            refusal: of a checkpoint's info, why it cannot be gone on from, or None.

        Returns:
            The checkpoint, its arrays in that structure; None where none was ever saved.

        Raises:
            CheckpointError: the checkpoint is refused, or its arrays do not match `like`, or none
                can be read.
        """
        complete = self._complete()
        for step, attempt in reversed(complete):
            path = self.directory / _name(step, attempt)
            try:
                info, manifest = self._read_info(path)
                reason, expected = refusal(info), like(info) if callable(like) else like
                wanted = {path: _describe(leaf) for path, leaf in _leaves(expected)}
                mismatch = _first_mismatch(manifest, wanted)
                leaves = {} if reason or mismatch else self._read_arrays(path, manifest)
            except Exception as error:  # whatever a damaged file makes orbax raise
                logger.warning("%s is damaged and passed over: %s", path, _one_line(error))
                continue
            if reason:
                raise CheckpointError(f"{path} is of another job: {reason}")
            if mismatch:
                raise CheckpointError(
                    f"{path} is of another job: {mismatch}; resume with the configuration it was "
                    "saved with, or choose another directory"
                )
            ordered = [leaves[leaf] for leaf, _ in _leaves(expected)]
            arrays = jax.tree.unflatten(jax.tree.structure(expected), ordered)
            return Checkpoint(step, arrays, info)
        if complete:
            raise CheckpointError(
                f"{self.directory}: none of its {len(complete)} checkpoints can be read; restore "
                "the directory from a copy, or remove it to start the job over"
            )
        return None

    def _complete(self) -> list[tuple[int, int]]:
        """(step, attempt) of every complete checkpoint, the newest last."""
        matches = [_COMPLETE.fullmatch(name) for name in self._names()]
        return sorted((int(m[1]), int(m[2] or 0)) for m in matches if m)

    def _check_room(self, needed: int) -> None:
        """OSError when `needed` bytes do not fit on the disk: what orbax leaves undone halfway
        prints tracebacks from threads of its own."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _names(self) -> list[str]:
        try:
            return [entry.name for entry in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be read as a directory of checkpoints "
                f"({_one_line(error)}); choose another, or let this user read it"
            ) from error

    def _read_info(self, path: Path) -> tuple[dict, dict[str, dict]]:
        """The job's info and the manifest of its arrays."""
        composite = ocp.args.Composite(info=ocp.args.JsonRestore())
        with _without_tracebacks():
            restored = self._orbax.restore(path, args=composite)
        return restored["info"]["info"], restored["info"]["arrays"]

    def _read_arrays(self, path: Path, manifest: dict[str, dict]) -> dict[str, np.ndarray]:
        """The arrays, checked against the manifest."""
        as_numpy = {
            leaf: ocp.RestoreArgs(restore_type=np.ndarray)
            for leaf, described in manifest.items()
            if 0 not in described["shape"]
        }
        composite = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=as_numpy))
        with _without_tracebacks():
            restored = self._orbax.restore(path, args=composite)
        leaves = {}
        for leaf, described in manifest.items():
            empty = (
                np.zeros(described["shape"], described["dtype"]) if leaf not in as_numpy else None
            )
            array = restored["arrays"][leaf] if empty is None else empty
            if _describe(array) | {"crc32": _crc32(array)} != described:
                raise CheckpointError(f"the array {leaf} is not what was saved")
            leaves[leaf] = array
        return leaves

    def _remove_superseded(self, newest: str) -> None:
        """Remove checkpoints older than `keep` allows, and those of a run that `newest` replaces.

        Each is renamed before its files go: half a checkpoint never bears a step's name.
        """
        complete = [_name(*at) for at in self._complete()]
        kept = complete[: complete.index(newest) + 1]
        step = newest.split("-")[0]
        kept = [name for name in kept if name == newest or name.split("-")[0] != step]
        kept = kept[-self.keep :]
        try:
            for name in complete:
                if name not in kept:
                    path = self.directory / name
                    path.rename(path.with_name(name + _REMOVED))
            self._remove_leftovers()
        except OSError as error:
            logger.warning("%s: an old checkpoint stays: %s", self.directory, _one_line(error))

    def _remove_leftovers(self, ignore_errors: bool = False) -> None:
        """Remove what interrupted saves and removals left behind."""
        for name in self._names():
            if ".orbax-checkpoint-tmp" in name or name.endswith(_REMOVED):
                shutil.rmtree(self.directory / name, ignore_errors=ignore_errors)


def _name(step: int, attempt: int) -> str:
    return str(step) if attempt == 0 else f"{step}-{attempt}"


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Each leaf with its path, such as ["master"][0]["q"]["a"]; empty nodes have none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def _describe(leaf: Any) -> dict:
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _first_mismatch(manifest: dict[str, dict], expected: dict[str, dict]) -> str | None:
    """What of a checkpoint's arrays is not as the job has it."""
    for path, want in expected.items():
        have = manifest.get(path)
        if have is None:
            return f"it has no array {path}"
        have = {key: have[key] for key in want}
        if have != want:
            return f"{path} is {_shown(have)}, the job has {_shown(want)}"
    extra = manifest.keys() - expected.keys()
    return f"the job has no array {min(extra)}" if extra else None


def _shown(described: dict) -> str:
    return f"{described['dtype']}{described['shape']}"


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep orbax from logging the traceback of what it raises: the caller says it in one line."""
    absl = logging.getLogger("absl")
    absl.addFilter(_nothing)
    try:
        yield
    finally:
        absl.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _one_line(error: BaseException) -> str:
    """What the operating system says is wrong, or else the first line of the error's message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # as tensorstore puts it
        return os.strerror(int(code[1]))
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
