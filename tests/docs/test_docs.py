"""What the README and the docs name exists: links, files, fields, make targets. Needs no Sphinx.

A rename that forgets the docs fails here.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flexllm_jax.config import Config, FinetuneConfig, Section
from flexllm_jax.config.load import describe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for folder in (ROOT, ROOT / "docs", ROOT / "scripts", ROOT / ".github")
    for path in folder.rglob("*.md")
    if folder != ROOT or path.parent == ROOT
    if not {"_build", "_generated"} & set(path.relative_to(ROOT).parts)
)
README = ROOT / "README.md"
# Their headings come from the build.
MADE = {ROOT / "docs/configuration.md", ROOT / "docs/http_api.md"}
# A path of the repository: in backticks, in a command, or in a sentence.
_PATH = re.compile(
    r"(?<![\w./-])((?:scripts|configs|flexllm_jax|scheduler|kernels_pallas|tests|docs|deploy)"
    r"/[\w./-]*\w/?)"
)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_SOURCE = re.compile(r'(?:srcset|src)="([^"]+)"|^```\{image\} (\S+)', re.M)
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
_FIELD = re.compile(r"`([a-z_]+(?:\.(?:[a-z_]+|\d+|NAME))+)(?:: [^`]*)?`|--set '?([\w.]+)=")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def fields() -> frozenset[str]:
    """Every field and section of the configuration, by its dotted name."""
    leaves = re.findall(r"^  (\S+) \(", describe(Config), re.M)
    names = {re.sub(r"\.N(?=\.|$)", ".0", leaf) for leaf in leaves}
    return frozenset(
        ".".join(name.split(".")[: depth + 1])
        for name in names
        for depth in range(name.count(".") + 1)
    )


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = _FENCE.sub("", prose(page))
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_short():
    assert len(prose(README).splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    broken = []
    for target in [*_LINK.findall(prose(page)), *map("".join, _SOURCE.findall(prose(page)))]:
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if file.is_relative_to(ROOT / "docs/_generated"):
            continue
        known = not anchor or file.suffix != ".md" or file in MADE
        if not file.exists() or not (known or anchor in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_exist(page):
    named = {path.rstrip("/") for path in _PATH.findall(prose(page))}
    missing = [p for p in named if not (ROOT / p).exists() and not is_example(p)]
    assert not missing


def is_example(path: str) -> bool:
    """A name to be filled in, such as configs/benchmarks/NAME.yaml, or what the build makes."""
    return (
        any(part.isupper() for part in re.split(r"[/.]", path) if len(part) > 2)
        or path.startswith(("docs/_build", "docs/_generated"))
        or path.endswith("test_")  # of a pattern, test_….py
    )


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_fields_of_the_configuration_exist(page):
    """`finetune.max_tokens` in a page, and `--set server.port=…` in its commands. Fields of
    experiments are of other trees, whose sections have other names."""
    sections = {name for name, field in Config.model_fields.items()}
    unknown = []
    for shown, given in _FIELD.findall(prose(page)):
        name = shown or given
        top = name.split(".")[0]
        plain = re.sub(r"\.\d+(?=\.|$)", ".0", name)
        is_file = (ROOT / f"{top}.py").exists() or name.endswith((".py", ".json", ".yaml", ".md"))
        if top not in sections or is_file or is_module(name):
            continue
        if plain not in fields() and name not in shorthands():
            unknown.append(name)
    assert not unknown


def is_module(name: str) -> bool:
    """Whether it names Python instead: scheduler.policies."""
    return any((ROOT / Path(*name.split("."))).with_suffix(s).exists() for s in ("", ".py"))


def shorthands() -> set[str]:
    """Fields that `--set` finds below the section that is given."""
    below = (f.annotation for f in FinetuneConfig.model_fields.values())
    sections = (s for s in below if isinstance(s, type) and issubclass(s, Section))
    return {f"finetune.jobs.0.{name}" for section in sections for name in section.model_fields}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", prose(ROOT / "Makefile"), re.M)
    code = [block for _, _, block in _FENCE.findall(prose(page))]
    code += re.findall(r"`([^`\n]+)`", prose(page))
    named = {name for text in code for name in re.findall(r"^ *make ([\w-]+)", text, re.M)}
    assert named <= set(targets)


@cache
def words() -> frozenset[str]:
    """Every word of the Python code."""
    packages = ("flexllm_jax", "kernels_pallas", "scheduler", "scripts", "tests")
    files = (path for package in packages for path in (ROOT / package).rglob("*.py"))
    return frozenset(word for path in files for word in re.findall(r"\w+", prose(path)))


@pytest.mark.parametrize("page", sorted((ROOT / "docs/add").glob("*.md")), ids=ids)
def test_names_of_the_code_exist(page):
    """The checklists name functions and tables: `BankShape.sites`, `FAMILIES`."""
    named = re.findall(r"`(?:\w+\.)?(\w+)`", prose(page))
    assert {name for name in named if name not in words()} <= {"KIND"}


def python_blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for _, language, block in _FENCE.findall(prose(page)):
            if language == "python":
                yield ids(page), block


def test_python_parses():
    blocks = list(python_blocks())
    assert {name for name, _ in blocks} >= {"README.md", "docs/serve.md"}
    for name, block in blocks:
        ast.parse(block, filename=name)


def test_both_pictures_are_the_same_drawing():
    """They differ in their colours alone."""
    light, dark = (
        re.sub(r"#[0-9a-f]{6}", "", prose(ROOT / f"docs/_static/step_{name}.svg"))
        for name in ("light", "dark")
    )
    assert light == dark


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^[\w/]+$", prose(ROOT / "docs/index.md"), re.M))
    pages = {p for p in PAGES if p.is_relative_to(ROOT / "docs")}
    names = {str(p.relative_to(ROOT / "docs").with_suffix("")) for p in pages}
    assert names - {"index"} <= listed
