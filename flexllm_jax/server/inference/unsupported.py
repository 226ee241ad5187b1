"""Fields of requests that other servers know and this one does not do.

A field that would change the result is refused by its name, unless its value asks for nothing. What
is in no list here means nothing to a result (`user`, `store`, `metadata`), or nothing to anybody.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from flexllm_jax.server.http.errors import ApiError

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
_OPENAI = (
    "audio",
    "function_call",
    "functions",
    "modalities",
    "reasoning",
    "suffix",
    "verbosity",
    "web_search_options",
)
_VLLM = (
    "cache_salt",
    "early_stopping",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "kv_transfer_params",
    "length_penalty",
    "logits_processors",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "priority",
    "prompt_embeds",
    "repetition_detection",
    "spaces_between_special_tokens",
    "structural_tag",
    "use_beam_search",
    "vllm_xargs",
)
_SGLANG = (
    "custom_logit_processor",
    "custom_params",
    "extra_key",
    "input_embeds",
    "lora_path",
    "no_stop_trim",
    "return_hidden_states",
    "sampling_seed",
    "session_params",
    "stop_regex",
)
_OTHERS = (  # of llama.cpp, Text Generation Inference and transformers
    "dry_multiplier",
    "dynatemp_range",
    "epsilon_cutoff",
    "eta_cutoff",
    "grammar",
    "max_new_tokens",
    "min_new_tokens",
    "mirostat",
    "n_predict",
    "no_repeat_ngram_size",
    "num_beams",
    "penalty_alpha",
    "repeat_penalty",
    "tfs_z",
    "top_a",
    "top_n_sigma",
    "typical_p",
    "xtc_probability",
)
_UNSUPPORTED = {*_OPENAI, *_VLLM, *_SGLANG, *_OTHERS}
# Values that ask for nothing besides, or instead of, those that mostly do.
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "function_call": (*_NOTHING, "none", "auto"),  # among no functions
    "modalities": (*_NOTHING, ["text"]),
    "spaces_between_special_tokens": (None, True),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    **dict.fromkeys(("length_penalty", "num_beams", "repeat_penalty"), (*_NOTHING, 1)),
    **dict.fromkeys(("tfs_z", "typical_p"), (*_NOTHING, 1)),
    **dict.fromkeys(("dry_multiplier", "dynatemp_range", "epsilon_cutoff"), (*_NOTHING, 0)),
    **dict.fromkeys(("eta_cutoff", "mirostat", "no_repeat_ngram_size"), (*_NOTHING, 0)),
    **dict.fromkeys(("penalty_alpha", "priority", "top_a", "xtc_probability"), (*_NOTHING, 0)),
    "top_n_sigma": (*_NOTHING, -1),
}


def refuse_unsupported(body: BaseModel, *others: type[BaseModel]) -> None:
    """ApiError 400 for a field that would change the answer, and cannot here: one of the lists, or
    one that is known only in the `others` of a request's kinds."""
    for name, value in (body.model_extra or {}).items():
        if name in _UNSUPPORTED and not _is_among(value, _DEFAULTS.get(name, _NOTHING)):
            raise ApiError(400, f"{name}: is not supported; leave it out", param=name)
        fields = [kind.model_fields[name] for kind in others if name in kind.model_fields]
        nothing = (*_DEFAULTS.get(name, _NOTHING), *(field.default for field in fields))
        if fields and not _is_among(value, nothing):
            raise ApiError(400, f"{name}: is no field of this request; leave it out", param=name)


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of them; 0 is not False."""
    return any(type(value) is type(each) and value == each for each in values)
