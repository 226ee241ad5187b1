"""simulate.py and benchmark.py from a configuration: results, errors, the experiments here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from flexllm_jax.config import ConfigError, build_config, load_config
from flexllm_jax.experiments.comparison.experiment import BenchmarkConfig
from flexllm_jax.experiments.comparison.targets import check_targets
from flexllm_jax.experiments.simulation.calibration import PaperRowsSection, predict_rows
from flexllm_jax.experiments.simulation.simulate import (
    ARRANGEMENTS,
    SimulationConfig,
    select_arrivals,
    simulate,
)
from tests.scripts.workspace import ROOT, SCRIPTS

ARRIVALS = {"process": "poisson", "rate": 2, "duration_s": 20, "prompt_tokens": 100}
TREE = {"workload": {"arrivals": ARRIVALS}, "slo": {"tpot_ms": 50}}
DATA = ROOT / "../shared"


def config(**changes) -> SimulationConfig:
    return build_config(TREE | changes, root=SimulationConfig)


def run(script, tree, tmp_path, *arguments):
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    command = [sys.executable, str(SCRIPTS / script), "--config", "c.yaml", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_simulate_writes_a_report_and_a_plot(tmp_path):
    done = run("simulate.py", TREE, tmp_path, "--set", "policy=published", "--set", "output_dir=o")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert report["inference"]["completed"] == report["inference"]["requests"] > 20
    assert report["finetune"]["finetune"]["tokens_per_s"] > 0
    assert report["simulation"]["policy"] == report["engine"]["policy"] == "published"
    assert (tmp_path / "o/report.png").stat().st_size > 10_000
    assert "published" in done.stdout and "SLO met" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fair"}, "policy: 'fair' must be one of coserving,"),
        ({"polcy": "coserving"}, "polcy: unknown field (value 'coserving'); did you mean policy?"),
        ({"workload": {"trace": "none.csv"}}, "workload.trace: none.csv: No such file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, changes, message):
    done = run("simulate.py", TREE | changes, tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("policy", [name for name in ARRANGEMENTS if name != "finetuning_only"])
def test_every_arrangement_runs(policy):
    made = simulate(config(policy=policy, fleet={"engines": 4}, leaps=True))
    inference = made.report["inference"]
    assert inference["completed"] == inference["requests"] == len(made.arrivals)
    trained = sum(job["tokens"] for job in made.report["finetune"].values())
    assert (trained > 0) == (policy != "inference_only")
    series = made.series(5.0)
    counted = sum(a.arrival_s < series["at_s"][-1] for a in made.arrivals)
    assert series["arrivals_per_s"].sum() * 5 == pytest.approx(counted) and counted > 20


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_the_rate_thins_a_trace_or_repeats_it(rate):
    arrivals = select_arrivals(config(rate=rate))
    span = arrivals[-1].arrival_s - arrivals[0].arrival_s
    assert (len(arrivals) - 1) / span == pytest.approx(rate, rel=0.1)
    with pytest.raises(ConfigError, match="no request arrives"):
        select_arrivals(config(duration_s=1e-9))


@pytest.mark.parametrize("file", sorted((ROOT / "configs/benchmarks").glob("*.yaml")))
def test_the_experiments_are_sound(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "title" not in yaml.safe_load(file.read_text()):
        load_config(file)
        return
    experiment = load_config(file, root=BenchmarkConfig)
    if experiment.simulation:
        assert len(list(experiment.simulation.cases())) >= 2
    if experiment.engine:
        assert experiment.engine.config.exists()


def test_benchmark_compares_and_judges(tmp_path):
    tree = {
        "title": "small",
        "simulation": {
            "base": TREE,
            "panels": {"one": {}},
            "systems": {"ours": {"policy": "coserving"}, "theirs": {"policy": "published"}},
            "rates": [1, 2],
            "targets": {"slo_attainment": 0.5, "finetune_over": {"theirs": 100.0}},
        },
        "output_dir": "o",
    }
    done = run("benchmark.py", tree, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o/results.json").read_text())["simulation"]
    assert [(row["system"], row["x"]) for row in rows] == [
        ("ours", 1),
        ("ours", 2),
        ("theirs", 1),
        ("theirs", 2),
    ]
    assert (tmp_path / "o/simulation.png").exists()
    assert "target 0.5: met" in done.stdout and "target 100: NOT met" in done.stdout


def test_targets_are_judged_at_the_worst_load():
    rows = [
        {"system": "a", "x": x, "slo_attainment": slo, "finetune_tokens_per_s": tokens}
        for x, slo, tokens in ((1, 1.0, 200), (2, 0.9, 100))
    ] + [{"system": "b", "x": x, "slo_attainment": 1, "finetune_tokens_per_s": 100} for x in (1, 2)]
    spec = {"slo_attainment": 0.95, "finetune_over": {"b": 0.5}, "kept": 0.6}
    targets = BenchmarkConfig.model_validate(
        {
            "title": "t",
            "simulation": {"base": {}, "panels": {}, "systems": {}, "rates": [1], "targets": spec},
        }
    ).simulation.targets
    lines = list(check_targets(targets, "a", rows, "p"))
    assert lines == [
        "p: SLO attainment of a, worst at 2/s: 0.900, target 0.95: NOT met",
        "p: finetuning over b, worst at 2/s: 1.000, target 0.5: met",
        "p: finetuning kept at 2/s: 0.500, target 0.6: NOT met",
    ]


def test_the_papers_8b_rows_are_reproduced(monkeypatch):
    """With the efficiencies that the README gives, every 8B row within 10 %."""
    monkeypatch.chdir(ROOT)
    spec = load_config(ROOT / "configs/benchmarks/paper_rows.yaml", root=BenchmarkConfig).paper_rows
    assert isinstance(spec, PaperRowsSection)
    if not spec.file.exists() or not DATA.exists():
        pytest.skip("the paper's rows are not at ../shared")
    short = spec.model_copy(update={"base": spec.base | {"duration_s": 60}})
    rows = predict_rows(short, {"compute": 0.46, "memory": 0.69, "step_s": 7.4e-3})
    for row in (row for row in rows if row["model"] == "llama-3.1-8b"):
        assert abs(row["tpot_mean_error"]) < 0.1 and abs(row["finetune_error"]) < 0.1
