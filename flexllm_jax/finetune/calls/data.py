"""What a client trains on, as it gives it: tokens, and what its loss takes by name; checked here.

The names are those of the Tinker API. Losses are sums over tokens and data, divided by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum


@dataclass(frozen=True, eq=False)
class GivenDatum:
    """A sequence of tokens [N], and arrays of N rows for its loss."""

    tokens: np.ndarray
    inputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Inputs:
    """The arrays that a loss takes besides its targets, and the settings that it may be given."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


_CLIP = ("clip_low_threshold", "clip_high_threshold")
_POLICY = ("logprobs", "advantages")
GIVEN_LOSSES: Mapping[str, _Inputs] = MappingProxyType(
    {
        "cross_entropy": _Inputs(optional=("weights",)),
        "importance_sampling": _Inputs(_POLICY),
        "ppo": _Inputs(_POLICY, settings=_CLIP),
        "cispo": _Inputs(_POLICY, settings=_CLIP),
        "dro": _Inputs(_POLICY, settings=("beta",)),
        "gspo": _Inputs((*_POLICY, "sequence_ratio_mask"), settings=_CLIP),
    }
)
_TARGETS = "target_tokens"
_NAMES = {"clip_low_threshold": "low", "clip_high_threshold": "high", "beta": "beta"}
# Fields of a `Datum`; without weights each token counts once.
_FIELDS = {
    "logprobs": "reference",
    "advantages": "advantage",
    "weights": "weight",
    "sequence_ratio_mask": "weight",
}


def read_loss(name: str, settings: Mapping[str, Any]) -> Loss:
    """A loss by its name and settings. ValueError, naming what is wrong."""
    if name not in GIVEN_LOSSES:
        raise ValueError(f"loss_fn={name!r} is not to be had here; use {', '.join(GIVEN_LOSSES)}")
    known = GIVEN_LOSSES[name].settings
    for key, value in settings.items():
        if key not in known:
            raise ValueError(
                f"loss_fn_config: {key} is no setting of {name}, which has {_listed(known)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"loss_fn_config: {key}={value!r} must be a number")
    try:
        return Loss.of(name, **{_NAMES[key]: float(value) for key, value in settings.items()})
    except ValueError as error:
        raise ValueError(f"loss_fn_config: {error}") from None


def read_data(
    data: Sequence[GivenDatum], loss: Loss, vocab_size: int, max_tokens: int
) -> list[list[Datum]]:
    """What goes through the model of each datum: one sequence, or one for each of its K targets
    after every token. ValueError, naming the datum and the field.

    max_tokens: of one datum.
    """
    if not data:
        raise ValueError("data is empty: give at least one datum")
    read = []
    for number, datum in enumerate(data):
        try:
            read.append(_read(datum, loss, vocab_size, max_tokens))
        except ValueError as error:
            raise ValueError(f"datum {number}: {error}") from None
    return read


def _read(datum: GivenDatum, loss: Loss, vocab_size: int, max_tokens: int) -> list[Datum]:
    takes = GIVEN_LOSSES[loss.name]
    names = (_TARGETS, *takes.required, *takes.optional)
    for name in datum.inputs:
        if name not in names:
            raise ValueError(f"{name} is no input of {loss.name}, which takes {_listed(names)}")
    for name in (_TARGETS, *takes.required):
        if name not in datum.inputs:
            raise ValueError(f"{loss.name} needs {name} in loss_fn_inputs")
    tokens, targets = datum.tokens, datum.inputs[_TARGETS]
    count = len(tokens)
    if not count:
        raise ValueError("model_input has no tokens")
    if count > max_tokens:
        raise ValueError(
            f"model_input has {count} tokens, and {max_tokens} can be trained at once: give "
            "shorter ones, or raise finetune.max_tokens and model.max_model_len of the server"
        )
    several = targets.ndim == 2 and loss.name == "cross_entropy"
    if targets.shape[:1] != (count,) or not (targets.ndim == 1 or several) or not targets.size:
        wanted = f"[{count}]" + (f" or [{count}, K]" if loss.name == "cross_entropy" else "")
        raise ValueError(f"{_TARGETS} has shape {list(targets.shape)}, and must have {wanted}")
    _check_tokens("model_input", tokens, vocab_size)
    _check_tokens(_TARGETS, targets, vocab_size)
    fields = {name: np.zeros(targets.shape, np.float32) for name in ("reference", "advantage")}
    fields["weight"] = np.ones(targets.shape, np.float32)
    for name in datum.inputs.keys() - {_TARGETS}:
        fields[_FIELDS[name]] = _floats(name, datum.inputs[name], targets.shape)
    if several:
        return Datum.of_targets(tokens, targets, fields["weight"])
    return [Datum(tokens.astype(np.int32), targets.astype(np.int32), **fields)]


def _check_tokens(name: str, tokens: np.ndarray, vocab_size: int) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} is of type {tokens.dtype}, and must be of whole numbers")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{name} has token {outside.flat[0]}, and the vocabulary has 0 to {vocab_size - 1}: "
            "use this model's tokenizer"
        )


def _floats(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if values.shape != shape:
        raise ValueError(f"{name} has shape {list(values.shape)}, and must have {list(shape)}")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite numbers")
    return values


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
