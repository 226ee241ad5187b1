"""Prompts as callers of the Python API hold them: texts, token ids, arrays, what a tokenizer
returns, vLLM's dictionaries. What cannot be read as a prompt is refused, never guessed at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any

Prompt = str | list[int]
_EXAMPLES = "give texts, lists of token ids, or what the model's tokenizer returns"


def read_prompts(given: Any) -> list[Prompt]:
    """One prompt or several, as several. ValueError for what is no prompt."""
    given = _plain(given)
    if isinstance(given, Mapping):
        return _read_mapping(given)
    if isinstance(given, str) or _are_tokens(given):
        return [read_prompt(given)]
    if isinstance(given, bytes) or not isinstance(given, Sequence | Iterator):
        raise ValueError(f"prompts: {_EXAMPLES}, not {type(given).__name__}")
    return [read_prompt(prompt) for prompt in given]


def read_prompt(given: Any) -> Prompt:
    """A single prompt. ValueError for what is none."""
    given = _plain(given)
    if isinstance(given, str):
        return given
    if isinstance(given, Mapping):
        prompts = _read_mapping(given)
        if len(prompts) != 1:
            raise ValueError(f"prompts: {len(prompts)} of them where one is expected")
        return prompts[0]
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        return [_token(token) for token in given]
    raise ValueError(f"prompts: {_EXAMPLES}, not {type(given).__name__}")


def _read_mapping(given: Mapping[str, Any]) -> list[Prompt]:
    """vLLM's `{"prompt": ...}` and `{"prompt_token_ids": ...}`, or a tokenizer's `input_ids`, of
    which the attention mask tells the padding."""
    if "role" in given:
        raise ValueError("prompts: this is a message; LLM.chat answers messages")
    names = {"prompt", "prompt_token_ids", "input_ids", "attention_mask", "token_type_ids"}
    if unknown := [name for name, v in given.items() if name not in names and v is not None]:
        raise ValueError(f"prompts: {unknown[0]!r} of a prompt is not supported; leave it out")
    if "input_ids" not in given:
        prompt = given.get("prompt_token_ids")
        prompt = given.get("prompt") if prompt is None else prompt
        if prompt is None or isinstance(prompt, Mapping):
            raise ValueError(f"prompts: {_EXAMPLES}, not a dictionary with {sorted(given)}")
        return [read_prompt(prompt)]
    rows, masks = _plain(given["input_ids"]), _plain(given.get("attention_mask"))
    if not rows or _are_tokens(rows):
        rows, masks = [rows], None if masks is None else [masks]
    if masks is None:
        return [read_prompt(row) for row in rows]
    return [
        [_token(token) for token, kept in zip(row, mask, strict=True) if kept]
        for row, mask in zip(map(_plain, rows), map(_plain, masks), strict=True)
    ]


def _plain(value: Any) -> Any:
    """Arrays of any library as lists."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _are_tokens(value: Any) -> bool:
    """Whether it is the token ids of one prompt: a sequence of numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return False
    return all(not isinstance(v, str | bytes | Iterable) or _is_scalar(v) for v in value)


def _is_scalar(value: Any) -> bool:
    """A number of an array library."""
    return getattr(value, "shape", None) == ()


def _token(value: Any) -> int:
    value = _plain(value)
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ValueError(f"prompts: {value!r} is no token id; {_EXAMPLES}") from None
