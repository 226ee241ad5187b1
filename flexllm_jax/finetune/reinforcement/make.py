"""A reinforcement job's source from its configuration and from who gives its rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexllm_jax.config import FinetuneConfig, ReinforcementConfig
from flexllm_jax.config.sections.graders import GradersSection
from flexllm_jax.finetune.data import DatasetError
from flexllm_jax.finetune.reinforcement.games import (
    Asking,
    Environment,
    Graded,
    Played,
    Reward,
    RewardFunction,
)
from flexllm_jax.finetune.reinforcement.prompts import load_prompts, longest_episode, reader_of
from flexllm_jax.finetune.reinforcement.source import ReinforcementSource
from flexllm_jax.graders import Grader, make_grader


@dataclass(frozen=True)
class Play:
    """Who gives the rewards of a job: one of a function, a grader, or environments of rows; and
    what a grader of the job's configuration may take of the machine."""

    reward: Reward | None = None
    grader: Grader | None = None
    environment: Callable[[dict[str, Any]], Environment] | None = None
    graders: GradersSection | None = None


def reinforcement_source(
    config: FinetuneConfig,
    tokenizer: Any,
    vocab_size: int,
    longest: int,
    play: Play | None,
    max_tokens: int,
    pack_tokens: int,
    first_position: int,
) -> ReinforcementSource:
    """`longest`: tokens of a prompt with its answer. DatasetError or ValueError, in one line, when
    nothing can be done."""
    method, play = config.method, play or Play()
    assert isinstance(method, ReinforcementConfig)
    grader, asking = play.grader, Asking()
    if method.grader is not None and grader is None:
        grader = make_grader(method.grader, asking, play.graders, field="method.grader")
    given = [one for one in (play.reward, grader, play.environment) if one is not None]
    if len(given) != 1:
        what = "nothing gives" if not given else "several of reward, grader, environment give"
        raise DatasetError(
            f"job {config.name!r} is to learn from rewards and {what} them: give one of a grader, "
            "a reward function or an environment"
        )
    longest -= first_position
    reader = reader_of(method, tokenizer, vocab_size, longest)
    of_rows, needed = None if play.environment else reader, grader.reads if grader else ()
    dataset = load_prompts(config.dataset, of_rows, needed)
    validation = load_prompts(config.validation, of_rows, needed) if config.validation else None
    if play.environment:
        game = Played(play.environment, reader, method.max_turns, longest_episode(method, longest))
    else:
        game = Graded(grader or RewardFunction(play.reward))  # type: ignore[arg-type]
    longest = longest_episode(method, longest)
    source = ReinforcementSource(
        config, dataset, validation, game, longest, max_tokens, pack_tokens, first_position
    )
    source.reader, source.asking = reader, asking
    return source
