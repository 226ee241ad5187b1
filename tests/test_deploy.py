"""What lies in deploy/ agrees with the server: metrics that exist, paths, and times that fit."""

import json
import re
from pathlib import Path

import yaml

from flexllm_jax.config import build_config
from flexllm_jax.server.metrics import ServerMetrics
from tests.server.running import make_config

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


def test_grafana_asks_for_metrics_that_exist():
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    config = build_config(make_config(Path("model"), Path("out")), "test")
    exist = set()
    for metric in ServerMetrics(config, "tiny").registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
        exist |= {metric.name + suffix for suffix in suffixes.get(metric.type, [""])}
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"(?:vllm|flexllm):\w+", text)}
    assert len(asked) > 20
    assert asked <= exist, asked - exist


def test_the_pod_has_time_to_drain_and_its_configuration_is_valid():
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    kinds = {document["kind"]: document for document in documents}
    tree = yaml.safe_load(kinds["ConfigMap"]["data"]["serve.yaml"])
    config = build_config(tree, "kubernetes.yaml")
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > config.server.grace_s
    (container,) = pod["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["ports"][0]["containerPort"] == config.server.port
