"""The experiments here are sound, and what they reach is judged where it is worst."""

import pytest
import yaml

from flexllm_jax.config import load_config
from flexllm_jax.experiments.comparison.experiment import BenchmarkConfig
from flexllm_jax.experiments.comparison.targets import check_targets, compare_with_simulated
from flexllm_jax.experiments.simulation.calibration import PaperRowsSection, predict_rows
from tests.scripts.workspace import ROOT

DATA = ROOT / "../shared"


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


def test_a_run_beside_its_twin_and_the_oracle():
    row = {"system": "a", "x": 2.0, "finetune_tokens_per_s": 80.0, "slo_attainment": 1.0}
    row |= {"tpot_mean_ms": 20.0, "tpot_p99_ms": None}
    other = {**row, "finetune_tokens_per_s": 100.0, "tpot_mean_ms": 21.0}
    told = compare_with_simulated(row, other, "oracle", 0.75)
    assert told == "a at 2/s: finetuning over oracle's: 0.800, target 0.75: met"
    told = compare_with_simulated(row, other, "simulator", 0.2)
    assert told.startswith("a at 2/s: simulator NOT within 20%: finetune_tokens_per_s +25.0%, ")
    assert "tpot_mean_ms +5.0%" in told and "tpot_p99_ms" not in told


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
