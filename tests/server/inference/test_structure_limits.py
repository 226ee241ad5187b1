"""Structures that would end a process or hold it up: an error for one request, whoever sends it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference import structures
from flexllm_jax.server.inference.structure_process import TOO_DEEP, TOO_LARGE, TOO_LONG
from flexllm_jax.server.inference.structures import StructureChecks

A, B = Client("a"), Client("b")


def chain(n, link, end):
    """Definitions that refer to one another, each to the next."""
    return {"$defs": {f"d{i}": link(i) for i in range(n)} | {f"d{n}": end}, "$ref": "#/$defs/d0"}


def ref(i):
    return {"$ref": f"#/$defs/d{i + 1}"}


def objects(n):
    link = lambda i: {"type": "object", "properties": {"a": ref(i)}, "required": ["a"]}  # noqa: E731
    return chain(n, link, {"type": "string"})


def nested(n, inner):
    """Alternatives in one another."""
    for _ in range(n):
        inner = {"anyOf": [inner, {}]}
    return inner


def alternatives(n):
    return {"regex": "|".join(f"w{i * 7919 % n}x" for i in range(n))}


DANGEROUS = {
    "references": ({"json": objects(3000)}, TOO_DEEP),
    "allOf": ({"json": chain(3000, lambda i: {"allOf": [ref(i)]}, {})}, TOO_DEEP),
    "rules": (
        {
            "grammar": "start: r0\n"
            + "".join(f"r{i}: r{i + 1}\n" for i in range(9000))
            + 'r9000: "x"'
        },
        TOO_DEEP,
    ),
    "terminals": (
        {
            "grammar": "start: R0\n"
            + "".join(f"R{i}: R{i + 1}\n" for i in range(9000))
            + 'R9000: "x"'
        },
        TOO_DEEP,
    ),
    "a long regex": ({"regex": "abcdefghij" * 50_000}, TOO_LARGE),
    "a longer regex": ({"regex": "a" * 600_000}, "more than 524288"),
    "an enum": ({"json": {"enum": [f"{i}" for i in range(75_000)]}}, "more than 524288"),
    "properties": (
        {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(15_000)}}},
        TOO_DEEP,
    ),
    "nesting": (
        {"json": nested(400, {})},
        "recursion limit",
    ),
    "groups": ({"regex": "(" * 5000 + "a" + ")" * 5000}, "invalid regex"),
}
USUAL = {
    "references": {"json": objects(60)},
    "nesting": {"json": nested(30, {"type": "null"})},
    "an enum": {"json": {"enum": [f"{i}" for i in range(2000)]}},
    "choices": {"choice": [f"choice {i}" for i in range(2000)]},
    "repetition": {"regex": "(((a{1,1000}){1,1000}){1,1000})"},
    "lengths": {"json": {"type": "string", "minLength": 1000, "maxLength": 10**6}},
}


def grammar(**fields):
    return StructuredOutputsParams(**fields).to_grammar()


@pytest.fixture(scope="module")
def checks(tokenizer):
    checks = StructureChecks(tokenizer)
    yield checks
    checks.close()


def reason(checks, text, client=A):
    try:
        text = text if isinstance(text, str) else grammar(**text)
        asyncio.run(checks.check(client, text))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", DANGEROUS)
def test_what_would_end_the_process_is_refused(checks, kind):
    fields, says = DANGEROUS[kind]
    told = reason(checks, fields)
    assert told and says in told and len(told) < 400 and "\n" not in told
    assert reason(checks, grammar(regex="[a-c]+")) is None


@pytest.mark.parametrize("kind", USUAL)
def test_what_is_large_but_can_be_kept_to_is_not(checks, kind):
    assert reason(checks, grammar(**USUAL[kind])) is None


TRY_OUT = """
import json, sys
from llguidance import LLParserLimits, LLTokenizer
from flexllm_jax.server.inference import structure_process
vocabulary, *grammars = json.load(sys.stdin)
structure_process.CPU_S = 0.05
for grammar in grammars:
    print(structure_process.try_out(LLTokenizer(vocabulary), LLParserLimits(), grammar))
"""


def test_processor_time_is_limited(tokenizer):
    """With a shorter limit than a server's, in a process that has no threads, as it has there."""
    given = [grammar(**alternatives(40_000)), grammar(regex="a")]
    given = json.dumps([tokenizer.backend_tokenizer.to_str(), *given])
    command = [sys.executable, "-c", TRY_OUT]
    ended = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [TOO_LONG, "None"]


def test_clients_take_turns(tokenizer):
    """Of one client's many slow structures only the one being compiled is waited for."""
    checks, ended = StructureChecks(tokenizer), []

    async def run(name, client, fields):
        await checks.check(client, grammar(**fields))
        ended.append(name)

    async def both():
        slow = [run(f"a{i}", A, alternatives(20_000 + i)) for i in range(4)]
        tasks = [asyncio.create_task(each) for each in slow]
        await asyncio.sleep(0.01)
        await run("b", B, {"regex": "b"})
        await asyncio.gather(*tasks)

    asyncio.run(both())
    checks.close()
    assert ended.index("b") <= 1 and len(ended) == 5


def test_a_client_cannot_queue_without_end(monkeypatch, checks):
    monkeypatch.setattr(structures, "_MOST_WAITING", 3)

    async def many():
        asked = [checks.check(A, grammar(regex=f"too many {i}")) for i in range(5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(many())
    assert told.count(None) == 3
    assert all(isinstance(error, ApiError) and error.status == 429 for error in told if error)


def test_what_was_found_out_is_kept(checks):
    text = grammar(**alternatives(30_000))
    began = time.perf_counter()
    assert reason(checks, text) is None
    first = time.perf_counter() - began
    began = time.perf_counter()
    assert reason(checks, text) is None
    assert time.perf_counter() - began < first / 5


def test_the_process_is_started_again(checks):
    assert reason(checks, grammar(regex="before")) is None
    before = checks._process.pid
    os.kill(before, signal.SIGKILL)
    assert reason(checks, grammar(regex="after")) is None
    assert checks._process.pid != before


def test_the_process_imports_nothing_heavy():
    program = (
        "import sys, flexllm_jax.server.inference.structure_process\n"
        "print({'jax', 'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "set()", ended.stdout + ended.stderr


OWNER = """
import os, sys, time
from transformers import AutoTokenizer
from flexllm_jax.server.inference.structures import StructureChecks
checks = StructureChecks(AutoTokenizer.from_pretrained(sys.argv[1]))
checks.start()
checks._thread.submit(int).result()
print(checks._process.pid, flush=True)
if sys.argv[2] == "close":
    checks.close()
else:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["close", "kill"])
def test_the_process_ends_with_its_owner(chat_llama, how):
    command = [sys.executable, "-c", OWNER, str(chat_llama), how]
    owner = subprocess.run(command, capture_output=True, text=True)
    pid = int(owner.stdout)
    end = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # without its owner nobody may take note of its end


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("response_format", {"response_format": schema_format(objects(1000))}),
        (
            "structured_outputs",
            {"structured_outputs": {"grammar": DANGEROUS["rules"][0]["grammar"][:70_000]}},
        ),
        (
            "tools",
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": objects(1000)}}
                ],
                "tool_choice": "required",
            },
        ),
    ],
)
def test_over_http_it_is_an_error_of_one_request(server, field, fields):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
    status, _, answer = server.post("/v1/chat/completions", json.dumps(ask | fields).encode())
    assert status == 400, answer
    error = json.loads(answer)["error"]
    assert error["param"] == field
    regex = {"structured_outputs": {"regex": "yes"}}
    status, _, answer = server.post("/v1/chat/completions", json.dumps(ask | regex).encode())
    assert status == 200, answer
    assert server.get("/health")[0] == 200
