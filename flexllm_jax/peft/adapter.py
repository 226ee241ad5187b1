"""An adapter on the host: its configuration and its weights; LoRA, and what merging it means.

Weights are float32 numpy arrays by (layer, site) and name. A site is where a bypass joins the base
model: for LoRA a projection, named as in the parameter tree (q, k, v, o, gate, up, down); the other
kinds (`ia3`, `bottleneck`, `prefix`) name theirs in their modules.

A projection y = x W with LoRA computes y = x W + scale * (x A) B. Ranks and scales may differ by
layer and module; they follow PEFT's rules, so an adapter means here what it means there. A [d_in,
rank] and B [rank, d_out] are in the orientation of the base kernels (PEFT stores the transposes).
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flexllm_jax.config import ALL_MODULES, FUSED_MODULES, ranks_taken
from flexllm_jax.errors import UserError
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.names import HEAD, PROJECTIONS, ROOTS, USUAL, Names


# The names that PEFT's `target_modules` knows -> those in the parameter tree.
def _target_modules() -> Iterator[tuple[str, str]]:
    """By the ends of their paths; that of a gate of attention is longer, as it has the name of the
    feed-forward network's."""
    first: dict[str, str] = {}
    for module, path in PROJECTIONS.items():
        end = path.rpartition(".")[2]
        yield (end if first.setdefault(end, module) == module else path), module
    yield HEAD, "head"


TARGET_MODULES: Mapping[str, str] = MappingProxyType(dict(_target_modules()))


def named_modules(names: Collection[str], model: ModelConfig) -> tuple[str, ...]:
    """The modules of a model that names of `TARGET_MODULES` mean, as the parameter tree calls them.
    Where some are one projection, that is meant by all of their names together, too: so the usual
    seven are all of every model. AdapterError for a name that means none."""
    whole = {name for name, parts in FUSED_MODULES.items() if set(parts) <= set(names)}
    modules = {n: m for n, m in TARGET_MODULES.items() if m in model.projections}
    own = [name for name in modules if {name, name.rpartition(".")[2]} & {*names, *whole}]
    meant = {*own, *(part for name in own for part in FUSED_MODULES.get(name, ()))}
    if unknown := [name for name in names if name not in meant]:
        raise AdapterError(
            f"target_modules={unknown!r}: this model has no such module; use one or more of "
            f"{', '.join(modules)}, or 'all-linear'"
        )
    return tuple(modules[name] for name in own)


PATH_END = r"(.*\.)?(", ")$"  # around a key of rank_pattern or alpha_pattern
MOST_RANK, MOST_ALPHA = 65_536, 1e6  # beyond them it is a mistake, or worse

Site = tuple[int, str]  # (layer, where in it)
Weights = Mapping[Site, Mapping[str, np.ndarray]]


class AdapterError(UserError):
    """An adapter or its configuration that cannot be used; one line."""


class AdapterConfig(ABC):
    """What an adapter computes with its weights; each kind of bypass has a class for it."""

    kind: ClassVar[str]

    @property
    def prefix_tokens(self) -> int:
        """Positions taken before the first token of every sequence."""
        return 0

    def scale(self, layer: int, site: str) -> float:
        """The number that goes with a site's weights."""
        return 1.0

    @abstractmethod
    def initialize(self, model: ModelConfig, seed: int) -> Weights:
        """Weights to start training from."""


@dataclass(frozen=True)
class Adapter:
    """An adapter; the keys of `weights` are the places that it changes."""

    config: AdapterConfig
    weights: Weights

    @property
    def shapes(self) -> dict[Site, dict[str, tuple[int, ...]]]:
        """Shapes of the weights."""
        return {
            site: {name: array.shape for name, array in own.items()}
            for site, own in self.weights.items()
        }

    @property
    def changes_nothing(self) -> bool:
        """Whether it is a LoRA whose B is zero: as if there were no adapter."""
        lora = self.config.kind == "lora"
        return lora and not any(own["b"].any() for own in self.weights.values())


def init_adapter(config: AdapterConfig, model: ModelConfig, seed: int) -> Adapter:
    """An adapter to start training from."""
    return Adapter(config, config.initialize(model, seed))


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """PEFT's LoRA configuration, as far as it decides what an adapter computes.

    `target_modules` is a sequence of names in TARGET_MODULES, or "all-linear" for the usual seven.
    `rank_pattern` and `alpha_pattern` map regular expressions on module paths to the rank and alpha
    used instead of `r` and `alpha`; the first that matches counts. `layers_to_transform` None: all.
    `resolved`: rank and alpha by layer and module, found out already; else the patterns are matched
    when they are needed, which takes as long as who wrote them wants. `init`: `init_lora_weights`
    of PEFT, "default" for its true; with "pissa", "pissa_niter_N" and "olora" half of the rank is a
    start that is subtracted (`principal`). `lora_dropout`: what a job trains with (`dropout`); it
    means nothing to an adapter that is served. `names`: what the model calls the modules that
    patterns match.
    """

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    init: str = "default"
    lora_dropout: float = 0.0
    resolved: Mapping[Site, tuple[int, float]] | None = field(
        default=None, compare=False, repr=False
    )
    names: Names = field(default=USUAL, compare=False, repr=False)

    kind: ClassVar[str] = "lora"

    def __post_init__(self):
        names = self.target_modules
        if isinstance(names, str):
            names = ALL_MODULES if names == "all-linear" else (names,)
        unknown = [name for name in names if name not in TARGET_MODULES]
        if unknown or not names:
            raise AdapterError(
                f"target_modules={unknown or list(names)!r}: use one or more of "
                f"{', '.join(TARGET_MODULES)}, or 'all-linear'"
            )
        ordered = tuple(name for name in TARGET_MODULES if name in names)
        object.__setattr__(self, "target_modules", ordered)
        if self.layers_to_transform is not None:
            layers = tuple(sorted(set(self.layers_to_transform)))
            object.__setattr__(self, "layers_to_transform", layers)
        ranks = {"r": self.r}
        ranks |= {f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}
        for name, value in ranks.items():
            number = isinstance(value, int) and not isinstance(value, bool)
            if not (number and 1 <= value <= MOST_RANK):
                raise AdapterError(
                    f"{name}={value!r} must be a positive integer, at most {MOST_RANK}"
                )
        alphas = {"alpha": self.alpha}
        alphas |= {f"alpha_pattern[{key!r}]": value for key, value in self.alpha_pattern.items()}
        for name, value in alphas.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and abs(value) <= MOST_ALPHA):  # which NaN is not
                raise AdapterError(f"{name}={value!r} must be a number up to {MOST_ALPHA:.0f}")
        if self.resolved is not None:
            return
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise AdapterError(
                        f"{name}[{pattern!r}] is not a regular expression: {error}"
                    ) from None

    def rank(self, layer: int, module: str) -> int:
        """Rank of one projection's adapter; `module` is its name in the parameter tree ("q")."""
        if self.resolved is not None:
            return self.resolved[layer, module][0]
        return self._first_match(self.rank_pattern, (layer, module), self.r)

    def scale(self, layer: int, site: str) -> float:
        """Factor on A @ B: alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA."""
        if self.resolved is not None:
            alpha = self.resolved[layer, site][1]
        else:
            alpha = self._first_match(self.alpha_pattern, (layer, site), self.alpha)
        rank = self.rank(layer, site)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _first_match(self, patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
        """PEFT's rule (`get_pattern_key`): the first key that matches the path's end, from a dot;
        the path is that in a model of text, or in one of more than text."""
        paths = [replace(self.names, root=names.root).module_path(*site) for names in ROOTS]
        for pattern, value in patterns.items():
            if any(re.match(pattern.join(PATH_END), path) for path in paths):
                return value
        return default

    @property
    def from_base(self) -> bool:
        """Whether it starts from the base weights, and half of its rank is that start."""
        return ranks_taken(self.init) > 1

    def difference(self) -> "LoraConfig":
        """The same of twice the rank and of the same scale, which can hold its start, too."""
        factor = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
        )

    def trained_rank(self, layer: int, module: str) -> int:
        """How much of its rank is trained."""
        return self.rank(layer, module) // (2 if self.from_base else 1)

    def targets(self, model: ModelConfig) -> tuple[tuple[int, str], ...]:
        """The (layer, module) pairs that a new adapter of this configuration has, by layer."""
        layers, num_layers = self.layers_to_transform, model.num_layers
        modules = named_modules(self.target_modules, model)
        layers = tuple(range(num_layers)) if layers is None else layers
        outside = [layer for layer in layers if not 0 <= layer < num_layers]
        if outside:
            raise AdapterError(
                f"layers_to_transform={outside!r}: the base model has layers 0 to {num_layers - 1}"
            )
        targets = tuple((i, m) for i in layers for m in modules if m in model.kernel_shapes(i))
        if "head" in modules and self.layers_to_transform is None:
            targets += ((num_layers, "head"),)
        return targets

    def initialize(self, model: ModelConfig, seed: int) -> Weights:
        """Start as PEFT does: A uniform in ±1/sqrt(d_in), or normal with deviation 1/rank
        ("gaussian"); B zero, so it changes nothing.

        (PEFT's kaiming_uniform with a=sqrt(5): bound = sqrt(6 / ((1 + 5) * d_in)).) A projection's
        A depends on the seed, layer and module only, not on which other projections are targeted.
        """
        weights = {}
        modules = list(TARGET_MODULES.values())
        for layer, module in self.targets(model):
            d_in, d_out = model.kernel_shapes(layer)[module]
            rank = self.rank(layer, module)
            random = np.random.default_rng([seed, layer, modules.index(module)])
            bound = 1 / math.sqrt(d_in)
            if self.init == "gaussian":
                a = random.normal(0, 1 / rank, (d_in, rank))
            else:
                a = random.uniform(-bound, bound, (d_in, rank))
            a = a.astype(np.float32)
            weights[layer, module] = {"a": a, "b": np.zeros((rank, d_out), np.float32)}
        return weights


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    # Highest precision: the accelerator's default for float32 products may be TF32.
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


_merge = jax.jit(_merged)
_merge_in_place = jax.jit(_merged, donate_argnums=0)


def check_mergeable(adapter: Adapter) -> None:
    """AdapterError unless the adapter can become part of the base model's kernels."""
    kind = adapter.config.kind
    if kind != "lora" or any(module == "head" for _, module in adapter.weights):
        raise AdapterError(
            f"an adapter {'of lm_head' if kind == 'lora' else f'of kind {kind}'} is no change of "
            "the layers' kernels alone: export it as an adapter instead of merging it"
        )


def merge_adapter(params: Any, adapter: Adapter, *, donate: bool = False) -> Any:
    """Return the parameter tree with `kernel + scale * A @ B`, one kernel at a time, on its device.

    The sum is float32, rounded once to the kernel's dtype. Arrays the adapter does not change are
    shared with `params`, not copied. With `donate` the memory of the others is reused too, and
    `params` must not be used again. To export a merged checkpoint while the base model stays in
    use, see `hf_peft.save_merged`: it needs no device memory.
    """
    merge = _merge_in_place if donate else _merge
    layers = [dict(layer) for layer in params["layers"]]
    check_mergeable(adapter)
    for (layer, module), weights in adapter.weights.items():
        projection = layers[layer][module]
        scale = adapter.config.scale(layer, module)
        kernel = merge(projection["kernel"], weights["a"], weights["b"], scale)
        layers[layer][module] = {**projection, "kernel": kernel}
    return {**params, "layers": layers}


def merge_kernel(adapter: Adapter, layer: int, module: str, kernel: np.ndarray) -> np.ndarray:
    """Return one projection's kernel [d_in, d_out] with the adapter merged, on the host.

    The sum is float32, rounded once to the kernel's dtype; without an adapter there, as it is.
    """
    weights = adapter.weights.get((layer, module))
    if weights is None:
        return kernel
    update = adapter.config.scale(layer, module) * (weights["a"] @ weights["b"])
    return (kernel.astype(np.float32) + update).astype(kernel.dtype)
