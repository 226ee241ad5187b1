"""Requests in the engine's process, from a message to tokens told.

What takes time is done before the engine's thread is asked: constraints are made, and adapters
read, in workers. Of several outputs of one prompt the first goes ahead: the others
find the prompt in the prefix cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.loop import EngineLoop, NewRequest, RequestFuture
from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling.constraints import Constraint
from flexllm_jax.server.engines.adapter_loads import AdapterLoads, Numbered
from flexllm_jax.server.engines.calls import EngineCalls
from flexllm_jax.server.engines.protocol import Event, Generate, Output, Outputs

log = logging.getLogger(__name__)


class EngineRequests:
    """Takes requests to the engine; `tell` sends events, `load` and `compile` run a function in a
    worker for adapters, or for structures."""

    def __init__(
        self,
        engine: Engine,
        loop: EngineLoop,
        calls: EngineCalls,
        tell: Callable[[Event], None],
        load: Callable[..., object],
        compile: Callable[..., object],
    ):
        self._engine, self._loop, self._calls = engine, loop, calls
        self._tell, self._compile_in_worker = tell, compile
        # The engine's thread alone uses these: by the engine's number, and by the client's.
        self._active: dict[str, tuple[int, RequestFuture]] = {}
        self._futures: dict[int, RequestFuture] = {}
        self._loads = AdapterLoads(
            *(loop, calls, self._add, self._refuse, load, engine.config.server.adapter_wait_s)
        )
        self._compiling: set[int] = set()  # requests whose constraints are not made yet
        # By the number of the one that goes ahead of them, with their adapter's path.
        self._behind: dict[int, tuple[Numbered, str | None]] = {}
        self._shared = engine.scheduler.pool.least_shared

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Drop requests."""
        self._loop.post(lambda: self._cancel(request_ids))

    def go_on(self) -> None:
        """From time to time: what waits for an adapter may have to be told something."""
        if self._loads.waiting:
            self._loop.post(self._loads.go_on)

    def take(self, requests: Sequence[Generate]) -> None:
        """Hand requests to the engine's thread, which has no time for what can be done here; their
        constraints, which this thread has no time for, are made in another."""
        first = requests[0]  # a message is about one adapter and one constraint
        if not first.params.is_constrained:
            numbered = _number(requests, [None] * len(requests))
            behind = _followers(numbered, self._shared)
            self._loop.post(partial(self._lead, numbered, behind, first))
        else:
            self._loop.post(partial(self._compiling.update, [r.request_id for r in requests]))
            self._compile_in_worker(self._compile, requests)

    def _compile(self, requests: Sequence[Generate]) -> None:
        """In a worker: what compiles is queued, or refused; unless it is cancelled by then."""
        first, numbers = requests[0], [r.request_id for r in requests]
        try:
            constraints = self._engine.constraints.make(first.params, len(requests))
        except Exception as error:
            invalid, text = isinstance(error, ValueError), " ".join(str(error).split())
            self._loop.post(partial(self._compiling.difference_update, numbers))
            self._refuse(numbers, text, invalid)
            return
        numbered = _number(requests, constraints)

        def submit() -> None:
            if left := {n: r for n, r in numbered.items() if n in self._compiling}:
                self._compiling.difference_update(left)
                self._submit(left, first.adapter, first.adapter_path)

        self._loop.post(submit)

    # -- in the engine's thread --------------------------------------------------------------------

    def _lead(self, requests: Numbered, behind: dict[int, list[int]], first: Generate) -> None:
        """Queue those that go ahead of others with their prompt, and those without any."""
        for leader, others in behind.items():
            waiting = {number: requests.pop(number) for number in others}
            self._behind[leader] = waiting, first.adapter_path
        self._submit(requests, first.adapter, first.adapter_path)

    def _follow(self, leader: int) -> None:
        """What waits for a request's prompt goes on: that is there, or will not be."""
        others, path = self._behind.pop(leader, ({}, None))
        if others:
            self._submit(others, next(iter(others.values())).adapter, path)

    def _submit(self, requests: Numbered, adapter: str | None, path: str | None) -> None:
        if adapter and path and not self._calls.is_loaded(adapter):
            self._loads.want(adapter, path, requests)
        else:
            self._add(requests)

    def _refuse(
        self, request_ids: Iterable[int], error: str, invalid: bool = False, busy: bool = False
    ) -> None:
        outputs = [
            Output(number, [], error=error, invalid=invalid, busy=busy) for number in request_ids
        ]
        self._tell(Outputs(outputs))
        for number in list(request_ids):
            if number in self._behind:
                self._loop.post(partial(self._follow, number))

    def _add(self, requests: Numbered) -> None:
        try:
            self._queue(requests)
        except Exception as error:
            log.exception("requests were not queued")
            self._refuse(requests, repr(error), invalid=False)

    def _queue(self, requests: Numbered) -> None:
        for number, future in zip(requests, self._loop.add(list(requests.values())), strict=True):
            if future.done() and (error := future.exception()):
                self._refuse([number], str(error), invalid=True)
            else:
                self._active[future.state.request_id] = (number, future)
                self._futures[number] = future

    def _cancel(self, request_ids: Sequence[int]) -> None:
        self._compiling.difference_update(request_ids)
        self._loads.cancel(request_ids)
        for others, _ in self._behind.values():
            for request_id in request_ids:
                others.pop(request_id, None)
        for request_id in request_ids:
            self._follow(request_id)
            future = self._futures.pop(request_id, None)
            if future is not None:
                self._active.pop(future.state.request_id, None)
                self._loop.drop(future, "cancelled by the client")

    def tell_tokens(self) -> None:
        """In the engine's thread, after a step: the tokens that it brought."""
        outputs, ahead = [], []
        for state, count in self._engine.progressed:
            active = self._active.get(state.request_id)
            if active is None:
                continue
            request_id = active[0]
            first = len(state.output) == count
            if request_id in self._behind:
                ahead.append(request_id)
            outputs.append(
                Output(
                    request_id,
                    state.output[-count:],
                    logprobs=state.logprobs[-count:],
                    prompt_logprobs=(state.prompt_logprobs or None) if first else None,
                    finish_reason=state.finish_reason,
                    queued_s=_queued_s(state) if first else None,
                    cached_tokens=state.cached_tokens if first else 0,
                    error=state.error,
                    invalid=state.error is not None,  # its constraint was too much
                )
            )
            if state.finished:
                del self._active[state.request_id], self._futures[request_id]
        if outputs:
            self._tell(Outputs(outputs))
        for request_id in ahead:
            self._follow(request_id)
        if self._loads.waiting:
            self._loads.go_on()


def _number(requests: Sequence[Generate], constraints: Sequence[Constraint | None]) -> Numbered:
    return {
        r.request_id: NewRequest(
            tuple(r.prompt), r.params, r.adapter, r.arrival, r.seed_offset, r.slo_class, constraint
        )
        for r, constraint in zip(requests, constraints, strict=True)
    }


def _followers(requests: Numbered, shared: int | None) -> dict[int, list[int]]:
    """Of requests with one adapter, those whose prompt another one computes before, by that one;
    `shared`: a prompt has to have more tokens, or nothing is shared."""
    found: dict[int, list[int]] = {}
    leaders: dict[tuple[int, ...], int] = {}
    for number, request in requests.items():
        if shared is None or len(requests) == 1:
            break
        if len(request.prompt) > shared and request.params.prompt_logprobs is None:
            leader = leaders.setdefault(request.prompt, number)
            if leader != number:
                found.setdefault(leader, []).append(number)
    return found


def _queued_s(state: RequestState) -> float | None:
    return None if state.started_at is None else max(0.0, state.started_at - state.arrival)
