"""AdamW for one job's adapter, as a program that updates the bank's slot in place.

The job's float32 master weights and optimizer state live on the device in the bank's padded shapes,
all layers of a stack in one array (`peft.stacks`), so that the program has few launches and few
arguments; the bank holds their copy in the model's dtype. Padding (a rank below the bank's, a
module or layer without an adapter) stays zero: both of its factors are zero, so its gradients are,
and AdamW leaves zeros alone. Hyperparameters are inputs of the program, so one program serves every
job.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from flexllm_jax.config import OptimizerConfig
from flexllm_jax.peft.bank import set_row

# What `optimizer_step` takes as its float32 vector of hyperparameters, in this order.
# b_lr_ratio: learning rate of LoRA's B over that of all else (LoRA+, arXiv 2402.12354).
# scale: what the gradient, a sum, is multiplied with; 0 where there is none.
HYPERPARAMETERS = (
    *("learning_rate", "b1", "b2", "eps", "weight_decay"),
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
) -> Float[np.ndarray, " 8"]:
    """The values of HYPERPARAMETERS for one optimizer step, whose gradient is divided by
    `divisor`."""
    values = {
        "learning_rate": learning_rate(config, step, total_steps),
        "b1": config.beta1,
        "b2": config.beta2,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "b_lr_ratio": config.b_lr_ratio,
        "max_norm": math.inf if config.clip is None else config.clip,
        "scale": 1 / divisor,
    }
    return np.array([values[name] for name in HYPERPARAMETERS], np.float32)


def without_gradient(values: Float[np.ndarray, " 8"]) -> Float[np.ndarray, " 8"]:
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


_ADAMW = ("learning_rate", "b1", "b2", "eps", "weight_decay")


def _adamw(values: Any) -> optax.GradientTransformation:
    """AdamW; clipping comes before, as its norm may have to be summed over devices."""
    named = dict(zip(HYPERPARAMETERS, values, strict=True))
    return optax.chain(optax.identity(), optax.adamw(**{name: named[name] for name in _ADAMW}))


def job_state_shapes(master: list) -> dict:
    """Shapes of a job's state on the device, all zeros at its start but the master weights.

    {"master": the adapter's float32 weights, "optimizer": AdamW's state, "gradients": float32 sums
    over the microbatches since the last step}.
    """
    adamw = _adamw([0.0] * len(HYPERPARAMETERS))
    return {
        "master": master,
        "optimizer": jax.eval_shape(adamw.init, master),
        "gradients": master,
    }


def commit(gradients: list, state: dict, first: Bool[Array, ""], trained_ranks: list) -> dict:
    """Add a finished microbatch's gradients, of what is trained, to its job's state (donated);
    those of the `first` since the last step take the place of what that left."""
    # Not in `optimizer_step`: there, fused with the norm, it would take XLA twice as long.
    return state | {
        "gradients": jax.tree.map(
            lambda total, own: jnp.where(first, 0.0, total) + own,
            state["gradients"],
            _trained(gradients, trained_ranks),
        )
    }


def optimizer_step(
    reduction: Reduction | None,
    weights: list,
    state: dict,
    bank_row: Int[Array, ""],
    trained_ranks: list,
    values: Float[Array, " 8"],
) -> tuple[list, dict, dict]:
    """One update of one job from its accumulated gradient times a scale.

    Args:
        reduction: of weights that are split over devices, static.
        weights: the bank, per stack: module -> {"a": [L, A, ...], "b": [L, A, ...]}; donated.
        state: the job's (`job_state_shapes`); donated.
        bank_row: the job's row of the bank.
        trained_ranks: what of the job's LoRA is trained (`bank.trained_ranks`).
        values: HYPERPARAMETERS; with a scale of 0 a step without a gradient, in which AdamW's
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
    updates, optimizer = _adamw(values).update(clipped, state["optimizer"], state["master"])
    updated: dict[str, Any] = {
        "master": optax.apply_updates(
            state["master"], _trained(updates, trained_ranks, b_lr_ratio)
        ),
        "optimizer": optimizer,
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
    a ratio, as AdamW's updates are proportional to the learning rate, with the decay of weights."""

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
