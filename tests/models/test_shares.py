"""The columns of projections that give several things side by side, in the order of devices."""

import numpy as np
import pytest

from flexllm_jax.models.shares import as_stored, by_device, own_columns

PARTS = (8, 4, 4)  # queries 0..7, keys 8..11, values 12..15


def test_each_device_has_its_share_of_every_part():
    columns = np.arange(2 * 16).reshape(2, 16)
    first, second = np.split(by_device(columns, PARTS, 2)[0], 2)
    assert first.tolist() == [0, 1, 2, 3, 8, 9, 12, 13]
    assert second.tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_columns_come_back(devices):
    columns = np.random.default_rng(0).standard_normal((3, 16))
    there = by_device(columns, PARTS, devices)
    np.testing.assert_array_equal(as_stored(there, PARTS, devices), columns)


def test_a_device_reads_its_own_columns_alone():
    runs = own_columns(PARTS, 2, slice(8, 16))
    assert runs == [slice(4, 8), slice(10, 12), slice(14, 16)]
    assert own_columns(PARTS, 1, slice(None)) == [slice(0, 16)]
    assert own_columns((), 2, slice(8, 16)) == [slice(8, 16)]
