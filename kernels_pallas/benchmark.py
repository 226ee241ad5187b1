"""Timing calls on the device at hand.

The calls run in a loop on the device, so that what is timed is the device and not the launching of
its programs by Python.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from jax import lax

from kernels_pallas.backend import select_backend
from kernels_pallas.cases import Case

_CALLS = 20
_RUNS = 5


class RepeatedCall:
    """`calls` calls of `function(*arguments)` in a row, as one program.

    arguments: arrays or their shapes. donated: those that the function updates in place; each call
    goes on with what the one before returned in their place.
    """

    def __init__(
        self,
        function: Callable,
        arguments: tuple,
        donated: tuple[int, ...] = (),
        calls: int = _CALLS,
    ):
        self.donated, self.calls = donated, calls

        def call_again(_, carry: tuple) -> tuple:
            # The barrier makes each call depend on the one before.
            arguments, _ = lax.optimization_barrier(carry)
            outputs = function(*arguments)
            return _fed_back(arguments, donated, outputs), outputs

        def all_calls(*arguments: Any) -> tuple:
            outputs = function(*arguments)
            carry = (_fed_back(arguments, donated, outputs), outputs)
            arguments, outputs = lax.fori_loop(1, calls, call_again, carry)
            return tuple(arguments[i] for i in donated), outputs

        self._lowered = jax.jit(all_calls, donate_argnums=donated).lower(*arguments)

    def compile(self) -> "RepeatedCall":
        """Compile; may run in a thread."""
        self._run = self._lowered.compile()
        return self

    def seconds(self, arguments: tuple, runs: int = _RUNS) -> float:
        """Time of one call, from the fastest run. What is donated must not be used afterwards."""
        fastest = float("inf")
        for _ in range(runs + 1):  # the first one warms up
            jax.block_until_ready(arguments)
            started = time.perf_counter()
            returned, outputs = jax.block_until_ready(self._run(*arguments))
            fastest = min(fastest, time.perf_counter() - started)
            del outputs
            given_back = dict(zip(self.donated, returned, strict=True))
            arguments = tuple(given_back.get(i, argument) for i, argument in enumerate(arguments))
        return fastest / self.calls


def seconds_per_call(
    function: Callable,
    arguments: tuple,
    donated: tuple[int, ...] = (),
    calls: int = _CALLS,
    runs: int = _RUNS,
) -> float:
    """Time of one call of `function(*arguments)` (see `RepeatedCall`)."""
    return RepeatedCall(function, arguments, donated, calls).compile().seconds(arguments, runs)


def _fed_back(arguments: tuple, donated: tuple[int, ...], outputs: Any) -> tuple:
    """The arguments with what is donated replaced by the outputs of the same shape and dtype."""
    left = jax.tree.leaves(outputs)

    def take(old: jax.Array) -> jax.Array:
        for i, new in enumerate(left):
            if (new.shape, new.dtype) == (old.shape, old.dtype):
                return left.pop(i)
        raise ValueError(f"no output replaces the donated argument of shape {old.shape}")

    return tuple(
        jax.tree.map(take, argument) if i in donated else argument
        for i, argument in enumerate(arguments)
    )


def main(cases: Iterable[Case]) -> None:
    """Time a kernel's cases and print bytes/s and FLOP/s: the command line of each `bench.py`."""
    parser = argparse.ArgumentParser(description="Time a kernel on the device at hand.")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--backend", choices=("pallas", "mosaic", "xla"), default="pallas")
    parser.add_argument("--calls", type=int, default=_CALLS, help="in a row, for one measurement")
    arguments = parser.parse_args()
    backend = select_backend(arguments.backend, jax.devices()[0])
    for case in cases:
        if arguments.case in case.name:
            function = partial(case.function, backend=backend)
            values = case.make(jax.random.key(0))
            seconds = seconds_per_call(function, values, case.donated, arguments.calls)
            print(
                f"{case.name:60} {1e6 * seconds:10.1f} us {case.bytes / seconds / 1e9:9.1f} GB/s "
                f"{case.flops / seconds / 1e12:8.2f} TFLOP/s",
                flush=True,
            )
