"""Layers of one shape share their arrays; what differs keeps its own, and every layer is found."""

import jax
import numpy as np
import pytest

from flexllm_jax.peft.stacks import LayerStacks


def layers_of(*widths):
    """Weights of layers of these widths, no two alike, beside something that is no list."""
    numbers = iter(range(1000))
    layers = [{"q": {"a": np.full((2, width), next(numbers))}} for width in widths]
    return {"master": layers, "count": np.int32(7)}


@pytest.mark.parametrize("widths", [(3,), (3, 3, 3), (3, 5, 3, 5, 5), (5, 3, 3)])
def test_layers_come_back_from_their_stacks(widths):
    tree = layers_of(*widths)
    stacks = LayerStacks.of([{"q": {"a": (2, width)}} for width in widths])
    stacked = stacks.stacked(tree)
    assert len(stacked["master"]) == len(set(widths))
    for layer, width in enumerate(widths):
        stack, at = stacks.place(layer)
        array = stacked["master"][stack]["q"]["a"]
        assert array.shape == (widths.count(width), 2, width)
        np.testing.assert_array_equal(array[at], tree["master"][layer]["q"]["a"])
    back = stacks.by_layer(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_columns_lie_by_device_in_a_stack_and_as_peft_has_them_by_layer():
    """Those of LoRA's B, where a projection is several things side by side; of nothing else."""
    random = np.random.default_rng(0)
    layers = [
        {
            site: {"a": random.normal(size=(4, 2)), "b": random.normal(size=(2, 8))}
            for site in ("qkv", "o")
        }
        for _ in range(2)
    ]
    stacks = LayerStacks.of(["alike", "alike"], [{"qkv": (4, 2, 2)}] * 2, devices=2)
    stacked = stacks.stacked({"master": layers})
    (stack,) = stacked["master"]
    for layer, own in enumerate(layers):
        for site, name in (("qkv", "a"), ("o", "a"), ("o", "b")):
            np.testing.assert_array_equal(stack[site][name][layer], own[site][name])
        moved = own["qkv"]["b"][:, [0, 1, 4, 6, 2, 3, 5, 7]]
        np.testing.assert_array_equal(stack["qkv"]["b"][layer], moved)
    jax.tree.map(np.testing.assert_array_equal, stacks.by_layer(stacked), {"master": layers})
