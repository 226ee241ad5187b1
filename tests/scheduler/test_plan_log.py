"""A log of plans can be planned again, to the same plans."""

from __future__ import annotations

import json
import random

import pytest

from scheduler.config import SchedulerConfig
from scheduler.latency.model import LatencyModel
from scheduler.plan_log import LoggedScheduler, replay
from scheduler.request import Microbatch, Slo
from tests.scheduler.simulated_device import SimulatedEngine, request

CONFIG = SchedulerConfig(
    max_sequences=3,
    max_tokens_per_step=16,
    max_model_len=64,
    token_buckets=(4, 8, 16),
    num_pages=20,
    page_size=4,
    state_snapshots=3,
    snapshot_every=8,
    num_layers=2,
    unit_tokens=8,
    finetune_slots=64,
    slo=Slo(0.05, 1.0),
)


def write_log(path, policy):
    """Some seconds of everything that can happen."""
    latency = LatencyModel({4: 0.01, 16: 0.02}, {"layer_units": 0.01, "loss_units": 0.01})
    generator = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        scheduler = LoggedScheduler(CONFIG, latency, policy, file)
        engine = SimulatedEngine(scheduler)
        scheduler.add_job("a", 2.0)
        for index in range(30):
            prompt = tuple(generator.choices(range(4), k=generator.randint(1, 30)))
            slo = Slo(0.2, 2.0, 0.5, "batch") if index % 3 == 0 else None
            made = request(str(index), prompt, 6, arrival=engine.now, slo=slo)
            scheduler.add(made)
            scheduler.add(
                Microbatch(index, (7, 9), job="a" if index % 2 else "b", weights_version=index)
            )
            for _ in range(generator.randint(1, 6)):
                engine.step()
            if index % 10 == 5:
                scheduler.cancel(str(index))
                scheduler.pause_job("a")
                scheduler.forget_prefixes()
            if index % 10 == 9:
                scheduler.resume_job("a")
        engine.drain(2000)
    return len(path.read_text().splitlines()) - 1


@pytest.mark.parametrize("policy", ["coserving", "published", "temporal_64"])
def test_every_step_is_planned_again_as_it_was(tmp_path, policy):
    path = tmp_path / "plans.jsonl"
    steps = write_log(path, policy)
    pairs = list(replay(path))
    assert len(pairs) == steps > 50
    assert all(logged == planned for logged, planned in pairs)
    assert any("state_copies" in logged for logged, _ in pairs)
    assert any(logged["backward"] for logged, _ in pairs)
    assert any(logged["parked"] for logged, _ in pairs) or policy != "coserving"


def test_a_plan_that_was_tampered_with_is_seen(tmp_path):
    path = tmp_path / "plans.jsonl"
    write_log(path, "coserving")
    lines = path.read_text().splitlines()
    changed = json.loads(lines[20])
    changed["plan"]["token_bucket"] = 5
    lines[20] = json.dumps(changed)
    path.write_text("\n".join(lines) + "\n")
    assert [logged != planned for logged, planned in replay(path)].count(True) == 1


def test_a_log_written_before_fields_were_renamed_is_replayed(tmp_path):
    path = tmp_path / "plans.jsonl"
    write_log(path, "coserving")
    text = path.read_text()
    for new, old in (("unit_tokens", "backward_window"), ("weights_version", "batch")):
        assert f'"{new}":' in text
        text = text.replace(f'"{new}":', f'"{old}":')
    path.write_text(text)
    assert all(logged == planned for logged, planned in replay(path))


@pytest.mark.parametrize("text", ["", "{}", "[1]\n", "not json"])
def test_a_file_that_is_no_log_is_named(tmp_path, text):
    path = tmp_path / "plans.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plans\.jsonl:1: not a log of plans"):
        list(replay(path))
