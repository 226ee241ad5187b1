"""The thread that drives an engine: others queue calls, which it carries out between two steps.

From the moment it is to stop, or has failed, every call raises EngineStopped, and so do those that
are queued and not carried out: nobody waits for an engine that is no more. A future may be
cancelled by who has it; its call is then not made, its request dropped.
"""

import contextlib
import gc
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling.constraints import Constraint
from flexllm_jax.engine.sampling.params import SamplingParams

Result = TypeVar("Result")


@dataclass(frozen=True)
class NewRequest:
    """A request to queue. `arrival`: time.monotonic, for its latencies.

    `seed_offset` is added to the seed, so that several outputs of one prompt differ. `slo_class`:
    "standard" or one of `scheduler.slo_classes`. `constraint`: of its output, which may take time
    to make.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str | None
    arrival: float
    seed_offset: int = 0
    slo_class: str = "standard"
    constraint: Constraint | None = None


class EngineStopped(RuntimeError):
    """The engine carries nothing out any more; its cause is what made it fail, if it did."""


class RequestFuture(Future):
    """Done when the request is; `state` is its record, also before. Cancelling it drops the
    request."""

    state: RequestState


def _resolve(future: Future, result: Any, error: BaseException | None = None) -> None:
    """Give a future its outcome, unless who has it has cancelled it."""
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class EngineLoop:
    """The thread that drives an engine, and the way in for all others."""

    def __init__(self, engine: Engine, after_step: Callable[[], None] | None = None):
        """`after_step` is called in the engine's thread after every step."""
        self.engine = engine
        self._after_step = after_step
        self._calls: queue.SimpleQueue[tuple[Callable, Future] | None] = queue.SimpleQueue()
        self._waiting: dict[str, RequestFuture] = {}
        self._error: BaseException | None = None
        self._entrance, self._closed = threading.Lock(), False  # once closed, no call comes in
        engine.wake = self._wake
        self.idle = True  # nothing to do: it waits for a call
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run `function` in the engine's thread between two steps; returns or raises as it does."""
        if threading.current_thread() is self._thread:  # in a callback of a future, say
            return function(*args, **kwargs)
        return self.post(lambda: function(*args, **kwargs)).result()

    def post(self, function: Callable[[], Result]) -> "Future[Result]":
        """`call` that does not wait: a future of what `function` returns or raises."""
        future: Future = Future()
        with self._entrance:
            if self._closed:
                raise self._stopped()
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
                    constraint=new.constraint,
                )
            except ValueError as error:
                _resolve(future, None, error)
            else:
                self._waiting[future.state.request_id] = future
                future.add_done_callback(self._drop_cancelled)
        return futures

    def _wake(self) -> None:
        """Let the engine look whether it has work; from any thread."""
        with contextlib.suppress(EngineStopped):
            self.post(lambda: None)

    def _drop_cancelled(self, future: Future) -> None:
        """In the thread of who cancelled a request's future, or in which it is done."""
        if future.cancelled() and isinstance(future, RequestFuture):
            with contextlib.suppress(EngineStopped):
                self.post(lambda: self.drop(future, "cancelled"))

    @property
    def alive(self) -> bool:
        """Whether calls are carried out."""
        return not self._closed

    def cancel(self, future: RequestFuture, error: str) -> None:
        """Drop a request that was submitted; its future holds it as it was."""
        self.call(self.drop, future, error)

    def drop(self, future: RequestFuture, error: str) -> None:
        """`cancel`, for functions that run in the engine's thread already."""
        state = future.state
        if not state.finished:
            self.engine.cancel(state, error)
            self._done(state)

    def _done(self, state: RequestState) -> None:
        """A request has ended; its future, if it came through here, says so."""
        if future := self._waiting.pop(state.request_id, None):
            _resolve(future, state)

    def stop(self) -> None:
        """Stop the engine: jobs checkpoint, unfinished requests fail."""
        if self._close():
            self._calls.put(None)
        if threading.current_thread() is not self._thread:  # a finalizer may run anywhere
            self._thread.join()

    def _close(self) -> bool:
        """Let no call in any more; whether any was until now."""
        with self._entrance:
            was_open, self._closed = not self._closed, True
        return was_open

    def _stopped(self) -> EngineStopped:
        """What a call gets that comes too late."""
        reason = f"the engine failed: {self._error!r}" if self._error else "the engine has stopped"
        stopped = EngineStopped(reason)
        stopped.__cause__ = self._error
        return stopped

    def _run(self) -> None:
        try:
            while self._answer_calls():
                for state in self.engine.step():
                    self._done(state)
                if self._after_step:
                    self._after_step()
            self.engine.stop()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._close()
            while not self._calls.empty():
                if call := self._calls.get():
                    _resolve(call[1], None, self._stopped())
            for future in self._waiting.values():
                _resolve(future, future.state, self._error and self._stopped())
            if self._error:
                self.engine.trainer.abandon(f"the engine failed: {self._error!r}")
            gc.unfreeze()  # so that an engine to which nothing refers any more is collected

    def _answer_calls(self) -> bool:
        """Carry out what is queued, waiting for it when there is nothing else to do."""
        while not self._calls.empty() or not self.engine.has_work:
            self.idle = self._calls.empty()
            call = self._calls.get()
            self.idle = False
            if call is None:
                return False
            function, future = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        return True
