r"""Conversations as text, with the assistant's turns marked as what is trained.

Where a turn begins and ends is found by applying the chat template to growing prefixes of the
conversation, so any template works, with generation markers or without. A turn begins where the
prompt given when serving ends, be it in the middle of what the template makes of the turn (the
prompts of DeepSeek's R1 distillations open the thinking). When a template renders a turn
differently once the conversation goes on (Qwen3 drops the thinking of earlier turns), the
conversation becomes several sequences, each exactly as served.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import Conversation, ConversationError, short

_WORD = "zqanswerqz"  # stands for an answer, to see what the template puts around it


class UnusableRow(ValueError):
    """A row cannot be trained on; the message is the reason."""


MOST_MESSAGES = 1000  # of a row
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # so that no sum of them is lost in float32


@dataclass(frozen=True)
class Segment:
    """A stretch of text: a trained turn or what stands before it, whose weight is 0."""

    text: str
    weight: float


def read_weight(value: Any, where: str) -> float:
    """What a message or token counts in the loss. Raises UnusableRow."""
    if isinstance(value, int | float) and (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT):
        return float(value)
    raise UnusableRow(
        f"{where} must be 0 or a number from {LEAST_WEIGHT} to {MOST_WEIGHT:.0f} (the loss is "
        f"divided by the sum of weights), not {short(value)}"
    )


def conversation_segments(
    template: ChatTemplate, conversation: Conversation
) -> list[list[Segment]]:
    """The sequences a conversation becomes, each a list of segments whose texts join to it.

    A turn counts as its `weight` says (OpenAI's field; 0: it is not trained), else 1. Text after
    the last assistant turn is left out: nothing in it is trained. Raises UnusableRow.
    """
    if (count := len(conversation.messages)) > MOST_MESSAGES:  # every turn renders all before it
        raise UnusableRow(f"{count} messages, more than {MOST_MESSAGES}: make several rows of them")
    sequences: list[tuple[str, list[tuple[int, int, float]]]] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or index == 0:  # the first message answers nothing
            continue
        try:
            start, text = _turn(template, conversation, index)
        except ConversationError as error:
            raise UnusableRow(str(error)) from None
        weight = read_weight(message.get("weight", 1), f"messages[{index}].weight")
        spans = [(start, len(text), weight)] if weight else []
        if sequences and text.startswith(sequences[-1][0]):
            sequences[-1] = (text, sequences[-1][1] + spans)
        else:
            sequences.append((text, spans))
    if not sequences:
        raise UnusableRow("no assistant message that answers another")
    if not any(spans for _, spans in sequences):
        raise UnusableRow("every assistant message has weight 0")
    return [_segments(text, spans) for text, spans in sequences if spans]


def _turn(template: ChatTemplate, conversation: Conversation, index: int) -> tuple[int, str]:
    """Where turn `index` begins, and the text up to its end."""
    before, turn = list(conversation.messages[:index]), conversation.messages[index]

    def render(*turns: dict) -> str:
        shown = replace(conversation, messages=[*before, *turns])
        return template.render(shown, add_generation_prompt=not turns)

    prompt, text = render(), render(turn)
    if text.startswith(prompt):
        return len(prompt), text
    # The prompt begins the answer, or it is written otherwise once it has been answered. In either
    # case the model is to go on from it with what the template makes of the answer; and with the
    # answer itself, should the template leave out a part.
    word = {key: value for key, value in turn.items() if key != "tool_calls"}
    head, found, tail = render({**word, "content": _WORD}).partition(_WORD)
    said = text.removeprefix(head)
    content = turn["content"]
    if not found or said == text or content.strip() not in said:
        if not found or "tool_calls" in turn:
            raise UnusableRow(
                f"the chat template renders message {index} differently from the prompt it answers"
            )
        said = content + tail
    begun = prompt.removeprefix(head)
    return len(prompt), prompt + (_without(said, begun) if begun != prompt else said)


def _without(said: str, begun: str) -> str:
    """An answer without the beginning that is in its prompt already."""
    mark = begun.strip()
    if not mark or not said.lstrip().startswith(mark):
        return said
    return said.lstrip().removeprefix(mark).removeprefix(begun[len(begun.rstrip()) :])


def _segments(text: str, spans: list[tuple[int, int, float]]) -> list[Segment]:
    segments, at = [], 0
    for start, end, weight in spans:
        segments += [Segment(text[at:start], 0.0), Segment(text[start:end], weight)]
        at = end
    return [*segments, Segment(text[at:], 0.0)]
