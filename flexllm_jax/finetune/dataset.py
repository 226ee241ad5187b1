"""A job's work from a dataset: batches of rows packed into microbatches, a step after each batch,
and validation.

What a row becomes, and what is reported of it, is the job's method: `Supervised` here,
`preference.Preference` for pairs.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from flexllm_jax.config import FinetuneConfig
from flexllm_jax.finetune.data import BatchStream, Dataset, TrainingSequence, pack
from flexllm_jax.finetune.layout import Head
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch
from flexllm_jax.finetune.optimizer import hyperparameters
from flexllm_jax.finetune.source import Step


class Method(Protocol):
    """How rows of a dataset are trained on. Every row is as many sequences (`data`)."""

    loss: Loss
    # Whether the rows have to be scored under the weights that the job starts from.
    needs_reference: bool

    def data(self, row: Any, reference: Sequence[float]) -> list[Datum]:
        """The sequences of a row, which stay in one microbatch; two are each the other's pair.
        `reference`: sums of log-probabilities under the start weights, one a sequence."""
        ...

    def divisor(self, rows: Sequence[Any]) -> float:
        """What the gradient of a batch, and its loss, are divided by."""
        ...

    def measure(self, packed: PackedMicrobatch, logprob: np.ndarray) -> Any:
        """What `metrics` needs of a microbatch."""
        ...

    def metrics(self, measured: list[Any]) -> dict[str, float]:
        """What is reported of a batch besides its loss, from the measures of its microbatches."""
        ...


class Supervised:
    """Cross-entropy of what is to be said, a weighted mean over its tokens."""

    loss = Loss.of("cross_entropy")
    needs_reference = False

    def data(self, row: TrainingSequence, reference: Sequence[float]) -> list[Datum]:
        """One sequence."""
        return [Datum.following(row.tokens, row.weights)]

    def divisor(self, rows: Sequence[TrainingSequence]) -> float:
        """The sum of weights: without any, the number of tokens to be said."""
        return float(sum(row.weights[1:].sum(dtype=np.float64) for row in rows))

    def measure(self, packed: PackedMicrobatch, logprob: np.ndarray) -> None:
        """Nothing."""

    def metrics(self, measured: list[None]) -> dict[str, float]:
        """None."""
        return {}


class _Pass:
    """Rows that are handed over together: a batch, the validation set, or rows to be scored."""

    def __init__(
        self, groups: Sequence[Sequence[Any]], divisor: float, places: dict[int, tuple[int, int]]
    ):
        """`places`: of a batch, (epoch, place in its order) of each row, by its id; of other
        passes, nothing."""
        self.groups, self.divisor, self.places = groups, divisor, places
        self.scored = 0  # microbatches whose results are in
        self._loss_sum = 0.0
        self._measured: list[Any] = []

    @property
    def backward(self) -> bool:
        """Whether it is a batch."""
        return bool(self.places)

    @property
    def complete(self) -> bool:
        """Whether the results of all its microbatches are in."""
        return self.scored == len(self.groups)

    def add(self, method: Method, packed: PackedMicrobatch, logprob: np.ndarray) -> None:
        """Account for a microbatch's results; neither is kept."""
        self._loss_sum += float(packed.evaluate(logprob)[0].sum(dtype=np.float64))
        self._measured.append(method.measure(packed, logprob))

    def metrics(self, method: Method) -> dict[str, float]:
        """Mean loss, and what the method reports."""
        return {"loss": self._loss_sum / self.divisor, **method.metrics(self._measured)}


class DatasetSource:
    """Hands over a dataset's batches (see `source.Source`).

    max_tokens: of a microbatch; pack_tokens: of one of several rows; first_position: of every
    sequence.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        method: Method,
        dataset: Dataset,
        validation: Dataset | None,
        max_tokens: int,
        pack_tokens: int,
        first_position: int = 0,
    ):
        self.config, self.method = config, method
        self.dataset, self.validation = dataset, validation
        self._max_tokens, self._pack_tokens = max_tokens, pack_tokens
        self._first_position, self.page = first_position, 0
        self.stream = BatchStream(dataset, config.batch_tokens, config.seed)
        self.total_steps: int = config.steps or self.stream.batches_left(config.epochs or 1)
        self._ready: deque[tuple[_Pass, Sequence[Any]] | Step] = deque()
        self._batches = self._steps = 0  # handed over; done
        self._passes: deque[_Pass] = deque()  # whose results are not all in, in order
        self._scored: deque[_Pass] = deque()  # batches whose step is not done
        rows = [*dataset.items, *(validation.items if validation else ())]
        self._rows: list[Any] = rows
        self._references: list[tuple[float, ...]] = []  # of each of `_rows`
        self._number = {id(row): i for i, row in enumerate(rows)} if method.needs_reference else {}
        self._reference_pass: _Pass | None = None
        self._found: dict[int, tuple[float, ...]] = {}  # references by id of the row, so far

    # -- handing over -----------------------------------------------------------------------------

    waiting = False

    def next(self) -> PackedMicrobatch | Step | None:
        """The next microbatch or step in order."""
        if not self._ready and self._batches < self.total_steps:
            self._prepare()
        if not self._ready:
            return None
        item = self._ready.popleft()
        return item if isinstance(item, Step) else self._pack(item[1], item[0].places)

    def _prepare(self) -> None:
        """The rows to be scored first, or the next batch, and the validation set if it is due."""
        if self.method.needs_reference and not self._references:
            if self._reference_pass is None:
                self._reference_pass = self._hand_over(self._rows)
            return
        epoch, first = self.stream.epoch, self.stream.index
        rows = self.stream.next_batch()
        batch = self._hand_over(rows, {id(row): (epoch, first + i) for i, row in enumerate(rows)})
        values = hyperparameters(
            self.config.optimizer, self._batches, self.total_steps, batch.divisor
        )
        self._batches += 1
        self._ready.append(Step(values, self.position()))
        self._validate_if_due(self._batches)

    def _validate_if_due(self, step: int) -> None:
        every = self.config.validation_every
        due = step == self.total_steps or (every and step % every == 0)
        if self.validation is not None and due:
            self._hand_over(self.validation.items)

    def _hand_over(
        self, rows: Sequence[Any], places: dict[int, tuple[int, int]] | None = None
    ) -> _Pass:
        """Queue the microbatches of a pass; `places` (see `_Pass`) make it a batch."""
        groups = pack(rows, self._max_tokens, self._pack_tokens, heads=self._heads)
        rows_pass = _Pass(groups, self.method.divisor(rows) or 1.0, places or {})
        self._passes.append(rows_pass)
        self._ready += [(rows_pass, group) for group in groups]
        return rows_pass

    def _heads(self, row: Any) -> list[Head | None]:
        data = self.method.data(row, ()) if self.page else ()
        return [datum.head(self.method.loss, self.page) for datum in data]

    def _pack(self, rows: Sequence[Any], places: dict[int, tuple[int, int]]) -> PackedMicrobatch:
        data: list[Datum] = []
        pairs: list[int] = []
        names: list[tuple[int, ...]] = []
        for row in rows:
            known = self._references[self._number[id(row)]] if self._references else ()
            own = self.method.data(row, known)
            pairs += [len(data) + i for i in reversed(range(len(own)))]
            data += own
            if places:
                names += [(*places[id(row)], i) for i in range(len(own))]
        return PackedMicrobatch(
            *(tuple(data), self.method.loss, tuple(pairs)),
            *(self._first_position, bool(places), tuple(names), self.page),
        )

    # -- results ----------------------------------------------------------------------------------

    def scored(self, packed: PackedMicrobatch, logprob: np.ndarray) -> dict[str, float] | None:
        """The results of a microbatch; they come in the order of `next`."""
        current = self._passes[0]
        if current is self._reference_pass:
            self._keep_references(current.groups[current.scored], packed, logprob)
        else:
            current.add(self.method, packed, logprob)
        current.scored += 1
        if not current.complete:
            return None
        self._passes.popleft()
        if packed.backward:
            self._scored.append(current)
        elif current is self._reference_pass:
            self._references = [self._found.pop(id(row)) for row in self._rows]
        else:
            return current.metrics(self.method)
        return None

    def _keep_references(
        self, rows: Sequence[Any], packed: PackedMicrobatch, logprob: np.ndarray
    ) -> None:
        """The weighted sums of log-probabilities of the sequences of a microbatch's rows."""
        sums = [
            float((datum.weight * own).sum(dtype=np.float64))
            for datum, own in zip(packed.data, packed.split(logprob), strict=True)
        ]
        each = len(sums) // len(rows)  # sequences of a row
        for number, row in enumerate(rows):
            self._found[id(row)] = tuple(sums[number * each : (number + 1) * each])

    def stepped(self, measured: dict[str, float]) -> dict[str, float]:
        """The metrics of the next step."""
        self._steps += 1
        return self._scored.popleft().metrics(self.method) | measured

    @property
    def finished(self) -> bool:
        """Whether all steps are done, and the validation after them."""
        return self._steps >= self.total_steps and not self._passes

    # -- checkpoints ------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        """Where in the data the next batch begins, and the references of all rows in order."""
        return {
            "stream": self.stream.state(),
            "references": self._references,
            "validation": self.validation.fingerprint if self.validation else None,
        }

    def restore(self, step: int, position: dict[str, Any]) -> None:
        """Go on after `step`, with what is left of the data. ValueError, naming the field, when it
        is of other data, or past the job's end."""
        self.stream.restore(position["stream"])
        c = self.config
        self.total_steps = c.steps or step + self.stream.batches_left(c.epochs or 1)
        if step > self.total_steps:
            raise ValueError(
                f"steps={c.steps}: the checkpoint that job {c.name!r} would go on from has done "
                f"{step} steps; raise steps, or start anew with resume: false"
            )
        self._batches = self._steps = step
        references = position.get("references", ())  # older checkpoints have none
        if (
            references
            and self.validation is not None
            and (position.get("validation") != self.validation.fingerprint)
        ):
            raise ValueError(
                f"validation={c.validation}: its rows are not those that were scored under the "
                f"weights which job {c.name!r} started from; give those, or none, or start anew "
                "with resume: false"
            )
        self._references = [tuple(own) for own in references[: len(self._rows)]]
        if step not in [at for at, _ in position.get("validations", ())]:
            self._validate_if_due(step)  # a checkpoint is written before what follows its step
