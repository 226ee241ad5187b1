"""What an output is made of, in order: thoughts, texts and calls, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flexllm_jax.server.inference.conversing import Said

Kind = Literal["thought", "text", "call"]


@dataclass
class Item:
    """One of them. `text`: what there is of it, of a call its arguments."""

    index: int
    kind: Kind
    text: str = ""
    call_id: str = ""
    name: str = ""


Change = tuple[Literal["begin", "more", "end"], Item, str]


class Items:
    """One output's items. An item has ended when another begins."""

    def __init__(self):
        self.items: list[Item] = []
        self._open: Item | None = None

    def take(self, said: Said) -> Iterator[Change]:
        """What a token changes, with the text that an item gets."""
        if said.thought:
            yield from self._add("thought", said.thought)
        if said.text:
            yield from self._add("text", said.text)
        for call in said.calls:
            if call.id is not None:
                yield from self._begin("call", call.id, call.name or "")
            if call.arguments:
                yield from self._add("call", call.arguments)

    def end(self) -> Iterator[Change]:
        """Nothing more will come."""
        if self._open is not None:
            yield "end", self._open, ""
            self._open = None

    def _add(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        self._open.text += text
        yield "more", self._open, text

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Change]:
        yield from self.end()
        self._open = Item(len(self.items), kind, call_id=call_id, name=name)
        self.items.append(self._open)
        yield "begin", self._open, ""
