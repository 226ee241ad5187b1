"""How a job is to train, as requests tell it: OpenAI's methods and hyperparameters, and ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flexllm_jax.config import ReinforcementConfig
from flexllm_jax.server.http.body import Body

Auto = Literal["auto"]
GENERATIONS = ReinforcementConfig.model_fields["num_generations"].default
_EVAL_INTERVAL = 10  # steps


class Hyperparameters(Body):
    """OpenAI's. One that a method does not have is refused: it would be without effect."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=100_000)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1e6)] | Auto = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        """What its method is set to; what is left to choose is not there."""
        common, given = Hyperparameters.model_fields, self.model_dump().items()
        return {name: v for name, v in given if name not in common and v != "auto"}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():  # pydantic would tell each of them
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise ValueError(f"{name[:64]} is none of its hyperparameters, {known}")
        return given


class BetaHyperparameters(Hyperparameters):
    """OpenAI's of DPO; IPO has the same."""

    beta: Annotated[float, Field(gt=0, le=1e6)] | Auto = "auto"


class SimpoHyperparameters(BetaHyperparameters):
    """SimPO's, which has a margin besides."""

    gamma: Annotated[float, Field(ge=0, le=1e6)] | Auto = "auto"


class Supervised(Body):
    """Of a method."""

    hyperparameters: Hyperparameters | None = None


class Preference(Body):
    """Of a method that learns from pairs of answers."""

    hyperparameters: BetaHyperparameters | None = None


class Simpo(Body):
    """Of SimPO."""

    hyperparameters: SimpoHyperparameters | None = None


class ReinforcementHyperparameters(Hyperparameters):
    """OpenAI's, and from `num_generations` on ours (docs/reinforcement.md); None: the default."""

    compute_multiplier: Annotated[float, Field(gt=0, le=64)] | Auto = "auto"
    eval_interval: Annotated[int, Field(ge=1, lt=2**31)] | Auto = "auto"
    eval_samples: Annotated[int, Field(ge=1, le=64)] | Auto = "auto"
    reasoning_effort: Literal["default", "low", "medium", "high"] | None = None
    num_generations: Annotated[int, Field(ge=2, le=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    loss: Literal["importance_sampling", "ppo", "cispo", "gspo"] | None = None
    clip_low: Annotated[float, Field(ge=0)] | None = None
    clip_high: Annotated[float, Field(gt=0)] | None = None
    scale_rewards: Literal["none", "group", "batch"] | None = None
    normalization: Literal["dapo", "grpo", "dr_grpo"] | None = None
    equal_groups: Literal["keep", "drop", "refill"] | None = None
    num_iterations: Annotated[int, Field(ge=1, le=64)] | None = None
    steps_ahead: Annotated[int, Field(ge=0, le=8)] | None = None
    kl_coef: Annotated[float, Field(ge=0, le=1e6)] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of a ReinforcementConfig; what is left to choose is not there."""
        openai = {*Hyperparameters.model_fields, "compute_multiplier", "eval_interval"}
        given = {n: v for n, v in self.model_dump().items() if v not in (None, "auto", "default")}
        own = {name: value for name, value in given.items() if name not in openai}
        if "compute_multiplier" in given:
            answers = max(2, round(GENERATIONS * given["compute_multiplier"]))
            own = {"num_generations": answers} | own
        return own | ({"batch_size": given["batch_size"]} if "batch_size" in given else {})

    @property
    def validation_every(self) -> int:
        """Steps between validations."""
        return _EVAL_INTERVAL if self.eval_interval == "auto" else self.eval_interval


class Reinforcement(Body):
    """Of a method that learns from rewards."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters | None = None


class Method(Body):
    """How to train. `ipo` and `simpo` are ours."""

    type: Literal["supervised", "dpo", "ipo", "simpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Preference | None = None
    ipo: Preference | None = None
    simpo: Simpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _of_its_type(self) -> Method:
        for name in sorted(type(self).model_fields.keys() - {"type", self.type}):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is given, and type is {self.type}: leave one of them out")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("reinforcement is missing, with the grader that gives the rewards")
        return self
