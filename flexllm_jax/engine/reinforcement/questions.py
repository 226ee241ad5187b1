"""What a job's grader asks models: requests of the engine that the job runs in.

Graders ask in threads of workers and wait; what they ask is sent, and answered, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling.constraints import Constraint
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from flexllm_jax.finetune.reinforcement.prompts import PromptReader
from flexllm_jax.graders import Completion, GradingError, Question, Usage
from flexllm_jax.peft.directory import Published

if TYPE_CHECKING:
    from flexllm_jax.engine.engine import Engine


class Questions:
    """Answers what the graders of `job` ask (`graders.Complete`). The adapters that they ask stay
    loaded from `begin` to `close`. `between_steps` has a function called in the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        reader: PromptReader,
        slo_class: str,
        job: str,
        between_steps: Callable[[Callable[[], None]], None],
    ):
        config = engine.config
        self._base = config.server.model_name or config.model.path.resolve().name
        self._adapters: dict[str, Published] = {}
        self._engine, self._reader, self._slo_class = engine, reader, slo_class
        self._job, self._between_steps = job, between_steps
        self._asked: dict[Future[RequestState], RequestState] = {}
        self._closed = False

    def begin(self, models: Iterable[str]) -> None:
        """Keep the adapters among these models as they are. AdapterError when one is not loaded."""
        for name in set(models) - {self._base, *self._adapters}:
            self._adapters[name] = self._engine.adapters.directory.pin(name)

    def __call__(self, question: Question) -> Completion:
        """In a worker: wait for the answer. GradingError when there is none."""
        options = {"reasoning_effort": e} if (e := question.reasoning_effort) else {}
        most = self._engine.runner.sizes.max_model_len - question.max_tokens
        try:
            reader = self._reader.of_questions(most, options)
            tokens = reader.tokens([dict(message) for message in question.messages])
            # Small models write white space without end.
            answer = StructuredOutputsParams(
                json=dict(question.answer), disable_any_whitespace=True
            )
            params = SamplingParams(
                max_tokens=question.max_tokens,
                temperature=question.temperature,
                top_p=question.top_p,
                seed=question.seed,
                structured_outputs=answer,
            )
            (constraint,) = self._engine.constraints.make(params, 1)
            future: Future[RequestState] = Future()
            send = partial(self._send, future, tokens, params, question.model, constraint)
            self._between_steps(send)
            state = future.result()
        except ValueError as error:
            reason = f"{question.field}: {error}"
            raise GradingError("model_grader_server_error", reason) from None
        text = state.text(self._engine.detokenizer)
        usage = Usage(len(state.prompt), len(state.output), state.cached_tokens)
        return Completion(text, state.finish_reason == "stop", usage)

    def _send(
        self,
        future: Future[RequestState],
        tokens: tuple[int, ...],
        params: SamplingParams,
        model: str,
        constraint: Constraint | None,
    ) -> None:
        if self._closed:
            future.set_exception(ValueError("the job has ended"))
            return
        try:
            self._asked[future] = self._engine.add_request(
                tokens,
                params,
                self._adapters.get(model),
                slo_class=self._slo_class,
                constraint=constraint,
                on_finish=partial(self._answered, future),
                job=self._job,
            )
        except ValueError as error:
            future.set_exception(error)

    def _answered(self, future: Future[RequestState], state: RequestState) -> None:
        if self._asked.pop(future, None) is None:
            return  # the job has ended, and nobody waits
        if state.error or state.finish_reason == "cancelled":
            future.set_exception(ValueError(state.error or "its answer was cancelled"))
        else:
            future.set_result(state)

    def close(self) -> None:
        """Nobody waits any more."""
        self._closed = True
        asked, self._asked = self._asked, {}
        for future, state in asked.items():
            future.set_exception(ValueError("the job has ended"))
            self._engine.cancel(state)
        adapters, self._adapters = self._adapters, {}
        for adapter in adapters.values():
            self._engine.adapters.directory.unpin(adapter)
