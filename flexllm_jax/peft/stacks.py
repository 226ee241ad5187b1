"""Layers stacked: what adapters have in all layers of one shape is one array for each weight, with
the layers leading, so that programs have few arguments and few launches, however many layers there
are.

Layers that differ (the output head, which has a layer of its own) are in stacks of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax


@dataclass(frozen=True)
class LayerStacks:
    """`layers`: which layers each stack holds, in their order."""

    layers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, layers: Sequence[Any]) -> "LayerStacks":
        """Layers of which the same is said share a stack."""
        kinds: list[Any] = []
        stacks: list[list[int]] = []
        for number, layer in enumerate(layers):
            if layer not in kinds:
                kinds.append(layer)
                stacks.append([])
            stacks[kinds.index(layer)].append(number)
        return cls(tuple(map(tuple, stacks)))

    def place(self, layer: int) -> tuple[int, int]:
        """The stack that holds a layer, and where in it."""
        for stack, layers in enumerate(self.layers):
            if layer in layers:
                return stack, layers.index(layer)
        raise ValueError(f"layer {layer} is in no stack")

    def stacked(self, tree: Any) -> Any:
        """A tree on the host in which every list is one by layer, with lists of stacks instead."""

        def stack(layers: list) -> list:
            return [
                jax.tree.map(lambda *own: np.stack(own), *(layers[i] for i in own))
                for own in self.layers
            ]

        return _lists(stack, tree)

    def by_layer(self, tree: Any) -> Any:
        """The reverse, without a copy."""
        places = [self.place(layer) for layer in range(sum(map(len, self.layers)))]

        def unstack(stacks: list) -> list:
            return [jax.tree.map(lambda x, at=at: x[at], stacks[stack]) for stack, at in places]

        return _lists(unstack, tree)


def _lists(change: Any, tree: Any) -> Any:
    """The tree with its lists changed."""
    return jax.tree.map(
        lambda node: change(node) if isinstance(node, list) else node,
        tree,
        is_leaf=lambda node: isinstance(node, list),
    )


def of_layer(stack: Any, index: Any) -> Any:
    """What a stack has of one layer; `index`: its place, also on the device. A stack of one is of
    whatever layer."""

    def own(x: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(x, index if x.shape[0] > 1 else 0, keepdims=False)

    return jax.tree.map(own, stack)


def shapes_of_one(stack: Any) -> Any:
    """The shapes of a stack of one such layer."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), stack)
