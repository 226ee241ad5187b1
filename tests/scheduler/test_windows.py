"""Keys that attention reads where some layers have windows, against counting them."""

import pytest

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import LatencyModel
from scheduler.latency.roofline import A100, LayerCost, ModelCost, roofline
from scheduler.policies import make_policy
from scheduler.request import Request
from scheduler.windows import KeyReads

FULL, NARROW = LayerCost(1, 4, 2, 16), LayerCost(1, 4, 2, 8, window=5)
READER = LayerCost(1, 4, 2, 8, own_keys=False, window=5)
MODEL = ModelCost("three kinds", 32, (FULL, NARROW, NARROW, READER), vocab=64)


def counted(queries, keys):
    """Bytes of keys that are read, over those of a key in all layers."""
    read = 0
    for layer in MODEL.by_layer:
        seen = set()
        for query in range(keys - queries, keys):
            first = 0 if layer.window is None else max(0, query - layer.window + 1)
            seen |= set(range(first, query + 1))
        read += len(seen) * layer.kv_heads * layer.head_dim
    return read / sum(layer.kv_heads * layer.head_dim for layer in MODEL.by_layer)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (1, 6), (1, 40), (7, 9), (7, 40)])
def test_keys_are_those_that_layers_see(queries, keys):
    reads = KeyReads(MODEL.windows)
    assert reads(keys, queries) == pytest.approx(counted(queries, keys))
    assert reads.pairs(queries, keys) == pytest.approx(queries * counted(1, keys))
    assert KeyReads()(keys, queries) == keys


def test_a_plan_counts_no_more_than_windows_show():
    config = SchedulerConfig(4, 64, 200, (64,), num_pages=64, windows=MODEL.windows)
    latency = LatencyModel({64: 1.0}, {})
    scheduler = Scheduler(config, latency, make_policy("coserving"))
    scheduler.add(Request("a", tuple(range(50)), 20, arrival=0.0))
    prefill = scheduler.plan(0.0)
    assert prefill and prefill.features.chunk_kv == pytest.approx(counted(50, 50))
    scheduler.complete(prefill, {"a": 1}, (), 1.0)
    decode = scheduler.plan(1.0)
    assert decode and decode.features.decode_kv == pytest.approx(counted(1, 51))


def test_a_key_costs_what_all_layers_read_of_it():
    model = roofline(A100, MODEL, (16,), 8)
    kv_s = 2 * 2 * (2 * 16 + 3 * 2 * 8) / (0.7 * 2.039e12)
    assert model.coefficients["decode_kv"] == pytest.approx(kv_s)
    attention = 4 * 2 * 32 * 4 * 8 + 2 * 2 * 32 * 2 * 8 + 2 * 32 * (4 + 2) * 16 - 2 * 32 * 4 * 8
    assert MODEL.layer_parameters == pytest.approx((attention + 4 * 3 * 32) / 4)
