"""The process that runs a grader's program. Standard library only.

A line of JSON in, a line of JSON out: first the program and its limits, then samples. It is
confined (`confinement`), if the program is a client's, before a line of it is compiled. What the
program writes to its standard output goes nowhere. Started by `flexllm_jax.graders.process`, which
may end it at any time.
"""

import inspect
import json
import math
import os
import sys
import types

from confinement import Unsupported, confine, limit

_NAME = "<grader>"


class Unusable(Exception):
    """What is told without its type."""


def _reason(error: BaseException) -> str:
    """What went wrong, where in the program, in one line."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except BaseException:
        message = "(it cannot be told)"
    said = message if isinstance(error, Unusable) else f"{type(error).__name__}: {message}"
    said = " ".join(said.rstrip(": ").encode("ascii", "backslashreplace").decode().split())[:300]
    return said if line is None or isinstance(error, Unusable) else f"line {line}: {said}"


def load(source: str):
    """The program's function `grade`. Unusable where there is none."""
    module = types.ModuleType("grader")
    sys.modules["grader"] = module
    exec(compile(source, _NAME, "exec"), module.__dict__)
    grade = getattr(module, "grade", None)
    if not callable(grade):
        raise Unusable("it has no function `grade`; add `def grade(sample, item):`")
    try:
        inspect.signature(grade).bind({}, {})
    except TypeError:
        raise Unusable("grade does not take two arguments: `def grade(sample, item):`") from None
    return grade


def run(grade, sample, item) -> float:
    """The reward that it gives. Unusable where that is no finite number."""
    reward = grade(sample, item)
    if isinstance(reward, (str, bytes, bytearray)) or not hasattr(reward, "__float__"):
        raise Unusable(f"grade returned a {type(reward).__name__}; it must return a number")
    reward = float(reward)
    if not math.isfinite(reward):
        raise Unusable(f"grade returned {reward}; it must return a finite number")
    return reward


def main() -> None:
    """Answer lines until there are no more."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    del sys.path[0]  # this folder

    def answer(told: dict) -> None:
        os.write(answers, json.dumps(told).encode() + b"\n")

    first = json.loads(requests.readline())
    try:
        limit(first["memory_mb"])
        if first["confined"]:
            confine()
    except Unsupported as error:
        return answer({"unsupported": str(error)})
    try:
        grade = load(first["source"])
    except BaseException as error:  # whatever a program raises
        return answer({"error": _reason(error)})
    answer({"ready": True})
    while line := requests.readline():
        told = json.loads(line)
        try:
            answer({"id": told["id"], "reward": run(grade, told["sample"], told["item"])})
        except BaseException as error:
            answer({"id": told["id"], "error": _reason(error)})


main()
