"""Read the configuration: a YAML file, `--set a.b=c` on top of it, one `Config` out of it.

Whatever is wrong becomes one line, a `ConfigError`, that names the field, its value and the remedy,
before anything is loaded or written. YAML follows version 1.2 where 1.1 surprises: `1e-4` is a
number and `yes` is a word. The fields themselves are in the modules beside this one, by section.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from flexllm_jax.config import renamed
from flexllm_jax.config.fields import ConfigError, Section
from flexllm_jax.config.tree import Config

Location = tuple[str | int, ...]
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
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None
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
        raise ConfigError(f"{source}: {_explain(error, root)}") from None


def describe(root: type[Section] = Config) -> str:
    """Every field, one a line, with type, default and description, for `--help` of the scripts."""
    lines = []
    for name, field in _walk(root):
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
        raise ConfigError(f"{source}{where}: not valid YAML: {_one_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {_one_line(error)}") from None


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
    section = _section_of(tuple(int(key) if key.isdecimal() else key for key in keys[:-1]), root)
    if section is None or keys[-1] in section.model_fields:
        return keys
    names = [name.split(".") for name, _ in _walk(section)]
    below = [name for name in names if name[-1] == keys[-1] and "N" not in name]
    return [*keys[:-1], *below[0]] if len(below) == 1 else keys


# --- what is wrong, in one line


def _explain(error: ValidationError, root: type[Section]) -> str:
    problems = error.errors(include_url=False)
    # An old name first: what it makes missing is not worth telling.
    old_names = [text for problem in problems if (text := _old_name(problem))]
    text = old_names[0] if old_names else _explain_one(problems[0], root)
    more = len(problems) - 1
    return _one_line(text) + (f" (and {more} more)" if more else "")


def _old_name(problem: ErrorDetails) -> str | None:
    loc, given = problem["loc"], problem.get("input")
    field = ".".join(map(str, loc))
    if problem["type"] == "extra_forbidden" and (new := renamed.new_field(loc)):
        return f"{field}: is called {new} now; rename it"
    if new := renamed.new_value(loc, given):
        return f"{field}: the value {given} is called {new} now; write that"
    return None


def _explain_one(problem: ErrorDetails, root: type[Section]) -> str:
    loc, given = problem["loc"], problem.get("input")
    field = ".".join(map(str, loc))
    if problem["type"] == "extra_forbidden":
        text = f"{field}: unknown field (value {_short(given)}); {_suggest(loc, root)}"
    elif problem["type"] == "missing":
        described = _field_at(loc, root)
        about = f" ({described.description})" if described else ""
        text = f"{field}: required field is missing; add it{about}"
    elif problem["type"] == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        text = f"{field}: {text}" if field else text
    else:
        wanted = problem["msg"].replace("Input should be", "must be").replace("Input", "it")
        wanted = wanted[0].lower() + wanted[1:]
        if isinstance(given, str) and problem["type"] in ("int_type", "float_type", "bool_type"):
            wanted += " (write it without quotes)"
        text = f"{field}: got {_short(given)}; {wanted}"
    return text


def _field_at(loc: Location, root: type[Section]) -> FieldInfo | None:
    section = _section_of(loc[:-1], root)
    return section.model_fields.get(str(loc[-1])) if section else None


def _section_of(loc: Location, root: type[Section]) -> type[Section] | None:
    section: type[Section] | None = root
    for key in loc:
        if isinstance(key, str):
            field = section.model_fields.get(key) if section else None
            section = _section_in(field.annotation) if field else None
    return section


def _suggest(loc: Location, root: type[Section]) -> str:
    key, section = str(loc[-1]), _section_of(loc[:-1], root) or root
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    if near:
        return f"did you mean {'.'.join(map(str, (*loc[:-1], near[0])))}?"
    elsewhere = [name for name, _ in _walk(root) if name.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(section.model_fields)}"


def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field with its dotted name; items of lists are called N."""
    for name, field in section.model_fields.items():
        child = _section_in(field.annotation)
        if child is None:
            yield prefix + name, field
        else:
            item = ".N" if "tuple" in str(field.annotation) else ""
            yield from _walk(child, f"{prefix}{name}{item}.")


def _section_in(annotation: Any) -> type[Section] | None:
    """The section an annotation holds: itself, or inside `tuple[...]` or `... | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation if issubclass(annotation, Section) else None
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _yaml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _kind(value: Any) -> str:
    return {list: "list", str: "text"}.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
