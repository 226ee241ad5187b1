"""Where the engine's arrays lie when the model is sharded, and its programs as SPMD programs.

Programs are written for what one device holds (`Placement.local`, the model with its share of heads
and of the feed-forward width) and run under `shard_map`, so every collective in them is one of
`models.collectives` or of the optimizer. Arrays are described whole, with their shardings. A sum
that is left to the optimizer step (pre-reduce: the gradient of a weight that each device uses on
its own part) is an array with all devices' summands, one after the other in its first dimension
after that of the layers.
"""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexllm_jax.compile.buckets import Program
from flexllm_jax.compile.mesh import Mesh, ParallelError
from flexllm_jax.compile.parallel import ROW_PARALLEL, ParallelPlan, WeightPlan, plan_parallel
from flexllm_jax.config import Config
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.spec import AttentionSpec
from flexllm_jax.peft.bank import BankShape

log = logging.getLogger(__name__)

KV, REPLICAS = "tp_kv", "tp_replicas"
ALL = (KV, REPLICAS)
GATHERED = "gathered"  # results that every device gets whole
# What of a layer is split by columns; those of keys and values are replicated where there are more
# devices than such heads.
_COLUMNS = {
    **dict.fromkeys(("q", "qkv", "attention_gate", "gate", "up", "gate_up"), ALL),
    **dict.fromkeys(("in_qkv", "in_z", "in_b", "in_a", "delta_g", "delta_b", "delta_a"), ALL),
    **dict.fromkeys(("conv", "decay"), ALL),
    **dict.fromkeys(("k", "v"), KV),
}


@dataclass(frozen=True)
class Placement:
    """The shardings of a model and its bypasses over the devices of `mesh`."""

    model: ModelConfig
    plan: ParallelPlan
    mesh: jax.sharding.Mesh | AbstractMesh

    @classmethod
    def on(cls, devices: list, model: ModelConfig, plan: ParallelPlan) -> "Placement":
        """Over the first devices. ParallelError when there are too few."""
        m = plan.mesh
        if len(devices) < m.tp:
            raise ParallelError(
                f"parallel.tp={m.tp} needs {m.tp} devices and JAX sees {len(devices)}: lower it "
                f"(on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={m.tp} makes more)"
            )
        grid = np.array(devices[: m.tp]).reshape(m.kv, m.replicas)
        return cls(model, plan, jax.sharding.Mesh(grid, ALL))

    @classmethod
    def without_devices(cls, model: ModelConfig, plan: ParallelPlan) -> "Placement":
        """Over devices that are not there: enough to know what each would hold."""
        return cls(model, plan, AbstractMesh((plan.mesh.kv, plan.mesh.replicas), ALL))

    @cached_property
    def local(self) -> ModelConfig:
        """The model as one device computes it."""
        m = self.plan.mesh
        return replace(
            self.model,
            layers=tuple(layer.shard(m.tp, m.kv) for layer in self.model.layers),
        )

    @property
    def replicated(self) -> NamedSharding:
        """The same everywhere."""
        return NamedSharding(self.mesh, P())

    @cached_property
    def gather(self) -> Callable[[jax.Array], jax.Array]:
        """Gives every device all of an array."""
        return jax.jit(lambda array: array, out_shardings=self.replicated)

    def _placed(self, array: Any, spec: P) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def parameters(self, abstract: dict) -> dict:
        """The parameters with their shardings: vocabularies by rows, projections by heads or inner
        columns, those behind mixers and activations by the rows that read these, sinks by heads."""

        def spec(path: tuple, ndim: int) -> P:
            names = [str(getattr(key, "key", "")) for key in path]
            module, kind = names[-2:]
            if module in ("embed", "head"):
                return P(ALL, None)
            split = _COLUMNS if names[0] == "layers" else {}
            if split and module in ("q_norm", "k_norm"):
                layer = self.model.layers[path[1].idx]
                whole = isinstance(layer.mixer, AttentionSpec) and layer.mixer.qk_norm != "head"
                return P(split[module[0]]) if whole else P()
            if module in split:
                return P(*[None] * (ndim - 1), split[module])
            if kind == "sinks":
                return P(ALL)
            if split and module in ROW_PARALLEL and kind == "kernel":
                return P(ALL, None)
            return P()

        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self._placed(leaf, spec(path, leaf.ndim)), abstract
        )

    def pages(self, pages: list) -> list:
        """KV pages [P, B, K, H] and recurrent states [X, Hv, dk, dv] by heads, the last inputs of
        convolutions [X, W - 1, C] by channels."""
        specs = dict.fromkeys(("k", "v"), P(None, None, KV))
        specs |= {"state": P(None, ALL), "conv": P(None, None, ALL)}
        return [
            {name: self._placed(leaf, specs[name]) for name, leaf in layer.items()}
            for layer in pages
        ]

    def own(self, arrays: Any) -> Any:
        """Arrays [S, X, ...] described as one device holds them, each with its own columns."""
        tp = self.plan.mesh.tp

        def whole(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (leaf.shape[0], tp * leaf.shape[1], *leaf.shape[2:])
            return self._placed(jax.ShapeDtypeStruct(shape, leaf.dtype), P(None, ALL))

        return jax.tree.map(whole, arrays)

    # -- bypasses ---------------------------------------------------------------------------------

    def adapters(self, weights: list, lead: int) -> list:
        """Stacks of bypass weights, with `lead` leading dimensions: of layers, and perhaps of
        rows."""
        return self._by_weight(
            weights, lambda plan, leaf: self._placed(leaf, _spec(plan, leaf.ndim, lead))
        )

    def gradients(self, master: list) -> list:
        """Gradients of such weights, those that are pre-reduce with every device's summand."""

        def summands(plan: WeightPlan, leaf: Any) -> jax.ShapeDtypeStruct:
            spec = list(_spec(plan, leaf.ndim, 1))
            if not plan.summed:
                return self._placed(leaf, P(*spec))
            over = _summed_over(plan)
            spec[1] = (*_names(spec[1]), *over)
            copies = math.prod(self.mesh.shape[name] for name in over)
            shape = (leaf.shape[0], leaf.shape[1] * copies, *leaf.shape[2:])
            return self._placed(jax.ShapeDtypeStruct(shape, leaf.dtype), P(*spec))

        return self._by_weight(master, summands)

    def job_state(self, state: dict) -> dict:
        """A job's state: the optimizer's moments lie where the weights do."""
        master = self.adapters(state["master"], lead=1)
        layout = jax.tree.structure(master)
        optimizer = jax.tree.map(
            lambda node: master if jax.tree.structure(node) == layout else node,
            state["optimizer"],
            is_leaf=lambda node: jax.tree.structure(node) == layout,
        )
        return state | {
            "master": master,
            "optimizer": optimizer,
            "gradients": self.gradients(master),
        }

    def _by_weight(self, stacks: list, place: Any) -> list:
        return [
            {
                site: {
                    name: place(self.plan.weights[site][name], leaf) for name, leaf in own.items()
                }
                for site, own in stack.items()
            }
            for stack in stacks
        ]

    # -- inside programs --------------------------------------------------------------------------

    def sum_gradients(self, gradients: list) -> list:
        """The sums of the gradients that are pre-reduce."""
        return self._by_weight(
            gradients,
            lambda plan, leaf: lax.psum(leaf, _summed_over(plan)) if plan.summed else leaf,
        )

    def norm(self, weights: Any) -> jax.Array:
        """Norm of all weights (or like arrays) together."""
        squares: dict[tuple[str, ...], Any] = {}

        def add(plan: WeightPlan, leaf: jax.Array) -> None:
            over = () if plan.dimension is None else (KV,) if plan.kv_only else ALL
            squares[over] = squares.get(over, 0.0) + jnp.sum(leaf * leaf)

        self._by_weight(weights, add)
        return jnp.sqrt(sum(lax.psum(s, over) if over else s for over, s in squares.items()))

    def distribute(self, program: Program) -> Program:
        """The program of one device as one of all."""

        def placed(leaf: Any) -> jax.ShapeDtypeStruct:
            spec = P() if leaf.sharding is None else leaf.sharding.spec
            return self._placed(leaf, spec)

        def spec(leaf: Any) -> P:
            return leaf if isinstance(leaf, P) else placed(leaf).sharding.spec

        arguments = jax.tree.map(placed, program.arguments)
        if program.results is GATHERED:
            gather = jax.jit(program.function, out_shardings=self.replicated)
            return replace(program, function=gather, arguments=arguments)
        function = jax.shard_map(
            program.function,
            mesh=self.mesh,
            in_specs=jax.tree.map(spec, arguments),
            out_specs=jax.tree.map(spec, program.results),
            check_vma=False,  # the derivatives of `models.collectives` are written out
        )
        return replace(program, function=function, arguments=arguments)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _spec(plan: WeightPlan, ndim: int, lead: int) -> P:
    """Spec of an array of `ndim` dimensions: `lead` of its own, then a weight's."""
    spec: list = [None] * ndim
    if plan.dimension is not None:
        spec[lead + plan.dimension] = KV if plan.kv_only else ALL
    return P(*spec)


def _summed_over(plan: WeightPlan) -> tuple[str, ...]:
    """The axes over which a weight is the same and its gradient pre-reduce."""
    return (REPLICAS,) if plan.kv_only else ALL


def split(
    config: Config, model: ModelConfig, bank: BankShape, tokens: int, dtype: np.dtype
) -> ParallelPlan | None:
    """How `parallel.tp` devices share the model, for steps of up to `tokens`; None for one device.
    ParallelError when they cannot."""
    if config.parallel.tp == 1:
        return None
    return plan_parallel(
        model,
        Mesh.of(model, config.parallel.tp),
        bank.all_sites(model),
        rank=bank.rank,
        bottleneck=bank.bottleneck,
        tokens=tokens,
        itemsize=dtype.itemsize,
    )


def plan_placement(
    config: Config, model: ModelConfig, bank: BankShape, tokens: int, dtype: np.dtype
) -> Placement | None:
    """`split` over the devices that JAX sees."""
    plan = split(config, model, bank, tokens, dtype)
    if plan is None:
        return None
    log.info("%s", plan.describe())
    by_process = itertools.groupby(jax.devices(), key=lambda device: device.process_index)
    each = config.parallel.tp // config.parallel.num_processes
    devices = [device for _, own in by_process for device in itertools.islice(own, each)]
    return Placement.on(devices, model, plan)
