"""What clients ask an output to look like, tried out before an engine sees it.

The work is done in a process that may die of it (`structure_process`). One structure of a client at
a time, and clients take turns: who sends slow ones waits for them alone. What was found out is
kept, so that a structure that is used again is not compiled again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

from flexllm_jax.engine.sampling.structured_outputs import LIMITS, describe
from flexllm_jax.models.text.tokenizer import end_token_ids
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError

MOST_CHARACTERS = 512 * 1024  # of a grammar in llguidance's form
_KEPT = 4096  # results
_MOST_WAITING = 128  # structures of a client


class StructureChecks:
    """Tries structures out, in a process that it starts, and again when that is lost.

    Args:
        tokenizer: the fast Hugging Face tokenizer of the engines.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="structures")  # it alone has it
        self._results: OrderedDict[bytes, str | None] = OrderedDict()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: Counter[str] = Counter()

    def start(self) -> None:
        """Start the process, before a request needs it."""
        self._thread.submit(self._begin)

    def close(self) -> None:
        """End the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if (process := self._process) is not None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it forked
            process.wait()

    async def check(self, client: Client, grammar: str) -> None:
        """ValueError, saying why, when a grammar cannot be kept to within the limits; ApiError when
        that cannot be found out now."""
        if len(grammar) > MOST_CHARACTERS:
            raise ValueError(
                describe(f"it has {len(grammar)} characters, more than {MOST_CHARACTERS}")
            )
        key = hashlib.sha256(grammar.encode()).digest()
        if key not in self._results:
            await self._find_out(client.name, key, grammar)
        self._results.move_to_end(key)
        if (reason := self._results[key]) is not None:
            raise ValueError(describe(reason))

    async def _find_out(self, client: str, key: bytes, grammar: str) -> None:
        if self._waiting[client] >= _MOST_WAITING:
            message = f"{_MOST_WAITING} structures of yours wait to be compiled: send fewer at once"
            raise ApiError(429, message, retry_after_s=5)
        self._waiting[client] += 1
        try:
            async with self._turns[client]:
                if key not in self._results:
                    loop = asyncio.get_running_loop()
                    self._results[key] = await loop.run_in_executor(
                        self._thread, self._ask, grammar
                    )
                    if len(self._results) > _KEPT:
                        self._results.popitem(last=False)
        finally:
            self._waiting[client] -= 1

    # -- in the thread ----------------------------------------------------------------------------

    def _ask(self, grammar: str) -> str | None:
        for _ in range(2):  # it may have been ended from outside since the last time
            process = self._process or self._begin()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(grammar).encode() + b"\n")
                process.stdin.flush()
                if answer := process.stdout.readline():
                    return json.loads(answer)
            except BrokenPipeError:
                pass
            process.kill()
            process.wait()
            self._process = None
        raise ApiError(503, "the process that compiles structures was lost; try again")

    def _begin(self) -> subprocess.Popen[bytes]:
        backend = copy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        told = {
            "tokenizer": backend.to_str(),
            "vocab_size": len(self._tokenizer),
            "eos_token_ids": list(end_token_ids(self._tokenizer)),
            "limits": LIMITS,
        }
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "flexllm_jax.server.inference.structure_process"],
            stdin=subprocess.PIPE,  # whose end ends it
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
        return process
