"""Rows that hold two answers to a prompt, of which one is preferred, as drafts of two sequences.

What the answers share is trained in neither: the loss compares what follows the same prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexllm_jax.finetune.data.chat import Segment, UnusableRow
from flexllm_jax.finetune.data.readers import (
    Draft,
    Item,
    Row,
    drafts_of,
    plain_prompt,
    read_row_conversation,
    with_context,
)
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import read_messages

_ANSWERS = ("chosen", "rejected")


def read_openai_preference(row: Row, template: ChatTemplate) -> list[Item]:
    """OpenAI's: `input` with messages, and two lists of answering messages."""
    given = row.inner("input")
    given.get("parallel_tool_calls")  # no template shows it
    prompt = read_messages(given.get("messages"), "input.messages")
    answers = {
        field: read_messages(row.get(field), field)
        for field in ("preferred_output", "non_preferred_output")
    }
    return _pair(given, template, prompt, answers)


def read_preference(row: Row, template: ChatTemplate) -> list[Item]:
    """TRL's: `chosen` and `rejected`, texts or messages, with their prompt or after it."""
    prompt = row.get("prompt")
    if all(isinstance(row.get(field), str) for field in _ANSWERS) and not isinstance(prompt, list):
        return _plain_pair(row, None if prompt is None else row.text("prompt"))
    answers = {field: _messages_of(row, field) for field in _ANSWERS}
    if isinstance(prompt, list):
        asked = read_messages(prompt, "prompt")
        if all(answer[: len(asked)] == asked for answer in answers.values()):
            answers = {field: answer[len(asked) :] for field, answer in answers.items()}
        return _pair(row, template, asked, answers)
    if isinstance(prompt, str) and all(a[0]["role"] == "assistant" for a in answers.values()):
        return _pair(row, template, [{"role": "user", "content": prompt}], answers)
    # Whole conversations: what they have in common is the prompt, as in TRL.
    common = _common(*answers.values())
    differing = [answer[common]["role"] for answer in answers.values()]
    if differing != ["assistant", "assistant"]:
        raise UnusableRow(f"the prompts differ, at message {common}")
    asked = answers["chosen"][:common]
    return _pair(row, template, asked, {field: a[common:] for field, a in answers.items()})


def _messages_of(row: Row, field: str) -> list[dict[str, Any]]:
    value = row.get(field)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return read_messages(value, field)


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with alike; of each at least one is left."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), most)


def _plain_pair(row: Row, prompt: str | None) -> list[Item]:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if prompt is None:
        common = _common(chosen, rejected)
        common -= chosen[:common].endswith(" ")  # a space belongs to the word behind it
        if not common:
            raise UnusableRow("no `prompt`, and the answers begin with nothing in common")
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    before = Segment(plain_prompt(row, prompt), 0.0)
    return [tuple(Draft([before, Segment(text, 1.0)], raw=True) for text in (chosen, rejected))]


def _pair(
    row: Row,
    template: ChatTemplate,
    prompt: list[dict[str, Any]],
    answers: Mapping[str, list[dict[str, Any]]],
) -> list[Item]:
    """The two answers to a prompt, by the fields that hold them; nothing else is trained."""
    if not prompt:
        raise UnusableRow("no message before the answers")
    asked = read_row_conversation(row, with_context(row, prompt))
    before = [{**message, "weight": 0} for message in asked.messages]
    drafts: list[Draft] = []
    for field, answer in answers.items():
        if not answer or answer[0]["role"] != "assistant":
            raise UnusableRow(f"`{field}` must begin with an assistant message")
        own = drafts_of(template, replace(asked, messages=[*before, *answer]))
        if len(own) > 1:
            raise UnusableRow(
                f"`{field}` has turns that the chat template writes differently once the "
                "conversation goes on: make a row of the last turn"
            )
        drafts += own
    return [tuple(drafts)]
