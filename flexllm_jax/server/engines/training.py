"""Calls of models that clients train, from a message to an answer, in the engine's process.

They are read in one thread of their own, in the order they came: neither the thread that takes
messages nor the engine's has the time. Files are read in workers, while the call that needs them
holds its place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.engine.calls.models import TrainingModels
from flexllm_jax.engine.loop import EngineLoop, EngineStopped
from flexllm_jax.finetune.calls.data import GivenDatum
from flexllm_jax.finetune.calls.source import AsideCall, Call, Scores, StepCall
from flexllm_jax.server.engines.calls import EngineCalls
from flexllm_jax.server.engines.protocol import Event, Train, Trained
from flexllm_jax.server.engines.training_messages import (
    ForwardBackward,
    Loaded,
    LoadState,
    Logprobs,
    OptimStep,
    SaveAdapter,
    Saved,
    SaveState,
    Stepped,
    Tensor,
    TrainingCall,
    TrainingDatum,
    TrainingModelState,
    TrainingResult,
)

log = logging.getLogger(__name__)


class EngineTraining:
    """Takes calls to models; `tell` sends events, `in_worker` runs a function in a worker."""

    def __init__(
        self,
        loop: EngineLoop,
        calls: EngineCalls,
        tell: Callable[[Event], None],
        in_worker: Callable[..., object],
    ):
        self._loop, self._calls, self._tell, self._in_worker = loop, calls, tell, in_worker
        self._models: TrainingModels = calls.models
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="training")

    def take(self, command: Train) -> None:
        """Have calls carried out in their order."""
        self._reader.submit(self._read_all, command)

    def close(self) -> None:
        """Read no more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def states(self) -> list[TrainingModelState]:
        """How all models are."""
        return [
            TrainingModelState(
                name,
                model.source.unanswered,
                model.source.steps,
                model.job.tokens_pending,
                model.parked is not None,
            )
            for name, model in list(self._models.models.items())
        ]

    # -- in the reader's thread -------------------------------------------------------------------

    def _read_all(self, command: Train) -> None:
        for number, call in command.calls:
            try:
                self._read(command.model, number, call)
            except EngineStopped:  # the end of this process is answer enough
                return
            except Exception as error:
                self._fail(number, error)

    def _read(self, model: str, number: int, given: TrainingCall) -> None:
        call, answer = self._made(given)
        call.future.add_done_callback(partial(self._answer, number, answer))
        self._loop.post(partial(self._add, model, call))
        if isinstance(given, LoadState):
            assert isinstance(call, AsideCall)
            self._in_worker(self._load, model, call, given)

    def _made(self, given: TrainingCall) -> tuple[Call, Callable[[Any], TrainingResult]]:
        """A call as the engine takes it, and what makes its answer. ValueError."""
        models = self._models
        match given:
            case ForwardBackward(data, loss, settings, forward_only):
                read = [_datum(number, datum) for number, datum in enumerate(data)]
                call = models.forward_call(read, loss, settings, backward=not forward_only)
                shapes = [own.inputs["target_tokens"].shape for own in read]
                return call, partial(_logprobs, shapes)
            case OptimStep():
                fields = {name: getattr(given, name) for name in given.__struct_fields__}
                return StepCall(**fields), _stepped
            case SaveState(path):
                return models.save_state_call(Path(path)), Saved
            case SaveAdapter(path, None):
                return models.save_adapter_call(Path(path)), Saved
            case SaveAdapter(path, str(name)):
                call = models.save_adapter_call(Path(path), serve_as=name)
                call.future.add_done_callback(partial(self._served, name, path))
                return call, Saved
            case LoadState():
                return models.load_call(), Loaded
        raise TypeError(f"unknown call {given!r}")

    # -- in the engine's thread, the writer's, or a worker ----------------------------------------

    def _add(self, model: str, call: Call) -> None:
        try:
            self._models.add(model, call)
        except Exception as error:
            call.fail(error)

    def _load(self, model: str, call: AsideCall, given: LoadState) -> None:
        try:
            read = self._models.read(Path(given.path), optimizer=given.optimizer)
            state: Any = self._models.ready(read)
        except Exception as error:
            state = error
        self._loop.post(partial(self._models.loaded, model, call, state))

    def _served(self, name: str, path: str, future: Future) -> None:
        if future.exception() is None:
            self._loop.post(partial(self._calls.can_come_back, name, path))

    def _answer(self, number: int, answer: Callable[[Any], TrainingResult], future: Future) -> None:
        if error := future.exception():
            self._fail(number, error)
        else:
            self._tell(Trained(number, answer(future.result())))

    def _fail(self, number: int, error: BaseException) -> None:
        user = isinstance(error, ValueError)
        if not user and not isinstance(error, RuntimeError):
            log.error("a call could not be carried out", exc_info=error)
        text = " ".join(str(error).split()) or type(error).__name__
        self._tell(Trained(number, None, text, "user" if user else "server"))


def _datum(number: int, datum: TrainingDatum) -> GivenDatum:
    where, count = f"datum {number}: ", len(datum.tokens) // 4
    tokens = _array(datum.tokens, "int32", [count], f"{where}model_input")
    inputs = {n: _array(t.data, t.dtype, t.shape, where + n) for n, t in datum.inputs.items()}
    return GivenDatum(tokens, inputs)


def _array(data: bytes, dtype: str, shape: list[int], name: str) -> np.ndarray:
    """ValueError when the bytes are not an array of that shape."""
    item = np.dtype(dtype).newbyteorder("<")
    if min(shape, default=0) < 0 or len(data) != item.itemsize * math.prod(shape):
        raise ValueError(f"{name}: {len(data)} bytes are no {dtype} array of shape {shape}")
    return np.frombuffer(data, item).reshape(shape)


def _logprobs(shapes: list[tuple[int, ...]], scores: Scores) -> Logprobs:
    tensors = [
        Tensor(np.ascontiguousarray(own, "<f4").tobytes(), "float32", list(shape))
        for own, shape in zip(scores.logprobs, shapes, strict=True)
    ]
    return Logprobs(tensors, {"loss:sum": scores.loss_sum}, scores.tokens)


def _stepped(measured: dict[str, float]) -> Stepped:
    metrics = {"grad_norm": measured["gradient_norm"], "weight_norm": measured["weight_norm"]}
    return Stepped(metrics, int(measured["step"]))
