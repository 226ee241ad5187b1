"""Tokens to text, one way for every output: for the Python API, HTTP answers and streams, stop
strings and log-probabilities.

The text of an output is what the tokenizer makes of prompt and output together, without the
prompt's: so a SentencePiece tokenizer, which drops the first space of a text, keeps that of an
output. Text is told as soon as no later token can change it. Bytes of a character that is not
complete wait for the others; bytes that never become one are U+FFFD in the end, as in
`tokenizer.decode`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

_BROKEN = "\ufffd"  # what bytes that are no character become
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_letters() -> dict[str, int]:
    """Byte-level tokenizers write every byte as a letter: printable ones of Latin-1 as themselves,
    the others in order from U+0100 on (GPT-2's `bytes_to_unicode`)."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_letters()


class Detokenizer:
    """A tokenizer's way from tokens to text. `special`: the names of the tokens that are left out
    of an output's text."""

    def __init__(self, tokenizer: Any):
        self.backend = tokenizer.backend_tokenizer
        added = self.backend.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        decoder = self.backend.decoder
        kinds = decoder.__getstate__().decode() if decoder else ""  # its JSON
        self._added, self._byte_level = added.keys(), '"ByteLevel"' in kinds
        bytes_of = {f"<0x{byte:02X}>": byte for byte in range(256)}
        ids = {self.backend.token_to_id(name): byte for name, byte in bytes_of.items()}
        # A run of these is decoded at once: as text if it is UTF-8, or else as U+FFFD each.
        self.single_bytes = ids if '"ByteFallback"' in kinds else {}
        self.single_bytes.pop(None, None)
        self._before = self.backend.encode("a", add_special_tokens=False).ids[-1:]
        self._length_before = len(self.decode(self._before))
        self.token_text = lru_cache(maxsize=100_000)(self._token_text)
        self._raw_bytes = lru_cache(maxsize=100_000)(self._find_raw_bytes)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.backend.decode(list(tokens), skip_special_tokens=False)

    def output_text(
        self, prompt: Sequence[int], output: Sequence[int], keep: Collection[str] = ()
    ) -> str:
        """The text of a whole output, without special tokens but those that `keep` names."""
        context, special = self.context(prompt), self.special
        tokens = [token for token in output if token not in special or special[token] in keep]
        return self.decode([*context, *tokens])[len(self.decode(context)) :]

    def _token_text(self, token: int) -> str:
        """What a token adds to a text that has begun; of its characters the complete ones."""
        return self.decode([*self._before, token])[self._length_before :].rstrip(_BROKEN)

    def token_bytes(self, token: int, text: str) -> bytes:
        """The bytes of a token, which may be a part of a character; `text` is what it adds."""
        raw = self._raw_bytes(token)
        return text.encode() if raw is None else raw

    def _find_raw_bytes(self, token: int) -> bytes | None:
        if token in self.single_bytes:
            return bytes([self.single_bytes[token]])
        name = self.backend.id_to_token(token) or ""
        spelled = self._byte_level and token not in self._added
        if spelled and all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        return None

    def context(self, prompt: Sequence[int]) -> list[int]:
        """The end of a prompt that decides how a text goes on: its last token that is text."""
        for token in reversed(prompt):
            if token not in self.special and token not in self.single_bytes:
                name = self.backend.id_to_token(token)
                if name and not self.decode([token]).endswith(_BROKEN):
                    return [token]
        return []


class OutputText:
    """One output's text, token by token, up to the first of its stop strings.

    `text` is what is certain of it. Of the token that came last, `offset` is where it stands in the
    text and `piece` what it adds, or its name where it is left out of the text. A stop string is
    looked for after more than `min_tokens` tokens, and belongs to the text if `include_stop`. Those
    special tokens that `keep` names are text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        keep: Collection[str] = (),
    ):
        self._detokenizer, self._stop, self._min_tokens = detokenizer, stop, min_tokens
        self._longest = max(map(len, stop), default=0)
        special = detokenizer.special if skip_special_tokens else {}
        self._left_out = {t: n for t, n in special.items() if n not in keep} if keep else special
        self._include_stop = include_stop
        # The tokens whose text is not certain, and before them some whose text is: of what they
        # say together, the first `_certain` characters are in `text` or the prompt's.
        self._window = detokenizer.context(prompt)
        self._settled = len(self._window)  # tokens of it whose text is certain
        self._certain = len(detokenizer.decode(self._window))
        self._likely = ""  # what follows `text` unless bytes to come change it
        self._tokens = self._not_searched = self._taken = 0
        self.text, self.piece, self.offset = "", "", 0
        self.stop: str | None = None  # the stop string that ended it
        self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the output."""
        return self.stop is not None

    def push(self, token: int) -> bool:
        """Take in a token; whether a stop string ends the output here."""
        self._tokens += 1
        known = len(self.text)
        self.offset = known + len(self._likely)
        if token in self._left_out:
            self.piece = self._left_out[token]
            return False
        self._window.append(token)
        whole = self._detokenizer.decode(self._window)
        end = max(self._certain, len(whole.rstrip(_BROKEN)))
        if token not in self._detokenizer.single_bytes:
            self._settle(whole[self._certain : end], complete=end == len(whole))
        elif end == len(whole):
            self._likely = whole[self._certain :]
        self._find_stop(known)
        self._tell_piece()
        return self.stopped

    def _settle(self, text: str, *, complete: bool) -> None:
        """`text` is certain now; if `complete`, it is all that the tokens say."""
        self.text += text
        self._likely, self._certain = "", self._certain + len(text)
        if complete:
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._certain = len(self._detokenizer.decode(self._window))

    def _find_stop(self, known: int) -> None:
        if not self._stop:
            return
        whole = self.text + self._likely
        if self._tokens <= self._min_tokens:
            self._not_searched = len(whole)
            return
        start = max(0, max(known, self._not_searched) - self._longest + 1)
        found = [(at, stop) for stop in self._stop if (at := whole.find(stop, start)) >= 0]
        if found:
            at, self.stop = min(found)
            self.text = whole[: at + len(self.stop) * self._include_stop]
            self._likely = ""

    def _tell_piece(self) -> None:
        not_told = max(0, self.offset - len(self.text))
        self.piece = self.text[self.offset :] + self._likely[not_told:]
        self.offset = min(self.offset, len(self.text) + len(self._likely))

    def finish(self) -> None:
        """No token will follow: what more of them might have changed is certain."""
        if not self.stopped:
            self.text += self._detokenizer.decode(self._window)[self._certain :]
            self.piece = self.text[self.offset :] or self.piece
        self._finished = True

    def would_add(self, token: int) -> str:
        """What `piece` would be if `token` came next."""
        if token in self._left_out:
            return self._left_out[token]
        begun = self._window and len(self._window) == self._settled  # and nothing is open
        if begun and token not in self._detokenizer.single_bytes:
            return self._detokenizer.token_text(token)
        text = self._detokenizer.decode([*self._window, token])
        return text.rstrip(_BROKEN)[self._certain + len(self._likely) :]

    def take(self) -> str:
        """Text that was not taken yet and stays whatever follows."""
        end = len(self.text) - (0 if self.stopped or self._finished else self._maybe_stop())
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _maybe_stop(self) -> int:
        """Characters at the end that a stop string may begin with."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
