"""Fields of `finetune.jobs.N.method`: what a job's rows are, and the loss that it trains with."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from flexllm_jax.config.fields import Float, Int, Section
from flexllm_jax.config.sections.graders import GraderConfig

Beta = Annotated[Float, Field(gt=0)]


class SupervisedConfig(Section):
    """Cross-entropy of what is to be said, from rows with one answer each."""

    pairs: ClassVar[bool] = False  # whether a row has two answers, of which one is preferred
    type: Literal["supervised"] = Field(
        default="supervised", description="How to train: answers as they are."
    )


class DpoConfig(Section):
    """Direct preference optimization: a preferred answer is to gain more than a rejected one, in
    log-probability over the weights that the job starts from."""

    pairs: ClassVar[bool] = True
    type: Literal["dpo"] = Field(
        default="dpo", description="How to train: DPO, on pairs of answers."
    )
    beta: Beta = Field(
        default=0.1, description="Of dpo: how strongly it is held to the weights it starts from."
    )


class IpoConfig(Section):
    """Identity preference optimization: the gain per token is to differ by 1 / (2 beta), not by as
    much as can be."""

    pairs: ClassVar[bool] = True
    type: Literal["ipo"] = Field(
        default="ipo", description="How to train: IPO, on pairs of answers."
    )
    beta: Beta = Field(
        default=0.1, description="Of ipo: gains per token are to differ by 1 / (2 beta)."
    )


class SimpoConfig(Section):
    """Simple preference optimization: log-probabilities per token without a reference, apart by a
    margin."""

    pairs: ClassVar[bool] = True
    type: Literal["simpo"] = Field(
        default="simpo", description="How to train: SimPO, on pairs of answers."
    )
    beta: Beta = Field(default=2.0, description="Of simpo: scale of log-probabilities per token.")
    gamma: Float = Field(default=1.0, ge=0, description="Of simpo: margin, after that scale.")


class ReinforcementConfig(Section):
    """Learning from rewards: a prompt is answered several times, and what got more than the others
    of its group becomes more likely (GRPO)."""

    pairs: ClassVar[bool] = False
    type: Literal["reinforcement"] = Field(
        default="reinforcement", description="How to train: on own answers, by their rewards."
    )
    grader: GraderConfig | None = Field(
        default=None,
        description="Of reinforcement: what gives the rewards. null: a function, from Python.",
    )
    batch_size: Int = Field(
        default=8, ge=1, description="Of reinforcement: prompts of a batch, each with its group."
    )
    num_generations: Int = Field(
        default=8, ge=2, description="Of reinforcement: answers to a prompt, which is its group."
    )
    max_tokens: Int = Field(
        default=256, ge=1, description="Of reinforcement: most tokens of an answer, or of a turn."
    )
    max_turns: Int = Field(
        default=8, ge=1, description="Of reinforcement: most turns in an environment."
    )
    stop: tuple[str, ...] = Field(
        default=(), description="Of reinforcement: strings that end an answer."
    )
    loss: Literal["importance_sampling", "ppo", "cispo", "gspo"] = Field(
        default="importance_sampling", description="Of reinforcement: the loss of a token."
    )
    clip_low: Float | None = Field(
        default=None, ge=0, description="Of ppo, cispo, gspo: least ratio. null: the loss's own."
    )
    clip_high: Float | None = Field(
        default=None,
        gt=0,
        description="Largest ratio. null: the loss's own; of importance_sampling 2, beyond which "
        "weights of answers from earlier weights are truncated.",
    )
    scale_rewards: Literal["none", "group", "batch"] = Field(
        default="none",
        description="Of reinforcement: advantages are divided by nothing, or by the deviation of "
        "rewards in a group or in the batch.",
    )
    normalization: Literal["dapo", "grpo", "dr_grpo"] = Field(
        default="dapo",
        description="Of reinforcement: a mean over all tokens (dapo), over answers of the mean of "
        "each (grpo), or over answers of sums divided by max_tokens (dr_grpo).",
    )
    equal_groups: Literal["keep", "drop", "refill"] = Field(
        default="keep",
        description="Of reinforcement: groups of equal rewards count in the means, or not, or are "
        "replaced by those of other prompts.",
    )
    num_iterations: Int = Field(
        default=1, ge=1, description="Of reinforcement: optimizer steps on a batch."
    )
    steps_ahead: Int = Field(
        default=0,
        ge=0,
        le=8,
        description="Of reinforcement: batches that weights may be older than those they train. 0: "
        "answers come from the weights they train; 1: they come while the batch before trains.",
    )
    kl_coef: Float = Field(
        default=0.0,
        ge=0,
        description="Of reinforcement: weight of the divergence from the start, taken off the "
        "advantages.",
    )
    reasoning_effort: str | None = Field(
        default=None, description="Of reinforcement: for chat templates that read it."
    )
    eval_samples: Int = Field(
        default=1, ge=1, description="Of reinforcement: answers to each validation prompt."
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.clip_low is not None and self.loss == "importance_sampling":
            raise ValueError("clip_low is not for loss importance_sampling; leave it out")
        if (self.clip_low or 0) > (math.inf if self.clip_high is None else self.clip_high):
            raise ValueError(
                f"clip_low {self.clip_low} is more than clip_high {self.clip_high}: they bound a "
                "ratio, which is 1 where nothing changed"
            )
        return self


PreferenceConfig = DpoConfig | IpoConfig | SimpoConfig
MethodConfig = SupervisedConfig | PreferenceConfig | ReinforcementConfig
METHODS: dict[str, type[MethodConfig]] = {
    config.model_fields["type"].default: config for config in get_args(MethodConfig)
}
PREFERENCE_METHODS = tuple(name for name, config in METHODS.items() if config.pairs)
