"""What a run on a GPU measures with: notes that outlive it, the device's rates, kernels' times."""

from __future__ import annotations

import glob
import json
import platform
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version


class Notes:
    """Measurements by name, in a JSON file that is whole after each of them."""

    def __init__(self, file: Path, **first: Any):
        self._file, self._started = file, time.monotonic()
        device = jax.devices()[0]
        self.values: dict[str, Any] = {
            **first,
            "device": device.device_kind,
            "platform_version": device.client.platform_version,
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "jaxlib": jaxlib.version.__version__,
            },
        }
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, value: Any) -> None:
        """Note a measurement, and show it."""
        self.values[name] = value
        self.values["seconds"] = round(time.monotonic() - self._started, 1)
        text = json.dumps(self.values, indent=1, default=str)
        unfinished = self._file.with_suffix(".tmp")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self._file)
        shown = json.dumps(value, default=str)[:600]
        print(f"[{self.values['seconds']:7.1f} s] {name}: {shown}", flush=True)


def measure_roofline(*, dry_run: bool) -> dict[str, float]:
    """Bytes/s of a large copy (read and written) and FLOP/s of a large bfloat16 product."""
    values, side = (2**20, 256) if dry_run else (2**30, 8192)
    normal = jax.jit(partial(jax.random.normal, dtype=jnp.bfloat16), static_argnums=1)
    x = normal(jax.random.key(0), (values,))
    copied = _seconds(jax.jit(lambda x: x + 1, donate_argnums=0), x)
    a = normal(jax.random.key(0), (side, side))
    product = _seconds(jax.jit(lambda x: x @ a), a)
    return {"bytes_per_s": 4 * values / copied, "flops_per_s": 2 * side**3 / product}


def _seconds(step: Callable[[jax.Array], jax.Array], x: jax.Array, calls: int = 20) -> float:
    """Time of a call that takes far longer than its dispatch, in a chain of them."""
    x = jax.block_until_ready(step(step(x)))
    begun = time.perf_counter()
    for _ in range(calls):
        x = step(x)
    jax.block_until_ready(x)
    return (time.perf_counter() - begun) / calls


def kernel_times(run: Callable[[], Any], calls: int = 1) -> dict[str, list[float]]:
    """Device microseconds and launches of a call by kernel, the longest first, from a trace.

    XLA uses no CUDA graphs in one: begin it while the device is idle. Kernels that differ by a
    number only are counted together.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    total, launches = defaultdict(float), defaultdict(int)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                jax.block_until_ready(run())
        for file in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            for name, microseconds in _device_events(file):
                name = re.sub(r"(_\d+)+$", "", name)
                total[name] += microseconds / calls
                launches[name] += 1
    ordered = sorted(total, key=lambda name: -total[name])
    return {name: [round(total[name], 1), launches[name] / calls] for name in ordered}


def _device_events(file: str) -> Iterator[tuple[str, float]]:
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield event.name, event.duration_ns / 1e3
