"""LoRA that starts from the base weights: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

PEFT takes the start, scale * A0 B0, out of the base weights. Here these are shared and frozen, so
the adapter is the difference: y = x W + scale * (x A B - x A0 B0) is LoRA of twice the rank, whose
second half, [A0, -B0], is never updated. It is what PEFT makes of such an adapter when it saves it
for other base weights (`path_initial_model_for_weight_conversion`).
"""

from collections.abc import Callable

import numpy as np

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import TARGET_MODULES, AdapterError, LoraConfig, Weights


def initialize_from_base(
    config: LoraConfig, model: ModelConfig, seed: int, kernel: Callable[[int, str], np.ndarray]
) -> Weights:
    """Weights of an adapter whose `config` is one of a difference (`LoraConfig.difference`).
    `kernel` gives the base kernels [d_in, d_out] float32."""
    modules = list(TARGET_MODULES.values())
    weights = {}
    for layer, module in config.targets(model):
        base, rank = kernel(layer, module), config.trained_rank(layer, module)
        if rank > min(base.shape):
            raise AdapterError(
                f"r={rank}: init={config.init} takes at most rank {min(base.shape)}, that of "
                f"{model.names.module_path(layer, module)}"
            )
        if config.init == "olora":
            a, b = _orthonormal(base, rank)
        else:
            random = np.random.default_rng([seed, layer, modules.index(module)])
            a, b = _principal(base, rank, config.init, config.scale(layer, module), random)
        weights[layer, module] = {
            "a": np.concatenate([a, a], axis=1, dtype=np.float32),
            "b": np.concatenate([b, -b], axis=0, dtype=np.float32),
        }
    return weights


def _orthonormal(base: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first columns of Q and rows of R, W = Q R of the stored kernel [d_out, d_in]; the first
    columns of W alone decide them."""
    q, _ = np.linalg.qr(base[:rank].T)
    return base @ q, q.T


def _principal(
    base: np.ndarray, rank: int, init: str, scale: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The largest singular values and vectors, so that scale * A B is what they make of W; exact,
    or with `pissa_niter_N` after N iterations of a subspace, as torch's svd_lowrank has it."""
    if init == "pissa":
        u, values, v = np.linalg.svd(base, full_matrices=False)
    else:
        q, _ = np.linalg.qr(base @ random.normal(size=(base.shape[1], rank)).astype(np.float32))
        for _ in range(int(init.removeprefix("pissa_niter_"))):
            q, _ = np.linalg.qr(base.T @ q)
            q, _ = np.linalg.qr(base @ q)
        u, values, v = np.linalg.svd(q.T @ base, full_matrices=False)
        u = q @ u
    root = np.sqrt(values[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * v[:rank]
