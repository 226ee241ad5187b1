"""Structured outputs: what an output has to look like, kept to token by token.

llguidance turns a JSON schema, a regular expression or a grammar into a matcher, which tells after
every token which ones may follow; the sampler draws from those alone.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

BITS = 32  # tokens in a word of a mask
_LONGEST_REASON = 300  # characters: reasons repeat what was given
_KEPT = 32  # matchers of a model
_MOST_EBNF = 8192  # characters; turning more into Lark takes over a third of a second
# Of llguidance, which has more. A state takes about 2 kB; the usual schema has hundreds of them.
LIMITS = {"verbose_errors": False, "max_lexer_states": 50_000}


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a whole output must match: exactly one of these, with vLLM's names.

    json           a JSON schema, as an object or as text
    json_object    any JSON object
    regex          a regular expression (of Rust's regex library, without look-around)
    choice         one of these strings
    grammar        a context-free grammar in Lark's syntax, as llguidance reads it; one in EBNF as
                   llama.cpp has it (`root ::= "yes" | "no"`) becomes one in Lark's

    disable_any_whitespace   JSON without white space between its tokens: small models can write it
                             without end
    """

    json: dict[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self):
        for name in ("json", "regex", "choice", "grammar"):
            if getattr(self, name) is False:  # asks for nothing
                object.__setattr__(self, name, None)
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        kinds = {
            "json": (isinstance(self.json, dict | str), "a JSON schema"),
            "json_object": (self.json_object is True, "true or left out"),
            "regex": (isinstance(self.regex, str), "a regular expression"),
            "choice": (_are_texts(self.choice), "strings that are not empty"),
            "grammar": (isinstance(self.grammar, str), "a grammar in Lark's syntax"),
        }
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}: give exactly one of "
                f"{', '.join(kinds)}"
            )
        good, rule = kinds[given[0]]
        if not good:
            value = getattr(self, given[0])
            raise ValueError(f"structured_outputs.{given[0]}={value!r} must be {rule}")
        if self.grammar and "::=" in self.grammar and not is_lark_syntax(self.grammar):
            object.__setattr__(self, "grammar", _lark_of(self.grammar))

    def to_grammar(self) -> str:
        """Its grammar in llguidance's form, which may be wrong. ValueError if it has none."""
        try:
            return self._grammar()
        except (ValueError, RecursionError) as error:
            raise ValueError(describe(str(error))) from None

    def _grammar(self) -> str:
        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.choice is not None:
            return LLMatcher.grammar_from_regex("|".join(map(re.escape, self.choice)))
        if self.grammar is not None:
            return LLMatcher.grammar_from_lark(self.grammar)
        schema = {"type": "object"} if self.json is None else self.json
        text = schema if isinstance(schema, str) else json.dumps(schema)  # which heeds its depth
        options: Any = {"whitespace_flexible": not self.disable_any_whitespace}
        return LLMatcher.grammar_from_json_schema(text, overrides=options)

    def as_lark(self) -> str:
        """It as a part of a rule in Lark's syntax. ValueError if it has none."""
        if self.grammar is not None:
            return f"%lark {{\n{self.grammar}\n}}"
        (whole,) = json.loads(self.to_grammar())["grammars"]
        if whole["lark_grammar"] is not None:
            return f"%lark {{\n{whole['lark_grammar']}\n}}"
        return f"%json {json.dumps(whole['json_schema'])}"


def mask_words(tokens: int) -> int:
    """Words of a mask of that many tokens."""
    return -(-tokens // BITS)


def _are_texts(choice: Any) -> bool:
    whole = isinstance(choice, tuple) and bool(choice)
    return whole and all(isinstance(text, str) and text for text in choice)


def quote(text: str) -> str:
    """A text as a literal of a Lark grammar, which is that of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def literal(tokenizer: Any, text: str) -> str:
    """`text` in a Lark grammar: if it is a token by its id, as models write it."""
    token = tokenizer.backend_tokenizer.token_to_id(text)
    return quote(text) if token is None else f"<[{token}]>"


def _lark_of(grammar: str) -> str:
    """A grammar in EBNF, in Lark's syntax."""
    if len(grammar) > _MOST_EBNF:
        raise ValueError(
            f"structured_outputs.grammar: it has {len(grammar)} characters of EBNF, at most "
            f"{_MOST_EBNF} can be converted; write it in Lark's syntax"
        )
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # it raises what is nothing more special
        raise ValueError(describe(str(error) or type(error).__name__)) from None


def describe(message: str) -> str:
    """What is wrong with a structure, in one line."""
    text, half = " ".join(message.split()), _LONGEST_REASON // 2
    shown = text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}"
    return f"structured_outputs: {shown}"


def failure(matcher: LLMatcher) -> str | None:
    """Why a matcher cannot go on, in one line."""
    return describe(matcher.get_error()) if matcher.is_error() else None


class TokenMatchers:
    """Matchers over a model's vocabulary.

    Who first asks for one waits for what llguidance makes of the vocabulary (3 s of 200,000 tokens,
    in half of which no other thread of Python runs): an engine that starts need not.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: number of logits.
        eos_token_ids: the tokens that end an output: they may follow where it can be complete.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]):
        size = max(vocab_size, len(tokenizer))
        self._given = tokenizer, size, list(eos_token_ids)
        self._lock = threading.Lock()
        self._made: LLTokenizer | str | None = None
        self._limits = LLParserLimits(**LIMITS)
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()  # by grammar, without tokens

    def vocabulary(self) -> LLTokenizer:
        """The tokens as llguidance has them, made by the first call. ValueError for a tokenizer of
        a kind that it does not know."""
        from llguidance.hf import from_tokenizer  # imports transformers, which takes seconds

        with self._lock:
            if self._made is None:
                try:
                    self._made = from_tokenizer(*self._given)
                except ValueError as error:
                    self._made = f"structured_outputs: not with this model's tokenizer ({error})"
        if isinstance(self._made, str):
            raise ValueError(self._made)
        return self._made

    def match(self, params: StructuredOutputsParams) -> LLMatcher:
        """The matcher of an output that has no tokens yet; any thread may ask, and not the
        engine's, as it takes time. ValueError, saying why, when it cannot be kept to, or the
        tokens of this tokenizer cannot be told as text."""
        grammar, vocabulary = params.to_grammar(), self.vocabulary()
        with self._lock:
            matcher = self._matchers.pop(grammar, None)
        if matcher is None:
            matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=self._limits)
            matcher.compute_bitmask()  # the first takes longest: what it finds out is kept
            if reason := failure(matcher):
                raise ValueError(reason)
        with self._lock:
            self._matchers[grammar] = matcher
            if len(self._matchers) > _KEPT:
                self._matchers.popitem(last=False)
        return matcher.deep_copy()
