"""A client's calls as a job's work: forwards and backwards, optimizer steps, and what is done in
between with the adapter as it is then.

Calls are carried out in the order they are added, each as soon as those before it are dispatched.
How a call's data are packed follows from that call alone: the same calls give the same numbers
again, whatever else came when. A call that fails changes nothing, and the next ones go on.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexllm_jax.config import OptimizerConfig
from flexllm_jax.finetune.data import pack
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch
from flexllm_jax.finetune.optimizer import HYPERPARAMETERS
from flexllm_jax.finetune.source import Aside, Step


@dataclass(frozen=True)
class CalledConfig:
    """What a job needs to know of a model that a client trains by calls; the rest comes with each
    call."""

    name: str
    weight: float = 1.0
    priority: int = 0
    seed: int = 0
    resume: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


class NotFinite(RuntimeError):
    """What a call computed is no number; its gradient is dropped, the weights stay."""


class ModelGone(RuntimeError):
    """Nobody carries out a model's calls any more."""


@dataclass(eq=False)
class Call:
    """Something that a client asked for; `future`: of what it is answered."""

    future: Future = field(default_factory=Future, init=False)

    def answer(self, result: Any) -> None:
        """Give the answer, unless there is one: its model may be gone. From any thread."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Answer with an error, likewise."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(eq=False)
class ForwardCall(Call):
    """Log-probabilities of data, and unless `backward` is False a part of the next step's gradient.

    data: for each datum its sequences (`data.read_data`). Answered by `Scores`.
    """

    data: Sequence[Sequence[Datum]] = ()
    loss: Loss = field(default_factory=Loss.of)
    backward: bool = True


@dataclass(frozen=True, eq=False)
class Scores:
    """Of each datum float32 [N, K], of its K targets after every token; the sum of all losses."""

    logprobs: list[np.ndarray]
    loss_sum: float
    tokens: int  # that went forward


@dataclass(eq=False)
class StepCall(Call):
    """An AdamW step. Answered by its measures, float by name, and `step`: how many there were.
    ValueError, naming the field, for one that cannot be."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # none unless more

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to less than 1")
        for name in ("learning_rate", "eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number, 0 or more")
        if math.isnan(self.grad_clip_norm):
            raise ValueError("grad_clip_norm=nan must be a number; 0: no clipping")

    def values(self) -> np.ndarray:
        """`optimizer.HYPERPARAMETERS`; the gradient is a sum and is divided by nothing."""
        named = {
            "learning_rate": self.learning_rate,
            "b1": self.beta1,
            "b2": self.beta2,
            "momentum": 0.0,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "b_lr_ratio": 1.0,
            "max_norm": self.grad_clip_norm if self.grad_clip_norm > 0 else math.inf,
            "scale": 1.0,
        }
        return np.array([named[name] for name in HYPERPARAMETERS], np.float32)


@dataclass(eq=False)
class AsideCall(Call):
    """Something done in its turn (`source.Aside`), which answers it; not before it is `ready`."""

    do: Callable[[Any], Callable[[], None]] = field(default=lambda job: lambda: None)
    changes_weights: bool = False
    ready: bool = True


@dataclass(eq=False)
class _Scoring:
    """A forward under way: its microbatches, and for each of their data where it belongs."""

    call: ForwardCall
    places: list[list[tuple[int, int]]]  # (datum, target) of each sequence of each microbatch
    scored: int = 0
    found: list[list[np.ndarray]] = field(default_factory=list)
    loss_sum: float = 0.0
    tokens: int = 0

    def add(self, packed: PackedMicrobatch, logprob: np.ndarray) -> bool:
        """The results of its next microbatch; whether it was the last."""
        for (datum, target), own in zip(
            self.places[self.scored], packed.split(np.array(logprob)), strict=True
        ):
            self.found[datum][target] = own
        self.loss_sum += float(packed.evaluate(logprob)[0].sum(dtype=np.float64))
        self.tokens += packed.tokens
        self.scored += 1
        return self.scored == len(self.places)

    def answer(self) -> None:
        """All its results are in."""
        logprobs = [np.stack(own, axis=1) for own in self.found]
        if math.isfinite(self.loss_sum):
            self.call.answer(Scores(logprobs, self.loss_sum, self.tokens))
        else:
            self.call.fail(
                NotFinite(
                    f"the loss is {self.loss_sum}: the ratio of new to old probabilities, or the "
                    "model itself, has got out of hand; load an earlier state"
                )
            )


class CallSource:
    """Hands over what is called for (see `source.Source`).

    max_tokens: of a microbatch; pack_tokens, most_sequences: of one of several sequences.
    """

    total_steps = None
    finished = False

    def __init__(self, max_tokens: int, pack_tokens: int, most_sequences: int):
        self._max_tokens, self._pack_tokens = max_tokens, pack_tokens
        self._most_sequences, self.page = most_sequences, 0
        self._calls: deque[Call] = deque()  # not begun
        self._ready: deque[PackedMicrobatch | Step | Aside] = deque()
        self._answering: deque[_Scoring | StepCall] = deque()  # results to come, in order
        self._unanswered: set[Call] = set()
        self.held = False  # whether no other call is to be begun
        self.steps = 0  # done

    def add(self, call: Call) -> None:
        """Carry a call out after those before it."""
        self._calls.append(call)
        self._unanswered.add(call)
        call.future.add_done_callback(lambda _: self._unanswered.discard(call))

    def fail(self, error: Exception) -> None:
        """Answer all calls with an error: there is nobody any more to carry them out."""
        for call in list(self._unanswered):
            call.fail(error)
        self._answering.clear()
        self._calls.clear()
        self._ready.clear()

    @property
    def asked(self) -> bool:
        """Whether there are calls that have not begun and could."""
        first = self._calls[0] if self._calls else None
        return first is not None and (not isinstance(first, AsideCall) or first.ready)

    @property
    def unanswered(self) -> int:
        """Calls without an answer."""
        return len(self._unanswered)

    @property
    def under_way(self) -> bool:
        """Whether a call has begun, and results of it are to come."""
        return bool(self._ready or self._answering)

    # -- handing over -----------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether the client is waited for."""
        return not self._ready and (self.held or not self.asked)

    def next(self) -> PackedMicrobatch | Step | Aside | None:
        """What comes next."""
        if not self._ready and not self.waiting:
            self._begin(self._calls.popleft())
        return self._ready.popleft() if self._ready else None

    def _begin(self, call: Call) -> None:
        if isinstance(call, ForwardCall):
            self._begin_forward(call)
        elif isinstance(call, StepCall):
            self._answering.append(call)
            self._ready.append(Step(call.values()))
        elif isinstance(call, AsideCall):
            self._ready.append(Aside(call.do, call.changes_weights))

    def _begin_forward(self, call: ForwardCall) -> None:
        sequences = [own for datum in call.data for own in datum]
        place = {
            id(own): (number, target)
            for number, datum in enumerate(call.data)
            for target, own in enumerate(datum)
        }
        sizes = (self._max_tokens, self._pack_tokens, self._most_sequences)
        packs = pack(sequences, *sizes, lambda own: [own.head(call.loss, self.page)])
        places = [[place[id(own)] for own in group] for group in packs]
        found = [[np.empty(0, np.float32)] * len(datum) for datum in call.data]
        self._answering.append(_Scoring(call, places, found=found))
        self._ready += [
            PackedMicrobatch(tuple(own), call.loss, backward=call.backward, page=self.page)
            for own in packs
        ]

    # -- results ----------------------------------------------------------------------------------

    def scored(self, packed: PackedMicrobatch, logprob: np.ndarray) -> None:
        """The results of a microbatch; they come in the order of `next`."""
        scoring = self._answering[0]
        assert isinstance(scoring, _Scoring)
        if scoring.add(packed, logprob):
            self._answering.popleft()
            scoring.answer()

    def stepped(self, measured: dict[str, float]) -> None:
        """The next step is done, unless a measure is not finite: then all stays as it was, and the
        next gradient begins anew."""
        call = self._answering.popleft()
        assert isinstance(call, StepCall)
        if all(map(math.isfinite, measured.values())):
            self.steps += 1
            call.answer(measured | {"step": self.steps})
        else:
            what = ", ".join(f"{name} {value}" for name, value in measured.items())
            call.fail(
                NotFinite(
                    f"the step was not done: {what}; the gradient is dropped, and weights and "
                    "moments are as before: lower the learning rate, or clip"
                )
            )

    # -- checkpoints ------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        """None: what it goes on with is its client's."""
        return {}

    def restore(self, step: int, position: dict[str, Any]) -> None:
        """Its client loads a state."""
        raise ValueError("what is trained by calls is gone on with by its client")
