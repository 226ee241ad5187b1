"""AdamW for one job's adapter, as a program that updates the bank's slot in place.

The job's float32 master weights and optimizer state live on the device in the bank's padded shapes;
the bank holds their copy in the model's dtype. Padding (a rank below the bank's, a module or layer
without an adapter) stays zero: both of its factors are zero, so its gradients are, and AdamW leaves
zeros alone. Hyperparameters are inputs of the program, so one program serves every job.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flexllm_jax.config import OptimizerConfig
from flexllm_jax.peft.bank import set_row

# What `optimizer_step` takes as its float32 vector of hyperparameters, in this order.
HYPERPARAMETERS = ("learning_rate", "b1", "b2", "eps", "weight_decay", "max_norm")
# Shapes of what is counted beside a gradient: the sum of its labels' losses, and their number.
LOSSES = dict.fromkeys(("loss_sum", "labels"), jax.ShapeDtypeStruct((), jnp.float32))


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


def hyperparameters(config: OptimizerConfig, step: int, total_steps: int) -> list[float]:
    """The values of HYPERPARAMETERS for one optimizer step."""
    return [
        learning_rate(config, step, total_steps),
        config.beta1,
        config.beta2,
        config.eps,
        config.weight_decay,
        math.inf if config.clip is None else config.clip,
    ]


class Reduction(Protocol):
    """How gradients and norms are completed when weights are split over devices."""

    def sum_gradients(self, gradients: list) -> list:
        """Gradients whose summands lie on several devices, summed."""
        ...

    def norm(self, weights: Any) -> jax.Array:
        """Norm of all weights (or gradients) together."""
        ...


def _adamw(values: Any) -> optax.GradientTransformation:
    """AdamW; clipping comes before, as its norm may have to be summed over devices."""
    keywords = dict(zip(HYPERPARAMETERS, values[:-1], strict=False))
    return optax.chain(optax.identity(), optax.adamw(**keywords))


def job_state_shapes(master: list) -> dict:
    """Shapes of a job's state on the device, all zeros at its start but the master weights.

    {"master": the adapter's float32 weights, "optimizer": AdamW's state, "losses": the
    batch's sum of losses and number of labels so far (`LOSSES`), "gradients": float32 sums over
    those labels, left from the batch before while there are none}.
    """
    adamw = _adamw([0.0] * len(HYPERPARAMETERS))
    return {
        "master": master,
        "optimizer": jax.eval_shape(adamw.init, master),
        "gradients": master,
        "losses": LOSSES,
    }


def commit(gradients: list, losses: dict, state: dict) -> dict:
    """Add a finished microbatch's gradients and `LOSSES` to its job's state (donated)."""
    has_gradient = state["losses"]["labels"] > 0
    return state | {
        "gradients": jax.tree.map(
            lambda total, own: jnp.where(has_gradient, total, 0.0) + own,
            state["gradients"],
            gradients,
        ),
        "losses": jax.tree.map(jnp.add, state["losses"], losses),
    }


def optimizer_step(
    reduction: Reduction | None,
    weights: list,
    state: dict,
    bank_row: Int[Array, ""],
    values: Float[Array, " 6"],
) -> tuple[list, dict, dict]:
    """One update of one job from its accumulated gradient, which is divided by its number of
    labels.

    Args:
        reduction: of weights that are split over devices, static.
        weights: the bank, per layer: module -> {"a": [A, ...], "b": [A, ...]}; donated.
        state: the job's (`job_state_shapes`); donated.
        bank_row: the job's row of the bank.
        values: HYPERPARAMETERS.

    Returns:
        The bank, the state with its losses cleared, and the step's metrics, float32
        scalars: mean loss, gradient norm before clipping, and the updated weights' norm. When one
        of them is not finite, weights and optimizer state stay as they were; the caller sees it in
        the metrics and stops the job.
    """
    loss_sum, labels = state["losses"]["loss_sum"], state["losses"]["labels"]
    norm_of = reduction.norm if reduction else optax.global_norm
    gradients = state["gradients"]
    if reduction:
        gradients = reduction.sum_gradients(gradients)
    mean = jax.tree.map(lambda g: g / jnp.maximum(labels, 1.0), gradients)
    norm, max_norm = norm_of(mean), values[-1]
    clipped = jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm), mean)
    updates, optimizer = _adamw(values).update(clipped, state["optimizer"], state["master"])
    updated: dict[str, Any] = {
        "master": optax.apply_updates(state["master"], updates),
        "optimizer": optimizer,
    }
    weight_norm = norm_of(updated["master"])
    sound = jnp.isfinite(loss_sum) & jnp.isfinite(norm) & jnp.isfinite(weight_norm)
    kept = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old),
        updated,
        {name: state[name] for name in updated},
    )
    weights = set_row(weights, bank_row, kept["master"])
    metrics = {
        "loss": loss_sum / jnp.maximum(labels, 1.0),
        "gradient_norm": norm,
        "weight_norm": weight_norm,
    }
    cleared = jax.tree.map(jnp.zeros_like, state["losses"])
    return weights, state | kept | {"losses": cleared}, metrics
