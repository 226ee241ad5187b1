"""A text in pieces as tokens, so that what is trained is what is served.

When serving, the text before a trained piece is the prompt, tokenized as a whole, and what the
model says goes on from there. So the tokens of a piece are those that the text up to its end has
more than the text before it: on its own a piece would get the space that some tokenizers put
before every text (SentencePiece).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from flexllm_jax.models.text.tokenizer import encode_texts

CHARACTERS_PER_CALL = 2**21
_BEFORE = ("\n", ".", "a")  # that few tokens of what follows have within them


def split_tokens(tokenizer: Any, texts: Sequence[list[str]]) -> list[list[list[int]]]:
    """For each text, which is given as its pieces, the tokens of every piece."""
    starts = [list(accumulate(pieces)) for pieces in texts]
    tokens = iter(_encode(tokenizer, [start for group in starts for start in group]))
    return [_differences(tokenizer, pieces, [next(tokens) for _ in pieces]) for pieces in texts]


def _differences(tokenizer: Any, pieces: list[str], starts: list[list[int]]) -> list[list[int]]:
    """`starts`: the tokens of the text up to the end of every piece."""
    found: list[list[int]] = []
    before: list[int] = []
    for at, tokens in enumerate(starts):
        if tokens[: len(before)] != before:
            # A token would reach over the border. The prompt is the prompt: what follows goes on
            # from there.
            rest = list(accumulate(pieces[at:]))
            return found + _differences(
                tokenizer, pieces[at:], [_encode_on(tokenizer, text) for text in rest]
            )
        found.append(tokens[len(before) :])
        before = tokens
    return found


def _encode_on(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on from another, whose first space is its own."""
    for before in _BEFORE:
        known, whole = _encode(tokenizer, [before, before + text])
        if whole[: len(known)] == known:
            return whole[len(known) :]
    return _encode(tokenizer, [text])[0]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    tokens: list[list[int]] = []
    while len(tokens) < len(texts):
        part, characters = [], 0  # so many at once that memory does not matter
        for text in texts[len(tokens) :]:
            if part and characters + len(text) > CHARACTERS_PER_CALL:
                break
            part.append(text)
            characters += len(text)
        tokens += encode_texts(tokenizer, part, add_special_tokens=False)
    return tokens
