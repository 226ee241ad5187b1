"""Least squares with nonnegative unknowns."""

from __future__ import annotations

import numpy as np


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin over x >= 0 of |matrix x - target|, by Lawson and Hanson's active sets (1974).

    Args:
        matrix: float64 [M, N].
        target: float64 [M].

    Returns:
        x, float64 [N].
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    x = np.zeros(matrix.shape[1])
    passive = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(10 * len(x)):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[passive] = -np.inf
        if gradient.max() <= 1e-10:
            break
        passive[gradient.argmax()] = True
        while passive.any():
            solution = np.zeros_like(x)
            solution[passive] = np.linalg.lstsq(matrix[:, passive], target, rcond=None)[0]
            blocked = passive & (solution <= 0)
            if not blocked.any():
                x = solution
                break
            # Go as far towards the solution as stays nonnegative; what reaches 0 is fixed there.
            steps = x[blocked] / (x[blocked] - solution[blocked] + 1e-300)
            x = x + steps.min() * (solution - x)
            passive &= x > 1e-12
            x[~passive] = 0.0
    return x / scale
