"""The thread that drives an engine: others queue calls, which it carries out between two steps."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from llguidance import LLMatcher

from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling_params import SamplingParams
from flexllm_jax.finetune.job import JobStatus

Result = TypeVar("Result")


@dataclass(frozen=True)
class NewRequest:
    """A request to queue. `arrival`: time.monotonic, for its latencies.

    `seed_offset` is added to the seed, so that several outputs of one prompt differ. `slo_class`:
    "standard" or one of `scheduler.slo_classes`. `matcher`: of its structured output, which takes
    time to make.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | None
    arrival: float
    seed_offset: int = 0
    slo_class: str = "standard"
    matcher: LLMatcher | None = None


class RequestFuture(Future):
    """Done when the request is; `state` is its record, also before."""

    state: RequestState


class EngineLoop:
    """The thread that drives an engine, and the way in for all others."""

    def __init__(self, engine: Engine, after_step: Callable[[], None] | None = None):
        """`after_step` is called in the engine's thread after every step."""
        self.engine = engine
        self._after_step = after_step
        self._calls: queue.SimpleQueue[tuple[Callable, Future] | None] = queue.SimpleQueue()
        self._waiting: dict[str, RequestFuture] = {}
        self._error: BaseException | None = None
        self.idle = True  # nothing to do: it waits for a call
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run `function` in the engine's thread between two steps; returns or raises as it does."""
        return self.post(lambda: function(*args, **kwargs)).result()

    def post(self, function: Callable[[], Result]) -> "Future[Result]":
        """`call` that does not wait: a future of what `function` returns or raises."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine has stopped") from self._error
        future: Future = Future()
        self._calls.put((function, future))
        return future

    def submit(self, requests: Sequence[NewRequest]) -> list[RequestFuture]:
        """Queue requests between two steps; a future of each finished RequestState.

        The future of one that can never be served holds its ValueError; the others go on.
        """

        return self.call(self.add, requests)

    def add(self, requests: Sequence[NewRequest]) -> list[RequestFuture]:
        """`submit`, for functions that run in the engine's thread already."""
        futures = []
        for new in requests:
            future = RequestFuture()
            futures.append(future)
            try:
                future.state = self.engine.add_request(
                    new.prompt,
                    new.params,
                    new.adapter,
                    arrival=new.arrival,
                    seed_offset=new.seed_offset,
                    slo_class=new.slo_class,
                    matcher=new.matcher,
                )
            except ValueError as error:
                future.set_exception(error)
            else:
                self._waiting[future.state.request_id] = future
        return futures

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def cancel(self, future: RequestFuture, error: str) -> None:
        """Drop a request that was submitted; its future holds it as it was."""
        self.call(self.drop, future, error)

    def drop(self, future: RequestFuture, error: str) -> None:
        """`cancel`, for functions that run in the engine's thread already."""
        state = future.state
        if not state.finished:
            self.engine.cancel(state, error)
            self._waiting.pop(state.request_id).set_result(state)

    def stop(self) -> None:
        """Stop the engine: jobs checkpoint, unfinished requests fail."""
        if self._thread.is_alive():
            self._calls.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._answer_calls():
                for state in self.engine.step():
                    self._waiting.pop(state.request_id).set_result(state)
                if self._after_step:
                    self._after_step()
            self.engine.stop()
        except BaseException as error:
            self._error = error
            raise
        finally:
            for job in self.engine.trainer.jobs.values():
                if job.running:
                    job.finish(JobStatus.FAILED, f"the engine failed: {self._error!r}")
            for future in self._waiting.values():
                if self._error:
                    future.set_exception(RuntimeError(f"the engine failed: {self._error!r}"))
                else:
                    future.set_result(future.state)
            while not self._calls.empty():
                if call := self._calls.get():
                    call[1].set_exception(RuntimeError("the engine has stopped"))

    def _answer_calls(self) -> bool:
        """Carry out what is queued, waiting for it when there is nothing else to do."""
        while not self._calls.empty() or not self.engine.has_work:
            self.idle = self._calls.empty()
            call = self._calls.get()
            self.idle = False
            if call is None:
                return False
            function, future = call
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        return True
