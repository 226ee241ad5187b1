"""The fields of a `config.json`: read with their types, and counted, so that none that could change
what the model computes is passed over."""

from collections.abc import Collection, Mapping
from typing import Any

from flexllm_jax.errors import UserError


class ModelConfigError(UserError):
    """A `config.json` that is missing, broken or describes an unsupported model; one line."""


# Of every model: how it was trained, saved or sampled, and not what its logits are.
HARMLESS = frozenset(
    {
        *("architectures", "model_type", "auto_map", "_name_or_path", "name_or_path"),
        *("transformers_version", "dtype", "torch_dtype", "tokenizer_class", "unsloth_version"),
        *("unsloth_fixed", "model_max_length", "use_cache", "initializer_range", "pad_token_id"),
        *(
            "bos_token_id",
            "eos_token_id",
            "sep_token_id",
            "decoder_start_token_id",
            "task_specific_params",
        ),
        *("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"),
        *("output_hidden_states", "output_attentions", "return_dict", "return_dict_in_generate"),
        *("output_scores", "chunk_size_feed_forward", "finetuning_task", "problem_type"),
        *("id2label", "label2id", "num_labels", "prefix", "torchscript", "pretraining_tp"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        # What generated texts: the engine's requests say it.
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
        *("num_beam_groups", "diversity_penalty", "top_k", "top_p", "typical_p", "length_penalty"),
        *("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("num_return_sequences", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "generation_config"),
    }
)
_OFF = (None, False, "", [], {})


class Fields:
    """A JSON object of a configuration; `name` is what messages call it. most_tokens: the longest
    text that the model is to be used for, if that is known."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        name: str = "config.json:",
        most_tokens: int | None = None,
    ):
        self._raw, self._name, self.most_tokens = raw, name, most_tokens
        self._read: set[str] = set()

    def __contains__(self, field: str) -> bool:
        return self._raw.get(field) is not None

    def get(self, field: str, default: Any = None) -> Any:
        """A value as it is; null is the default."""
        self._read.add(field)
        value = self._raw.get(field)
        return default if value is None else value

    def is_null(self, field: str) -> bool:
        """Whether it is there, and null: to few fields that is something else than the default."""
        self._read.add(field)
        return field in self._raw and self._raw[field] is None

    def error(self, field: str, reason: str) -> ModelConfigError:
        """An error that names a field with its value."""
        return ModelConfigError(f"{self._name} {field}={self._raw.get(field)!r} {reason}")

    def positive_int(self, field: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._needed(field, default, "a positive integer")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(field, "must be a positive integer")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._needed(field, default, "a positive number")
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(field, "must be a positive number")
        return float(value)

    def boolean(self, field: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, "must be true or false")
        return value

    def choice(self, field: str, choices: Collection[str], default: str) -> str:
        """One of some words."""
        value = self.get(field, default)
        if not isinstance(value, str) or value not in choices:
            only = " and ".join(map(repr, choices))
            raise self.error(
                field, f"is not supported; only {only} {'is' if len(choices) == 1 else 'are'}"
            )
        return value

    def refuse(self, field: str, remedy: str) -> None:
        """Refuse a field that is on, whatever its value."""
        if self.get(field) not in _OFF:
            raise self.error(field, f"is not supported; {remedy}")

    def refuse_unread(self, reader: str, harmless: Collection[str]) -> None:
        """Refuse the first field that is on, was not read, and is not known to change nothing."""
        for field in sorted(self._raw.keys() - self._read - set(harmless) - HARMLESS):
            if self._raw[field] not in _OFF:
                raise self.error(
                    field,
                    f"is not known to {reader}, so it could change what the model computes; remove "
                    "it if it changes nothing",
                )

    def _needed(self, field: str, default: Any, kind: str) -> Any:
        value = self.get(field, default)
        if value is None:
            raise ModelConfigError(f"{self._name} {field} is missing; it must be {kind}")
        return value
