"""A campaign: jobs on a quiet server first, then rounds of the same jobs on a server under faults,
beside streams of requests; what they leave is compared after each round, and once more at the end.

Everything runs in one token bucket, where a job's bits do not depend on the requests beside it.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx2
from rich.console import Console

from flexllm_jax.experiments.faults.checks import Ended, compare, look_at
from flexllm_jax.experiments.faults.plan import Fault, plan_round
from flexllm_jax.experiments.faults.server import FaultyServer, wait_until
from flexllm_jax.experiments.faults.work import ENDED, JOBS, Api, Streams
from flexllm_jax.experiments.load.client import first_model

STUCK_S, GRACE_S = 4.0, 12.0
OVERRIDES = (
    "compile.token_buckets=[64]",
    "scheduler.max_tokens_per_step=64",
    "scheduler.max_sequences=8",
    "finetune.max_tokens=512",
    "finetune.unit_tokens=256",
    "finetune.checkpoint_every=4",
    "finetune.floor=0.5",
    "server.max_running_jobs=2",
    f"server.stuck_after_s={STUCK_S}",
    f"server.grace_s={GRACE_S}",
)
_SPREAD = {"start-up": 10.0, "checkpoint": 0.1}  # of faults: a start is long, a checkpoint short
_MOMENT_S = 30.0  # that a moment is waited for
_ROUND_S = 240.0  # that a round's jobs may take, once its faults are over


def _at_once() -> bool:
    """A moment that is now."""
    return True


@dataclass
class Happened:
    """A fault that was tried: whether it met what it was to disturb, and how long the server was
    away afterwards."""

    fault: Fault
    met: bool
    away_s: float


@dataclass
class Round:
    """What a round has brought."""

    number: int
    happened: list[Happened] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    finished: int = 0  # requests
    cut: int = 0  # requests that a fault ended
    seconds: float = 0.0


class Campaign:
    """A server under faults. `data`: the training file of all jobs."""

    def __init__(
        self,
        script: Path,
        config: Path,
        overrides: Sequence[str],
        out: Path,
        data: bytes,
        console: Console,
        clients: int = 3,
    ):
        self._server = FaultyServer(script, config, [*OVERRIDES, *overrides], out)
        self._api = Api(self._server)
        self._data, self._console, self._clients = data, console, clients
        self._quiet: dict[str, Ended] = {}
        self._files: list[str] = []  # that were taken in
        self._jobs: dict[str, str] = {}  # that were taken in: of which of JOBS each is
        self._cancelled: set[str] = set()  # of them
        self._seen: dict[str, list[str]] = {}  # events of ended jobs, by id
        self._model = ""

    def quiet(self) -> None:
        """Start the server, and make every job undisturbed."""
        self._server.recover()
        self._model = first_model(self._server.client)
        file = self._upload("quiet")
        for kind in JOBS:
            job = self._create(kind, f"quiet {kind}", file)
            if self._api.wait_ended([job], _ROUND_S):
                raise RuntimeError(f"the quiet job {kind} does not end")
            self._quiet[kind] = look_at(self._api, self._server.folder, self._api.job(job))

    def run(self, seed: int, number: int, faults: int) -> Round:
        """One round: its faults as the seed has them, its jobs to their ends, and the checks."""
        began, done = time.monotonic(), Round(number)
        planned = plan_round(seed, number, faults)
        streams = Streams(self._server.url, self._model, self._clients, seed + number)
        jobs: list[str] = []
        try:
            self._disturb(done, planned, "start-up", self._restart)
            file = self._while_uploading(done, planned)
            jobs += self._create_all(number, file)
            self._disturb(done, planned, "validation", lambda: _at_once)
            for moment, watch in (
                ("training", self._watch_steps),
                ("checkpoint", partial(self._watch_files, "checkpoints/*")),
                ("publish", partial(self._watch_files, "adapter*")),
            ):
                for fault in (fault for fault in planned if fault.moment == moment):
                    if not self._running(jobs):
                        jobs += self._create_all(number, file)
                    self._disturb(done, [fault], moment, partial(watch, jobs), jobs)
            for job in self._api.wait_ended(jobs, _ROUND_S):
                done.problems.append(f"job {job} has not ended after {_ROUND_S:g} s")
            before = streams.finished()
            if not wait_until(lambda: streams.finished() > before, 30):
                done.problems.append("requests are not answered after the round's faults")
        finally:
            if not streams.stop(30):
                done.problems.append("a request hangs")
        done.finished = streams.finished()
        done.cut = len(streams.requests) - done.finished
        for request in streams.requests:
            if "Timeout" in request.why or "tokens and a count of" in request.why:
                done.problems.append(f"a request: {request.why}")
        done.problems += self.check(jobs)
        done.seconds = time.monotonic() - began
        return done

    def check(self, jobs: Sequence[str] | None = None) -> list[str]:
        """What is wrong with these jobs, or with all, and with all files."""
        wrong = []
        listed = {job["id"]: job for job in self._api.jobs()}
        for name in self._jobs if jobs is None else jobs:
            if name not in listed:
                wrong.append(f"job {name} is lost")
                continue
            wrong += [f"job {name}: {text}" for text in self._check_job(listed[name])]
        files = {file["id"] for file in self._api.all_of("/v1/files")}
        for file in self._files:
            if file not in files:
                wrong.append(f"file {file} is lost")
            elif self._api.ask("GET", f"/v1/files/{file}/content").content != self._data:
                wrong.append(f"file {file} has other bytes")
        return wrong

    def stop(self) -> list[str]:
        """End the server in order."""
        status = self._server.stop()
        return [f"the server ended with status {status}"] if status else []

    # -- jobs and files ---------------------------------------------------------------------------

    def _upload(self, name: str, slow_s: float = 0.0) -> str:
        file = self._api.upload(f"{name}.jsonl", self._data, slow_s)
        self._files.append(file)
        return file

    def _create(self, kind: str, name: str, file: str) -> str:
        job = self._api.create(kind, name, file, self._model)
        self._jobs[job] = kind
        return job

    def _create_all(self, number: int, file: str) -> list[str]:
        names = [f"round {number} {kind} {len(self._jobs)}" for kind in JOBS]
        return [self._create(kind, name, file) for kind, name in zip(JOBS, names, strict=True)]

    def _check_job(self, job: dict) -> list[str]:
        name, kind = job["id"], self._jobs[job["id"]]
        if name in self._cancelled:
            return [] if job["status"] == "cancelled" else [f"cancelled, and {job['status']}"]
        if job["status"] != "succeeded":
            return [f"{job['status']}: {job['error']}"]
        try:
            ended = look_at(self._api, self._server.folder, job)
        except (KeyError, IndexError, OSError, httpx2.HTTPError) as error:
            return [f"something is missing: {type(error).__name__}: {error}"]
        wrong = compare(kind, ended, self._quiet[kind])
        events = [event["id"] for event in ended.events]
        if self._seen.setdefault(name, events) != events:
            wrong.append("its events are not those that it ended with")
        return wrong

    def _running(self, jobs: Sequence[str]) -> bool:
        return any(self._api.job(job)["status"] not in ENDED for job in jobs)

    def _watch_steps(self, jobs: Sequence[str]) -> Callable[[], bool]:
        """Whether they have trained further by a few optimizer steps."""
        before = self._steps(jobs)
        return lambda: self._steps(jobs) >= before + 6

    def _steps(self, jobs: Sequence[str]) -> int:
        paths = [f"/v1/fine_tuning/jobs/{job}/events" for job in jobs]
        return sum(event["type"] == "metrics" for path in paths for event in self._api.all_of(path))

    def _watch_files(self, pattern: str, jobs: Sequence[str]) -> Callable[[], bool]:
        """Whether something new is written to their folders."""

        def find() -> set[Path]:
            return {path for job in jobs for path in (self._server.folder / job).glob(pattern)}

        before = find()
        return lambda: bool(find() - before)

    # -- faults -----------------------------------------------------------------------------------

    def _disturb(
        self,
        done: Round,
        planned: Sequence[Fault],
        moment: str,
        watch: Callable[[], Callable[[], bool]],
        jobs: Sequence[str] = (),
    ) -> None:
        """Carry out the faults of a moment, and get the server going again after each."""
        for fault in planned:
            if fault.moment != moment:
                continue
            came = self._await(watch(), jobs)
            time.sleep(fault.after_s * _SPREAD.get(moment, 1.0))
            met = self._carry_out(fault, done) and came
            away_s = self._server.recover()
            done.happened.append(Happened(fault, met, away_s))
            told = "" if met else " (there was nothing left to disturb)"
            self._console.print(f"  {fault}, serves again after {away_s:.1f} s{told}")

    def _await(self, comes: Callable[[], bool], jobs: Sequence[str]) -> bool:
        """Whether a moment comes, before these jobs end."""
        end, look = time.monotonic() + _MOMENT_S, 0.0
        while not comes():
            now = time.monotonic()
            if now > end or (jobs and now > look and not self._running(jobs)):
                return False
            look = now + 0.3 if now > look else look
            time.sleep(0.003)
        return True

    def _restart(self) -> Callable[[], bool]:
        """A moment: the server starts, and has started its engine."""
        if self._server.alive:
            self._server.signal("http", signal.SIGTERM)
            self._server.wait_end(GRACE_S + 10)
        self._server.start()
        return lambda: self._server.engine_pid is not None

    def _while_uploading(self, done: Round, planned: Sequence[Fault]) -> str:
        files: list[str] = []

        def upload() -> None:
            files.append(self._upload(f"round-{done.number}", slow_s=0.6))

        thread = threading.Thread(target=upload)
        thread.start()
        self._disturb(done, planned, "upload", lambda: _at_once)
        thread.join()
        return files[0]

    def _carry_out(self, fault: Fault, done: Round) -> bool:
        """Whether it met what it was to disturb."""
        server = self._server
        match fault.kind.split():
            case ["kill", process]:
                engine = server.engine_pid
                met = server.signal(process, signal.SIGKILL)
                if process == "http":
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        server.wait_end(5)
                else:
                    wait_until(lambda: server.engine_pid not in (None, engine), 10)
                return met
            case ["stop", process]:
                with server.stopped(process) as met:
                    # An engine may stand still for longer than the server lets it.
                    time.sleep(fault.lasts_s * (2 if process == "engine" else 1))
                return met
            case ["sigterm"]:
                server.signal("http", signal.SIGTERM)
                try:
                    status = server.wait_end(GRACE_S + 10)
                except subprocess.TimeoutExpired:
                    done.problems.append("SIGTERM: the server does not end within its grace time")
                    server.signal("http", signal.SIGKILL)
                    return True
                if status != 0 and fault.moment != "start-up":
                    done.problems.append(f"SIGTERM: the server ended with status {status}")
                return True
            case ["pause"]:
                return self._pause(fault.lasts_s)
            case ["cancel"]:
                return self._cancel(done)
            case ["full", _]:
                with server.full_disk() as met:
                    time.sleep(fault.lasts_s)
                return met
            case ["locked", _]:
                with server.locked_database() as met:
                    time.sleep(fault.lasts_s)
                return met
        raise ValueError(fault.kind)

    def _pause(self, lasts_s: float) -> bool:
        """Every job waits for a while."""
        running = [job["id"] for job in self._api.jobs() if job["status"] in ("queued", "running")]
        paused = [job for job in running if self._ask(job, "pause")]
        time.sleep(lasts_s)
        for job in paused:
            self._ask(job, "resume")
        return bool(paused)

    def _cancel(self, done: Round) -> bool:
        """One more job is begun and cancelled."""
        job = self._create("wide", f"cancelled {len(self._jobs)}", self._files[-1])
        wait_until(lambda: self._api.job(job)["status"] in ("running", *ENDED), 3.0)
        met = self._ask(job, "cancel")
        if met:
            self._cancelled.add(job)
            if self._api.job(job)["status"] != "cancelled":
                done.problems.append(f"job {job} was cancelled, and is not")
        return met

    def _ask(self, job: str, action: str) -> bool:
        return self._api.ask("POST", f"/v1/fine_tuning/jobs/{job}/{action}").status_code == 200
