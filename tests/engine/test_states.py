"""Slots of recurrent state: planned, copied in place, and named by the scheduler's plans."""

import jax
import jax.numpy as jnp
import numpy as np

from flexllm_jax.engine.memory.cache import copy_slot


def test_a_slot_is_copied_in_place_in_all_layers():
    slots = np.arange(6.0, dtype=np.float32)
    state = np.broadcast_to(slots[:, None, None, None], (6, 2, 64, 64))
    tail = np.broadcast_to(slots[:, None, None], (6, 3, 16))
    states = [{"state": jnp.asarray(state * n), "conv": jnp.asarray(tail * n)} for n in (1, 2)]
    arguments = states, jnp.int32(4), jnp.int32(1)
    program = jax.jit(copy_slot, donate_argnums=0).lower(*arguments).compile()
    memory = program.memory_analysis()
    assert memory is not None
    held = sum(x.nbytes for x in jax.tree.leaves(states))
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < states[0]["state"].nbytes, "a whole array was copied"
    for n, layer in enumerate(program(*arguments), start=1):
        for array in layer.values():
            own = np.asarray(array) / n
            assert (own == own.reshape(6, -1)[:, :1].reshape(6, *[1] * (own.ndim - 1))).all()
            assert own.reshape(6, -1)[:, 0].tolist() == [0, 4, 2, 3, 4, 5]
