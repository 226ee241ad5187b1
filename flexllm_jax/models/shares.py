"""In which order the columns of a projection lie when they are split over devices.

What a projection gives may be parts side by side: queries, keys and values, or gate and up. Each
device has its share of every part, so that it computes with its own columns as one device does with
all of them. The columns lie in the order of the devices: parts [q | k | v] on 2 devices are
[q0 k0 v0 | q1 k1 v1]. On the host they always lie as in checkpoints.
"""

from functools import lru_cache

import numpy as np

Parts = tuple[int, ...]  # widths


@lru_cache
def column_order(parts: Parts, devices: int) -> np.ndarray:
    """Of each column in the order of the devices, which one of the checkpoint it is."""
    starts = np.cumsum((0, *parts[:-1]))
    numbers = [
        start + np.arange(width).reshape(devices, -1)
        for start, width in zip(starts, parts, strict=True)
    ]
    return np.concatenate(numbers, axis=1).reshape(-1)


def own_columns(parts: Parts, devices: int, part: slice) -> list[slice]:
    """Which columns of the checkpoint a part of those in the order of the devices are."""
    if not parts:
        return [part]
    numbers = column_order(parts, devices)[part]
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]


def by_device(array: np.ndarray, parts: Parts, devices: int) -> np.ndarray:
    """The array with its columns, the last axis, in the order of the devices."""
    return array[..., column_order(parts, devices)]


def as_stored(array: np.ndarray, parts: Parts, devices: int) -> np.ndarray:
    """The reverse."""
    return array[..., np.argsort(column_order(parts, devices))]
