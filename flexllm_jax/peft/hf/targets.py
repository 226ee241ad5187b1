"""Which modules of the base model an adapter changes, by PEFT's rules.

`target_modules` is a regular expression that must match a module's whole path, or a list of names:
a path in full is a target whatever the other fields say, and a path's end from a dot is one in the
layers that `layers_to_transform` names. A name that matches nothing is passed over, as long as
another matches. `exclude_modules` goes before everything (PEFT's `check_target_module_exists`).
"""

import logging
from collections.abc import Mapping
from typing import Any

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.names import USUAL
from flexllm_jax.peft.adapter import TARGET_MODULES, Adapter, AdapterError, Site
from flexllm_jax.peft.patterns import Expression, Matches, match_paths

logger = logging.getLogger(__name__)

_LAYER = r"\.(?P<layer>\d+)\."  # behind the name of a list of layers


def targeted_sites(raw: Mapping[str, Any], model: ModelConfig) -> tuple[Site, ...]:
    """The projections that the fields of an adapter's configuration select.

    Raises AdapterError when there is none, or what they select is no projection.
    """
    sites = candidates(model)
    names = raw.get("target_modules")
    if isinstance(names, str) and names.lower() == "all-linear":
        names = [path for path in sites if path != "lm_head"]  # PEFT means them in full
    others = [model.names.embed]  # what else PEFT's LoRA could be put on
    paths = [*sites, *others]
    try:
        rules = _Rules(raw, names, paths)
        matched = [path for path in paths if rules.select(path)]
        ends = {end for path in paths for end in _ends(path)}
        unused = [name for name in rules.names if name not in ends]
    except (AdapterError, TypeError) as error:
        raise AdapterError(
            f"target_modules={names!r} with exclude_modules={raw.get('exclude_modules')!r} cannot "
            f"be matched with modules: {error}"
        ) from None
    unsupported = [path for path in matched if path in others]
    if unsupported or not matched:
        found = f"matches {unsupported[0]}" if unsupported else "matches no module of this model"
        raise AdapterError(
            f"target_modules={raw.get('target_modules')!r} {found}; supported are "
            f"{', '.join(n for n, m in TARGET_MODULES.items() if m in model.projections)} in "
            f"{model.num_layers} layers"
        )
    if unused:
        logger.warning(
            "target_modules: %s match no module of this model and change nothing",
            ", ".join(unused[:20]),
        )
    return tuple(sites[path] for path in matched)


def target_fields(adapter: Adapter, model: ModelConfig) -> dict[str, Any]:
    """PEFT's fields that select exactly the adapter's projections: as short as they can be, or else
    their paths in full."""
    targets = set(adapter.weights)
    layers = sorted({layer for layer, module in targets if module != "head"})
    names = [name for name, module in TARGET_MODULES.items() if module in {m for _, m in targets}]
    some = None if layers in ([], list(range(model.num_layers))) else layers
    fields = {"target_modules": names, "layers_to_transform": some}
    # In a model of more than text, other parts have modules of the same names.
    if model.names.root == USUAL.root and set(targeted_sites(fields, model)) == targets:
        return fields
    paths = [model.names.module_path(layer, module) for layer, module in sorted(targets)]
    return {"target_modules": paths, "layers_to_transform": None}


def candidates(model: ModelConfig) -> dict[str, Site]:
    """Every projection that LoRA can be put on, by its path."""
    sites = [
        (layer, module)
        for layer in range(model.num_layers + 1)
        for module in model.kernel_shapes(layer)
    ]
    return {model.names.module_path(*site): site for site in sites}


def _ends(path: str) -> list[str]:
    """The path, and its ends from a dot: the names that mean it."""
    parts = path.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


class _Rules:
    """The fields of a configuration that select modules; what they hold is not checked before."""

    def __init__(self, raw: Mapping[str, Any], names: Any, paths: list[str]):
        self._target, self._excluded = names, raw.get("exclude_modules")
        layers = raw.get("layers_to_transform")
        self._layers = None if layers is None or layers == [] else _as_set(layers)
        patterns = raw.get("layers_pattern") or []
        # PEFT's two expressions, with and without a pattern, agree on these paths.
        before = r"(?:^|.*?\.)"
        self._in_layers = [
            Expression("start", pattern, before, _LAYER)
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ] or [Expression("start", "", before + r"[^.]*", _LAYER)]
        self.names = [] if isinstance(names, str) else list(names)
        given = [spec for spec in (names, self._excluded) if isinstance(spec, str) and spec]
        whole = [Expression("whole", spec) for spec in given]
        used = [] if self._layers is None or isinstance(names, str) else self._in_layers
        self._matches: Mapping[Expression, Matches] = match_paths([*whole, *used], paths)
        self._sets = {
            key: frozenset(spec)
            for key, spec in (("target", names), ("excluded", self._excluded))
            if spec and not isinstance(spec, str)
        }

    def select(self, path: str) -> bool:
        """Whether a module is a target."""
        if self._excluded and self._means("excluded", self._excluded, path):
            return False
        if not self._means("target", self._target, path):
            return False
        if isinstance(self._target, str) or self._layers is None or path in self._sets["target"]:
            return True
        for expression in self._in_layers:
            if path in self._matches[expression]:
                return int(self._matches[expression][path]["layer"]) in self._layers
        return False

    def _means(self, key: str, spec: Any, path: str) -> bool:
        if isinstance(spec, str):
            return path in self._matches[Expression("whole", spec)] if spec else not path
        return key in self._sets and not self._sets[key].isdisjoint(_ends(path))


def _as_set(layers: Any) -> frozenset[Any]:
    return frozenset([layers] if isinstance(layers, int) else layers)
