"""What a server says and keeps of jobs and files, and what of it is not as it should be."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_jax.experiments.faults.work import JOBS, Api

_COULD_NOT = ("could not be saved", "could not be written")  # a checkpoint, as an event tells


@dataclass(frozen=True)
class Ended:
    """A job that has succeeded: losses by step as its events and as its result file tell them, the
    adapter's bytes, those of its checkpoints by step, what it answers, and all events in order."""

    losses: dict[int, float]
    result: dict[int, float]
    adapter: bytes
    checkpoints: dict[int, bytes]
    answer: str
    events: list[dict[str, Any]]


def look_at(api: Api, folder: Path, job: dict[str, Any]) -> Ended:
    """What there is of a job that has succeeded; KeyError or OSError where something is missing."""
    name = job["id"]
    events = list(reversed(api.all_of(f"/v1/fine_tuning/jobs/{name}/events")))
    told = [event["data"] for event in events if event["type"] == "metrics"]
    losses = {data["step"]: data["train_loss"] for data in told if "train_loss" in data}
    content = api.ask("GET", f"/v1/files/{job['result_files'][0]}/content").text
    table = csv.DictReader(io.StringIO(content))
    result = {int(row["step"]): float(row["train_loss"]) for row in table}
    checkpoints = {
        kept["step_number"]: _weights(folder / name / "adapters" / f"step-{kept['step_number']}")
        for kept in api.all_of(f"/v1/fine_tuning/jobs/{name}/checkpoints")
    }
    body = {"model": job["fine_tuned_model"], "prompt": [7, 8, 9], "max_tokens": 8}
    answer = api.ask("POST", "/v1/completions", json=body | {"temperature": 0, "ignore_eos": True})
    text = answer.raise_for_status().json()["choices"][0]["text"]
    adapter = _weights(folder / name / "adapter")
    return Ended(losses, result, adapter, checkpoints, text, events)


def _weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def compare(kind: str, ended: Ended, quiet: Ended) -> list[str]:
    """What of a disturbed job is not that of the quiet one, bit for bit; nothing of it may be
    missing, out of order, or told twice but where it was computed twice."""
    wrong = []
    steps = list(range(1, JOBS[kind]["max_steps"] + 1))
    messages = [event["message"] for event in ended.events]
    if sorted(ended.losses) != steps:
        wrong.append(f"events tell losses of steps {sorted(ended.losses)}")
    if ended.losses != quiet.losses:
        apart = max(abs(ended.losses.get(s, 9e9) - quiet.losses[s]) for s in quiet.losses)
        wrong.append(f"losses differ by {apart:g}")
    if ended.result != quiet.result:
        wrong.append("the file of its losses differs")
    if ended.adapter != quiet.adapter:
        wrong.append("the adapter differs")
    if ended.answer != quiet.answer:
        wrong.append(f"the adapter answers {ended.answer!r}, not {quiet.answer!r}")
    for step, weights in quiet.checkpoints.items():
        told = [f"step {step} {text}" for text in _COULD_NOT]
        excused = any(text in message for message in messages for text in told)
        if step not in ended.checkpoints and not excused:
            wrong.append(f"the checkpoint of step {step} is missing, and no event says why")
        elif step in ended.checkpoints and ended.checkpoints[step] != weights:
            wrong.append(f"the checkpoint of step {step} differs")
    wrong += _check_events(ended.events, messages)
    return wrong


def _check_events(events: list[dict[str, Any]], messages: list[str]) -> list[str]:
    wrong = []
    if not messages[0].startswith("Created fine-tuning job"):
        wrong.append(f"the first event is {messages[0]!r}")
    for once in ("Created fine-tuning job", "New fine-tuned model", "The job has successfully"):
        if (count := sum(message.startswith(once) for message in messages)) != 1:
            wrong.append(f"{count} events say {once!r}")
    reached = 0
    for event in events:
        if event["message"].startswith(("Resumed from", "Started again", "The engine ended")):
            reached = 0  # what was computed again may be told again
        if event["type"] == "metrics" and "train_loss" in event["data"]:
            if event["data"]["step"] <= reached:
                wrong.append(f"the loss of step {event['data']['step']} is told out of order")
            reached = event["data"]["step"]
    return wrong
