"""Imports point one way: scripts -> flexllm_jax -> scheduler and kernels_pallas.

The scheduler can then be read, tested and simulated without JAX, and the kernels be used elsewhere.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"flexllm_jax", "kernels_pallas", "scheduler", "scripts", "tests"}

# What of our own a package may import besides itself.
MAY_IMPORT = {
    "scheduler": set(),
    "kernels_pallas": set(),
    "flexllm_jax": {"scheduler", "kernels_pallas"},
    "scripts": {"flexllm_jax", "scheduler", "kernels_pallas"},
}
# Where the libraries are limited too; the standard library is always allowed.
LIBRARIES = {
    "scheduler": {"numpy"},
    "kernels_pallas": {"jax", "jaxlib", "jaxtyping", "numpy"},
}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every absolute import, wherever it stands in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args:
            function, argument = node.func, node.args[0]
            name = getattr(function, "attr", getattr(function, "id", None))
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value).split(".")[0]


def violations(package: str, source: str) -> list[str]:
    """The imports that `package` may not have."""
    wrong = []
    for line, name in imported(source):
        ours = name in OURS and name not in MAY_IMPORT[package] | {package}
        library = (
            package in LIBRARIES
            and name not in OURS | LIBRARIES[package]
            and name not in sys.stdlib_module_names
        )
        if ours or library:
            wrong.append(f"line {line} imports {name}")
    return wrong


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ has no Python files"
    wrong = [
        f"{path.relative_to(ROOT)}: {violation}"
        for path in files
        for violation in violations(package, path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("scheduler", "import jax.numpy as jnp"),
        ("scheduler", "from flexllm_jax.config import Config"),
        ("scheduler", "def f():\n    import kernels_pallas"),
        ("scheduler", "import importlib\nimportlib.import_module('jax')"),
        ("kernels_pallas", "import flax"),
        ("kernels_pallas", "from scheduler import pages"),
        ("flexllm_jax", "from tests.checkpoints import write"),
        ("flexllm_jax", "import scripts.serve"),
        ("scripts", "import tests"),
    ],
)
def test_an_import_the_wrong_way_is_found(package, source):
    assert len(violations(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("scheduler", "import heapq\nimport numpy as np\nfrom scheduler.pages import PagePool"),
        ("kernels_pallas", "from jax.experimental import pallas\nfrom jaxtyping import Array"),
        ("flexllm_jax", "import optax\nfrom scheduler.request import Slo\nfrom . import config"),
    ],
)
def test_the_imports_of_the_design_are_allowed(package, source):
    assert violations(package, source) == []
