"""Fields and values under their earlier names are refused, and the new name is given."""

from typing import Any

import pytest

from flexllm_jax.config import Config, ConfigError, Section, build_config, load_config
from flexllm_jax.config.explain import walk
from flexllm_jax.config.renamed import FIELDS, VALUES
from flexllm_jax.experiments.comparison.experiment import BenchmarkConfig
from flexllm_jax.experiments.simulation.config import SimulationConfig

# The smallest tree that reads, and the tree's class, by first key of a field.
ROOTS: dict[str, tuple[type[Section], dict[str, Any]]] = {
    "finetune": (Config, {"model": {"path": "m"}}),
    "engine": (SimulationConfig, {}),
    "memory": (BenchmarkConfig, {}),
}


def error_of(field: str, value: Any) -> str:
    """What is said when `field` has `value`; items of lists are called N in `field`."""
    root, tree = ROOTS[field.split(".")[0]]
    for key in reversed(field.split(".")):
        value = [value] if key == "N" else {key: value}
    with pytest.raises(ConfigError) as error:
        build_config(tree | value, "c.yaml", root)
    return str(error.value)


@pytest.mark.parametrize(("old", "new"), FIELDS.items())
def test_an_old_field_is_refused_and_the_new_one_named(old: str, new: str) -> None:
    message = error_of(old, 128)
    old, new = old.replace("N", "0"), new.replace("N", "0")
    assert f"{old}: is called {new} now; rename it" in message and "\n" not in message


@pytest.mark.parametrize("new", FIELDS.values())
def test_the_new_field_exists(new: str) -> None:
    root, _ = ROOTS[new.split(".")[0]]
    assert new in dict(walk(root))


@pytest.mark.parametrize(
    ("field", "old", "new"),
    [(f, old, new) for f, names in VALUES.items() for old, new in names.items()],
)
def test_an_old_value_is_refused_and_the_new_one_named(field: str, old: str, new: str) -> None:
    assert f"{field}: the value {old} is called {new} now; write that" in error_of(field, old)
    root, tree = ROOTS[field.split(".")[0]]
    section, name = field.split(".")
    assert getattr(getattr(build_config(tree | {section: {name: new}}, "", root), section), name)


def test_set_and_sections_of_larger_trees_are_told_too(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\n")
    with pytest.raises(ConfigError, match=r"finetune\.window: is called finetune\.unit_tokens now"):
        load_config(path, ["finetune.window=64"])


def test_what_was_never_a_field_is_unknown() -> None:
    assert "cache.window: unknown field" in error_of_tree({"cache": {"window": 1}})
    assert "finetune.saved: got 'input'" in error_of_tree({"finetune": {"saved": "input"}})


def error_of_tree(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        build_config({"model": {"path": "m"}} | tree)
    return str(error.value)
