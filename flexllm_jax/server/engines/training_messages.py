"""What is said of adapters that clients train by calls: the calls of a model, in order, and their
answers.

Arrays are little-endian bytes in C order, and never JSON. Nothing here needs JAX.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """An array."""

    data: bytes
    dtype: Literal["float32", "int32", "int64"]
    shape: list[int]


class TrainingDatum(msgspec.Struct, frozen=True, array_like=True):
    """A sequence of tokens (int32), and what its loss takes, by the Tinker API's names."""

    tokens: bytes
    inputs: dict[str, Tensor]


class _Call(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Something to be done with a model in its turn."""


class ForwardBackward(_Call, frozen=True):
    """Log-probabilities of data, and unless `forward_only` a part of the next step's gradient;
    answered by `Logprobs`."""

    data: list[TrainingDatum]
    loss: str
    settings: dict[str, float | str] = {}
    forward_only: bool = False


class OptimStep(_Call, frozen=True):
    """An AdamW step with the gradient since the one before; answered by `Stepped`."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SaveState(_Call, frozen=True):
    """Write weights, moments and the number of steps to a folder, which is replaced; answered by
    `Saved`."""

    path: str


class LoadState(_Call, frozen=True):
    """Go on from a folder of `SaveState`; without `optimizer` with its weights alone, which may be
    any PEFT folder's. The gradient so far is dropped. Answered by `Loaded`."""

    path: str
    optimizer: bool


class SaveAdapter(_Call, frozen=True):
    """Write the weights in PEFT's format; with a `name` they are also served under it, as they are
    now for good. Answered by `Saved`."""

    path: str
    name: str | None = None


TrainingCall = ForwardBackward | OptimStep | SaveState | LoadState | SaveAdapter


class _Result(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An answer to a call."""


class Logprobs(_Result, frozen=True):
    """Of each datum's targets, in their shape; `tokens`: those that went forward."""

    logprobs: list[Tensor]
    metrics: dict[str, float]
    tokens: int


class Stepped(_Result, frozen=True):
    """`grad_norm` before clipping, `weight_norm`; the model's optimizer steps so far."""

    metrics: dict[str, float]
    step: int


class Saved(_Result, frozen=True):
    """All files are on disk."""

    size_bytes: int


class Loaded(_Result, frozen=True):
    """The optimizer steps of the state; 0 without its optimizer."""

    step: int


TrainingResult = Logprobs | Stepped | Saved | Loaded


class TrainingModelState(msgspec.Struct, frozen=True, array_like=True):
    """A model: its calls without an answer, optimizer steps, forward tokens, and whether it waits
    in the host's memory for a slot of the bank."""

    name: str
    waiting: int
    step: int
    tokens: int
    parked: bool
