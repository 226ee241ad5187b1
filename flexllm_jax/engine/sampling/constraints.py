"""Which tokens may come next in an output, from all that its request says of it.

A structure says it by a matcher, `allowed_token_ids` and `bad_words` of one token by a mask that
stays, longer `bad_words` by the tokens before, and `min_tokens` beside a structure by how many have
come. Together they are bits that the sampler heeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.engine.sampling.structured_outputs import BITS, TokenMatchers, failure, mask_words
from flexllm_jax.models.text.tokenizer import encode_texts

_NOTHING_LEFT = "allowed_token_ids, bad_words and structured_outputs leave no token that may follow"


@dataclass
class Constraint:
    """What one output must keep to; it has taken in the tokens so far.

    matcher: of a structured output. fixed: the bits of tokens that may ever come. bad_words: of
    several tokens; none may be the end of the output. no_ends: beside a matcher, the bits of all
    tokens but those that end the output, and of these one may come among the first `min_tokens`
    only where nothing else may.
    """

    matcher: LLMatcher | None = None
    fixed: Int[np.ndarray, " W"] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    no_ends: Int[np.ndarray, " W"] | None = None
    min_tokens: int = 0
    stuck: bool = False  # nothing was left to draw
    _tokens: int = 0
    _output: list[int] = field(default_factory=list)

    @property
    def reads_tokens(self) -> bool:
        """Whether what may come next depends on the tokens so far."""
        return self.matcher is not None or bool(self.bad_words)

    def copy(self) -> Constraint:
        """That of another output of the request."""
        matcher = self.matcher and self.matcher.deep_copy()
        return replace(self, matcher=matcher, _output=list(self._output))

    def consume(self, token: int) -> None:
        """The output has another token."""
        self._tokens += 1
        if self.matcher:
            self.matcher.consume_token(token)
        if self.bad_words:
            self._output.append(token)

    def failure(self) -> str | None:
        """Why the output cannot go on, in one line."""
        if self.stuck:
            return _NOTHING_LEFT
        return failure(self.matcher) if self.matcher else None

    def narrow(self, bits: Int[np.ndarray, " W"]) -> None:
        """Take away the bits of what may not come, but for what the matcher takes."""
        if self.fixed is not None:
            bits[: len(self.fixed)] &= self.fixed
        for *before, last in self.bad_words:
            if self._output[-len(before) :] == before:
                bits[last // BITS] &= ~_bit(last)
        if self.reads_tokens and (self.fixed is not None or self.bad_words):
            self.stuck = not bits.any()
        if self.no_ends is not None and self._tokens < self.min_tokens:
            longer = bits & self.no_ends
            if longer.any():
                bits[:] = longer


class Constraints:
    """Makes the constraints of a model's outputs; any thread may ask for one, and not the engine's
    as it may take time. Arguments as of `TokenMatchers`."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]):
        self.matchers = TokenMatchers(tokenizer, vocab_size, eos_token_ids)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ends = tuple(eos_token_ids)
        self._words = mask_words(vocab_size)
        self._all_words = mask_words(max(vocab_size, len(tokenizer)))
        self._executor = LLExecutor()

    def make(self, params: SamplingParams, count: int) -> Sequence[Constraint | None]:
        """Constraints of `count` outputs of a request that have no tokens yet; None for each if
        they may be anything. ValueError, saying why, for what cannot be kept to."""
        if not params.is_constrained:
            return [None] * count
        structure = params.structured_outputs
        matcher = self.matchers.match(structure) if structure else None
        words = self._bad_words(params.bad_words)
        single = [word[0] for word in words if len(word) == 1]
        longer = tuple(tuple(word) for word in words if len(word) > 1)
        fixed = None
        if params.allowed_token_ids or single:
            fixed = self._fixed(params, single)
        first = Constraint(matcher, fixed, longer)
        if matcher and params.min_tokens:
            no_ends = self._all_but(params.stop_ids(self._ends))
            first = replace(first, no_ends=no_ends, min_tokens=params.min_tokens)
        return [first, *(first.copy() for _ in range(count - 1))]

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Their tokens, as vLLM has them: as they stand, and after a space if that makes another
        first token of as many."""
        found = []
        for word in words:
            both = [word.lstrip(), " " + word.lstrip()]
            own, spaced = encode_texts(self._tokenizer, both, add_special_tokens=False)
            if not own:
                raise ValueError(f"bad_words={word!r} must have a token")
            found.append(own)
            if spaced[:1] != own[:1] and len(spaced) == len(own):
                found.append(spaced)
        return [word for word in found if max(word) < self._vocab_size]

    def _fixed(self, params: SamplingParams, barred: Sequence[int]) -> Int[np.ndarray, " W"]:
        bits = self._all_but(barred)
        if params.allowed_token_ids:
            bits &= ~self._all_but(params.allowed_token_ids)
        held = params.stop_ids(self._ends) if params.min_tokens else frozenset()
        if params.allowed_token_ids and held.issuperset({*params.allowed_token_ids} - {*barred}):
            raise ValueError("allowed_token_ids: bad_words and min_tokens leave none of them")
        return bits

    def _all_but(self, tokens: Iterable[int]) -> Int[np.ndarray, " W"]:
        """The bits of all tokens but these, of which the model need not have each."""
        bits = np.full(self._words, -1, np.int32)
        for token in tokens:
            if 0 <= token < self._vocab_size:
                bits[token // BITS] &= ~_bit(token)
        return bits

    def allowed(
        self, constraints: Sequence[tuple[Constraint, int]], rows: int
    ) -> Int[np.ndarray, "rows W"]:
        """The tokens that may come next, as bits: token t is bit t % 32 of word t // 32.
        `constraints` with their rows; in the other rows all tokens may."""
        bits = np.full((rows, self._all_words), -1, np.int32)
        matchers = [(c.matcher, row) for c, row in constraints if c.matcher]
        if matchers:
            fill_next_token_bitmask_par(self._executor, matchers, bits)
        for constraint, row in constraints:
            constraint.narrow(bits[row, : self._words])
        return bits[:, : self._words]


def _bit(token: int) -> np.int32:
    """The bit of a token in its word."""
    return np.uint32(1 << token % BITS).view(np.int32)
