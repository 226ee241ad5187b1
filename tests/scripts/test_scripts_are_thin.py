"""A script parses arguments, calls the package and prints: it is short, has help, and stands in the
table of scripts/README.md."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.workspace import SCRIPTS

ALL = sorted(SCRIPTS.glob("*.py"))
NAMES = sorted(path.name for path in ALL)
LONGEST = 120
README = SCRIPTS / "README.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
# Families, and names that are a verb of their own; all others are a verb and its object.
FAMILIES = ("benchmark_", "fault_", "gpu_", "nightly_")
VERBS = {"benchmark", "coserve", "export", "finetune", "generate", "make", "plan", "replay"}
VERBS |= {"serve", "simulate", "tune"}
HELP = """
import contextlib, io, json, runpy, sys
told = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            told[path] = ended.code, shown.getvalue()
print(json.dumps(told))
"""


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_it_is_short_and_says_what_it_does(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST, "logic belongs into the package"
    assert lines[0].startswith('"""') and "def main(" in "\n".join(lines)


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str]]:
    """Exit status and output of every script's --help, from one process: it imports jax once."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *map(str, ALL)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_its_help_describes_it(path: Path, helps: dict[str, tuple[int, str]]) -> None:
    status, shown = helps[str(path)]
    assert status == 0 and f"usage: {path.name}" in shown
    first = re.findall(r"\w+", path.read_text(encoding="utf-8"))[0]
    assert re.search(rf"^{first} ", shown, re.MULTILINE), "the docstring's first words"


def test_every_script_is_in_the_table() -> None:
    assert sorted(row[0].strip("`") for row in ROWS) == NAMES


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_a_row_says_everything(row: list[str]) -> None:
    script, does, writes, how_long, example = row
    assert does and writes and how_long
    python, path, *_ = shlex.split(example.strip("`"))
    assert (python, path) == ("python", f"scripts/{script.strip('`')}")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_its_name_is_a_verb_or_of_a_family(path: Path) -> None:
    assert path.name.startswith(FAMILIES) or path.stem.split("_")[0] in VERBS
