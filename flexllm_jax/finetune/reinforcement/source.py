"""A reinforcement job's work: answers to a batch of prompts, their advantages, optimizer steps.

Batch m is answered with the weights that `max(0, m - steps_ahead)` batches have trained, and
trained after m of them. Which prompts it has, and the seeds of its answers, follow from the job's
seed and m; when answers come never decides what is trained. So a resumed job does what it would
have done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flexllm_jax.config import FinetuneConfig, ReinforcementConfig
from flexllm_jax.finetune.data import pack
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch
from flexllm_jax.finetune.optimizer import hyperparameters
from flexllm_jax.finetune.reinforcement.advantages import advantages, divisor, token_weight
from flexllm_jax.finetune.reinforcement.episodes import Game, Group, Sampler
from flexllm_jax.finetune.reinforcement.games import Asking
from flexllm_jax.finetune.reinforcement.kept import Kept, Told, keep
from flexllm_jax.finetune.reinforcement.measures import AnswerMeasures, UpdateMeasures
from flexllm_jax.finetune.reinforcement.prompts import Prompt, PromptDataset, PromptReader
from flexllm_jax.finetune.source import CannotGoOn, Measured, Step

_MOST_REFILLS = 8  # rounds, after which a batch is what it is
_TRAINED, _VALIDATED = 0, 1  # kinds of seeds


@dataclass(eq=False)
class _Version:
    """Weights that stay as they are while anything is answered with them. `batch`: how many have
    trained them."""

    batch: int
    frozen: Any
    users: int = 0


@dataclass(eq=False)
class _Batch:
    """Groups that are answered with one version. `current`: those that the last round began."""

    number: int
    version: _Version
    groups: list[Group] = field(default_factory=list)
    current: list[Group] = field(default_factory=list)
    rounds: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def played(self) -> bool:
        """Whether all its groups are done."""
        return all(group.done for group in self.current)

    @property
    def unequal(self) -> list[Group]:
        """Those that there is something to learn from."""
        return [group for group in self.groups if not group.equal]


class ReinforcementSource:
    """Hands over what a reinforcement job trains (see `source.Source`).

    The engine gives it a `sampler` before it asks for anything. longest: tokens of an episode.
    max_tokens: of a microbatch; pack_tokens: of one of several answers; first_position: of every
    sequence.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        dataset: PromptDataset,
        validation: PromptDataset | None,
        game: Game,
        longest: int,
        max_tokens: int,
        pack_tokens: int,
        first_position: int = 0,
    ):
        assert isinstance(config.method, ReinforcementConfig)
        self.config, self.method, self.game = config, config.method, game
        self.dataset, self.validation, self.longest = dataset, validation, longest
        self.sampler: Sampler | None = None
        self.reader: PromptReader | None = None  # of its prompts
        self.asking: Asking | None = None  # by which its grader asks models
        # Sees the groups of a batch and the microbatches that they are trained in.
        self.on_batch: Callable[..., None] = lambda groups, microbatches: None
        self._max_tokens, self._pack_tokens = max_tokens, pack_tokens
        self._first_position, self.page = first_position, 0
        updates, size = self.method.num_iterations, self.method.batch_size
        in_epochs = -(-len(dataset) * (config.epochs or 1) // size) * updates
        self.total_steps: int = config.steps or in_epochs
        self.loss = _loss(self.method)
        self.samples: list[dict[str, Any]] = []  # of the last batch trained
        self._batches = -(-self.total_steps // updates)
        self._trained = 0  # batches whose steps are handed over
        self._training: _Batch | None = None  # the last of them, until its steps are done
        self._skipped = 0  # steps of the next batch that were done before a checkpoint
        self._steps = self._handed = 0  # done; handed over
        self._stuck = False  # nothing was left to be done when it was last asked
        self._ready: deque[PackedMicrobatch | Step | Measured] = deque()
        self._updates: deque[UpdateMeasures] = deque()  # of steps handed over and not done
        self._version: _Version | None = None  # the weights as they are, once frozen
        self._open: dict[int, _Batch] = {}  # being answered, by number
        self._thawed: dict[int, _Version] = {}  # of a checkpoint, by batches trained
        self._kept = Kept([], {})  # answers of a checkpoint
        self._validating: _Batch | None = None
        self._validated: set[int] = set()  # steps after which that is done

    # -- handing over -----------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether graders or environments are waited for."""
        return self._stuck and self.sampler is not None and self.sampler.idle

    def next(self) -> PackedMicrobatch | Step | Measured | None:
        """The next microbatch, step or validation in order."""
        if not self._ready and self._handed == self._steps:
            self._stuck = True
            self._advance()
        self._stuck = self._stuck and not self._ready
        return self._ready.popleft() if self._ready else None

    def _advance(self) -> None:
        """With no step under way: let answers begin, and hand over a batch that is answered."""
        for number in self._to_answer():
            before = max(0, number - self.method.steps_ahead)
            self._open[number] = self._play(number, self._thawed.get(before) or self._freeze())
        self._thawed.clear()  # each has its batches
        if self._validation_due and self._validating is None:
            self._validating = self._validate(self._freeze())
        if self._validating is not None:
            if not self._validating.played:
                return
            self._end_validation(self._validating)
        batch = self._open.get(self._trained)
        if batch is not None and self._settled(batch):
            del self._open[self._trained]
            self._hand_over(batch)

    def _to_answer(self) -> list[int]:
        """Numbers of the batches that the weights as they are shall answer, and do not yet."""
        first, after = self._trained, self._trained + self.method.steps_ahead + 1
        return [m for m in range(first, min(after, self._batches)) if m not in self._open]

    def _freeze(self) -> _Version:
        """The weights as they are, kept."""
        if self._version is None:
            assert self.sampler is not None
            self._version = _Version(self._trained, self.sampler.freeze())
        return self._version

    def _play(self, number: int, version: _Version) -> _Batch:
        version.users += 1
        batch = _Batch(number, version)
        self._begin(
            batch,
            self.dataset.batch(number, self.method.batch_size, self.config.seed),
            self.method.num_generations,
            _TRAINED,
        )
        return batch

    def _begin(self, batch: _Batch, prompts: Sequence[Prompt], count: int, kind: int) -> None:
        """Let the prompts of a round be answered, `count` times each."""
        assert self.sampler is not None
        key = (self.config.seed, kind, batch.number, batch.rounds)
        batch.current = [Group.of(p, count, (*key, i)) for i, p in enumerate(prompts)]
        batch.groups += batch.current
        batch.rounds += 1
        for group in batch.current:
            self._kept.fill(group)
        unfinished = [group for group in batch.current if not group.done]
        self.sampler.play(unfinished, batch.version.frozen)

    def _settled(self, batch: _Batch) -> bool:
        """Whether a batch is answered; for groups of equal rewards, others may have to be."""
        if not batch.played:
            return False
        self._check_grades(batch)
        missing = self.method.batch_size - len(batch.unequal)
        if self.method.equal_groups != "refill" or not missing or batch.rounds > _MOST_REFILLS:
            return True
        tried = {group.prompt.number for group in batch.groups}
        others = self.dataset.others(batch.number, self.config.seed, tried)[:missing]
        if others:
            self._begin(batch, others, self.method.num_generations, _TRAINED)
        return not others

    def _check_grades(self, batch: _Batch) -> None:
        """CannotGoOn where most answers have no reward."""
        episodes = [episode for group in batch.groups for episode in group.episodes]
        failed = [episode.error for episode in episodes if episode.error]
        if len(failed) * 2 > len(episodes):
            raise CannotGoOn(
                f"{len(failed)} of {len(episodes)} answers of batch {batch.number + 1} could not "
                f"be graded, the first with: {failed[0]}; correct the grader or the rows, and "
                "resume"
            )

    def _hand_over(self, batch: _Batch) -> None:
        """Queue the microbatches and steps of a batch that is answered."""
        self._training = batch
        method = self.method
        groups = batch.groups if method.equal_groups == "keep" else batch.unequal
        measures = AnswerMeasures.of(batch.groups, len(batch.groups) - len(groups), batch.began)
        self.samples = [told for group in groups for told in group.told]
        data, scale = self._data(groups)
        self._version = None  # the next steps change it
        place = {id(datum): i for i, datum in enumerate(data)}
        heads = lambda datum: [datum.head(self.loss, self.page)]  # noqa: E731
        microbatches = [
            PackedMicrobatch(tuple(own), self.loss, (), self._first_position, page=self.page)
            for own in pack(data, self._max_tokens, self._pack_tokens, heads=heads)
        ]
        self.on_batch(batch.groups, microbatches)
        updates, self._skipped = method.num_iterations - self._skipped, 0
        updates = min(updates, self.total_steps - self._handed)
        for left in reversed(range(updates)):
            self._ready += [
                replace(own, names=tuple((self._handed, place[id(datum)]) for datum in own.data))
                for own in microbatches
            ]
            values = hyperparameters(self.config.optimizer, self._handed, self.total_steps, scale)
            self._handed += 1
            if not left:
                self._trained += 1
            position = self.position() | {"update": method.num_iterations - left if left else 0}
            self._ready.append(Step(values, position, self._versions(batch if left else None)))
            self._updates.append(UpdateMeasures(measures, self.loss, scale))

    def _versions(self, batch: _Batch | None) -> dict[int, Any]:
        """What a checkpoint has to keep: of batches that are being answered, and of `batch`."""
        needed = [*self._open.values(), *([batch] if batch else [])]
        return {own.version.batch: own.version.frozen for own in needed}

    def _data(self, groups: Sequence[Group]) -> tuple[list[Datum], float]:
        """What is trained of a batch, and what its gradient is divided by."""
        method = self.method
        gains = advantages([group.rewards for group in groups], method.scale_rewards)
        episodes = [episode for group in groups for episode in group.episodes]
        lengths = [episode.length for episode in episodes]
        penalties = _penalties(episodes, method.kl_coef)
        data: list[Datum] = []
        for episode, gain, penalty in zip(
            episodes, np.concatenate(gains) if gains else (), penalties, strict=True
        ):
            of_each = (gain - penalty) * token_weight(method.normalization, episode.length)
            if np.any(of_each) and episode.length:  # the others have no gradient
                data.append(episode.datum(of_each))
        return data, divisor(method.normalization, lengths, method.max_tokens)

    # -- validation -------------------------------------------------------------------------------

    @property
    def _validation_due(self) -> bool:
        """Between two batches: whether it is the last, or `validation_every` steps are done."""
        step, every = self._steps, self.config.validation_every
        if self.validation is None or self._skipped or step in self._validated:
            return False
        last = max((at for at in self._validated if at < step), default=0)
        return step == self.total_steps or bool(every and step // every > last // every)

    def _validate(self, version: _Version) -> _Batch:
        assert self.validation is not None
        version.users += 1
        batch = _Batch(self._steps, version)
        self._begin(batch, self.validation.items, self.method.eval_samples, _VALIDATED)
        return batch

    def _end_validation(self, batch: _Batch) -> None:
        self._release(batch)
        self._validating = None
        self._validated.add(batch.number)
        measures = AnswerMeasures.of(batch.groups, 0, batch.began)
        self._ready.append(Measured(batch.number, measures.of_validation()))

    def _release(self, batch: _Batch) -> None:
        """Nothing more of a batch will be answered."""
        version = batch.version
        version.users -= 1
        if not version.users and self.sampler is not None:
            if version is self._version:
                self._version = None  # the weights can be frozen again
            self.sampler.release(version.frozen)

    # -- results ----------------------------------------------------------------------------------

    def scored(self, packed: PackedMicrobatch, logprob: np.ndarray) -> None:
        """The results of a microbatch; they come in the order of `next`."""
        self._updates[0].add(packed, logprob)

    def stepped(self, measured: dict[str, float]) -> dict[str, float]:
        """The metrics of the next step."""
        self._steps += 1
        self._stuck = False
        if self._steps == self._handed and self._training is not None:
            self._release(self._training)
            self._training = None
        return self._updates.popleft().metrics() | measured

    @property
    def finished(self) -> bool:
        """Whether all steps are done, and the validation after them."""
        done = self._steps >= self.total_steps and not self._ready
        return done and self._validating is None and not self._validation_due

    # -- checkpoints ------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        """How many batches are trained, and of which data."""
        data = {"fingerprint": self.dataset.fingerprint}
        return {"stream": data, "batch": self._trained, "update": 0}

    def thaw(self, batch: int, frozen: Any) -> None:
        """A version that a checkpoint kept: the weights that `batch` batches had trained."""
        self._thawed[batch] = _Version(batch, frozen)

    def answers(self, position: dict[str, Any]) -> tuple[Told, dict[str, np.ndarray]]:
        """What a checkpoint at `position` keeps of answers, for `remember`."""
        assert self.sampler is not None
        batches = [*self._open.values()]
        if position["update"] and self._training is not None:
            batches.append(self._training)
        if self._validating is not None:
            batches.append(self._validating)
        return keep([group for batch in batches for group in batch.groups], self.sampler.text)

    def remember(self, told: Told, arrays: dict[str, np.ndarray]) -> None:
        """Answers that a checkpoint kept: they are not sampled again."""
        self._kept = Kept(told, arrays)

    def restore(self, step: int, position: dict[str, Any]) -> None:
        """Go on after `step`. ValueError, naming the field, when it is past the job's end."""
        if step > self.total_steps:
            raise ValueError(
                f"steps={self.config.steps}: the checkpoint that job {self.config.name!r} would go "
                f"on from has done {step} steps; raise steps, or start anew with resume: false"
            )
        self._steps = self._handed = step
        self._trained, self._skipped = int(position["batch"]), int(position["update"])
        self._validated = {int(at) for at, _ in position.get("validations", ())}


def _loss(method: ReinforcementConfig) -> Loss:
    given = {"low": method.clip_low, "high": method.clip_high}
    settings = {name: value for name, value in given.items() if value is not None}
    if method.loss == "importance_sampling":
        settings = {"high": 2.0} | settings
    return Loss.of(method.loss, **settings)


def _penalties(episodes: Sequence[Any], weight: float) -> list[Any]:
    """What the divergence from the start takes off each token's advantage: weight x (its estimate
    minus the mean), so that it pulls towards the start and not up or down."""
    if not weight:
        return [0.0] * len(episodes)
    drifts = [np.array(e.logprob) - np.array(e.reference or e.logprob) for e in episodes]
    said = [np.array(e.said) for e in episodes]
    count = max(1, sum(int(own.sum()) for own in said))
    mean = sum(float(d[s].sum()) for d, s in zip(drifts, said, strict=True)) / count
    return [weight * (d - mean) for d in drifts]
