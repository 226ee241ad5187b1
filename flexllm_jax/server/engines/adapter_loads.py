"""Requests whose adapter is not on the device: it is loaded as soon as there is a slot for it.

Adapters wait in the order they were asked for. What is loaded is published and its requests are
queued between the same two steps, so nothing can evict it in between. When all slots are in use for
long, the adapter that has had its slot the longest gives it up: its requests finish, later ones
wait in their turn. All but `_read` runs in the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from flexllm_jax.engine.loop import EngineLoop, NewRequest
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.bank import AdapterRow
from flexllm_jax.peft.directory import NoFreeSlot
from flexllm_jax.server.engines.calls import EngineCalls

Numbered = dict[int, NewRequest]  # by the client's number
_TURN_S = 1.0  # that an adapter keeps its slot at least while others wait


@dataclass(eq=False)
class Wanted:
    """An adapter that is waited for, by `requests`; `content`: once its files are read."""

    path: str
    requests: Numbered = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    reading: bool = False
    content: tuple[Adapter, AdapterRow] | None = None


class AdapterLoads:
    """`add` queues requests, `refuse` tells why they are not, `in_worker` runs a function in a
    worker. After `wait_s` without a slot requests are refused as the server is busy."""

    def __init__(
        self,
        loop: EngineLoop,
        calls: EngineCalls,
        add: Callable[[Numbered], None],
        refuse: Callable[..., None],
        in_worker: Callable[..., object],
        wait_s: float,
    ):
        self._loop, self._calls, self._in_worker = loop, calls, in_worker
        self._add, self._refuse, self._wait_s = add, refuse, wait_s
        self.waiting: dict[str, Wanted] = {}  # the first came first
        calls.on_unload = self._unloaded

    def want(self, name: str, path: str, requests: Numbered) -> None:
        """Queue requests when their adapter is there."""
        self.waiting.setdefault(name, Wanted(path)).requests |= requests
        self.go_on()

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Drop requests."""
        for name, wanted in list(self.waiting.items()):
            for number in request_ids:
                wanted.requests.pop(number, None)
            if not wanted.requests:
                del self.waiting[name]

    def go_on(self) -> None:
        """Between two steps: load what there are slots for, refuse what has waited too long."""
        now, slots = time.monotonic(), self._calls.slots_to_be_had()
        lacking = len(self.waiting) - slots - self._calls.num_giving_up
        for name, wanted in list(self.waiting.items()):
            if slots > 0 and wanted.content is not None and self._publish(name, wanted):
                slots -= 1
            elif now - wanted.since > self._wait_s:
                del self.waiting[name]
                text = f"all adapters.slots are in use, for {self._wait_s:g} s by now: try again"
                self._refuse(wanted.requests, text, busy=True)
            elif slots > 0:
                slots -= 1
                if not wanted.reading:
                    wanted.reading = True
                    self._in_worker(self._read, name, wanted)
            elif now - wanted.since > _TURN_S and lacking > 0:
                lacking -= 1
                self._calls.give_up_oldest(now - _TURN_S)

    def _publish(self, name: str, wanted: Wanted) -> bool:
        assert wanted.content is not None
        try:
            if not self._calls.is_loaded(name):  # a newer version may have come meanwhile
                self._calls.publish(name, wanted.path, *wanted.content)
        except NoFreeSlot:  # a job has taken it
            return False
        del self.waiting[name]
        self._add(wanted.requests)
        return True

    def _read(self, name: str, wanted: Wanted) -> None:
        """In a worker: read an adapter's files, or refuse what waits for it."""
        try:
            content = self._calls.read_adapter(name, wanted.path)
        except Exception as error:
            invalid, text = isinstance(error, ValueError), " ".join(str(error).split())
            self._loop.post(partial(self._failed, name, wanted, text, invalid))
        else:
            self._loop.post(partial(self._have_read, wanted, content))

    def _have_read(self, wanted: Wanted, content: tuple[Adapter, AdapterRow]) -> None:
        wanted.content = content
        self.go_on()

    def _failed(self, name: str, wanted: Wanted, text: str, invalid: bool) -> None:
        if self.waiting.get(name) is wanted:
            del self.waiting[name]
            self._refuse(wanted.requests, text, invalid=invalid)
        self.go_on()

    def _unloaded(self, name: str) -> None:
        wanted = self.waiting.pop(name, None)
        if wanted is not None:
            requests: Iterable[int] = wanted.requests
            self._refuse(requests, "the adapter was unloaded meanwhile", invalid=True)
