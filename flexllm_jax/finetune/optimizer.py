"""Optimizers of one job's adapter, as programs that update the bank's slot in place.

The job's float32 master weights and optimizer state live on the device in the bank's padded shapes,
all layers of a stack in one array (`peft.stacks`), so that the program has few launches and few
arguments; the bank holds their copy in the model's dtype. Padding (a rank below the bank's, a
module or layer without an adapter) stays zero: both of its factors are zero, so its gradients are,
and AdamW leaves zeros alone. Hyperparameters are inputs of the program, so one program serves every
job.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from optax.contrib import MuonDimensionNumbers, MuonState

from flexllm_jax.config import OptimizerConfig
from flexllm_jax.peft.bank import set_row

# What `optimizer_step` takes as its float32 vector of hyperparameters, in this order.
# b_lr_ratio: learning rate of LoRA's B over that of all else (LoRA+, arXiv 2402.12354).
# scale: what the gradient, a sum, is multiplied with; 0 where there is none.
HYPERPARAMETERS = (
    *("learning_rate", "b1", "b2", "momentum", "eps", "weight_decay"),
    *("b_lr_ratio", "max_norm", "scale"),
)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0), as transformers' schedulers give it.

    It rises linearly over `warmup` steps, then stays, or falls to 0 at `total_steps` linearly or as
    half a cosine. Plain floats: the host asks for it between two steps, and must not start a device
    program for it.
    """
    if step < config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, total_steps - config.warmup)
    factors = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
    }
    return config.lr * factors[config.schedule]


def hyperparameters(
    config: OptimizerConfig, step: int, total_steps: int, divisor: float
) -> Float[np.ndarray, " 9"]:
    """The values of HYPERPARAMETERS for one optimizer step, whose gradient is divided by
    `divisor`."""
    values = {
        "learning_rate": learning_rate(config, step, total_steps),
        "b1": config.beta1,
        "b2": config.beta2,
        "momentum": config.momentum,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "b_lr_ratio": config.b_lr_ratio,
        "max_norm": math.inf if config.clip is None else config.clip,
        "scale": 1 / divisor,
    }
    return np.array([values[name] for name in HYPERPARAMETERS], np.float32)


def without_gradient(values: Float[np.ndarray, " 9"]) -> Float[np.ndarray, " 9"]:
    """The same hyperparameters for a step that no microbatch came before."""
    return np.where(np.array(HYPERPARAMETERS) == "scale", np.float32(0), values)


class Reduction(Protocol):
    """How gradients and norms are completed when weights are split over devices."""

    def sum_gradients(self, gradients: list) -> list:
        """Gradients whose summands lie on several devices, summed."""
        ...

    def norm(self, weights: Any) -> jax.Array:
        """Norm of all weights (or gradients) together."""
        ...


_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of optax
_MUON_RMS = 0.2  # of Muon's updates: about AdamW's, so that one learning rate suits both
_FACTORS = {"a": MuonDimensionNumbers(-2, -1), "b": MuonDimensionNumbers(-2, -1)}


def _adamw(named: dict[str, Any]) -> optax.GradientTransformation:
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay")
    return optax.chain(optax.identity(), optax.adamw(**{name: named[name] for name in names}))


def _muon(named: dict[str, Any]) -> optax.GradientTransformation:
    """optax's Muon of each factor of LoRA in each layer, with updates of one root mean square
    whatever the shape (arXiv 2502.16982); sites of other kinds have no gradients in such a job."""

    def dimensions(stacks: Any) -> Any:
        return [
            {
                site: _FACTORS if own.keys() == _FACTORS.keys() else dict.fromkeys(own)
                for site, own in stack.items()
            }
            for stack in stacks
        ]

    muon = optax.contrib.muon(
        named["learning_rate"],
        beta=named["momentum"],
        eps=named["eps"],
        weight_decay=named["weight_decay"],
        consistent_rms=_MUON_RMS,
        muon_weight_dimension_numbers=dimensions,
    )

    # optax keeps the coefficients of its iteration in the state: here that begins as zeros.
    def with_coefficients(state: Any, value: Any) -> Any:
        return jax.tree.map(
            lambda s: s._replace(ns_coeffs=value) if isinstance(s, MuonState) else s,
            state,
            is_leaf=lambda s: isinstance(s, MuonState),
        )

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        whole = with_coefficients(state, jnp.array(_NEWTON_SCHULZ))
        with jax.default_matmul_precision("highest"):  # GPUs would round to TF32
            updates, whole = muon.update(updates, whole, params)
        return updates, with_coefficients(whole, ())

    return optax.GradientTransformation(
        lambda params: with_coefficients(muon.init(params), ()), update
    )


# By `optimizer.type`: what makes updates of gradients, with hyperparameters by name. Clipping comes
# before, as its norm may have to be summed over devices. The state is zeros at its start.
OPTIMIZERS: dict[str, Callable[[dict[str, Any]], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
}


def optimizer_program(name: str, optimizer: str) -> str:
    """The name of an optimizer's own program (or part of its state)."""
    return name if optimizer == "adamw" else f"{name}/{optimizer}"


def job_state_shapes(master: list, optimizer: str = "adamw") -> dict:
    """Shapes of a job's state on the device, all zeros at its start but the master weights.

    {"master": the adapter's float32 weights, "optimizer": the optimizer's state, "gradients":
    float32 sums over the microbatches since the last step}.
    """
    transformation = OPTIMIZERS[optimizer](dict.fromkeys(HYPERPARAMETERS, 0.0))
    return {
        "master": master,
        "optimizer": jax.eval_shape(transformation.init, master),
        "gradients": master,
    }


def checkpointed(state: dict) -> dict:
    """The parts of a job's state, or of its shapes, that a checkpoint keeps."""
    return {name: state[name] for name in ("master", "optimizer")}


def commit(gradients: list, totals: list, first: Bool[Array, ""], trained_ranks: list) -> list:
    """Add a finished microbatch's gradients, of what is trained, to those of its job's state
    (donated); those of the `first` since the last step take the place of what that left."""
    # Not in `optimizer_step`: there, fused with the norm, it would take XLA twice as long.
    return jax.tree.map(
        lambda total, own: jnp.where(first, 0.0, total) + own,
        totals,
        _trained(gradients, trained_ranks),
    )


def optimizer_step(
    optimizer: str,
    reduction: Reduction | None,
    weights: list,
    state: dict,
    bank_row: Int[Array, ""],
    trained_ranks: list,
    values: Float[Array, " 9"],
) -> tuple[list, dict, dict]:
    """One update of one job from its accumulated gradient times a scale.

    Args:
        optimizer: one of OPTIMIZERS, static.
        reduction: of weights that are split over devices, static.
        weights: the bank, per stack: module -> {"a": [L, A, ...], "b": [L, A, ...]}; donated.
        state: the job's (`job_state_shapes`); donated.
        bank_row: the job's row of the bank.
        trained_ranks: what of the job's LoRA is trained (`bank.trained_ranks`).
        values: HYPERPARAMETERS; with a scale of 0 a step without a gradient, in which the
            momentum still moves the weights.

    Returns:
        The bank, the state, and the step's metrics, float32 scalars: gradient norm before clipping,
        and the updated weights' norm. When one of them is not finite, weights and optimizer state
        stay as they were; the caller sees it in the metrics and stops the job.
    """
    norm_of = reduction.norm if reduction else optax.global_norm
    gradients, (b_lr_ratio, max_norm, scale) = state["gradients"], values[-3:]
    if reduction:
        gradients = reduction.sum_gradients(gradients)
    scaled = jax.tree.map(lambda g: jnp.where(scale == 0, 0.0, g * scale), gradients)
    norm = norm_of(scaled)
    clipped = jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm), scaled)
    named = dict(zip(HYPERPARAMETERS, values, strict=True))
    updates, new = OPTIMIZERS[optimizer](named).update(clipped, state["optimizer"], state["master"])
    updated: dict[str, Any] = {
        "master": optax.apply_updates(
            state["master"], _trained(updates, trained_ranks, b_lr_ratio)
        ),
        "optimizer": new,
    }
    weight_norm = norm_of(updated["master"])
    sound = jnp.isfinite(norm) & jnp.isfinite(weight_norm)
    kept = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old),
        updated,
        {name: state[name] for name in updated},
    )
    weights = set_row(weights, bank_row, kept["master"])
    return weights, state | kept, {"gradient_norm": norm, "weight_norm": weight_norm}


def _trained(stacks: Any, ranks: list, b_lr_ratio: Any = 1.0) -> list:
    """Gradients or updates by stack, 0 for the part of a LoRA's rank that stays as it is; B's times
    a ratio, as updates are proportional to the learning rate, with the decay of weights."""

    def of_site(own: dict, ranks: Int[Array, " L"]) -> dict:
        if own.keys() != {"a", "b"}:
            return own
        trained = jnp.arange(own["a"].shape[2]) < ranks[:, None]
        return {
            "a": jnp.where(trained[:, None], own["a"], 0.0),
            "b": jnp.where(trained[:, :, None], own["b"] * b_lr_ratio, 0.0),
        }

    return [
        {site: of_site(own, in_layers[:, j]) for j, (site, own) in enumerate(sorted(stack.items()))}
        for stack, in_layers in zip(stacks, ranks, strict=True)
    ]
