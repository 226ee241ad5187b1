"""Drafts by prompt lookup (arXiv 2304.04487 verifies drafts; these need no model): what followed
the last tokens where they stood before may follow again.

A draft is tried beside its sequence's next token, in the sample rows that no request has. How many
tokens are tried follows what was accepted; a sequence whose drafts fail waits longer and longer.
"""

from __future__ import annotations

LONGEST, SHORTEST = 4, 2  # tokens that must have stood there
MOST = 16  # tokens of a draft
_WAIT = 5  # after n failures in a row, 2**n tokens are left to come, n up to this
_RATE = 0.1  # how fast the share that is accepted follows


class PromptLookup:
    """Proposes what may come after the tokens of one sequence, at most `most` at once."""

    def __init__(self, most: int) -> None:
        self.accepted_share = 0.5  # of the tokens tried, those of late counting most
        self._most = most
        self._length = min(4, most)
        self._seen = 0  # tokens whose places are in `_after`
        self._after: dict[tuple[int, ...], int] = {}  # by n-gram: where what follows it stands
        self._failures = 0
        self._quiet_until = 0
        self._promised = False

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which have only grown since the last call;
        none where nothing is likely. A repetition is gone on with."""
        count = len(tokens)
        for end in range(max(self._seen, SHORTEST), count):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._seen = max(self._seen, count)
        most = min(most, self._length)
        if most < 1 or count < self._quiet_until:
            return []
        for n in range(min(LONGEST, count), SHORTEST - 1, -1):
            start = self._after.get(tuple(tokens[count - n :]))
            if start is not None:
                period = count - start
                found = tokens[start : start + most]
                while len(found) < most:
                    found.append(found[-period])
                return found
        return []

    def promises(self, tokens: list[int]) -> bool:
        """Whether there may be a draft when it is known what comes after `tokens`."""
        self._promised = bool(self.propose(tokens, 1))
        return self._promised

    def next_draft(self, tokens: list[int], most: int) -> list[int]:
        """`propose`, when it is known. A promise that is not kept is a failure."""
        draft = self.propose(tokens, most)
        if self._promised and not draft:
            self._fail(len(tokens))
        self._promised = False
        return draft

    def learn(self, tokens: int, tried: int, accepted: int) -> None:
        """Of a draft of `tried` tokens `accepted` came; the sequence has `tokens` now."""
        self.accepted_share += _RATE * (accepted / tried - self.accepted_share)
        self._length = min(self._most, 2 * accepted if accepted == tried else accepted + 1)
        if accepted:
            self._failures = 0
        else:
            self._fail(tokens)

    def _fail(self, tokens: int) -> None:
        self._failures += 1
        self._quiet_until = tokens + 2 ** min(self._failures, _WAIT)


def expected(lookup: PromptLookup, length: int) -> float:
    """How many tokens of a draft are likely accepted."""
    share = lookup.accepted_share
    return sum(share**n for n in range(1, length + 1))
