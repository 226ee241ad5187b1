"""The remat benchmark on a small model: the arrays add up, and plans give the same gradients."""

from pathlib import Path

import jax
import pytest
from rich.console import Console

from flexllm_jax.compile.layer_graph import INPUT
from flexllm_jax.compile.remat import all_plans
from flexllm_jax.config import Config, build_config
from flexllm_jax.engine.memory.activations import layer_graph
from flexllm_jax.experiments.memory import remat, remat_speed
from tests.server.running import make_config


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    tree = make_config(llama, tmp_path_factory.mktemp("out"), adapters={"slots": 2})
    tree["model"]["max_model_len"] = 96
    tree["finetune"] = {"max_tokens": 96, "unit_tokens": 48, "saved": "attention"}
    tree["compile"]["token_buckets"] = [48]
    return build_config(tree)


def test_the_analysis_accounts_for_every_array(config: Config) -> None:
    sizes = remat.planned_sizes(config, jax.devices()[0])
    graph = layer_graph(sizes)
    rows = remat.activations(graph, ())
    assert len(rows) == len(graph.kept)
    assert sum(row["bytes"] for row in rows) == graph.bytes_of(graph.kept)
    fates = {row["fate"] for row in rows}
    assert "recomputed" in fates and "pruned" in fates
    assert any(row["flops"] > 0 for row in rows if row["fate"] == "recomputed")
    told = remat.summary(graph, ())
    assert told[0].startswith("a framework keeps: ") and told[-1].endswith(" MFLOP")


def test_plans_differ_in_memory_and_not_in_gradients(config: Config) -> None:
    sizes = remat.planned_sizes(config, jax.devices()[0])
    plans = all_plans(layer_graph(sizes))
    least_and_most = [plans[0], plans[-1]]
    rows = [remat.plan_row(plan, sizes) for plan in least_and_most]
    assert rows[0]["saved"] == [INPUT] and rows[0]["bytes"] < rows[1]["bytes"]
    assert rows[0]["recomputed_flops_per_token"] > rows[1]["recomputed_flops_per_token"]
    remat_speed.measure(config, least_and_most, 1, rows, Console(quiet=True))
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["gradient_difference"] < 1e-5
        assert row["bytes"] <= row["allocated_bytes"]
    assert remat.plan_table(rows, sizes).row_count == 2
