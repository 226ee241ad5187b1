"""Plans for GPUs that are not there: beside what was measured on one, and for the configurations
that people start from."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexllm_jax.config import Config, ConfigError, build_config, load_config
from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.experiments.gpu.llama_8b import write_config
from flexllm_jax.experiments.gpu.report import plot, predict
from flexllm_jax.experiments.planning import load as loads
from flexllm_jax.experiments.planning import make
from flexllm_jax.experiments.planning.advice import Advice, advise, changes
from flexllm_jax.experiments.planning.engine import CHIPS, PlannedEngine, plan_engine
from flexllm_jax.experiments.planning.load import (
    Job,
    finetuning_alone,
    simulate_load,
    size_fleet,
    split_arrivals,
    step_times,
)
from flexllm_jax.experiments.planning.make import choose_requests, make_plan
from flexllm_jax.experiments.planning.report import print_plan
from flexllm_jax.models.config import ModelConfig
from scheduler.simulation.workload import Arrival

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "docs/results/gpu"
# Weights in billions; the chips, of a single one of which the configuration has enough.
STARTS = {
    "llama3.1-8b": (8.03, {"a100", "h100", "h200"}),
    "qwen3-8b": (8.19, {"a100", "h100", "h200"}),
    "qwen3.5-9b": (8.95, {"a100", "h100", "h200"}),
    "qwen2.5-14b": (14.77, {"a100", "h100", "h200"}),
    "qwen2.5-32b": (32.76, {"h200"}),
}
JOB = Job(4096, 0.0)


def configuration(name: str, *overrides: str) -> Config:
    given = [*overrides, f"model.path={ROOT}/configs/models/{model_folder(name)}"]
    return load_config(ROOT / f"configs/{name}.yaml", given)


def model_folder(name: str) -> str:
    return "llama-3.1-8b" if name == "llama3.1-8b" else name


@pytest.mark.parametrize("chip", sorted(CHIPS))
@pytest.mark.parametrize("name", STARTS)
def test_a_configuration_to_start_from_fits_or_says_what_helps(name, chip):
    billions, enough = STARTS[name]
    engine = plan_engine(configuration(name), chip)
    assert engine.parts["weights"] / 2e9 == pytest.approx(billions, rel=2e-3)
    assert engine.fits == (chip in enough)
    if engine.fits:
        used = sum(engine.parts.values()) + engine.num_pages * engine.page_bytes
        assert used <= engine.available < used + engine.page_bytes
        assert engine.kv_tokens > 4 * engine.config.finetune.max_tokens
        return
    assert engine.problem is not None and "GB: weights 65.53" in engine.problem
    if chip == "a100":  # no other than an H100 in this: once is enough
        assert plan_engine(configuration(name, "parallel.tp=2"), chip).fits
        return
    advice = advise(engine, JOB, None)
    assert all(one.planned.fits and one.finetuning for one in advice)
    assert "--set parallel.tp=2" in [one.text for one in advice]


@pytest.mark.parametrize("name", STARTS)
def test_a_configuration_to_start_from_names_its_model(name):
    """As the file has it, read from the root of the repository."""
    path = load_config(ROOT / f"configs/{name}.yaml").model.path
    assert path == Path(f"configs/models/{model_folder(name)}")


def test_two_descriptions_of_llama_are_one(tmp_path):
    own = ModelConfig.from_hf(ROOT / "configs/models/llama-3.1-8b")
    assert own == ModelConfig.from_hf(write_config(tmp_path))


# -- beside measurements ---------------------------------------------------------------------------


def measured(name: str) -> dict[str, Any]:
    return json.loads((MEASURED / f"{name}.json").read_text())


def as_measured(saved: str) -> PlannedEngine:
    """The engine of `gpu_first_contact.py engine`."""
    config = {
        "model": {"path": str(ROOT / "configs/models/llama-3.1-8b"), "max_model_len": 8192},
        "adapters": {"slots": 4, "max_rank": 16},
        "cache": {"page_size": 64, "memory_fraction": 0.85},
        "scheduler": {"max_tokens_per_step": 2048, "max_sequences": 64, "slo": {"tpot_ms": 50.0}},
        "finetune": {"max_tokens": 8192, "unit_tokens": 1024, "saved": saved},
        "compile": {"token_buckets": [64, 512, 2048]},
    }
    return plan_engine(build_config(config), "h100")


def test_predictions_are_near_what_an_h100_did():
    found, engine = measured("engine-saved-all"), as_measured("all")
    times = step_times(engine, 2048 + 32)
    for rows in (1, 8, 64):
        predicted = times[f"decode_{rows}_row{'s' * (rows > 1)}_ms"]
        assert predicted == pytest.approx(found[f"decode/{rows}"]["step_ms"], rel=0.05)
    assert times["prefill_tokens_per_s"] == pytest.approx(
        found["prefill"]["tokens_per_s"], rel=0.05
    )
    alone = found["finetune/alone"]["tokens_per_s"]
    assert finetuning_alone(engine, JOB) == pytest.approx(alone, rel=0.05)
    # Nothing was fitted to what both at once did. Prompts were cached there: here they are short.
    both = simulate_load(engine, [Arrival(0.0, 1600, 960)] * 64, 1, JOB)
    beside = found["decode and finetune"]
    assert both["finetune_tokens_per_s"] == pytest.approx(beside["finetune_tokens_per_s"], rel=0.15)
    assert both["tpot_mean_ms"] == pytest.approx(beside["tpot_ms"], rel=0.25)


TRACE = ROOT.parent / "shared" / "data" / "workload_azconv600s_sharegpt_20rps.csv"


@pytest.mark.skipif(not TRACE.exists(), reason=f"the trace that was measured is not at {TRACE}")
def test_an_engine_under_load_is_predicted(tmp_path):
    """Nothing was fitted to it, but for the passes of a backward unit to another run."""
    # What the configuration had, and what `saved: auto` chose, when it was measured.
    options = ["adapters.slots=66", "compile.token_buckets=[16,64,256,512,2048]"]
    options += ["finetune.saved=[query,attended,residual]"]
    config, own = ROOT / "configs/llama3.1-8b.yaml", {"trace": TRACE, "seconds": 24.0}
    rows = predict(measured("serve"), config, overrides=options, **own)
    for name, predicted, found in rows:
        ttft = name.endswith("ttft_mean_ms")  # of few requests, some of them long
        assert predicted == pytest.approx(found, rel=0.35 if ttft else 0.08), name
    assert len(rows) == 3 + 4 * 4
    plot(rows, [], tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 10_000


def test_the_memory_that_is_reckoned_with_is_that_of_the_device():
    """What JAX said that it may use of an H100, and what was in use after the start."""
    found, engine = measured("engine-saved-all"), as_measured("all")
    memory = found["start"]["memory"]
    assert engine.available == pytest.approx(0.85 * memory["bytes_limit"], rel=1e-4)
    arrays = sum(engine.parts[name] for name in ("weights", "adapters", "finetuning", "requests"))
    pages = int(found["start"]["plan"].split(" KV pages")[0].split()[-1])
    assert arrays + pages * engine.page_bytes == pytest.approx(memory["bytes_in_use"], rel=2e-3)


# -- load ------------------------------------------------------------------------------------------


def test_more_requests_need_more_engines():
    engine = plan_engine(configuration("llama3.1-8b"), "h100")
    few = choose_requests(engine.config, None, 2.0)[:40]
    results = size_fleet(engine, few, JOB, 0.99)
    assert [row["engines"] for row in results] == [1, 2]
    assert results[0]["slo_attainment"] == 1.0 and results[0]["unfinished"] == 0
    assert results[1]["finetune_tokens_per_s"] > 1.8 * results[0]["finetune_tokens_per_s"]
    flood = [Arrival(0.0, 3000, 100)] * 200
    assert len(size_fleet(engine, flood, None, 0.99)) > 2


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 13])
def test_the_fewest_engines_are_found(monkeypatch, needed):
    tried = []

    def simulated(planned, arrivals, engines, job):
        tried.append(engines)
        return {"engines": engines, "slo_attainment": float(engines >= needed)}

    monkeypatch.setattr(loads, "simulate_load", simulated)
    results = size_fleet(as_measured("attention"), [], None, 0.99)
    met = [row["engines"] for row in results if row["slo_attainment"]]
    assert met == [needed, needed + 1]
    assert len(tried) == len(set(tried)) <= 8


def test_what_never_fits_is_left_out_and_told(monkeypatch):
    monkeypatch.setattr(make, "advise", lambda *_: [])  # it is tried elsewhere, and takes seconds
    config = configuration("llama3.1-8b")
    arrivals = [Arrival(0.0, 100, 10), Arrival(0.1, 8000, 1000), Arrival(0.2, 100, 10)]
    engine = plan_engine(config, "h100")
    assert split_arrivals(engine, arrivals) == ([arrivals[0], arrivals[2]], 1)
    plan = make_plan("mine", config, "h100", arrivals, job=JOB, target=0.99)
    told = plan.as_dict()
    assert (told["requests"], told["refused"], told["devices_needed"]) == (3, 1, 1)


def test_requests_come_from_a_trace_a_rate_or_the_configuration(tmp_path):
    config = configuration("llama3.1-8b")
    assert 4 < len(choose_requests(config, None, None)) / 300 < 6
    assert 18 < len(choose_requests(config, None, 20.0)) / 300 < 22
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{i},10,5\n" for i in range(101))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    assert choose_requests(config, trace, None)[-1] == Arrival(100.0, 10, 5)
    assert len(choose_requests(config, trace, 3.0)) == pytest.approx(300, abs=3)
    limited = configuration("llama3.1-8b", "workload.max_requests=7")
    assert len(choose_requests(limited, trace, None)) == 7
    quiet = config.model_copy(update={"workload": None})
    assert choose_requests(quiet, None, None) == []
    assert 1 < len(choose_requests(quiet, None, 2.0)) / 300 < 3
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n1,10,5\n1,10,5\n")
    with pytest.raises(ConfigError, match="have no rate"):
        choose_requests(config, trace, 3.0)


# -- changes ---------------------------------------------------------------------------------------


def test_a_budget_is_what_the_engine_may_use():
    config = configuration("llama3.1-8b", "cache.budget_gb=40")
    engine = plan_engine(config, "h200")
    assert engine.available == 40 * 10**9 and engine.fits
    small = plan_engine(configuration("llama3.1-8b", "cache.budget_gb=17"), "h200")
    assert not small.fits and small.num_pages == 0


def test_what_does_not_fit_is_told_with_what_helps(monkeypatch):
    monkeypatch.setattr(make, "advise", lambda *_: [])
    config = configuration("llama3.1-8b", "cache.budget_gb=17")
    plan = make_plan("mine", config, "h200", [Arrival(0.0, 100, 10)], job=JOB, target=0.99)
    other = plan_engine(configuration("llama3.1-8b", "parallel.tp=2"), "h200")
    plan = replace(plan, advice=[Advice({"parallel.tp": 2}, other, 20_000.0)])
    console = Console(record=True, width=110, file=io.StringIO())
    print_plan(plan, console)
    told = console.export_text()
    assert "mine on NVIDIA H200: does not fit" in told and "predicted speed" not in told
    assert re.search(r"--set parallel.tp=2 +│ +2 │ [\d,]+ │ +20,000", told)


def test_few_pages_are_no_fit():
    """The engine would start, and could run neither a longest request nor a full microbatch."""
    engine = plan_engine(configuration("llama3.1-8b", "cache.num_pages=100"), "h200")
    assert engine.problem is not None and "room for 100 KV pages" in engine.problem
    assert {"cache.num_pages": None} in list(changes(engine))


def test_devices_share_what_they_hold():
    one, two = (
        plan_engine(configuration("llama3.1-8b", f"parallel.tp={tp}"), "h100") for tp in (1, 2)
    )
    assert two.parts["weights"] == pytest.approx(one.parts["weights"] / 2, rel=1e-3)
    assert two.page_bytes == one.page_bytes / 2
    assert tree_bytes(two.sizes.parameters) == two.parts["weights"]
