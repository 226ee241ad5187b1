"""The losses a job can train with: each a function of log-probabilities, which also says how the
loss changes with them.

All that the backward needs of a loss is one coefficient per token, c = dL/dlogprob. With lp the
log-probability of a token's target, q its reference (of the policy that sampled it, or of the
weights that a preference job starts from), A its advantage, w its weight, r = exp(lp - q), and of a
whole sequence G = sum of w (lp - q) and W = sum of w:

    name                 loss of a token                                c
    cross_entropy        -w lp                                          -w
    importance_sampling  -k A, k = min(r, high), a constant beyond      -k A
    ppo                  -min(r A, clip(r, low, high) A)                -r A, or 0 where clipped
    cispo                -k lp A, k = clip(r, low, high), a constant    -k A
    dro                  -(lp A - beta/2 (lp - q)^2)                    -A + beta (lp - q)
    sapo                 -f(r) A, f(r) = 4/tau sigmoid(tau (r - 1)),    -f'(r) r A
                         tau = tau_pos where A > 0, else tau_neg
    gspo                 as ppo with s = exp(G/W) in the place of r     -s A, or 0 where clipped

and of a pair of a preferred (A = 1) and a rejected sequence (A = -1), counted at the preferred
one's first token:

    dpo                  -log sigmoid(z), z = beta (G+ - G-)            -sigmoid(-z) beta A w
    ipo                  (h - 1/(2 beta))^2, h = G+/W+ - G-/W-          2 (h - 1/(2 beta)) A w/W
    simpo                -log sigmoid(z), q = 0,                        -sigmoid(-z) beta A w/W
                         z = beta (G+/W+ - G-/W-) - gamma

Sources: ppo arXiv 1707.06347, cispo 2506.13585, dro 2405.19107, sapo 2511.20347, gspo 2507.18071,
dpo 2305.18290, ipo 2310.12036 (of mean log-probabilities, as TRL has it), simpo 2405.14734.

Losses are sums: what a job divides by is part of its optimizer step. All in float32. The functions
take numpy's functions or jax.numpy's, so that what the device trains and what the host reports are
one formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

Array = Any  # numpy's or JAX's


class LossTokens(NamedTuple):
    """Tokens of a microbatch as losses see them, float32 [U] each.

    logprob, reference, advantage, weight: lp, q, A, w. gap, length: G and W of the token's
    sequence; pair_gap, pair_length: those of the other sequence of its pair. first: whether it is
    the first of its sequence (bool).
    """

    logprob: Array
    reference: Array
    advantage: Array
    weight: Array
    gap: Array
    length: Array
    pair_gap: Array
    pair_length: Array
    first: Array


class LossSettings(NamedTuple):
    """What a loss may be configured by: bounds of a ratio, beta, SimPO's margin, and SAPO's
    temperatures."""

    low: float
    high: float
    beta: float
    gamma: float
    tau_pos: float
    tau_neg: float


Formula = Callable[[LossTokens, LossSettings, ModuleType], tuple[Array, Array]]


def _cross_entropy(t: LossTokens, _: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    # A weight of 0 is no loss, also where the log-probability is infinite.
    return xp.where(t.weight == 0, 0.0, -t.weight * t.logprob), -t.weight


def _importance_sampling(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    gain = _gain(xp.minimum(xp.exp(t.logprob - t.reference), s.high), t, xp)
    return -gain, -gain


def _ppo(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    return _clipped(xp.exp(t.logprob - t.reference), t, s, xp)


def _gspo(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    return _clipped(xp.exp(_mean(t.gap, t.length, xp)), t, s, xp)


def _cispo(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    gain = _gain(xp.clip(xp.exp(t.logprob - t.reference), s.low, s.high), t, xp)
    return xp.where(gain == 0, 0.0, -gain * t.logprob), -gain


def _dro(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    drift = t.logprob - t.reference
    return 0.5 * s.beta * drift**2 - t.logprob * t.advantage, s.beta * drift - t.advantage


def _sapo(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    ratio, tau = xp.exp(t.logprob - t.reference), xp.where(t.advantage > 0, s.tau_pos, s.tau_neg)
    gate = _sigmoid(tau * (ratio - 1), xp)
    return -_gain(4 / tau * gate, t, xp), -_gain(4 * gate * (1 - gate) * ratio, t, xp)


def _dpo(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    z = s.beta * t.advantage * (t.gap - t.pair_gap)
    return _of_pair(_softplus(-z, xp), t, xp), -_sigmoid(-z, xp) * s.beta * t.advantage * t.weight


def _ipo(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    off = t.advantage * _mean_difference(t, xp) - 1 / (2 * s.beta)
    return _of_pair(off**2, t, xp), 2 * off * t.advantage * _mean(t.weight, t.length, xp)


def _simpo(t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    z = s.beta * t.advantage * _mean_difference(t, xp) - s.gamma
    slope = -_sigmoid(-z, xp) * s.beta
    return _of_pair(_softplus(-z, xp), t, xp), slope * t.advantage * _mean(t.weight, t.length, xp)


def _gain(ratio: Array, t: LossTokens, xp: ModuleType) -> Array:
    """Ratio x advantage; an advantage of 0 gains nothing, whatever the ratio."""
    return xp.where(t.advantage == 0, 0.0, ratio * t.advantage)


def _clipped(ratio: Array, t: LossTokens, s: LossSettings, xp: ModuleType) -> tuple[Array, Array]:
    gain, bound = _gain(ratio, t, xp), _gain(xp.clip(ratio, s.low, s.high), t, xp)
    return -xp.minimum(gain, bound), xp.where(gain <= bound, -gain, 0.0)


def _mean(total: Array, length: Array, xp: ModuleType) -> Array:
    return total / xp.where(length == 0, 1.0, length)


def _mean_difference(t: LossTokens, xp: ModuleType) -> Array:
    return _mean(t.gap, t.length, xp) - _mean(t.pair_gap, t.pair_length, xp)


def _of_pair(loss: Array, t: LossTokens, xp: ModuleType) -> Array:
    return xp.where(t.first & (t.advantage > 0), loss, 0.0)


def _softplus(x: Array, xp: ModuleType) -> Array:
    return xp.logaddexp(x, 0.0)


def _sigmoid(x: Array, xp: ModuleType) -> Array:
    return xp.exp(-_softplus(-x, xp))


@dataclass(frozen=True)
class LossKind:
    """A loss: its formula, the settings it reads with their defaults, and whether it needs the
    log-probabilities of whole sequences before any coefficient. silent: a token whose fields of
    these names are 0 has no part in the loss, its own or its sequence's; without names all have."""

    formula: Formula
    defaults: dict[str, float]
    of_sequences: bool = False
    silent: tuple[str, ...] = ("weight",)


_RATIO, _NO_GAIN = {"low": 0.8, "high": 1.2}, ("advantage",)
LOSSES: dict[str, LossKind] = {
    "cross_entropy": LossKind(_cross_entropy, {}),
    "importance_sampling": LossKind(_importance_sampling, {"high": math.inf}, silent=_NO_GAIN),
    "ppo": LossKind(_ppo, _RATIO, silent=_NO_GAIN),
    "cispo": LossKind(_cispo, {"low": 0.0, "high": 4.0}, silent=_NO_GAIN),
    "dro": LossKind(_dro, {"beta": 0.05}, silent=()),
    "sapo": LossKind(_sapo, {"tau_pos": 1.0, "tau_neg": 1.05}, silent=_NO_GAIN),
    "gspo": LossKind(_gspo, _RATIO, of_sequences=True, silent=("weight", *_NO_GAIN)),
    "dpo": LossKind(_dpo, {"beta": 0.1}, of_sequences=True),
    "ipo": LossKind(_ipo, {"beta": 0.1}, of_sequences=True),
    "simpo": LossKind(_simpo, {"beta": 2.0, "gamma": 1.0}, of_sequences=True),
}


@dataclass(frozen=True)
class Loss:
    """A loss by name, with its settings."""

    name: str
    settings: LossSettings

    @classmethod
    def of(cls, name: str = "cross_entropy", **settings: float) -> Loss:
        """ValueError, naming it, for an unknown loss, an unknown setting or an unusable value."""
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; use one of {', '.join(LOSSES)}")
        defaults = LOSSES[name].defaults
        for key, value in settings.items():
            if key not in defaults:
                known = ", ".join(defaults) or "none"
                raise ValueError(f"{key} is no setting of the loss {name}; it has: {known}")
            if not math.isfinite(value):
                raise ValueError(f"{key}={value} of the loss {name} must be a finite number")
        values = dict.fromkeys(LossSettings._fields, 0.0) | defaults | settings
        for key in ("beta", "tau_pos", "tau_neg"):
            if key in defaults and values[key] <= 0:
                raise ValueError(f"{key}={values[key]} of the loss {name} must be more than 0")
        if "high" in defaults and not 0 <= values["low"] <= values["high"]:
            raise ValueError(
                f"low={values['low']} and high={values['high']} of the loss {name} must be bounds "
                "of a ratio, 0 <= low <= high"
            )
        return cls(name, LossSettings(**values))

    @property
    def of_sequences(self) -> bool:
        """Whether log-probabilities of whole sequences come before any coefficient."""
        return LOSSES[self.name].of_sequences

    def silent(self, fields: Any) -> np.ndarray:
        """Which tokens have no part in it; bool [n]. `fields`: has arrays [n] by those names."""
        zero = [getattr(fields, name) == 0 for name in LOSSES[self.name].silent]
        return np.all(zero, axis=0) if zero else np.zeros(len(fields.weight), np.bool_)

    def packed(self) -> np.ndarray:
        """For the device: the loss's number in LOSSES and its settings, float32
        [L]."""
        return np.array([list(LOSSES).index(self.name), *self.settings], np.float32)

    def evaluate(self, tokens: LossTokens) -> tuple[np.ndarray, np.ndarray]:
        """Loss and coefficient of every token, on the host."""
        loss, coefficient = LOSSES[self.name].formula(tokens, self.settings, np)
        return loss, np.broadcast_to(coefficient, loss.shape)


def coefficients(packed: Float[jax.Array, " L"], tokens: LossTokens) -> Float[jax.Array, " U"]:
    """dL/dlogprob of tokens for the loss that `Loss.packed` names, on the device: one program
    serves all losses, and computes those few numbers for each of them."""
    settings = LossSettings(*packed[1:])
    of_each = [kind.formula(tokens, settings, jnp)[1] for kind in LOSSES.values()]
    return jnp.stack(of_each)[packed[0].astype(jnp.int32)]


def reads_sequences(packed: Float[jax.Array, " L"]) -> Bool[jax.Array, ""]:
    """Whether the loss that `Loss.packed` names is one of whole sequences, on the device."""
    return jnp.array([kind.of_sequences for kind in LOSSES.values()])[packed[0].astype(jnp.int32)]
