"""The body that creates a finetuning job, and the FinetuneConfig it becomes."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from flexllm_jax.config import (
    ALL_MODULES,
    METHODS,
    Config,
    LoraInit,
    ReinforcementConfig,
    TargetModule,
    ranks_taken,
)
from flexllm_jax.config.fields import room_for
from flexllm_jax.config.sections.graders import read_grader
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Completion, Grader, Question, make_grader
from flexllm_jax.server.finetuning.methods import (
    GENERATIONS,
    Hyperparameters,
    Method,
    Reinforcement,
    ReinforcementHyperparameters,
)
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError

AUTO_EPOCHS = 3
AUTO_BATCH_TOKENS = 4096
BASE_LEARNING_RATE = 2e-4


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half a surrogate pair, which is no character") from None
    return text


def _short(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > 16:  # before each item is told to be wrong
        raise ValueError(f"it has {len(given)} items, and may have 16")
    return given


Text = Annotated[str, AfterValidator(_encodable)]
_TAGS = Field(max_length=50, fail_fast=True)


class Wandb(Body):
    """A run at Weights & Biases, in the account of who runs the server."""

    project: Annotated[Text, Field(min_length=1, max_length=128)]
    name: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    entity: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    tags: Annotated[list[Annotated[Text, Field(min_length=1, max_length=64)]], _TAGS] | None = None


class Integration(Body):
    """Where the progress of a job is told."""

    type: Literal["wandb"]
    wandb: Wandb


class CreateJob(Body):
    """POST /v1/fine_tuning/jobs. From `learning_rate` on, fields are ours (`extra_body`)."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = (
        None
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
            BeforeValidator(_short),
            Field(max_length=16),
        ]
        | None
    ) = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    lora_target_modules: (
        Annotated[list[TargetModule], Field(fail_fast=True, min_length=1)] | None
    ) = None
    lora_init: LoraInit = "default"
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    batch_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    train_on: Literal["completion", "all"] = "completion"
    warmup: Annotated[int, Field(ge=0, lt=2**31)] = 0
    b_lr_ratio: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    weight: Annotated[float, Field(gt=0)] = 1.0
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0

    @property
    def method_type(self) -> str:
        """How to train."""
        return self.method.type if self.method else "supervised"

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, wherever they were given."""
        own = getattr(self.method, self.method_type, None)
        given = (own.hyperparameters if own else None) or self.hyperparameters
        return given or Hyperparameters()

    @property
    def settings(self) -> dict[str, Any]:
        """What its method is set to; what is left to choose is not there."""
        rewards = self.rewards
        return self.chosen.settings | ({"grader": rewards.grader} if rewards else {})

    @property
    def rewards(self) -> Reinforcement | None:
        """What gives the rewards that it learns from."""
        return self.method.reinforcement if self.method else None

    def grader_of(self, rewards: Reinforcement, config: Config) -> Grader:
        """To look at; it cannot ask models. UserError for one that cannot be used."""
        where = "method.reinforcement"
        try:
            told = read_grader(rewards.grader)
        except UserError as error:
            raise UserError(f"{where}.{error}") from None
        return make_grader(told, _unasked, config.graders, field=f"{where}.grader")

    def check(self, config: Config) -> None:
        """ApiError 400 for what this server's adapters have no room for, and for a grader that
        cannot be used."""
        bank = config.adapters
        self._check_method(config)
        if self.integrations and config.trackers.wandb is None:
            raise ApiError(
                400,
                "integrations: this server is not connected to wandb; leave it out, or ask who "
                "runs the server (trackers.wandb)",
                param="integrations",
            )
        if self.train_on == "all" and METHODS[self.method_type].pairs:
            raise ApiError(
                400,
                f"train_on: all is not for method {self.method_type}, which compares answers",
                param="train_on",
            )
        most = bank.max_rank // ranks_taken(self.lora_init)
        if (self.lora_rank or 1) > most:
            raise ApiError(
                400,
                f"lora_rank: got {self.lora_rank}; this server's adapters have at most {most} with "
                f"lora_init: {self.lora_init} (adapters.max_rank is {bank.max_rank})",
                param="lora_rank",
            )
        if self.lora_dropout and not config.finetune.with_dropout:
            raise ApiError(
                400,
                f"lora_dropout: got {self.lora_dropout}; this server trains without dropout: leave "
                "it out, or ask who runs the server (finetune.dropout)",
                param="lora_dropout",
            )
        if self.lora_dropout and most < bank.max_rank:
            raise ApiError(
                400,
                f"lora_dropout: got {self.lora_dropout}, which would also drop the start that "
                f"lora_init: {self.lora_init} subtracts; leave one of them out",
                param="lora_dropout",
            )
        wanted = self.lora_target_modules or ()
        outside = {module for module in wanted if not room_for(module, bank.target_modules)}
        if outside:
            raise ApiError(
                400,
                f"lora_target_modules: {', '.join(sorted(outside))} not among "
                f"{', '.join(bank.target_modules)} (adapters.target_modules)",
                param="lora_target_modules",
            )

    def _check_method(self, config: Config) -> None:
        """ApiError 400 for what no reinforcement job can have."""
        if self.rewards is None:
            return
        where = "method.reinforcement"
        try:
            method = ReinforcementConfig.model_validate(self.chosen.settings)
            self.grader_of(self.rewards, config)
        except ValidationError as error:
            text = error.errors()[0]["msg"].removeprefix("Value error, ")
            where += ".hyperparameters"
            raise ApiError(400, f"{where}: {text}", param=where) from None
        except UserError as error:
            raise ApiError(400, str(error), param=f"{where}.grader") from None
        if method.max_tokens >= config.finetune.max_tokens:
            raise ApiError(
                400,
                f"{where}.hyperparameters.max_tokens: {method.max_tokens}, and a prompt with its "
                f"answer has at most {config.finetune.max_tokens} tokens (finetune.max_tokens)",
                param=f"{where}.hyperparameters.max_tokens",
            )

    def tree(
        self, config: Config, name: str, seed: int, mean_tokens: float
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of a FinetuneConfig, without files, and the hyperparameters they stand for.

        `mean_tokens` of a training row turn a batch of rows into one of tokens.
        """
        chosen, bank = self.chosen, config.adapters
        multiplier = chosen.learning_rate_multiplier
        factor = 1.0 if multiplier == "auto" else float(multiplier)
        rate = self.learning_rate or BASE_LEARNING_RATE * factor
        epochs = AUTO_EPOCHS if chosen.n_epochs == "auto" else chosen.n_epochs
        batch_tokens = self.batch_tokens
        if batch_tokens is None:
            size = chosen.batch_size
            auto = size == "auto"
            batch_tokens = AUTO_BATCH_TOKENS if auto else max(1, round(int(size) * mean_tokens))
        rank = self.lora_rank or min(16, bank.max_rank // ranks_taken(self.lora_init))
        modules = self.lora_target_modules or [m for m in ALL_MODULES if m in bank.target_modules]
        fields = {
            "name": name,
            "train_on": self.train_on,
            "method": {"type": self.method_type, **self.settings},
            "peft": {
                "r": rank,
                "alpha": self.lora_alpha or 2.0 * rank,
                "target_modules": modules,
                "init": self.lora_init,
                "lora_dropout": self.lora_dropout,
            },
            "optimizer": {"lr": rate, "warmup": self.warmup, "b_lr_ratio": self.b_lr_ratio},
            "batch_tokens": batch_tokens,
            **({"epochs": epochs} if self.max_steps is None else {"steps": self.max_steps}),
            "seed": seed,
            "weight": self.weight,
            "priority": self.priority,
            "validation_every": 0,
        }
        method = METHODS[self.method_type].model_validate(self.settings)
        shown = {
            "n_epochs": epochs,
            "batch_size": max(1, round(batch_tokens / mean_tokens)),
            "learning_rate_multiplier": rate / BASE_LEARNING_RATE,
            **method.model_dump(exclude={"type", "grader"}),
        }
        if isinstance(chosen, ReinforcementHyperparameters):
            fields["validation_every"] = shown["eval_interval"] = chosen.validation_every
            shown["compute_multiplier"] = shown["num_generations"] / GENERATIONS
            shown["reasoning_effort"] = chosen.reasoning_effort or "default"
        return fields, shown


def _unasked(_: Question) -> Completion:
    raise RuntimeError("a grader that is only looked at asks nobody")


def random_seed() -> int:
    """For a job that names none."""
    return secrets.randbelow(2**31)


class ValidateGrader(Body):
    """POST /v1/fine_tuning/alpha/graders/validate."""

    grader: dict[str, Any] = Field(description="A grader, as docs/graders.md has them.")


class RunGrader(ValidateGrader):
    """POST /v1/fine_tuning/alpha/graders/run."""

    model_sample: str = Field(description="The text to grade; `sample` of templates.")
    item: dict[str, Any] | None = Field(default=None, description="Its row; `item` of templates.")
