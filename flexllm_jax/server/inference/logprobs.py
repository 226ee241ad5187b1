"""Tokens with their log-probabilities, as texts: what answers tell where `logprobs` are asked for.

The text of a token is what it adds to the text it stands in: of a character of several tokens the
last one says it, and texts join to the whole. Offsets count characters of the text that is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexllm_jax.models.text.detokenizer import Detokenizer, OutputText

Logprobs = dict[int, float]


@dataclass(frozen=True)
class TokenReport:
    """A token where it stands. `likeliest`: tokens that could have stood there with their texts and
    log-probabilities, likeliest first; itself is always among them. The first token of a prompt has
    no log-probability, as nothing predicts it."""

    token: int
    text: str
    offset: int
    logprob: float | None
    likeliest: list[tuple[int, str, float]]


def text_of_token(token: int, text: str) -> str:
    """How a token is called where it is told as text."""
    return text


def id_of_token(token: int, text: str) -> str:
    """How a token is called with `return_tokens_as_token_ids`, as vLLM has it."""
    return f"token_id:{token}"


def report_token(
    token: int, texts: Mapping[int, str], offset: int, logprobs: Logprobs | None
) -> TokenReport:
    """`texts`: of the token itself and of all that have log-probabilities."""
    if logprobs is None:
        return TokenReport(token, texts[token], offset, None, [])
    ranked = sorted(logprobs.items(), key=lambda item: -item[1])
    likeliest = [(other, texts[other], value) for other, value in ranked]
    return TokenReport(token, texts[token], offset, logprobs[token], likeliest)


def token_entry(
    report: TokenReport,
    detokenizer: Detokenizer,
    count: int,
    name: Callable[[int, str], str] = text_of_token,
) -> dict[str, Any]:
    """A token of a chat, as OpenAI shows it, with the `count` likeliest in its place."""

    def entry(token: int, text: str, value: float | None) -> dict[str, Any]:
        data = list(detokenizer.token_bytes(token, text))
        return {"token": name(token, text), "logprob": value, "bytes": data}

    top = [entry(*item) for item in report.likeliest[:count]]
    return {**entry(report.token, report.text, report.logprob), "top_logprobs": top}


def prompt_table(
    detokenizer: Detokenizer, prompt: Sequence[int], logprobs: Sequence[Logprobs | None], count: int
) -> list[dict[str, dict[str, Any]] | None]:
    """What vLLM tells as `prompt_logprobs`: by token id, each token and the `count` likeliest in
    its place. The rank is null of a token that is none of them."""
    table: list[dict[str, dict[str, Any]] | None] = []
    for report in report_prompt(detokenizer, prompt, logprobs, None):
        if report.logprob is None:
            table.append(None)
            continue
        table.append(
            {
                str(token): {
                    "logprob": value,
                    "rank": rank if rank <= count else None,
                    "decoded_token": text,
                }
                for rank, (token, text, value) in enumerate(report.likeliest, 1)
                if rank <= count or token == report.token
            }
        )
    return table


def report_prompt(
    detokenizer: Detokenizer,
    prompt: Sequence[int],
    logprobs: Sequence[Logprobs | None],
    sent: tuple[str, list[int]] | None,
) -> list[TokenReport]:
    """Every token of a prompt. `sent`: the text it was sent as, and where the tokens start in it;
    None: it was sent as tokens, which are told as text with their special ones."""
    reports: list[TokenReport] = []
    whole, starts = (sent[0], [*sent[1], len(sent[0])]) if sent else ("", [])
    walk = OutputText(detokenizer, skip_special_tokens=sent is not None)
    for at, (token, values) in enumerate(zip(prompt, logprobs, strict=True)):
        texts = {other: walk.would_add(other) for other in values or ()}
        walk.push(token)
        if at == len(prompt) - 1:
            walk.finish()
        text, offset = walk.piece, walk.offset
        if sent is not None:
            offset, end = starts[at : at + 2]
            text = detokenizer.special.get(token) or whole[offset:end]
        reports.append(report_token(token, texts | {token: text}, offset, values))
    return reports
