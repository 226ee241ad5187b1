"""Layers stacked: what adapters have in all layers of one shape is one array for each weight, with
the layers leading, so that programs have few arguments and few launches, however many layers there
are.

Layers that differ (the output head, which has a layer of its own) are in stacks of their own. Where
the model is split over devices, columns lie as `models.shares` has them, and by layer as PEFT does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax

from flexllm_jax.models.shares import Parts, as_stored, by_device


@dataclass(frozen=True)
class LayerStacks:
    """layers: which layers each stack holds, in their order. parts: by stack, of the sites whose
    projection gives several things side by side, their widths. devices: that the model is split
    over."""

    layers: tuple[tuple[int, ...], ...]
    parts: tuple[Mapping[str, Parts], ...] = ()
    devices: int = 1

    @classmethod
    def of(
        cls,
        layers: Sequence[Any],
        parts: Sequence[Mapping[str, Parts]] | None = None,
        devices: int = 1,
    ) -> "LayerStacks":
        """Layers of which the same is said share a stack; `parts`: by layer."""
        parts = [{} for _ in layers] if parts is None else parts
        kinds: list[Any] = []
        stacks: list[list[int]] = []
        for number, layer in enumerate(zip(layers, parts, strict=True)):
            if layer not in kinds:
                kinds.append(layer)
                stacks.append([])
            stacks[kinds.index(layer)].append(number)
        return cls(tuple(map(tuple, stacks)), tuple(own for _, own in kinds), devices)

    def place(self, layer: int) -> tuple[int, int]:
        """The stack that holds a layer, and where in it."""
        for stack, layers in enumerate(self.layers):
            if layer in layers:
                return stack, layers.index(layer)
        raise ValueError(f"layer {layer} is in no stack")

    def stacked(self, tree: Any) -> Any:
        """A tree on the host in which every list is one by layer, with lists of stacks instead."""

        def stack(layers: list) -> list:
            stacks = [
                jax.tree.map(lambda *own: np.stack(own), *(layers[i] for i in own))
                for own in self.layers
            ]
            return [self.for_devices(i, own) for i, own in enumerate(stacks)]

        return _lists(stack, tree)

    def by_layer(self, tree: Any) -> Any:
        """The reverse, without a copy of what lies alike."""
        places = [self.place(layer) for layer in range(sum(map(len, self.layers)))]

        def unstack(stacks: list) -> list:
            stacks = [self._ordered(as_stored, i, own) for i, own in enumerate(stacks)]
            return [jax.tree.map(lambda x, at=at: x[at], stacks[stack]) for stack, at in places]

        return _lists(unstack, tree)

    def for_devices(self, stack: int, tree: Any) -> Any:
        """What one stack (or one of its layers) has, {site: {name: array}}, as it lies on the
        devices."""
        return self._ordered(by_device, stack, tree)

    def _ordered(self, change: Callable[..., np.ndarray], stack: int, tree: Any) -> Any:
        """The tree with the columns of its projections changed: those of LoRA's B."""
        parts = self.parts[stack] if self.devices > 1 and self.parts else {}
        if not parts:
            return tree

        def own(path: tuple, x: Any) -> Any:
            site, *name = (key.key for key in path)
            return change(x, parts[site], self.devices) if site in parts and name == ["b"] else x

        return jax.tree_util.tree_map_with_path(own, tree)


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
