"""Episodes of a reinforcement job as requests of this engine, to a version of its adapter.

They belong to the class that may wait longest and leave rows free for others. Of a group one
request goes first: the others find its prompt in the prefix cache. Graders and environments run in
threads of their own; what they have done is taken in between two steps.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from flexllm_jax.config import ReinforcementConfig
from flexllm_jax.config.sections.graders import asked_models
from flexllm_jax.engine.reinforcement.questions import Questions
from flexllm_jax.engine.reinforcement.versions import Version
from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.reinforcement.episodes import Episode, Group
from flexllm_jax.finetune.reinforcement.source import ReinforcementSource
from scheduler.simulation.rollouts import ROWS_LEFT

if TYPE_CHECKING:
    from flexllm_jax.engine.engine import Engine

log = logging.getLogger(__name__)
_WORKERS = 4
_MOST_LOST = 3  # requests of a turn


@dataclass(eq=False)
class _Turn:
    """A turn of an episode: waiting to be a request, or one (`state`). scores: nothing is said,
    and what was is scored."""

    group: Group
    episode: Episode
    version: Version | None
    scores: bool = False
    state: RequestState | None = None
    lost: int = 0  # requests that the engine gave up


class Rollouts:
    """Plays the groups of one job (`episodes.Sampler`); all but workers is the engine's thread."""

    def __init__(self, engine: Engine, job: FinetuneJob, source: ReinforcementSource):
        assert isinstance(source.method, ReinforcementConfig)
        self._engine, self._job = engine, job
        self._method, self._game, self._longest = source.method, source.game, source.longest
        self._slo_class = engine.config.scheduler.least_urgent
        self._waiting: deque[_Turn] = deque()
        self._running: dict[str, _Turn] = {}  # by request id
        self._leading: list[tuple[_Turn, list[_Turn]]] = []  # and those that wait for its prompt
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # by workers
        self._workers = _Workers(f"rollouts of {job.name}")
        self._questions: Questions | None = None
        if source.asking is not None and source.reader is not None:
            self._questions = Questions(
                engine, source.reader, self._slo_class, job.name, self._later
            )
            source.asking.engine = self._questions
        self.paused = False
        self._versions = engine.versions
        self._held: list[Version] = []
        self._start: Version | None = None  # of the weights that the job started from; None: none
        self._absent = False  # only turns are left whose versions wait for slots
        self._said_tokens = self._prompt_tokens = 0

    def begin(self) -> None:
        """Hold what is needed to the end, until `close`. NoFreeSlot, or AdapterError."""
        job = self._job
        if self._questions is not None and self._method.grader is not None:
            asked = asked_models(self._method.grader.model_dump())
            self._questions.begin(part["model"] for _, part in asked)
        if self._method.kl_coef and not job.adapter.changes_nothing:
            row = self._engine.adapters.to_row(job.name, job.adapter)
            self._start = self.thaw(row.weights, row.scales)

    # -- what the source asks for -----------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Said so far."""
        return self._said_tokens

    @property
    def computed(self) -> int:
        """Tokens that went through for it: what was said, and of prompts what was not cached."""
        return self._said_tokens + self._prompt_tokens

    def freeze(self) -> Version:
        """The adapter as it is now: a copy on the device, or on the host where slots are short."""
        return self._keep(self._versions.freeze(self._job))

    def thaw(self, values: list, scales: list) -> Version:
        """A version that a checkpoint kept."""
        return self._keep(self._versions.thaw(self._job, values, scales))

    def _keep(self, version: Version) -> Version:
        self._held.append(version)
        return version

    def read(self, version: Version) -> list:
        """Its weights on the host; waits for the device."""
        return self._versions.read(version)

    def release(self, version: Version) -> None:
        """No more requests to it will come."""
        self._held.remove(version)
        self._versions.release(version)

    def play(self, groups: Sequence[Group], version: Version) -> None:
        """Begin; each group says when it is done."""
        for group in groups:
            if self._game.one_turn:
                for episode in group.episodes:
                    if not episode.over:
                        episode.hear(group.prompt.tokens)
                self._begin(group, version)
            else:
                begin = partial(self._game.begin, group)
                self._work(begin, partial(self._begin, group, version), group)

    def text(self, episode: Episode) -> str:
        """What an episode has said last; one of a checkpoint has no request, and knows it."""
        request = episode.request
        return episode.text if request is None else request.text(self._engine.detokenizer)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do here until a worker is done."""
        if not self._done.empty():
            return False
        absent = self._absent and not self._versions.due
        return self.paused or not (self._running or (self._waiting and not absent))

    # -- between two steps ------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what workers have done, and send requests."""
        while not self._done.empty():
            self._done.get()()
        if self.paused:
            return
        for leader, others in list(self._leading):
            state = leader.state
            if state is not None and (state.first_token_at or state.finished):
                self._leading.remove((leader, others))
                self._waiting.extendleft(reversed(others))
        self._send_turns()

    def _send_turns(self) -> None:
        """As many as may run; those of a version without a slot wait for it."""
        absent: set[Version] = set()
        for turn in list(self._waiting):
            if len(self._running) >= self._most:
                break
            version = turn.version
            if version in absent:
                continue
            if version is None or self._bring(version):
                self._waiting.remove(turn)
                self._send(turn)
            else:
                absent.add(version)
        self._absent = bool(absent) and not self._running

    def _bring(self, version: Version) -> bool:
        if not version.placed:
            self._job.note(
                "adapters.slots are short: versions of its adapter wait in the host's memory and "
                "answer by turns; raise adapters.slots"
            )
        return self._versions.bring(version)

    @property
    def _most(self) -> int:
        """Requests at once: an equal part of the rows that all jobs of this kind may have."""
        rows, jobs = self._engine.runner.sizes.rows, self._engine.trainer.jobs.values()
        sharing = sum(j.sampler is not None and j.running and not j.paused for j in jobs)
        return max(1, (rows - max(1, rows // ROWS_LEFT)) // max(1, sharing))

    def pause(self) -> None:
        """Drop what is under way; it will begin its turn again, with the same seed."""
        self.paused = True
        for turn in list(self._running.values()):
            self._drop(turn)
            turn.state = None
            self._waiting.appendleft(turn)
        for version in self._held:
            self._versions.forgo(version)

    def resume(self) -> None:
        """Go on."""
        self.paused = False

    def close(self) -> None:
        """Drop everything: the job has ended."""
        self.paused = True
        self._workers.close()
        if self._questions is not None:
            self._questions.close()
        for turn in list(self._running.values()):
            self._drop(turn)
        self._waiting.clear()
        self._leading.clear()
        for version in self._held:
            self._versions.release(version)
        self._held.clear()

    # -- turns ------------------------------------------------------------------------------------

    def _begin(self, group: Group, version: Version) -> None:
        """Let the episodes of a group begin, the first before the others."""
        turns = [_Turn(group, e, version) for e in group.episodes if not e.over]
        if not turns:
            self._check_over(group)
            return
        least = self._engine.scheduler.pool.least_shared
        if least is not None and self._game.one_turn and len(group.prompt.tokens) > least:
            self._leading.append((turns[0], turns[1:]))
            turns = turns[:1]
        self._waiting += turns

    def _send(self, turn: _Turn) -> None:
        episode, method = turn.episode, self._method
        params = (
            SamplingParams(max_tokens=1, prompt_logprobs=0)
            if turn.scores
            else SamplingParams(
                max_tokens=min(method.max_tokens, self._longest - len(episode.tokens)),
                temperature=1.0,
                seed=(episode.seed + 0x9E3779B1 * episode.turns) & 0x7FFFFFFF,
                stop=method.stop,
                logprobs=0,
            )
        )
        try:
            turn.state = self._engine.add_request(
                tuple(episode.tokens),
                params,
                turn.version and turn.version.published,
                slo_class=self._slo_class,
                on_finish=partial(self._said, turn),
                job=self._job.name,
            )
        except ValueError as error:  # it can never be served
            episode.fail(str(error))
            self._check_over(turn.group)
        else:
            self._running[turn.state.request_id] = turn

    def _drop(self, turn: _Turn) -> None:
        assert turn.state is not None
        del self._running[turn.state.request_id]
        self._engine.cancel(turn.state)

    def _said(self, turn: _Turn, state: RequestState) -> None:
        """A request has ended."""
        if self._running.pop(state.request_id, None) is None:
            return  # dropped
        episode = turn.episode
        self._prompt_tokens += len(state.prompt) - state.cached_tokens
        if state.finish_reason == "cancelled":  # by the engine: it stops, or has no memory left
            turn.lost += 1
            if turn.lost < _MOST_LOST:  # again, from its beginning, with the same seed
                turn.state = None
                self._waiting.append(turn)
            else:
                episode.fail(state.error or "its request was cancelled")
                self._check_over(turn.group)
            return
        if turn.scores:
            known = zip(episode.tokens[1:], state.prompt_logprobs[1:], strict=True)
            episode.reference = [0.0, *(own[token] for token, own in known if own)]
            turn.group.done = all(e.reference is not None for e in turn.group.episodes if e.length)
            return
        logprobs = [own[token] for token, own in zip(state.output, state.logprobs, strict=True)]
        episode.say(state.output, logprobs)
        episode.request, episode.cut = state, state.finish_reason == "length"
        self._said_tokens += len(state.output)
        if self._game.one_turn:
            episode.over = True
            self._check_over(turn.group)
        else:
            work, after = partial(self._answer, episode), partial(self._answered, turn)
            self._work(work, after, turn.group)

    def _answer(self, episode: Episode) -> None:
        """In a worker."""
        episode.text = self.text(episode)
        self._game.answer(episode)

    def _answered(self, turn: _Turn) -> None:
        if turn.episode.over:
            self._check_over(turn.group)
        else:
            self._waiting.append(_Turn(turn.group, turn.episode, turn.version))

    def _check_over(self, group: Group) -> None:
        if all(episode.over for episode in group.episodes):
            self._work(partial(self._grade, group), partial(self._graded, group), group)

    def _grade(self, group: Group) -> None:
        """In a worker."""
        if self._game.one_turn:
            for episode in group.episodes:
                episode.text = self.text(episode)
        self._game.grade(group)

    def _graded(self, group: Group) -> None:
        said = [e for e in group.episodes if e.length and e.reference is None]
        if self._method.kl_coef and said:
            self._waiting += [_Turn(group, episode, self._start, scores=True) for episode in said]
        else:
            group.done = True

    def _work(self, work: Callable[[], None], after: Callable[[], None], group: Group) -> None:
        """Do something in a worker, and then something between two steps."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # a user's program
                reason = " ".join(str(error).split())[:300]
                for episode in group.episodes:
                    if episode.reward is None:
                        episode.fail(f"{type(error).__name__}: {reason}")
            self._later(after)

        self._workers.do(run)

    def _later(self, do: Callable[[], None]) -> None:
        """From any thread: do something between two steps."""
        self._done.put(do)
        self._engine.wake()


class _Workers:
    """A few threads that do what they are given, in order. They end with the program, whatever
    holds them up."""

    def __init__(self, name: str):
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def do(self, work: Callable[[], None]) -> None:
        """Queue it."""
        if len(self._threads) < _WORKERS:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if not self._closed:
                work()

    def close(self) -> None:
        """Begin nothing more."""
        self._closed = True
        for _ in self._threads:
            self._work.put(None)
