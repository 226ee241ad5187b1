"""The configuration: what a minimal file means, how --set reaches in, how mistakes are told."""

import dataclasses
import math
from pathlib import Path

import pytest

from flexllm_jax.config import (
    ALL_MODULES,
    Config,
    ConfigError,
    FinetuneConfig,
    PeftConfig,
    build_config,
    describe,
    load_config,
)

JOB = {"name": "mine", "dataset": "rows.jsonl", "steps": 10}
FULL = """
model: {path: models/base, dtype: float32}
cache: {page_size: 8, num_pages: 128}
adapters:
  slots: 4
  preload: [{name: math, path: adapters/math}]
finetune:
  max_tokens: 512
  unit_tokens: 64
  jobs:
    - name: mine
      dataset: rows.jsonl
      epochs: 2
      peft: {r: 8, alpha: 16.0, target_modules: [q_proj, down_proj]}
      optimizer: {lr: 1e-4, warmup: 5, schedule: cosine}
workload: {trace: trace.csv, prompts: prompts.jsonl}
output_dir: runs/x
"""


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FULL)
    return path


def error_of(tree: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


def load_error(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_job(**fields: object) -> dict:
    return {"model": {"path": "m"}, "finetune": {"jobs": [JOB | fields]}}


def test_a_model_path_is_enough() -> None:
    config = build_config({"model": {"path": "models/base"}})
    assert config.model.path == Path("models/base")
    assert config.cache.page_size == 16 and config.cache.num_pages is None
    assert config.adapters.slots == 8 and config.adapters.target_modules == ALL_MODULES
    assert config.scheduler.slo.tpot_ms == 200 and config.scheduler.slo.ttft_ms == 5000
    assert config.finetune.jobs == () and config.workload is None
    assert config.compile.cache_dir == Path.home() / ".cache/flexllm_jax"


def test_a_full_file(full: Path) -> None:
    config = load_config(full)
    job = config.finetune.jobs[0]
    assert job.optimizer.lr == 1e-4 and job.optimizer.schedule == "cosine"
    assert job.peft.target_modules == ("q_proj", "down_proj")
    assert job.max_seq_len == 512, "a row may fill a microbatch unless the job says otherwise"
    assert config.adapters.preload[0].name == "math"
    assert config.workload is not None and config.workload.trace == Path("trace.csv")


def test_set_reaches_everywhere(full: Path) -> None:
    config = load_config(
        full,
        [
            "finetune.jobs.0.optimizer.lr=3e-4",
            "finetune.jobs.0.peft.target_modules=[v_proj]",
            "finetune.jobs.0.peft.rank_pattern={layers.1.v_proj: 4}",
            "finetune.jobs.1={name: other, dataset: b.jsonl, steps: 3}",
            "scheduler.slo.tpot_ms=50",
            "cache.num_pages=null",
            "finetune.idle_step_ms=.inf",
            "output_dir=runs/a=b",
        ],
    )
    job, other = config.finetune.jobs
    assert job.optimizer.lr == 3e-4 and job.optimizer.warmup == 5, "neighbours stay"
    assert job.peft.target_modules == ("v_proj",)
    assert job.peft.rank_pattern == {"layers.1.v_proj": 4}
    assert other.name == "other" and other.steps == 3
    assert config.scheduler.slo.tpot_ms == 50 and config.cache.num_pages is None
    assert math.isinf(config.finetune.idle_step_ms)
    assert config.output_dir == Path("runs/a=b")


def test_set_completes_an_unambiguous_name(full: Path) -> None:
    config = load_config(full, ["finetune.jobs.0.lr=1e-3", "page_size=32"])
    assert config.finetune.jobs[0].optimizer.lr == 1e-3
    assert config.cache.page_size == 32


def test_set_can_build_a_job_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    config = load_config(
        path,
        [
            "model.path=m",
            "finetune.jobs.0.name=a",
            "finetune.jobs.0.dataset=d",
            "finetune.jobs.0.steps=1",
        ],
    )
    assert config.finetune.jobs[0].name == "a"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("finetune.jobs.0.seed", "must be field=value"),
        ("=3", "must be field=value"),
        ("finetune..seed=3", "must be field=value"),
        ("finetune.jobs.5.seed=3", "finetune.jobs is a list of 1"),
        ("finetune.jobs.first.seed=3", "finetune.jobs is a list of 1"),
        ("model.path.x=3", "model.path is 'models/base' and has no field 'x'"),
        ("cache.page_size=[", "not valid YAML"),
        ("cache.pagesize=8", "did you mean cache.page_size?"),
        ("finetune.rate=1", "did you mean workload.arrivals.rate?"),
    ],
)
def test_a_bad_set_is_named(full: Path, override: str, named: str) -> None:
    assert named in load_error(full, override)


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({}, ["model: required field is missing"]),
        ({"model": {}}, ["model.path: required", "Hugging Face"]),
        ({"model": {"path": "m", "dtyp": "float32"}}, ["model.dtyp: unknown", "mean model.dtype?"]),
        ({"model": {"path": "m"}, "zzz": 1}, ["zzz: unknown field", "known here: model, "]),
        ({"model": {"path": "m", "dtype": "int8"}}, ["model.dtype: got 'int8'", "'bfloat16'"]),
        ({"model": "m"}, ["model: got 'm'", "dictionary"]),
        ({"model": {"path": "m"}, "parallel": {"tp": 0}}, ["parallel.tp", "got 0"]),
        *(
            ({"model": {"path": "m"}, "parallel": parallel}, parts)
            for parallel, parts in (
                ({"process_id": 1}, ["parallel", "need num_processes of 2 or more"]),
                ({"tp": 2, "num_processes": 2}, ["num_processes=2 needs coordinator_address"]),
                (
                    {"tp": 2, "num_processes": 2, "coordinator_address": "host"},
                    ["parallel.coordinator_address: got 'host'"],
                ),
                (
                    {"tp": 3, "num_processes": 2, "coordinator_address": "host:1"},
                    ["tp=3 must be a multiple of num_processes=2"],
                ),
                (
                    {
                        "tp": 2,
                        "num_processes": 2,
                        "process_id": 2,
                        "coordinator_address": "host:1",
                    },
                    ["process_id=2 must be below num_processes=2"],
                ),
            )
        ),
        (
            {"model": {"path": "m"}, "cache": {"page_size": 0}},
            ["page_size: got 0", "greater"],
        ),
        (
            {"model": {"path": "m"}, "cache": {"page_size": 8, "snapshot_every": 100}},
            ["cache: snapshot_every=100 must be a multiple of page_size=8"],
        ),
        ({"model": {"path": "m"}, "cache": {"page_size": "8"}}, ["got '8'", "without quotes"]),
        ({"model": {"path": "m"}, "cache": {"page_size": True}}, ["cache.page_size: got True"]),
        ({"model": {"path": "m"}, "cache": {"page_size": 8.5}}, ["cache.page_size: got 8.5"]),
        ({"model": {"path": "m"}, "cache": {"memory_fraction": 1.5}}, ["got 1.5", "less than"]),
        ({"model": {"path": "m"}, "scheduler": {"slo": {"tpot_ms": math.inf}}}, ["got inf"]),
        (
            {"model": {"path": "m"}, "scheduler": {"max_sequences": 9, "max_tokens_per_step": 8}},
            ["scheduler: max_sequences is 9", "8"],
        ),
        (
            {"model": {"path": "m"}, "compile": {"token_buckets": [64, 32]}},
            ["compile.token_buckets: got [64, 32]", "increasing"],
        ),
        (
            {
                "model": {"path": "m"},
                "compile": {"token_buckets": [64, 128]},
                "scheduler": {"max_tokens_per_step": 256},
            },
            ["compile.token_buckets: the last bucket is 128", "256"],
        ),
        (
            {"model": {"path": "m"}, "compile": {"token_buckets": [8, 16]}},
            ["compile.token_buckets: the last bucket is 16", "max_sequences, which is 32"],
        ),
        (
            {"model": {"path": "m"}, "finetune": {"max_tokens": 100, "unit_tokens": 64}},
            ["finetune.unit_tokens: got 64", "divide", "100"],
        ),
        ({"model": {"path": "m"}, "finetune": {"saved": 3}}, ["finetune.saved: got 3", "list"]),
        ({"model": {"path": "m"}, "workload": {}}, ["workload: neither of trace and arrivals"]),
        (
            {"model": {"path": "m"}, "workload": {"trace": "t", "adapter": "x"}},
            ["workload.adapter: 'x'", "there are none"],
        ),
        (
            {"model": {"path": "m"}, "adapters": {"target_modules": ["q_proj", "q_proj"]}},
            ["adapters.target_modules: 'q_proj' is given twice"],
        ),
        (with_job(steps=None), ["finetune.jobs.0: neither of epochs and steps"]),
        (with_job(epochs=1), ["finetune.jobs.0: both of epochs and steps"]),
        (with_job(name="../x"), ["finetune.jobs.0.name: got '../x'"]),
        (with_job(name=3), ["finetune.jobs.0.name: got 3", "string"]),
        (with_job(max_seq_len=4096), ["job 0 has max_seq_len 4096", "1024"]),
        (
            with_job(peft={"r": 9, "init": "pissa"}),
            ["finetune.jobs.0.peft.init: pissa takes twice the rank, 18", "adapters.max_rank"],
        ),
        (with_job(peft={"init": "pisa"}), ["finetune.jobs.0.peft.init", "pisa"]),
        (
            with_job(peft={"init": "olora"}, init_adapter="folder"),
            ["finetune.jobs.0: peft.init=olora and init_adapter are given"],
        ),
        (
            with_job(peft={"init": "olora", "lora_dropout": 0.1}),
            ["finetune.jobs.0.peft: lora_dropout: 0.1 and init: olora are given"],
        ),
        (with_job(peft={"lora_dropout": 1.0}), ["finetune.jobs.0.peft.lora_dropout: got 1.0"]),
        (with_job(peft={"r": 32}), ["finetune.jobs.0.peft.r: rank 32", "adapters.max_rank"]),
        (
            with_job(peft={"type": "ia3"}),
            ["finetune.jobs.0.peft.type: ia3 is not in adapters.kinds"],
        ),
        (with_job(peft={"target_modules": ["c_attn"]}), ["peft.target_modules.0: got 'c_attn'"]),
        (with_job(peft={"rank_pattern": {"q(": 2}}), ["peft.rank_pattern: 'q(' is not a regular"]),
        (with_job(method={"type": "dpo", "beta": 0}), ["jobs.0.method.beta: got 0", "than 0"]),
        (with_job(method={"type": "ipo", "beta": -0.1}), ["method.beta: got -0.1", "than 0"]),
        (with_job(method={"type": "dpo", "beta": math.inf}), ["method.beta: got inf", "finite"]),
        (with_job(method={"type": "ppo"}), ["method.type: got 'ppo'", "'dpo', 'ipo', 'simpo'"]),
        (with_job(method={"beta": 0.1}), ["jobs.0.method.type: required field is missing"]),
        (with_job(method={"type": "dpo", "gamma": 1.0}), ["method.gamma: unknown", "type, beta"]),
        (
            with_job(method={"type": "simpo"}, train_on="all"),
            ["finetune.jobs.0: train_on: all is not for method simpo"],
        ),
        (
            with_job(optimizer={"lr": -1}),
            ["jobs.0.optimizer.lr: got -1", "greater than 0"],
        ),
        (with_job(optimizer={"beta1": 1.0}), ["optimizer.beta1: got 1.0", "less than 1"]),
        (
            with_job() | {"adapters": {"target_modules": ["q_proj"]}},
            ["finetune.jobs.0.peft.target_modules: k_proj is not in adapters.target_modules"],
        ),
        (
            with_job() | {"adapters": {"preload": [{"name": "mine", "path": "p"}]}},
            ["finetune.jobs.0.name: 'mine' is also a preloaded adapter"],
        ),
        (with_job() | {"adapters": {"slots": 1}}, ["adapters.slots: got 1", "set it to 2 or more"]),
        (
            with_job(method={"type": "reinforcement", "steps_ahead": 1})
            | {"adapters": {"slots": 3}},
            ["adapters.slots: got 3", "set it to 4 or more"],
        ),
        (
            {"model": {"path": "m"}, "finetune": {"jobs": [JOB, JOB]}},
            ["finetune.jobs: name: 'mine' is given twice"],
        ),
    ],
)
def test_each_mistake_is_one_line(tree: dict, parts: list[str]) -> None:
    message = error_of(tree)
    for part in parts:
        assert part in message


def test_bad_files(tmp_path: Path) -> None:
    assert "no such file" in load_error(tmp_path / "none.yaml")
    assert "cannot be read" in load_error(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: [}\n")
    assert f"{path}:1:16: not valid YAML" in load_error(path)
    path.write_text("model: {path: m}\ncache: {}\nmodel: {path: n}\n")
    assert f"{path}:3:1: not valid YAML: 'model' is given twice" in load_error(path)
    path.write_text("- a\n- b\n")
    assert "not a list" in load_error(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in load_error(path)


def test_words_stay_words(tmp_path: Path) -> None:
    """YAML 1.1 would make these a boolean and a date."""
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: no}\noutput_dir: 2024-01-01\n")
    config = load_config(path)
    assert config.model.path == Path("no") and config.output_dir == Path("2024-01-01")


def test_inputs_that_do_not_exist_are_named(full: Path, tmp_path: Path) -> None:
    config = load_config(full, [f"model.path={tmp_path}", f"adapters.preload.0.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"jobs\.0\.dataset: rows\.jsonl does not exist"):
        config.require_inputs()


def test_a_peft_config_is_made_from_a_dataclass() -> None:
    """`FinetuneConfig(peft=LoraConfig(...))` of the Python API: LoraConfig is a dataclass."""

    @dataclasses.dataclass(frozen=True)
    class LoraLike:
        r: int = 4
        alpha: float = 8.0
        target_modules: tuple[str, ...] = ("down_proj",)

    job = FinetuneConfig.model_validate(JOB | {"peft": LoraLike()})
    assert job.peft == PeftConfig(r=4, alpha=8.0, target_modules=("down_proj",))


def test_all_linear_is_all_seven_modules() -> None:
    assert PeftConfig.model_validate({"target_modules": "all-linear"}).target_modules == ALL_MODULES


def test_describe_tells_every_field() -> None:
    text = describe()
    for name in ("model.path (required)", "finetune.jobs.N.optimizer.lr (default 0.0002)"):
        assert name in text
    assert "cache.num_pages (default null)" in text and "workload.arrivals.rate (required)" in text


def test_a_config_survives_a_round_trip(full: Path) -> None:
    config = load_config(full)
    assert Config.model_validate(config.model_dump(mode="json")) == config
