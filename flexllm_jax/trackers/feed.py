"""Tells a tracker how a job goes, in a thread of its own.

The thread asks for what is new (`Read`) a few times a second, so whoever runs the job never waits,
and nothing is queued: a tracker that hangs or fails costs a message, told once. One that failed is
started again after a while, and goes on behind what it knows.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flexllm_jax.trackers.tracker import Logged, Run, Sample, Tracker

log = logging.getLogger(__name__)

PERIOD_S = 0.5
_AGAIN_S, _AGAIN_MOST_S = 2.0, 60.0


@dataclass(frozen=True)
class Progress:
    """What there is of a job, each by step and in order. `ended`: its status, once it has one."""

    metrics: Sequence[tuple[int, Mapping[str, float]]]
    validations: Sequence[tuple[int, Mapping[str, float]]]
    samples: tuple[int, Sequence[Sample]] | None = None
    ended: str | None = None


Read = Callable[[Logged], Progress]  # what is newer than what is logged


class Feed:
    """Feeds one tracker with one job until that has ended, or `close`."""

    def __init__(
        self,
        kind: str,
        tracker: Tracker,
        run: Run,
        read: Read,
        note: Callable[[str, str], None],
        found: Callable[[str], None],
        done: Callable[[], None] = lambda: None,
    ):
        """In the feed's thread `note` is told of trouble, and why, `found` where the run is, and
        `done` is called once the tracker knows how the job ended."""
        self.kind, self._tracker, self._run, self._read = kind, tracker, run, read
        self._note, self._found, self._done = note, found, done
        self._logged = Logged()
        self._closing = threading.Event()
        self._noted = False
        self.complete = False  # the tracker knows how the job ended
        self._thread = threading.Thread(target=self._work, name=f"{kind} {run.id}", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether it has ended, with or without the tracker's help."""
        return not self._thread.is_alive()

    def join(self, by: float) -> None:
        """Wait for its end until time.monotonic() is `by`."""
        self._thread.join(max(0.0, by - time.monotonic()))

    def close(self, by: float) -> None:
        """Tell what is left and end, or give up when time.monotonic() is `by`."""
        self._closing.set()
        self.join(by)
        if self._thread.is_alive():
            self._trouble("does not answer", "it hangs")

    def _work(self) -> None:
        again_s = _AGAIN_S
        while True:
            ended = None
            try:
                self._logged = self._tracker.start(self._run)
                self._found(self._tracker.where)
                again_s = _AGAIN_S
                self._follow()
                return
            except Exception as error:
                with contextlib.suppress(Exception):
                    ended = self._read(self._logged).ended
                self._trouble("failed", " ".join(str(error).split()) or repr(error))
                with contextlib.suppress(Exception):
                    self._tracker.finish(None)
            if self._closing.wait(again_s) or ended:
                return
            again_s = min(2 * again_s, _AGAIN_MOST_S)

    def _follow(self) -> None:
        while True:
            last = self._closing.wait(PERIOD_S)
            progress = self._read(self._logged)
            self._tell(progress)
            if last or progress.ended:
                self._tracker.finish(progress.ended)
                if progress.ended:
                    self.complete = True
                    self._done()
                return

    def _tell(self, progress: Progress) -> None:
        tracker, logged = self._tracker, self._logged
        new = [(step, 0, metrics) for step, metrics in progress.metrics if step > logged.step]
        new += [(step, 1, m) for step, m in progress.validations if step > logged.validation]
        for step, kind, metrics in sorted(new, key=lambda item: item[:2]):
            (tracker.validation if kind else tracker.log)(step, metrics)
            name = "validation" if kind else "step"
            self._logged = self._logged._replace(**{name: step})
        if progress.samples and progress.samples[0] > logged.samples:
            tracker.samples(*progress.samples)
            self._logged = self._logged._replace(samples=progress.samples[0])
        if self._logged != logged:
            tracker.flush()

    def _trouble(self, what: str, reason: str) -> None:
        if not self._noted:
            self._noted = True
            self._note(f"tracker {self.kind} {what}; the job goes on without it", reason)
