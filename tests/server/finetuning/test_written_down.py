"""What an engine says of jobs is in the database in the end, once, whatever happens meanwhile."""

import asyncio
import os
import sqlite3
import threading
import time
from contextlib import contextmanager

import pytest
from sqlalchemy import event, select

from flexllm_jax.config import build_config
from flexllm_jax.server import database as database_module
from flexllm_jax.server.database import (
    CheckpointRow,
    Database,
    DatabaseUnavailable,
    EventRow,
    JobRow,
)
from flexllm_jax.server.engines.protocol import Fact, JobReport
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.finetuning import transitions
from flexllm_jax.server.finetuning.files import FileStore
from flexllm_jax.server.finetuning.records import JobRecords, losses_of, metrics_at
from flexllm_jax.server.finetuning.reports import ReportWriter
from tests.server.running import make_config

JOB = "ftjob-1"


class Engine:
    """Hears what is acknowledged."""

    def __init__(self):
        self.heard = []

    def acknowledge(self, name, run, number):
        self.heard.append((name, run, number))


class World:
    """A database with a running job, and who writes to it."""

    def __init__(self, folder):
        self.config = build_config(make_config(folder / "model", folder))
        self.path = folder / "server.sqlite"
        self.database = Database(f"sqlite:///{self.path}")
        files = FileStore(folder / "files", self.database, self.config.server, several=False)
        self.records = JobRecords(self.config, ModelRegistry(self.config), files)
        row = {"id": JOB, "status": "running", "model": "tiny", "request": {"seed": 1}}
        row |= {"hyperparameters": {}, "training_file": "file-1", "config": {}}
        self.run(lambda s: s.add(JobRow(**row)))
        self.engine, self.adapters = Engine(), []

    def run(self, function):
        return self.database.run_now(function)

    async def written(self, report, adapters):
        self.adapters += adapters

    def job(self):
        return self.run(lambda s: s.scalars(select(JobRow)).one())

    def messages(self):
        query = select(EventRow.message).order_by(EventRow.number)
        return self.run(lambda s: list(s.scalars(query)))

    def losses(self):
        return self.run(lambda s: losses_of(s, JOB))

    def write(self, *reports, timeout_s=20.0):
        """Hand reports in, as an engine does that tells them again every 20 ms."""

        async def follow():
            writer = ReportWriter(self.database, self.records, self.written)
            task = asyncio.create_task(writer.run())
            for report in reports:
                writer.take(self.engine, report)
                await asyncio.sleep(0.02)
            done = await writer.all_settled(timeout_s)
            task.cancel()
            return done

        return asyncio.run(follow())


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "_LOCKED_S", 0.05)
    world = World(tmp_path)
    yield world
    world.database.close()


def report(*facts, run="a", resumed_from=0, first=1):
    numbered = [Fact(first + i, *fact) for i, fact in enumerate(facts)]
    status = numbered[-1].status or "running"
    return JobReport(JOB, run, status, 0, 9, 0, 0, 70, 0.0, {}, None, resumed_from, numbered)


STARTED = ("started", 0)
SUCCEEDED = ("ended", 0, {}, None, "succeeded")


def loss(step, value=0.5):
    return ("step", step, {"loss": value})


@contextmanager
def locked(path, seconds):
    """Another program has the database."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(seconds, other.execute, ["ROLLBACK"])
    timer.start()
    yield
    timer.join()
    other.close()


def test_a_fact_is_written_once_however_often_it_is_told(world):
    facts = (STARTED, loss(1), loss(2))
    assert world.write(report(*facts), report(*facts), report(*facts, loss(3)))
    assert list(world.losses()) == [1, 2, 3]
    assert len([m for m in world.messages() if "training loss" in m]) == 3
    assert world.engine.heard[-1] == (JOB, "a", 4)


def test_a_locked_database_loses_nothing(world):
    """Not even the end, which is told while it is locked; health says that it is, until it is not,
    and an event of the job tells it."""
    problems = []

    async def look():
        while True:
            problems.append(world.database.problem())
            await asyncio.sleep(0.1)

    async def follow():
        writer = ReportWriter(world.database, world.records, world.written)
        tasks = [asyncio.create_task(writer.run()), asyncio.create_task(look())]
        writer.take(world.engine, report(STARTED, loss(1), loss(2), SUCCEEDED))
        assert await writer.all_settled(20)
        assert world.database.problem() is None
        for task in tasks:
            task.cancel()

    with locked(world.path, 3.0):
        asyncio.run(follow())
    assert "the database refuses: database is locked" in problems
    assert world.job().status == "succeeded" and world.job().result_files
    assert list(world.losses()) == [1, 2]
    assert any("could not be written down for" in message for message in world.messages())
    assert len(list((world.config.output_dir / "files").iterdir())) == 1


def test_health_is_well_again_when_there_is_nothing_left_to_write(world):
    with locked(world.path, 0.5), pytest.raises(DatabaseUnavailable):
        world.run(lambda s: s.add(EventRow(job_id=JOB, message="", level="info")))
    assert world.database.problem() is not None

    async def wait():
        writer = ReportWriter(world.database, world.records, world.written)
        task = asyncio.create_task(writer.run())
        end = time.monotonic() + 10
        while world.database.problem():
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(wait())


def test_a_full_disk_is_status_507_and_costs_nothing_that_is_told_again(world):
    limits = [1]  # pages: none beyond those that there are

    @event.listens_for(world.database._engine, "checkout")
    def limit(connection, *_):
        connection.execute(f"PRAGMA max_page_count={limits[0]}")

    with pytest.raises(DatabaseUnavailable) as refused:
        world.run(lambda s: s.add(EventRow(job_id=JOB, message="x" * 100_000, level="info")))
    assert refused.value.status == 507 and "full" in refused.value.message
    facts = [STARTED, *[loss(step) for step in range(1, 200)], SUCCEEDED]
    assert not world.write(report(*facts), timeout_s=0.5)
    assert world.job().status == "running"
    limits[0] = 1_000_000
    assert world.write(report(*facts))
    assert world.job().status == "succeeded" and len(world.losses()) == 199


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_database_that_is_gone_is_noticed(world, what):
    other = world.path.with_name("other")
    other.write_bytes(b"")
    os.replace(other, world.path) if what == "replaced" else world.path.unlink()
    assert "is gone or was replaced: restart the server" in world.database.problem()
    with pytest.raises(DatabaseUnavailable, match="gone"):
        world.run(lambda s: s.scalars(select(JobRow)).all())


def test_a_run_that_goes_on_fills_what_the_one_before_could_not_say(world):
    world.write(report(STARTED, loss(1), loss(2)))
    facts = (loss(2), loss(3), loss(4), ("started", 4), loss(5))
    world.write(report(*facts, run="b", resumed_from=4))
    assert list(world.losses()) == [1, 2, 3, 4, 5]
    shown = [m for m in world.messages() if "Step" in m or "Resumed" in m]
    assert shown == [
        *(f"Step {n}/9: training loss=0.5000" for n in (1, 2, 3, 4)),
        "Resumed from step 4",
        "Step 5/9: training loss=0.5000",
    ]


def test_a_restart_from_the_beginning_is_told_once(world):
    world.write(report(STARTED, loss(1)))
    again = report(STARTED, loss(1), run="b")
    world.write(again, again)
    told = [m for m in world.messages() if m.startswith("Started again from step 0")]
    assert len(told) == 1


def test_checkpoints_on_disk_are_found(world):
    """Also those that the engine's death kept from being told; not those half written."""
    folder = world.config.output_dir / JOB / "adapters"
    for step in (2, 4):
        (folder / f"step-{step}").mkdir(parents=True)
    (folder / "step-2" / "adapter_config.json").write_text("{}")
    (folder / "step-4" / "adapter_config.json.part").write_text("{}")
    world.write(report(loss(1), loss(2), ("started", 2), run="b", resumed_from=2))
    rows = world.run(lambda s: list(s.scalars(select(CheckpointRow))))
    assert [(row.step, row.metrics["train_loss"]) for row in rows] == [(2, 0.5)]
    assert [adapter.path for adapter in world.adapters] == [str(folder / "step-2")]


def test_a_checkpoint_has_the_losses_of_its_step_and_reads_few_events(world):
    """However long the job is; of a step taken twice, the last."""
    told = [loss(1), loss(2), ("validation", 2, {"loss": 0.7}), ("checkpoint", 2)]
    told += [loss(step) for step in range(3, 2001)]
    world.write(report(*told))
    took = {}
    for look in (losses_of, lambda s, job: metrics_at(s, job, 2000)):
        began = time.perf_counter()
        found = world.run(lambda s, look=look: [look(s, JOB) for _ in range(5)])
        took[look] = time.perf_counter() - began
    assert found[0] == {"train_loss": 0.5}
    everything, one = took.values()
    assert one < everything / 4
    rows = world.run(lambda s: list(s.scalars(select(CheckpointRow))))
    assert rows[0].metrics == {"step": 2, "train_loss": 0.5, "valid_loss": 0.7}
    again = (("started", 0), loss(1), loss(2, 0.25), ("checkpoint", 4))
    world.write(report(*again, run="b"))
    found = world.run(lambda s: metrics_at(s, JOB, 2))
    assert found["train_loss"] == 0.25


def test_only_losses_of_the_engine_without_progress_fail_a_job(world):
    def lose():
        world.run(lambda s: transitions.note_lost(s, [JOB]))
        return world.job().status

    for step in range(1, 6):
        world.write(report(("started", step - 1), loss(step), run=str(step)))
        assert lose() == "running"
    assert [lose(), lose(), lose()] == ["running", "running", "failed"]
    assert "the engine ended 3 times while this job got no further than step 5" in str(
        world.job().error
    )
    world.run(lambda s: transitions.revive(s, JOB, limit=10))
    assert (world.job().status, world.job().error) == ("queued", None)
