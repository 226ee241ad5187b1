"""Fields of `finetune.jobs.N.method`: what a job's rows are, and the loss that it trains with."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from flexllm_jax.config.fields import Float, Section

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


PreferenceConfig = DpoConfig | IpoConfig | SimpoConfig
MethodConfig = SupervisedConfig | PreferenceConfig
METHODS: dict[str, type[MethodConfig]] = {
    config.model_fields["type"].default: config for config in get_args(MethodConfig)
}
PREFERENCE_METHODS = tuple(name for name, config in METHODS.items() if config.pairs)
