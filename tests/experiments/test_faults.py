"""The campaign of faults: its plan follows from its seed, its checks see every kind of loss, and a
short one on a real server comes to its end with nothing lost."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from flexllm_jax.experiments.faults import run
from flexllm_jax.experiments.faults.checks import Ended, compare
from flexllm_jax.experiments.faults.plan import KINDS, MOMENTS, ORDER, plan_round
from flexllm_jax.experiments.faults.report import table
from flexllm_jax.experiments.faults.work import JOBS
from tests.engines import letter_rows, write_rows
from tests.scripts.workspace import SCRIPTS
from tests.server.running import make_config

STEPS = JOBS["narrow"]["max_steps"]


def test_a_seed_and_a_number_are_a_rounds_faults() -> None:
    assert plan_round(7, 3, 3) == plan_round(7, 3, 3) != plan_round(8, 3, 3)
    planned = [plan_round(7, number, 3) for number in range(12)]
    counts = Counter(fault.kind for faults in planned for fault in faults)
    assert counts == dict.fromkeys(KINDS, 4)
    for faults in planned:
        places = [ORDER.index(fault.moment) for fault in faults]
        assert places == sorted(places)
        assert all(fault.moment in MOMENTS[fault.kind] for fault in faults)


def event(message: str, **data: Any) -> dict[str, Any]:
    return {"message": message, "type": "metrics" if data else "message", "data": data or None}


def told(step: int) -> dict[str, Any]:
    return event(f"Step {step}", step=step, train_loss=1 / step)


FIRST = [event("Created fine-tuning job: a")]
LAST = [event("New fine-tuned model created: a"), event("The job has successfully completed")]
LOSSES = {step: 1 / step for step in range(1, STEPS + 1)}
WHOLE = Ended(
    LOSSES,
    LOSSES,
    b"weights",
    {4: b"four", 8: b"eight"},
    "text",
    [*FIRST, *map(told, LOSSES), *LAST],
)


def test_what_is_whole_is_not_complained_of() -> None:
    assert compare("narrow", WHOLE, WHOLE) == []
    again = [*FIRST, *map(told, range(1, 9)), event("Resumed from step 4")]
    again += [*map(told, range(5, STEPS + 1)), *LAST]
    assert compare("narrow", replace(WHOLE, events=again), WHOLE) == []
    excused = [*WHOLE.events[:-1], event("x: step 8 could not be saved (full)"), WHOLE.events[-1]]
    lost = replace(WHOLE, checkpoints={4: b"four"}, events=excused)
    assert compare("narrow", lost, WHOLE) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"losses": {s: 1 / s for s in range(1, STEPS)}}, "events tell losses of steps"),
        ({"losses": LOSSES | {3: 0.3333}}, "losses differ by"),
        ({"result": LOSSES | {3: 0.3333}}, "the file of its losses differs"),
        ({"adapter": b"weight5"}, "the adapter differs"),
        ({"answer": "test"}, "the adapter answers 'test', not 'text'"),
        ({"checkpoints": {4: b"four"}}, "the checkpoint of step 8 is missing"),
        ({"checkpoints": {4: b"four", 8: b"8"}}, "the checkpoint of step 8 differs"),
        ({"events": WHOLE.events[1:]}, "the first event is"),
        ({"events": [*WHOLE.events, LAST[1]]}, "2 events say 'The job has successfully'"),
        ({"events": [*FIRST, told(2), told(1), *LAST]}, "the loss of step 1 is told out of order"),
        ({"events": [*FIRST, told(1), told(1), *LAST]}, "the loss of step 1 is told out of order"),
    ],
)
def test_every_loss_is_seen(changes: dict[str, Any], complaint: str) -> None:
    wrong = compare("narrow", replace(WHOLE, **changes), WHOLE)
    assert any(text.startswith(complaint) for text in wrong), wrong


def test_two_rounds_lose_nothing(llama, tmp_path) -> None:
    """A real server, killed, with a full disk and with a locked database: worth its half minute."""
    config = make_config(llama, tmp_path / "unused")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    data = write_rows(tmp_path / "rows.jsonl", letter_rows(20))
    overrides = ["compile.token_buckets=[48]", "scheduler.max_tokens_per_step=48"]
    overrides += ["scheduler.max_sequences=6", "finetune.max_tokens=96", "finetune.unit_tokens=32"]
    report = run.run_campaign(
        SCRIPTS / "serve.py", path, overrides, tmp_path, 7, range(2), faults=2, training_file=data
    )
    assert report["problems"] == []
    assert len(report["faults"]) == 4 and all(fault["survived"] for fault in report["faults"])
    assert report["requests"]["finished"] > 0
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert table(report) == (tmp_path / "report.md").read_text()
