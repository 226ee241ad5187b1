"""The load generator: what its client makes of each kind of answer, what its report finds, and a
short load on a server."""

import asyncio
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import isfunction
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from flexllm_jax.errors import UserError
from flexllm_jax.experiments.load import library_flows
from flexllm_jax.experiments.load.client import Completion, complete, open_clients, upload
from flexllm_jax.experiments.load.generator import Load, LoadShape, Turn
from flexllm_jax.experiments.load.outside_clients import (
    OUTPUT,
    REQUESTS,
    OutsideClient,
    run_library,
)
from flexllm_jax.experiments.load.report import make_report
from flexllm_jax.experiments.load.run import Jobs, run_load
from flexllm_jax.experiments.load.server import Sample, ServerProcess
from flexllm_jax.experiments.load.step_cost import compare, cost_table
from tests.engines import letter_rows, write_rows
from tests.scripts.workspace import SCRIPTS
from tests.server.running import make_config


class Answers(BaseHTTPRequestHandler):
    """Answers a completion as its body's `model` says; of a stream each line is an event."""

    tokens: ClassVar = ['{"choices":[{"text":"a"}]}'] * 3
    usage: ClassVar = '{"choices":[],"usage":{"completion_tokens":3}}'
    streams: ClassVar = {
        "whole": [*tokens, usage, "[DONE]"],
        "short": [*tokens[:2], usage, "[DONE]"],
        "error": [*tokens[:1], '{"error": {"message": "the engine is gone"}}'],
        "cut": tokens[:2],
    }

    asked_for_metrics = 0

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, '{"data": [{"id": "whole"}]}')
            return
        Answers.asked_for_metrics += 1
        at = Answers.asked_for_metrics
        cpu = 'flexllm:engine_cpu_seconds_total{engine="0",thread='
        lines = [
            "# HELP flexllm:step_seconds A step.",
            f'flexllm:step_seconds_count{{engine="0"}} {10 * at}',
            f'flexllm:step_seconds_sum{{engine="0"}} {0.5 * at}',
            f'vllm:generation_tokens_total{{kind="a"}} {4 * at}',
            f'vllm:generation_tokens_total{{kind="b"}} {2 * at}',
            f'{cpu}"step"}} {0.2 * at}',
            f'{cpu}"messages"}} {0.1 * at}',
        ]
        self._answer(200, "\n".join(lines))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/files":
            assert b'name="purpose"\r\n\r\nfine-tune' in body and b'filename="a.jsonl"' in body
            self._answer(200, json.dumps({"id": "file-1"}))
            return
        asked = json.loads(body)
        kind = asked["model"]
        if kind == "busy":
            self._answer(429, "{}", **{"Retry-After": "2"})
        elif kind == "wrong":
            self._answer(400, '{"error": "what is that?"}')
        elif not asked["stream"]:
            counted = 3 * len(asked["prompt"])
            self._answer(200, json.dumps({"usage": {"completion_tokens": counted}}))
        else:
            self._answer(200, "".join(f"data: {event}\n\n" for event in self.streams[kind]))

    def _answer(self, status: int, text: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def ask(url: str, model: str, leaves_after: int | None = None) -> Completion:
    body = {"model": model, "prompt": [3, 4], "max_tokens": 3, "stream": model != "at once"}

    async def once() -> Completion:
        async with open_clients(url) as client:
            return await complete(client, body, leaves_after)

    return asyncio.run(once())


def test_a_stream_that_ends_as_it_should(url: str) -> None:
    completion = ask(url, "whole")
    assert (completion.outcome, completion.tokens, completion.why) == ("finished", 3, "")
    assert completion.ttft_s is not None and completion.ttft_s > 0
    assert completion.tpot_s is not None and completion.tpot_s >= 0


def test_several_prompts_in_one_request(url: str) -> None:
    assert ask(url, "at once").outcome == "finished"  # two prompts of three tokens


def test_a_client_that_goes_away(url: str) -> None:
    completion = ask(url, "whole", leaves_after=1)
    assert (completion.outcome, completion.tokens) == ("left", 2)


@pytest.mark.parametrize(
    ("model", "outcome", "why"),
    [
        ("short", "failed", "2 tokens and a count of 3, not 3"),
        ("error", "failed", "the engine is gone"),
        ("wrong", "failed", "400: "),
        ("busy", "refused", ""),
        ("cut", "lost", "the connection was closed amid an answer"),
    ],
)
def test_what_goes_wrong_is_told(url: str, model: str, outcome: str, why: str) -> None:
    completion = ask(url, model)
    assert completion.outcome == outcome and why in completion.why
    assert completion.retry_after_s == (2.0 if model == "busy" else None)


def test_without_a_server_a_request_is_lost() -> None:
    completion = ask("http://127.0.0.1:9", "whole")
    assert completion.outcome == "lost" and completion.why


def test_an_upload_is_a_form(url: str) -> None:
    async def once() -> str:
        async with open_clients(url) as client:
            return await upload(client, "a.jsonl", b"{}\n")

    assert asyncio.run(once()) == "file-1"


def test_the_cost_of_a_step_is_a_difference_of_metrics(url: str) -> None:
    whole, streams = compare(url, "", 3, prompt_tokens=4, output_tokens=3, repeat=1)
    for (cost,) in (whole, streams):
        assert (cost.steps, cost.tokens, cost.failed) == (10, 6, 0)
        assert cost.step_s == pytest.approx(0.05) and cost.step_cpu_s == pytest.approx(0.02)
        assert cost.message_cpu_s == pytest.approx(0.01)
    assert len(streams[0].ttft_s) == 3 and whole[0].ttft_s == []
    assert cost_table(whole, streams).row_count == 2


def sample(at: float, **changes: float) -> Sample:
    values = {"http_rss": 100e6, "engine_rss": 500e6, "http_fds": 10, "engine_fds": 20}
    values |= {"kv_usage": 0.0, "running": 0, "waiting": 0, "finetune_tokens": 100 * at}
    values["free_slots"] = 3
    return Sample(at=at, **(values | changes))  # type: ignore[arg-type]


def test_the_report_finds_what_leaks_or_fails() -> None:
    load = Load("", "m", LoadShape(clients=2, seconds=8.0, uploads=2))
    slo = {"ttft_ms": 100.0, "tpot_ms": 10.0}
    load.requests = [
        Completion(0.0, "finished", "", 0.05, 0.005, 10),
        Completion(0.0, "finished", "", 0.05, 0.050, 10),
    ]
    load.uploads = ["file-1", "file-2"]
    samples = [sample(at) for at in range(9)]
    good = make_report(load, samples, sample(0), sample(9), slo)
    assert good["problems"] == []
    assert good["attainment"] == {"ttft": 1.0, "tpot": 0.5, "both": 0.5}
    assert good["finetune_tokens_per_s"] == 100 and good["output_tokens_per_s"] == 2.5

    load.requests.append(Completion(0.0, "lost", "ReadError: "))
    load.uploads[1] = "500: no room"
    samples = [sample(at, http_rss=(100 + 5 * at) * 2**20, finetune_tokens=0) for at in range(9)]
    after = sample(9, kv_usage=0.25, engine_fds=30, free_slots=1)
    bad = make_report(load, samples, sample(0), after, slo)
    assert bad["problems"] == [
        "1 requests lost",
        "1 of 2 uploads failed",
        "25.0% of the KV pages are still in use",
        "2 slots for adapters are still in use",
        "http: memory grew from 115 MiB in the second quarter to 135 in the last",
        "engine: 30 file descriptors, 20 before the load",
        "no job trained after the first quarter: raise finetune.floor",
    ]
    assert ("500: no room", 1) in bad["why"]


def test_requests_are_compared_with_those_of_turns_without_jobs() -> None:
    """Those that are sent in one turn and answered in the next belong to neither."""
    load = Load("", "m", LoadShape(clients=2, seconds=8.0, uploads=0), began=100.0)
    load.turns = [Turn(0, 2, True), Turn(2, 4, False), Turn(4, 6, True)]
    tpots = {100.0: 0.005, 101.0: 0.02, 101.9: 0.02, 102.5: 0.009, 103.0: 0.001, 104.5: 0.004}
    load.requests = [Completion(at, "finished", "", 0.05, tpot, 10) for at, tpot in tpots.items()]
    samples = [sample(at) for at in range(9)]
    slo = {"ttft_ms": 100.0, "tpot_ms": 10.0}
    report = make_report(load, samples, sample(0), sample(9), slo)
    beside, alone = report["turns"]["with jobs"], report["turns"]["without"]
    assert (beside["requests"], alone["requests"]) == (3, 2)
    assert (beside["attainment"], alone["attainment"]) == (pytest.approx(2 / 3), 1.0)
    assert alone["tpot_ms"]["p50"] == pytest.approx(5.0)
    assert report["problems"] == ["66.7% of the requests are on time with jobs, 100.0% without"]


def test_another_projects_report_must_count_all_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "loader"
    program.write_text('#!/bin/sh\necho "$1" > report.json\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for tokens, told in ((REQUESTS * OUTPUT, "ok: "), (1, "FAILED: ")):
        client = OutsideClient(
            "loader",
            [json.dumps([REQUESTS, tokens])],
            tmp_path / "report.json",
            lambda told: tuple(told),  # type: ignore[arg-type]
        )
        assert client.run(tmp_path).startswith(told)
    assert OutsideClient("no-such-program", []).run(tmp_path).startswith("left out")


def test_a_library_runs_in_its_own_environment(tmp_path: Path) -> None:
    """Here one without that library: each of its flows is told as failed."""
    python = tmp_path / "outlines" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.base_prefix + "/bin/python3")
    told = run_library("outlines", tmp_path, "http://127.0.0.1:1", "none", tmp_path)
    assert told.startswith("FAILED: 0 of 3 flows; outlines_chat outlines_form outlines_kinds;")
    assert "ModuleNotFoundError" in (tmp_path / "outlines.log").read_text()
    assert run_library("litellm", tmp_path, "", "", tmp_path).startswith("left out")


def test_every_flow_is_of_a_library() -> None:
    names = [name for name, of in vars(library_flows).items() if isfunction(of)]
    flows = [name for name in names if name != "main" and not name.startswith("_")]
    of = {lib: [f for f in flows if f.startswith(f"{lib}_")] for lib in library_flows.LIBRARIES}
    assert all(of.values()) and sum(map(len, of.values())) == len(flows) == 30


def test_a_load_on_a_server_beside_a_job(tmp_path: Path, llama: Path) -> None:
    """Ten seconds: the server is started as a user starts it, and everything it is asked ends."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(make_config(llama, tmp_path / "out")))  # JSON is YAML
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20))
    questions = [{"prompt": row["prompt"], "answer": row["completion"]} for row in letter_rows(20)]
    prompts = write_rows(tmp_path / "prompts.jsonl", questions)
    jobs = Jobs(1, rows, reinforcement=1, prompts=prompts, turn_s=1.0)
    shape = LoadShape(8, 4.0, 0.2, (4, 20), (4, 12), uploads=5)
    overrides = ["finetune.floor=0.3"]
    out = tmp_path / "load"
    report = run_load(SCRIPTS / "serve.py", config, overrides, out, shape, jobs)
    requests = report["requests"]
    assert requests["finished"] > 8 and requests["failed"] == requests["lost"] == 0, report["why"]
    assert requests["sent"] == sum(requests.values()) - requests["sent"]
    assert report["turns"].keys() == {"with jobs", "without"}
    assert all(turn["requests"] > 1 for turn in report["turns"].values())
    trained, learnt = report["tokens_of_jobs"].values()
    assert trained["forward"] > 0 == trained["answers"] and learnt["answers"] > 0
    assert report["before"]["free_slots"] == report["after"]["free_slots"] > 0
    assert report["last_quarter"]["free_slots"] < report["before"]["free_slots"]
    assert report["uploads"]["kept"] == 5 and report["finetune_tokens_per_s"] > 0
    assert report["after"]["kv_usage"] == report["after"]["running"] == 0
    assert json.loads((out / "report.json").read_text())["requests"] == requests
    assert (out / "report.png").stat().st_size > 10_000


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    with pytest.raises(UserError, match=r"the server has ended; see .*server\.log"):
        ServerProcess(SCRIPTS / "serve.py", config, [], tmp_path)
