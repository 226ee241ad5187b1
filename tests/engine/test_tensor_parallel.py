"""The engine split over 4 devices, and over 2 processes, says and learns what it does on one.

The model has biases, norms on queries and keys, and 2 key-value heads: on 4 devices they are
replicated. Gradients on one device are compared with PEFT's elsewhere. FLEXLLM_TP_DEVICES=1,2,4,8
tests other numbers of devices too, which takes two minutes more.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_llama, make_qwen3, save_tokenizer
from tests.engine.tensor_parallel import trained
from tests.engine.test_preference_jobs import pair_rows
from tests.engines import (
    free_port,
    letter_rows,
    load_with_adapter,
    random_prompts,
    reference_greedy,
    save_random_adapter,
    start_engine,
    write_rows,
)

DEVICES = tuple(os.environ.get("FLEXLLM_TP_DEVICES", "1,4").split(","))
LAYOUTS = (*DEVICES, "2p2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What was said and learnt, by layout: number of devices, and of processes after a p."""
    folder = tmp_path_factory.mktemp("tp")
    options = {"num_heads": 8, "num_kv_heads": 2, "attention_bias": True}
    model = save_tokenizer(make_qwen3(folder / "model", vocab=272, **options))
    adapter = save_random_adapter(model, folder / "adapter")
    rows = write_rows(folder / "rows.jsonl", letter_rows(16))
    write_rows(folder / "pairs.jsonl", pair_rows(12))

    def start(*parallel: dict) -> subprocess.Popen[str]:
        sections = [json.dumps(section) for section in parallel]
        paths = [str(path) for path in (model, adapter, rows, folder)]
        command = [sys.executable, "-m", "tests.engine.tensor_parallel", *paths, *sections]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait(*processes: subprocess.Popen[str]) -> None:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]

    wait(start(*({"tp": int(n)} for n in DEVICES)))
    both = {"tp": 2, "num_processes": 2, "coordinator_address": f"127.0.0.1:{free_port()}"}
    wait(start(both | {"process_id": 0}), start(both | {"process_id": 1}))
    return SimpleNamespace(
        folder=folder,
        model=model,
        adapter=adapter,
        said={n: json.loads((folder / f"said{n}.json").read_text()) for n in LAYOUTS},
        gradients={n: np.load(folder / f"gradients{n}.npz") for n in LAYOUTS},
    )


@pytest.fixture(params=LAYOUTS[1:])
def tp(request):
    return request.param


def test_one_device_says_what_transformers_and_peft_do(runs):
    prompts = random_prompts([1, 9, 33, 60])
    reference = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float32).eval()
    adapted = load_with_adapter(runs.model, runs.adapter)
    for i, prompt in enumerate(prompts):
        assert runs.said["1"]["greedy"][i] == reference_greedy(reference, prompt, 20)
        assert runs.said["1"]["adapter"][i] == reference_greedy(adapted, prompt, 20)


@pytest.mark.parametrize("what", ["greedy", "adapter", "sampled", "structured", "trained"])
def test_same_tokens(runs, tp, what):
    assert runs.said[tp][what] == runs.said["1"][what]


def test_same_logprobs(runs, tp):
    for own, expected in zip(runs.said[tp]["logprobs"], runs.said["1"]["logprobs"], strict=True):
        assert own == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("tp", "kind"), [(name, kind) for name in LAYOUTS[1:] for kind in trained(name)]
)
def test_same_gradients(runs, tp, kind):
    def of(layout: str) -> dict[str, np.ndarray]:
        found = runs.gradients[layout]
        return {name: found[name] for name in found.files if name.startswith(kind)}

    own, expected = of(tp), of("1")
    assert own.keys() == expected.keys()
    counted = 0
    for name, gradient in expected.items():
        size = np.linalg.norm(gradient)
        assert np.linalg.norm(own[name] - gradient) <= 1e-5 * size, name
        counted += size > 0
    assert counted > 4


def test_same_losses(runs, tp):
    assert runs.said[tp]["losses"] == pytest.approx(runs.said["1"]["losses"], rel=1e-5)
    expected = runs.said["1"]["preferred"]
    for name in ("loss", "margin", "gradient_norm"):  # of margins near 0 accuracy is a coin's toss
        own = [metrics[name] for metrics in runs.said[tp]["preferred"]]
        assert own == pytest.approx([m[name] for m in expected], rel=1e-4, abs=1e-5)
    assert np.ptp([m["loss"] for m in expected]) > 0.01, "nothing is learnt of preferences"


def test_the_same_is_learnt_from_rewards(runs, tp):
    assert runs.said[tp]["answers"] == runs.said["1"]["answers"]
    for own, expected in zip(runs.said[tp]["learnt"], runs.said["1"]["learnt"], strict=True):
        assert abs(own["kl_sampler"]) < 1e-6
        for name in ("loss", "reward", "length", "gradient_norm"):
            assert own[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
        assert expected["gradient_norm"] > 0


def test_nothing_compiles_or_moves_after_the_start(runs, tp):
    assert runs.said[tp]["recompiles"] == 0
    assert runs.said[tp]["moved"] == 0


def test_exports_are_whole(runs, tp):
    for name in (f"adapter{tp}/adapter_model", f"merged{tp}/model"):
        own = load_file(runs.folder / f"{name}.safetensors")
        expected = load_file(runs.folder / f"{name.replace(tp, '1')}.safetensors")
        assert own.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(own[key], tensor, atol=2e-4, rtol=1e-3)
    adapted = load_with_adapter(runs.model, runs.folder / f"adapter{tp}")
    for prompt, said in zip(random_prompts([1, 9, 33, 60]), runs.said[tp]["trained"], strict=True):
        assert reference_greedy(adapted, prompt, 20) == said


def test_what_cannot_be_split_is_refused_in_one_line(tmp_path):
    path = save_tokenizer(make_llama(tmp_path / "model", vocab=272, num_heads=4))
    for tp, message in ((3, "num_heads=4"), (2, "needs 2 devices and JAX sees 1")):
        with pytest.raises(ValueError, match=message) as error:
            start_engine(path, tmp_path / "runs", parallel={"tp": tp})
        assert "\n" not in str(error.value)
