"""Work that is done in processes of its own, which may be ended at any time (`confined/`).

What runs there can do to this process no more than answer wrong, late or not at all: an answer is
read as one short line of JSON with a number in it. A sample that takes too long costs its own
reward; those after it get a new process.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from flexllm_jax.config.sections.graders import GradersSection
from flexllm_jax.errors import UserError
from flexllm_jax.graders.grade import ErrorKind, Grade, GradingError, no_grade

_PROGRAM = Path(__file__).with_name("confined")
_MOST_ANSWER = 4096  # bytes
# What it is when a client's program fails, and when its process does.
_KINDS: tuple[ErrorKind, ErrorKind] = ("python_grader_runtime_error", "python_grader_server_error")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# A confined process knows nothing of this one's environment, which may hold keys.
_CONFINED = {"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", **_ONE_THREAD}

Request = Mapping[str, Any]  # the arguments of `grade`: sample and item


class Lost(Exception):
    """A process answers no more; the message says why."""


class Unusable(Exception):
    """There is no process with such a program: which field of the grader is wrong, and why."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")


class Process:
    """A process with a program in it, a module that has `grade(sample, item)`.

    Raises Unusable where the program cannot be used, Lost where that is not known.
    """

    def __init__(self, source: str, settings: GradersSection, *, confined: bool):
        self._seconds = settings.timeout_s
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, *(["-I"] if confined else []), "-B", str(_PROGRAM)],
            stdin=subprocess.PIPE,  # whose end ends it
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_CONFINED if confined else os.environ | _ONE_THREAD,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for this process
        )
        first = {"source": source, "memory_mb": settings.memory_mb, "confined": confined}
        try:
            told = self._ask(first)
        except BaseException:
            self.close()
            raise
        if told.get("ready") is not True:
            self.close()
            if "unsupported" in told:
                raise Unusable("type", f"python graders cannot be run: {told['unsupported']}")
            raise Unusable("source", _said(told))

    def grade(self, request: Request) -> float:
        """The reward. Raises Unusable where the program makes none; and Lost, after which the
        process is to be closed."""
        self._number += 1
        told = self._ask({"id": self._number, **request})
        if told.get("id") != self._number:
            raise Lost("it wrote what is no answer")
        if "error" in told:
            raise Unusable("source", _said(told))
        reward = told.get("reward")
        if not isinstance(reward, float) or not math.isfinite(reward):
            raise Lost("it wrote what is no answer")
        return reward

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        process, line = self._process, json.dumps(message).encode() + b"\n"
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds, end)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline(_MOST_ANSWER)
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
        if late.is_set():
            raise Lost(f"it took over {self._seconds:g} s")
        if not answer:
            raise Lost(f"its process ended ({_death(process.wait())})")
        try:
            told = json.loads(answer)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise Lost("it wrote what is no answer")
        return told


def _said(told: Mapping[str, Any]) -> str:
    return " ".join(str(told.get("error")).split())[:400]


def _death(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


@lru_cache
def _room(processes: int) -> threading.BoundedSemaphore:
    """What bounds the processes at work: of all graders here together."""
    return threading.BoundedSemaphore(processes)


class Processes:
    """Processes with one program, in which samples are graded side by side.

    Args:
        keep: whether they wait for the next samples. Only trusted programs may: the kernel ends a
            confined process with the thread that started it, and what a client's has seen ends
            with its samples.
    """

    def __init__(self, source: str, settings: GradersSection, *, keep: bool):
        self._source, self._settings, self._keep = source, settings, keep
        self._kinds = _KINDS if not keep else ("other_error", "other_error")
        self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        weakref.finalize(self, _close_all, self._idle)

    def check(self, field: str) -> None:
        """Load the program of the grader `field` once. Raises UserError."""
        try:
            with _room(self._settings.processes):
                self._start().close()
        except Unusable as error:
            raise UserError(f"{field}.{error}") from None
        except Lost as error:
            raise UserError(f"{field}.source: it cannot be loaded: {error}") from None

    def grade(self, requests: Sequence[Request | GradingError], field: str) -> list[Grade]:
        """A grade for each; of an error, what it says. `field`: the grader, in messages."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        grades: dict[int, Grade] = {}
        for index, request in enumerate(requests):
            if isinstance(request, GradingError):
                grades[index] = no_grade(request, 0.0)
            else:
                waiting.put(index)
        workers = min(self._settings.processes, waiting.qsize())
        if workers:
            with ThreadPoolExecutor(workers) as threads:
                work = [
                    threads.submit(self._work, requests, waiting, grades, field)
                    for _ in range(workers)
                ]
            for done in work:
                done.result()
        return [grades[index] for index in range(len(requests))]

    def _start(self) -> Process:
        return Process(self._source, self._settings, confined=not self._keep)

    def _take(self) -> Process:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self._start()

    def _work(
        self,
        requests: Sequence[Any],
        waiting: queue.SimpleQueue[int],
        grades: dict[int, Grade],
        field: str,
    ) -> None:
        process: Process | None = None
        with _room(self._settings.processes):
            try:
                while True:
                    try:
                        index = waiting.get_nowait()
                    except queue.Empty:
                        break
                    begin = time.perf_counter()
                    try:
                        process = process or self._take()
                        reward = process.grade(requests[index])
                        grades[index] = Grade(reward, seconds=time.perf_counter() - begin)
                        continue
                    except Unusable as error:
                        reason = f"{field}.{error}"
                        problem = GradingError(self._kinds[0], reason)
                    except (TypeError, ValueError, RecursionError) as error:  # of JSON
                        reason = f"{field}: the row cannot be handed over: {error}"
                        problem = GradingError("other_error", reason)
                    except Lost as error:
                        if process is not None:
                            process.close()
                        process = None
                        reason = f"{field}: {error}"
                        problem = GradingError(self._kinds[1], reason)
                    grades[index] = no_grade(problem, time.perf_counter() - begin)
                if process is not None and self._keep:
                    self._idle.put(process)
                    process = None
            finally:
                if process is not None:
                    process.close()


def _close_all(idle: queue.SimpleQueue[Process]) -> None:
    while True:
        try:
            idle.get_nowait().close()
        except queue.Empty:
            return
