"""All that an engine allocates is planned, and what its programs need while they run is reckoned
before they are compiled."""

import gc
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.config import Config
from flexllm_jax.engine.device import runner as runner_module
from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.memory.activations import choose_saved, saved_names
from flexllm_jax.engine.memory.cache import CacheError, tree_bytes
from flexllm_jax.engine.memory.plan import fixed_parts, memory_budget, plan_memory
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.engine.memory.temporaries import reckon_temporaries
from flexllm_jax.experiments.gpu.compile import engine_sizes
from flexllm_jax.experiments.gpu.growth import RECORD
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import XLA
from tests.engines import job_config, letter_rows, random_prompts, start_engine, write_rows


def arrays_on_device() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_the_plan_is_what_is_allocated(llm):
    """Arrays by purpose, the pool, and what the compiled programs say."""
    runner = llm.engine.runner
    parts, programs = runner.memory.parts, runner.programs.values()
    assert parts["weights"] == tree_bytes(runner.params)
    assert parts["adapters"] == tree_bytes(runner.bank)
    assert parts["finetuning"] == tree_bytes((runner.finetune, runner.pending))
    assert runner.memory.pages == tree_bytes(runner.pages)
    assert parts["temporaries"] == max(p.memory_analysis().temp_size_in_bytes for p in programs)
    assert parts["jobs"] == runner.memory.jobs * tree_bytes(runner.new_job_state({}))
    assert runner.memory.total == sum(parts.values()) + runner.memory.pages
    forward = runner.programs["forward/adapters/48"].memory_analysis()
    named = sum(parts[name] for name in ("weights", "adapters", "finetuning"))
    requests = runner.sizes.request_arrays
    step = 4 * runner.sizes.step_shapes[48].size
    step += tree_bytes((requests["last_tokens"], requests["page_tables"]))
    pending = tree_bytes(runner.pending)
    # XLA counts a buffer's own size; it rounds none of them up.
    assert forward.argument_size_in_bytes == named - pending + runner.memory.pages + step
    assert f"{runner.memory.total / 2**20:,.1f} of" in runner.memory.describe()


def test_an_engine_that_is_closed_leaves_nothing_on_the_device(llama, tmp_path):
    """Neither arrays nor programs, as soon as nothing refers to it: the next has room."""
    client = jax.devices()[0].client
    before = arrays_on_device(), len(client.live_executables())
    engine = start_engine(llama, tmp_path)
    engine.generate(random_prompts([12]), SamplingParams(max_tokens=2))
    assert arrays_on_device() > before[0]
    engine.close()
    del engine
    assert arrays_on_device() == before[0]
    assert len(client.live_executables()) <= before[1] + 16  # JAX keeps those of its own jits


def test_a_job_takes_what_is_planned_for_one(llm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20))
    before = arrays_on_device()
    job = llm.finetune(job_config("planned", rows, steps=1000))
    while not job.losses:
        time.sleep(0.01)
    taken = llm._loop.call(arrays_on_device) - before
    job.cancel()
    memory = llm.engine.runner.memory
    assert memory.parts["jobs"] / memory.jobs <= taken
    assert taken <= (memory.parts["jobs"] + memory.parts["copies"]) / memory.jobs


ALL_KINDS = (
    "forward",
    "sample",
    "unit/loss",
    "unit/layer",
    "optimizer_step",
    "optimizer_step/muon",
)


@pytest.mark.parametrize(
    ("model", "kinds"), (("llama-3.1-8b", ALL_KINDS), ("qwen3.5-9b", ("forward", "unit/layer")))
)
def test_temporaries_are_reckoned_as_gpu_programs_were_compiled(model, kinds):
    """`compiled.json` has what XLA made of the programs for an H200: no more than is reckoned, and
    of those that need most not much less."""
    reckoned = reckon_temporaries(engine_sizes("h200", model, quick=True))
    assert set(reckoned) == set(ALL_KINDS)
    recorded = json.loads(RECORD.read_text())["programs"]
    for kind in kinds:
        most = reckoned[kind]
        found = [
            program["temporary bytes"]
            for name, program in recorded.items()
            if name.startswith(f"h200/engine/{model}/{kind}")
            and ("muon" in name) == ("muon" in kind)
        ]
        assert found, kind
        assert 0.6 * most <= max(found) <= most, kind


def test_temporaries_are_reckoned_as_a_cpu_compiles(llm):
    runner = llm.engine.runner
    most = max(reckon_temporaries(runner.sizes).values())
    assert runner.memory.parts["temporaries"] <= most <= 4 * runner.memory.parts["temporaries"]


def device(platform: str, statistics: dict[str, int] | None = None) -> Any:
    return SimpleNamespace(
        platform=platform, device_kind="a device", memory_stats=lambda: statistics
    )


def config_of(**fields: Any) -> Config:
    return Config.model_validate({"model": {"path": "model"}, **fields})


def test_the_memory_of_a_device_is_never_guessed():
    half = config_of(cache={"memory_fraction": 0.5})
    given = config_of(cache={"budget_gb": 10})
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_budget(half, device("cpu")) == own // 2
    assert memory_budget(half, device("gpu", {"bytes_limit": 80_000})) == 40_000
    assert memory_budget(given, device("gpu", {"bytes_limit": 80 * 10**9})) == 10**10
    assert memory_budget(given, device("gpu")) == 10**10
    for statistics in (None, {}):
        with pytest.raises(CacheError, match=r"cache.budget_gb: a device does not say how much"):
            memory_budget(half, device("gpu", statistics))
    with pytest.raises(CacheError, match=r"cache.budget_gb: 10 is more than the 8.0"):
        memory_budget(given, device("gpu", {"bytes_limit": 8 * 10**9}))


def sizes_of(config: Config, model: ModelConfig) -> EngineSizes:
    return EngineSizes.from_config(config, model, "cpu", XLA)


def test_jobs_and_temporaries_leave_fewer_pages(llama):
    model = ModelConfig.from_hf(llama)
    config = config_of(model={"path": str(llama), "max_model_len": 160})
    sizes = sizes_of(config, model)
    page = sizes.page_bytes
    budget = sum(fixed_parts(config, sizes).values()) + 10 * page
    assert plan_memory(config, sizes, budget).num_pages == 10
    more = config.model_copy(
        update={"server": config.server.model_copy(update={"max_running_jobs": 3})}
    )
    state = tree_bytes(sizes.job_state)
    kept = tree_bytes((sizes.job_state["master"], sizes.job_state["optimizer"]))
    assert plan_memory(more, sizes, budget + state + kept).num_pages == 10
    measured = fixed_parts(config, sizes)["temporaries"] + 3 * page
    assert plan_memory(config, sizes, budget, measured).num_pages == 7
    with pytest.raises(CacheError, match=r"1 KV pages .* do not fit in the 0 bytes .*weights 0\."):
        plan_memory(config, sizes, budget - 11 * page)


def test_what_is_saved_fits_beside_the_jobs(llama):
    """`auto` takes a quarter of what everything else leaves, jobs included."""
    model = ModelConfig.from_hf(llama)
    config = config_of(
        model={"path": str(llama), "max_model_len": 160},
        finetune={"saved": "auto"},
        scheduler={"max_sequences": 256},
    )
    sizes = sizes_of(config, model)
    least = sum(fixed_parts(config, sizes).values())
    few = choose_saved(config, sizes, least + 1000)
    assert len(saved_names(few)) < len(saved_names(choose_saved(config, sizes, 1e12)))


def test_a_gpu_gives_most_of_its_memory():
    """Unless its owner has said how much, by either of two names: both at once JAX refuses."""
    say = "import os, flexllm_jax; print(os.environ.get('XLA_CLIENT_MEM_FRACTION'))"
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    for own, expected in (({}, "0.92"), ({names[0]: "0.5"}, "0.5"), ({names[1]: "0.5"}, "None")):
        said = subprocess.run(
            [sys.executable, "-c", say], env=clean | own, capture_output=True, text=True, check=True
        )
        assert said.stdout.strip() == expected


def test_programs_that_need_more_than_was_reckoned_leave_fewer_pages(llama, monkeypatch):
    model = ModelConfig.from_hf(llama)
    config = config_of(
        model={"path": str(llama), "max_model_len": 160}, compile={"cache_dir": None}
    )
    asked = Runner.__new__(Runner)
    asked.sizes = sizes_of(config, model)
    parts, page = fixed_parts(config, asked.sizes), asked.sizes.page_bytes
    memory = plan_memory(config, asked.sizes, sum(parts.values()) + 10 * page)
    needed = SimpleNamespace(temp_size_in_bytes=parts["temporaries"] + 3 * page)
    program = SimpleNamespace(memory_analysis=lambda: needed)
    compiled: list[int] = []

    def list_programs(sizes: EngineSizes, num_pages: int) -> list:
        compiled.append(num_pages)
        return []

    monkeypatch.setattr(runner_module, "list_programs", list_programs)
    monkeypatch.setattr(runner_module, "compile_programs", lambda *_, **__: {"unit": program})
    measured, _ = asked._compile(config, memory, progress=False)
    assert compiled == [10, 7]
    assert (measured.num_pages, measured.total) == (7, memory.available)
