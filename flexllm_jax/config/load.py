"""Read the configuration: a YAML file, `--set a.b=c` on top of it, one `Config` out of it.

Whatever is wrong becomes one line, a `ConfigError`, that names the field, its value and the remedy,
before anything is loaded or written. YAML follows version 1.2 where 1.1 surprises: `1e-4` is a
number and `yes` is a word. The fields themselves are in the modules beside this one, by section.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from flexllm_jax.config.explain import explain, one_line, section_of, walk
from flexllm_jax.config.fields import ConfigError, Section
from flexllm_jax.config.tree import Config

Root = TypeVar("Root", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = (), root: type[Root] = Config) -> Root:
    """Read the YAML file `path`, apply `overrides` (`a.b=c`, in order), validate as a `root`.

    Raises ConfigError: file missing or not YAML, unknown field, wrong type or range, bad --set.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give an existing YAML file to --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the file must hold `section: ...` fields, not a {_kind(tree)}")
    for override in overrides:
        _set(tree, override, root)
    return build_config(tree, str(path), root)


def build_config(tree: dict[str, Any], source: str = "config", root: type[Root] = Config) -> Root:
    """Validate a tree of plain values; `source` opens the error message."""
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, root)}") from None


def describe(root: type[Section] = Config) -> str:
    """Every field, one a line, with type, default and description, for `--help` of the scripts."""
    lines = []
    for name, field in walk(root):
        default = field.get_default(call_default_factory=True)
        given = "required" if field.is_required() else f"default {_yaml_value(default)}"
        lines.append(f"  {name} ({given})\n      {field.description}")
    return "\n".join(lines)


# --- YAML and --set


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's floats and booleans, and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"field name {key!r} is not text", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag.rsplit(":", 1)[-1] not in ("float", "bool", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {one_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from None


def _set(tree: dict[str, Any], override: str, root: type[Section]) -> None:
    """Set one `a.b.0.c=value`, making missing sections; an index one past a list's end appends."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: must be field=value, such as finetune.jobs.0.seed=1")
    keys = _full_name(keys, root)
    value = _parse_yaml(text, f"--set {override}")
    parent: Any = tree
    for depth, key in enumerate(keys):
        at = ".".join(keys[:depth])
        if isinstance(parent, list):
            if not key.isdecimal() or int(key) > len(parent):
                raise ConfigError(
                    f"--set {override}: {at} is a list of {len(parent)}; "
                    f"{key!r} must be a number from 0 to {len(parent)} (which appends)"
                )
            index: Any = int(key)
            if index == len(parent):
                parent.append(None)
        elif isinstance(parent, dict):
            index = key
        else:
            raise ConfigError(f"--set {override}: {at} is {parent!r} and has no field {key!r}")
        if depth == len(keys) - 1:
            parent[index] = value
        elif (parent[index] if isinstance(parent, list) else parent.get(index)) is None:
            parent[index] = [] if keys[depth + 1].isdecimal() else {}
        parent = parent[index]


def _full_name(keys: list[str], root: type[Section]) -> list[str]:
    """Complete a last key that is no field of its section but of just one section below it.

    `finetune.jobs.0.lr` is short for `finetune.jobs.0.optimizer.lr`.
    """
    section = section_of(tuple(int(key) if key.isdecimal() else key for key in keys[:-1]), root)
    if section is None or keys[-1] in section.model_fields:
        return keys
    names = [name.split(".") for name in dict(walk(section))]
    below = [name for name in names if name[-1] == keys[-1] and "N" not in name]
    return [*keys[:-1], *below[0]] if len(below) == 1 else keys


def _yaml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _kind(value: Any) -> str:
    return {list: "list", str: "text"}.get(type(value), type(value).__name__)
