"""A layer has two all-reduces forward, with LoRA on all seven projections as without, and two
backward: bypasses join those of the base model."""

import json
import subprocess
import sys

import pytest

from tests.checkpoints import make_llama


@pytest.fixture(scope="module")
def examine(tmp_path_factory):
    """Collectives of the compiled programs of a model with so many layers, by devices."""
    path = make_llama(tmp_path_factory.mktemp("model"), vocab=128, num_heads=8, num_kv_heads=2)

    def run(layers: int, saved: str, *tp: int) -> dict:
        command = [sys.executable, "-m", "tests.compile.collectives", str(path), str(layers), saved]
        done = subprocess.run([*command, *map(str, tp)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def two_layers(examine):
    return examine(2, "all", 1, 8)


@pytest.mark.parametrize("tp", ["8"])
def test_two_all_reduces_a_layer_with_and_without_lora(examine, two_layers, tp):
    three_layers = examine(3, "all", int(tp))[tp]
    for program in ("forward/base/8", "forward/adapters/8"):
        two, three = (found[program]["collectives"] for found in (two_layers[tp], three_layers))
        assert two == {"all-reduce": 1 + 2 * 2}  # one more joins the split embedding
        assert three == {"all-reduce": 1 + 3 * 2}


@pytest.mark.parametrize("tp", ["8"])
def test_two_all_reduces_in_a_layers_backward(two_layers, tp):
    assert two_layers[tp]["unit/layer"]["collectives"] == {"all-reduce": 2}


def test_one_device_has_no_collective(two_layers):
    assert not any(found["collectives"] for found in two_layers["1"].values())


@pytest.mark.parametrize("tp", ["8"])
def test_sharded_buffers_are_updated_in_place(two_layers, tp):
    for name, found in two_layers[tp].items():
        assert found["in_place"], name
