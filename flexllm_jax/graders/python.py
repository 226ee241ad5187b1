"""Grading by a client's program, in processes of its own (`confined/`).

A process is started for a list of samples, ends with it, and is ended when a sample takes too long;
the samples after that get a new one. All that a program can do to this process is to answer wrong,
late or not at all: its answers are read as one short line of JSON with a number in it.
"""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexllm_jax.config.graders import GradersSection, PythonConfig
from flexllm_jax.errors import UserError
from flexllm_jax.graders.grade import Grade, GradingError, Sample, SampleError, no_grade

_PROGRAM = Path(__file__).with_name("confined")
_MOST_ANSWER = 4096  # bytes
# Nothing of this process's environment: it may hold keys.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin:/bin",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


class _Lost(Exception):
    """The process answers no more; the message says why."""


class _Process:
    """A process with the program in it. Raises UserError where the program cannot be used, _Lost
    where that is not known."""

    def __init__(self, source: str, settings: GradersSection, field: str):
        self._seconds, self._field = settings.python_timeout_s, field
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for this process
        )
        try:
            told = self._ask({"source": source, "memory_mb": settings.python_memory_mb})
        except BaseException:
            self.close()
            raise
        if told.get("ready") is not True:
            self.close()
            if "unsupported" in told:
                raise UserError(
                    f"{field}.type: python graders cannot be run: {told['unsupported']}"
                )
            raise UserError(f"{field}.source: {_said(told)}")

    def grade(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
        """The reward. Raises GradingError, and _Lost, after which it is to be closed."""
        self._number += 1
        told = self._ask({"id": self._number, "sample": sample, "item": item})
        if told.get("id") != self._number:
            raise _Lost("it wrote what is no answer")
        if "error" in told:
            raise GradingError(
                "python_grader_runtime_error", f"{self._field}.source: {_said(told)}"
            )
        reward = told.get("reward")
        if not isinstance(reward, float) or not math.isfinite(reward):
            raise _Lost("it wrote what is no answer")
        return reward

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds, end)
        timer.start()
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(_MOST_ANSWER)
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if late.is_set():
            raise _Lost(f"it took over {self._seconds:g} s")
        if not line:
            raise _Lost(f"its process ended ({_death(process.wait())})")
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise _Lost("it wrote what is no answer")
        return told


def _said(told: Mapping[str, Any]) -> str:
    return " ".join(str(told.get("error")).split())[:400]


def _death(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


class Python:
    """Runs the program on every sample."""

    reads: frozenset[str] = frozenset()

    def __init__(self, config: PythonConfig, settings: GradersSection, field: str):
        if not settings.python:
            raise UserError(
                f"{field}.type: python graders are off; whoever runs this server turns them on "
                "with graders.python: true"
            )
        self._source, self._settings, self._field = config.source, settings, field
        try:
            self._start().close()
        except _Lost as error:
            raise UserError(f"{field}.source: it cannot be loaded: {error}") from None

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(samples)):
            waiting.put(index)
        grades: dict[int, Grade] = {}
        workers = min(self._settings.python_processes, len(samples))
        if workers:
            with ThreadPoolExecutor(workers) as threads:
                # The kernel ends a process with the thread that started it: one thread has it.
                work = [
                    threads.submit(self._work, samples, waiting, grades) for _ in range(workers)
                ]
            for done in work:
                done.result()
        return [grades[index] for index in range(len(samples))]

    def _start(self) -> _Process:
        return _Process(self._source, self._settings, self._field)

    def _work(
        self, samples: Sequence[Sample], waiting: queue.SimpleQueue[int], grades: dict[int, Grade]
    ) -> None:
        process: _Process | None = None
        try:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                begin = time.perf_counter()
                try:
                    process = process or self._start()
                    reward = process.grade(_told(samples[index]), samples[index].item)
                    grades[index] = Grade(reward, seconds=time.perf_counter() - begin)
                    continue
                except GradingError as error:
                    problem = error
                except UserError as error:  # it could be loaded before
                    problem = GradingError("python_grader_runtime_error", str(error))
                except (_Lost, TypeError, ValueError) as error:
                    if process is not None:
                        process.close()
                    process = None
                    problem = GradingError("python_grader_server_error", f"{self._field}: {error}")
                grades[index] = no_grade(problem, time.perf_counter() - begin)
        finally:
            if process is not None:
                process.close()


def _told(sample: Sample) -> dict[str, Any]:
    """What a program sees of a sample; OpenAI's names."""
    told = sample.variables()
    try:
        told["output_json"] = sample.output_json
    except SampleError:
        told["output_json"] = None
    return {"output_tools": None, **told}
