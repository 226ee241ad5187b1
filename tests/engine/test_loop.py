"""The engine's thread: whoever calls a stopping engine is told so at once, and cancelled futures
disturb nobody. The engine is a stand-in that does nothing but what a test lets it."""

import threading
import time
from concurrent.futures import CancelledError, wait
from types import SimpleNamespace

import pytest

from flexllm_jax.engine.loop import EngineLoop, EngineStopped, NewRequest
from flexllm_jax.engine.sampling.params import SamplingParams

REQUEST = NewRequest((1, 2), SamplingParams(), None, 0.0)
SOON = 5.0


class Engine:
    """Requests wait until the test finishes them; `failure` is raised by the next step."""

    def __init__(self):
        self.requests, self.finished, self.failure = {}, [], None
        self.may_stop = threading.Event()
        self.may_stop.set()
        self.abandoned = []
        self.trainer = SimpleNamespace(abandon=self.abandoned.append)

    @property
    def has_work(self):
        return bool(self.failure or self.finished)

    def add_request(self, prompt, params, adapter, **rest):
        state = SimpleNamespace(request_id=str(len(self.requests)), finished=False, error=None)
        self.requests[state.request_id] = state
        return state

    def step(self):
        if self.failure:
            raise self.failure
        done, self.finished = self.finished, []
        for state in done:
            state.finished = True
        return done

    def cancel(self, state, error=None):
        state.finished, state.error = True, error
        self.finished = [other for other in self.finished if other is not state]

    def stop(self):
        assert self.may_stop.wait(SOON)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def loop(engine, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    loop = EngineLoop(engine)
    yield loop
    engine.may_stop.set()
    loop.stop()


def finish(loop, state):
    loop.call(loop.engine.finished.append, state)


class TestStopping:
    def test_calls_that_meet_a_failure_raise(self, loop, engine, monkeypatch):
        reporting = threading.Event()  # the thread lives on until its error is reported
        monkeypatch.setattr(threading, "excepthook", lambda *_: reporting.wait(SOON))
        (request,) = loop.submit([REQUEST])
        engine.failure = OSError("the device is lost")
        queued = loop.post(lambda: time.sleep(0.05))  # carried out before the step that fails
        with pytest.raises(EngineStopped, match="the device is lost") as error:
            request.result(SOON)
        assert error.value.__cause__ is engine.failure
        assert queued.result(SOON) is None
        for call in (loop.call, loop.post):
            with pytest.raises(EngineStopped, match=r"the engine failed: .*the device is lost"):
                call(print)
        assert not loop.alive
        reporting.set()
        loop.stop()
        assert engine.abandoned == ["the engine failed: OSError('the device is lost')"]

    def test_calls_that_meet_a_clean_stop_raise(self, loop, engine):
        (request,) = loop.submit([REQUEST])
        engine.may_stop.clear()
        stopping = threading.Thread(target=loop.stop)
        stopping.start()
        while loop.alive:
            time.sleep(0.001)
        with pytest.raises(EngineStopped, match="the engine has stopped"):
            loop.call(print)
        with pytest.raises(EngineStopped):
            loop.submit([REQUEST])
        assert not request.done(), "it is stopping still"
        engine.may_stop.set()
        stopping.join(SOON)
        assert request.result(0) is request.state
        assert not engine.abandoned

    def test_a_call_that_comes_while_the_failing_step_runs_raises(self, loop, engine):
        inside, go = threading.Event(), threading.Event()

        def step():
            inside.set()
            assert go.wait(SOON)
            raise OSError("lost")

        engine.step = step
        loop.call(engine.finished.append, None)  # there is work now
        assert inside.wait(SOON)
        late = loop.post(print)
        go.set()
        with pytest.raises(EngineStopped):
            late.result(SOON)

    def test_in_the_engines_own_thread(self, loop):
        """A finalizer may run there."""
        loop.post(loop.stop).result(SOON)
        loop.stop()
        assert not loop.alive


class TestCancelledFutures:
    def test_its_request_is_dropped_and_the_others_go_on(self, loop, engine):
        dropped, kept = loop.submit([REQUEST, REQUEST])
        assert dropped.cancel()
        with pytest.raises(CancelledError):
            dropped.result(SOON)
        while not dropped.state.finished:
            time.sleep(0.001)
        assert dropped.state.error == "cancelled"
        assert wait([dropped], SOON).done
        finish(loop, kept.state)
        assert kept.result(SOON) is kept.state
        assert not kept.cancel(), "it is done"

    def test_it_is_cancelled_while_its_last_step_is_read(self, loop, engine):
        (future,) = loop.submit([REQUEST])

        def meanwhile():
            engine.finished.append(future.state)
            future.cancel()

        loop.call(meanwhile)
        loop.call(lambda: None)
        assert future.cancelled() and loop.alive

    def test_on_an_engine_that_stops(self, loop):
        (future,) = loop.submit([REQUEST])
        future.cancel()
        loop.stop()
        assert future.cancelled()
        assert future.cancel(), "once more does no harm"

    def test_a_call_that_is_not_made_yet_is_not_made(self, loop):
        inside, go, made = threading.Event(), threading.Event(), []
        loop.post(lambda: (inside.set(), go.wait(SOON)))
        inside.wait(SOON)
        call = loop.post(lambda: made.append(1))
        assert call.cancel()
        go.set()
        loop.call(lambda: None)
        assert not made and loop.alive


def test_a_callback_in_the_engines_thread_may_call_it(loop):
    (first,) = loop.submit([REQUEST])
    more = []
    first.add_done_callback(lambda _: more.extend(loop.submit([REQUEST])))
    finish(loop, first.state)
    first.result(SOON)
    loop.call(lambda: None)
    finish(loop, more[0].state)
    assert more[0].result(SOON) is more[0].state
