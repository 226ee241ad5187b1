"""The process in which clients' grammars are tried out before an engine compiles them.

llguidance recurses on the thread's stack: a long chain of rules or references ends its process, and
others take seconds or gigabytes. So each grammar is compiled in a fork of its own that may die,
with limits of processor time, memory and stack. The stack is smaller than those of an engine's
threads: what passes here recurses safely there. Started by `structures.StructureChecks`; ends with
its standard input. Imports nothing heavy: it holds the vocabulary and little else.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_S = 2.0
_WALL_S = 30.0  # on a machine that is busy with other things
MEMORY_MB = 256
_STACK_BYTES = 2**20  # llguidance's own threads, which compute masks in an engine, have 2 MB
_MASKS = 4  # to try; an engine limits the work of each

TOO_LONG = f"it takes over {CPU_S:.0f} s to compile: make it smaller"
TOO_DEEP = "its rules, references or properties make too long a chain: make it flatter"
TOO_LARGE = f"it takes over {MEMORY_MB} MB to compile: make it smaller"
_DEATHS: dict[int, str] = {
    signal.SIGPROF: TOO_LONG,
    signal.SIGALRM: TOO_LONG,
    signal.SIGSEGV: TOO_DEEP,
    signal.SIGBUS: TOO_DEEP,
    signal.SIGABRT: TOO_LARGE,
}


def try_out(vocabulary: LLTokenizer, limits: LLParserLimits, grammar: str) -> str | None:
    """Why a grammar cannot be kept to, in llguidance's words; None: it can."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            _limit()
            threading.stack_size(_STACK_BYTES)
            work = threading.Thread(target=_compile, args=(vocabulary, limits, grammar, writing))
            work.start()
            work.join()
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if told.endswith(b"\n"):  # it came to its end
        return told[:-1].decode() or None
    return _DEATHS.get(os.WTERMSIG(status), f"it could not be tried out (status {status})")


def _limit() -> None:
    """Signals that nobody handles end the process, in the midst of native code too."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, _WALL_S)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = now + MEMORY_MB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with open(os.devnull, "wb") as nowhere:  # what native code prints before it aborts
        os.dup2(nowhere.fileno(), 2)


def _compile(vocabulary: LLTokenizer, limits: LLParserLimits, grammar: str, pipe: int) -> None:
    try:
        reason = _walk(vocabulary, limits, grammar)
    except MemoryError:
        reason = TOO_LARGE
    except Exception as error:
        reason = f"it could not be tried out ({error!r})"
    text = " ".join(reason.split())
    text = text if len(text) < 1000 else f"{text[:500]} ... {text[-500:]}"  # a pipe holds that
    os.write(pipe, text.encode() + b"\n")


def _walk(vocabulary: LLTokenizer, limits: LLParserLimits, grammar: str) -> str:
    """Do what an engine does; returns what is wrong, if anything."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()
    copy = matcher.deep_copy()
    for _ in range(_MASKS):  # on one of many ways: what is wrong there fails that output alone
        allowed = 0 if copy.is_stopped() else int.from_bytes(copy.compute_bitmask(), "little")
        if not allowed:
            break
        copy.consume_token((allowed & -allowed).bit_length() - 1)
    return matcher.get_error() if matcher.is_error() else ""


def main() -> None:
    """Read the vocabulary, then grammars, one a line; answer each in a line."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)
    told: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    vocabulary = LLTokenizer(told["tokenizer"], told["vocab_size"], told["eos_token_ids"])
    limits = LLParserLimits(**told["limits"])
    del told
    while line := sys.stdin.buffer.readline():
        reason = try_out(vocabulary, limits, json.loads(line))
        sys.stdout.buffer.write(json.dumps(reason).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
