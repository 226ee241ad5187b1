"""Which modules of the base model an adapter changes, by PEFT's rules.

`target_modules` is a regular expression that must match a module's whole path, or a list of names:
a path in full is a target whatever the other fields say, and a path's end from a dot is one in the
layers that `layers_to_transform` names. A name that matches nothing is passed over, as long as
another matches. `exclude_modules` goes before everything (PEFT's `check_target_module_exists`).
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import TARGET_MODULES, Adapter, AdapterError, Site, module_path

logger = logging.getLogger(__name__)


def targeted_sites(raw: Mapping[str, Any], model: ModelConfig) -> tuple[Site, ...]:
    """The projections that the fields of an adapter's configuration select.

    Raises AdapterError when there is none, or what they select is no projection.
    """
    candidates = _candidates(model)
    names = raw.get("target_modules")
    if isinstance(names, str) and names.lower() == "all-linear":
        names = [path for path in candidates if path != "lm_head"]  # PEFT means them in full
    others = ["model.embed_tokens"]  # what else PEFT's LoRA could be put on
    try:
        matched = [path for path in [*candidates, *others] if _is_target(raw, names, path)]
        unused = [
            name
            for name in (names if isinstance(names, list) else [])
            if not any(_names_module(name, path) for path in [*candidates, *others])
        ]
    except (re.error, TypeError) as error:
        raise AdapterError(
            f"target_modules={names!r} with exclude_modules={raw.get('exclude_modules')!r} cannot "
            f"be matched with modules: {error}"
        ) from None
    unsupported = [path for path in matched if path in others]
    if unsupported or not matched:
        found = f"matches {unsupported[0]}" if unsupported else "matches no module of this model"
        raise AdapterError(
            f"target_modules={raw.get('target_modules')!r} {found}; supported are "
            f"{', '.join(TARGET_MODULES)} in {model.num_layers} layers"
        )
    if unused:
        logger.warning(
            "target_modules: %s match no module of this model and change nothing", ", ".join(unused)
        )
    return tuple(candidates[path] for path in matched)


def target_fields(adapter: Adapter, model: ModelConfig) -> dict[str, Any]:
    """PEFT's fields that select exactly the adapter's projections: as short as they can be, or else
    their paths in full."""
    targets = set(adapter.weights)
    layers = sorted({layer for layer, module in targets if module != "head"})
    names = [name for name, module in TARGET_MODULES.items() if module in {m for _, m in targets}]
    some = None if layers in ([], list(range(model.num_layers))) else layers
    fields = {"target_modules": names, "layers_to_transform": some}
    if set(targeted_sites(fields, model)) == targets:
        return fields
    paths = [module_path(layer, module) for layer, module in sorted(targets)]
    return {"target_modules": paths, "layers_to_transform": None}


def _candidates(model: ModelConfig) -> dict[str, Site]:
    """Every projection that LoRA can be put on, by its path."""
    sites = [
        (layer, module)
        for layer in range(model.num_layers)
        for module in TARGET_MODULES.values()
        if module != "head"
    ]
    return {module_path(*site): site for site in [*sites, (model.num_layers, "head")]}


def _names_module(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _matches(spec: str | list[str], path: str) -> bool:
    if isinstance(spec, str):
        return re.fullmatch(spec, path) is not None
    return any(_names_module(name, path) for name in spec)


def _is_target(raw: Mapping[str, Any], names: Any, path: str) -> bool:
    excluded = raw.get("exclude_modules")
    if excluded and _matches(excluded, path):
        return False
    if not _matches(names, path):
        return False
    layers = raw.get("layers_to_transform")
    if isinstance(names, str) or path in names or layers is None or layers == []:
        return True
    patterns = raw.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        # PEFT's two expressions, with and without a pattern, agree on these paths.
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", path)
        if match:
            return int(match["layer"]) in ([layers] if isinstance(layers, int) else layers)
    return False
