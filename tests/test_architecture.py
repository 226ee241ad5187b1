"""Imports point one way: the floors below are in order, and a module imports from its own floor or
from a lower one.

So the scheduler can be read, tested and simulated without JAX, the kernels be used elsewhere, the
decoder knows no adapter, and a job knows no engine.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"flexllm_jax", "kernels_pallas", "scheduler", "scripts", "tests"}

# From the top to the bottom. Rooms on one floor do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("scripts",),
    ("flexllm_jax.experiments",),
    ("flexllm_jax.launch",),
    ("flexllm_jax.llm", "flexllm_jax.server"),
    ("flexllm_jax.engine",),
    ("flexllm_jax.finetune",),
    ("flexllm_jax.compile",),
    ("flexllm_jax.peft",),
    ("flexllm_jax.models",),
    ("flexllm_jax.trackers", "flexllm_jax.graders"),
    ("flexllm_jax.config",),
    ("flexllm_jax.errors", "flexllm_jax.version"),
    ("scheduler", "kernels_pallas"),
)
# Inside the server.
SERVER = "flexllm_jax.server"
SERVER_FLOORS: tuple[tuple[str, ...], ...] = (
    (f"{SERVER}.ray_serve",),
    (f"{SERVER}.run",),
    (f"{SERVER}.app",),
    (f"{SERVER}.dashboard",),
    (f"{SERVER}.tinker", f"{SERVER}.batches", f"{SERVER}.uploads"),
    (f"{SERVER}.inference", f"{SERVER}.finetuning"),
    (f"{SERVER}.database",),
    (f"{SERVER}.metrics",),
    (f"{SERVER}.request_metrics", f"{SERVER}.traces", f"{SERVER}.visible_metrics"),
    (f"{SERVER}.engines",),
    (f"{SERVER}.http",),
)
# Inside other packages of many files: the whole package stands for what is in none of its folders.
ENGINE = "flexllm_jax.engine"
MODELS = "flexllm_jax.models"
INNER_FLOORS: tuple[tuple[tuple[str, ...], ...], ...] = (
    SERVER_FLOORS,
    ((ENGINE,), (f"{ENGINE}.device",), (f"{ENGINE}.memory",), (f"{ENGINE}.sampling",)),
    ((f"{MODELS}.checkpoints",), (MODELS,), (f"{MODELS}.text",)),
    (("flexllm_jax.peft.hf",), ("flexllm_jax.peft",)),
    (("scheduler.simulation",), ("scheduler",), ("scheduler.latency", "scheduler.cache")),
)
# Where the libraries are limited too; the standard library is always allowed.
LIBRARIES = {
    "scheduler": {"numpy"},
    "kernels_pallas": {"jax", "jaxlib", "jaxtyping", "numpy"},
}
# The package's front door names what it hands out, from every floor.
_FRONT_DOOR = "flexllm_jax"


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands in the file; of `from a import b`
    it is a.b, as b may be a module. `package` is what relative imports start from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = [*(above if node.level else []), *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function, argument = node.func, node.args[0]
            name = getattr(function, "attr", getattr(function, "id", None))
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def room_of(name: str, floors: tuple[tuple[str, ...], ...]) -> tuple[int, str] | None:
    """Floor (0 is the top) and room of a dotted name: the room of the longest name it is in."""
    found = [
        (len(room), level, room)
        for level, rooms in enumerate(floors)
        for room in rooms
        if name == room or name.startswith(f"{room}.")
    ]
    return max(found)[1:] if found else None


def violations(module: str, source: str) -> list[str]:
    """The imports that `module` (a dotted name) may not have."""
    wrong = []
    top = module.split(".")[0]
    for line, name in imported(source, module.rpartition(".")[0]):
        library = name.split(".")[0]
        if library not in OURS:
            if (
                top in LIBRARIES
                and library not in LIBRARIES[top]
                and library not in sys.stdlib_module_names
            ):
                wrong.append(f"line {line} imports {name}")
        elif any(_up(module, name, floors) for floors in (FLOORS, *INNER_FLOORS)):
            wrong.append(f"line {line} imports {name}")
    return wrong


def _up(module: str, name: str, floors: tuple[tuple[str, ...], ...]) -> bool:
    here, there = room_of(module, floors), room_of(name, floors)
    if floors is not FLOORS:
        if here is None or there is None:
            return False
    elif there is None:
        return name.split(".")[0] == "tests" or module.split(".")[0] != "scripts"
    assert here is not None, f"{module} is on no floor: add it to FLOORS"
    assert there is not None
    return there[1] != here[1] and there[0] <= here[0]


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


@pytest.mark.parametrize("package", ["scripts", "flexllm_jax", "scheduler", "kernels_pallas"])
def test_imports_point_one_way(package):
    modules = [(name, path) for name, path in _modules(package) if name != _FRONT_DOOR]
    assert modules, f"{package}/ has no Python files"
    wrong = [
        f"{path.relative_to(ROOT)}: {violation}"
        for name, path in modules
        for violation in violations(name, path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_exists():
    """One that was moved or renamed would be checked no more."""
    rooms = [room for floors in (FLOORS, *INNER_FLOORS) for floor in floors for room in floor]
    paths = [ROOT / room.replace(".", "/") for room in rooms]
    missing = [str(p) for p in paths if not p.is_dir() and not p.with_suffix(".py").is_file()]
    assert not missing


def test_a_file_holds_one_idea():
    """At least it is short enough for one. A section of the configuration is shorter."""
    most = {"flexllm_jax": 400, "flexllm_jax/config": 275, "scheduler": 400}
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for folder, limit in most.items()
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > limit
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scheduler.cache.pages", "import jax.numpy as jnp"),
        ("scheduler.cache.pages", "from flexllm_jax.config import Config"),
        ("scheduler.cache.pages", "def f():\n    import kernels_pallas"),
        ("scheduler.cache.pages", "import importlib\nimportlib.import_module('jax')"),
        ("kernels_pallas.tuning", "import flax"),
        ("kernels_pallas.tuning", "from scheduler import pages"),
        ("flexllm_jax.llm", "from tests.checkpoints import write"),
        ("flexllm_jax.llm", "import scripts.serve"),
        ("flexllm_jax.llm", "from flexllm_jax.server import app"),
        ("flexllm_jax.launch.run", "from flexllm_jax.experiments import benchmark"),
        ("flexllm_jax.finetune.job", "from flexllm_jax.engine.device.runner import Runner"),
        ("flexllm_jax.models.decoder", "from flexllm_jax.peft.bypass import Bypass"),
        ("flexllm_jax.models.decoder", "from ..peft import bypass"),
        ("flexllm_jax.config.load", "from flexllm_jax import LLM"),
        ("flexllm_jax.server.http.sse", "from flexllm_jax.server.inference.text import TextCodec"),
        ("flexllm_jax.server.inference.chat", "from flexllm_jax.server.finetuning import jobs"),
        ("flexllm_jax.server.engines.calls", "from flexllm_jax.server import metrics"),
        ("scripts.serve", "import tests"),
    ],
)
def test_an_import_the_wrong_way_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scheduler.cache.pages", "import numpy as np\nfrom scheduler.cache import snapshots"),
        (
            "kernels_pallas.tuning",
            "from jax.experimental import pallas\nfrom jaxtyping import Array",
        ),
        ("flexllm_jax.finetune.job", "import optax\nfrom scheduler.request import Slo"),
        ("flexllm_jax.config.load", "from . import tree"),
        (
            "flexllm_jax.server.inference.chat",
            "from flexllm_jax.server.metrics import ServerMetrics",
        ),
        ("scripts.serve", "from flexllm_jax import LLM\nfrom scheduler.slo import summarize"),
    ],
)
def test_the_imports_of_the_design_are_allowed(module, source):
    assert violations(module, source) == []
