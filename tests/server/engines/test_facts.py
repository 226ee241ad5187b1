"""What happens to a job is told until it is acknowledged, in order, each fact under one number."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from flexllm_jax.finetune.job import JobStatus
from flexllm_jax.server.engines.facts import FactBook, JobFacts


def make_job(resumed_from=0):
    """What facts are made from: the lists that a job adds to, and its place."""
    return SimpleNamespace(
        name="job",
        status=JobStatus.RUNNING,
        running=True,
        paused=False,
        reason=None,
        step=resumed_from,
        total_steps=9,
        forwarded=0,
        backwarded=0,
        earlier_tokens=0,
        tokens=0,
        tokens_per_s=0.0,
        metrics=[{"loss": 1.0 / (n + 1)} for n in range(resumed_from)],
        validations=[],
        messages=[],
        eta_s=None,
        resumed_from=resumed_from,
        finished_at=None,
        sampler=None,
    )


def told(report):
    return [(f.number, f.kind, f.step, f.metrics, f.text, f.status) for f in report.facts]


@given(st.lists(st.sampled_from(["loss", "checkpoint", "message", "report", "ack", "old ack"])))
def test_every_fact_is_told_until_it_is_acknowledged(actions):
    job = make_job()
    facts = JobFacts(job, losses_known=0)
    expected, heard, written = [("started", 0)], {}, 0
    for number, action in enumerate([*actions, "report"]):
        if action == "loss":
            job.metrics.append({"loss": float(number)})
            job.step += 1
            expected.append(("step", job.step))
        elif action == "checkpoint":
            facts.checkpoints.append(number)
            expected.append(("checkpoint", number))
        elif action == "message":
            job.messages.append(str(number))
            expected.append(("message", str(number)))
        elif action == "report":
            report = facts.report()
            numbers = [fact.number for fact in report.facts]
            assert numbers == list(range(written + 1, len(expected) + 1))
            heard |= {f.number: (f.kind, f.text or f.step) for f in report.facts}
        elif action == "ack":
            report = facts.report()
            heard |= {f.number: (f.kind, f.text or f.step) for f in report.facts}
            written = len(heard)
            facts.acknowledge(report.run, written)
        else:
            facts.acknowledge("another run", len(expected))
    assert sorted(heard) == list(range(1, len(expected) + 1))
    assert sorted(heard.values(), key=str) == sorted(expected, key=str)


def test_a_validation_is_told_after_its_step_and_before_the_next():
    job = make_job()
    facts = JobFacts(job, losses_known=0)
    job.metrics += [{"loss": float(n)} for n in (1, 2, 3, 4)]
    job.validations += [(2, {"loss": 0.2}), (4, {"loss": 0.4})]
    found = [(f.kind, f.step) for f in facts.report().facts if f.metrics]
    steps = [("step", n) for n in (1, 2, 3, 4)]
    assert found == [*steps[:2], ("validation", 2), *steps[2:], ("validation", 4)]


def test_a_run_that_goes_on_tells_what_the_checkpoint_knows_and_the_database_lacks():
    facts = JobFacts(make_job(resumed_from=5), losses_known=3)
    assert [(f.kind, f.step) for f in facts.report().facts] == [
        ("step", 4),
        ("step", 5),
        ("started", 5),
    ]
    ahead = JobFacts(make_job(resumed_from=5), losses_known=8)
    assert [(f.kind, f.step) for f in ahead.report().facts] == [("started", 5)]


def test_an_ended_job_is_told_of_until_its_end_is_written():
    job, book = make_job(), FactBook(forgotten_after_s=0.0)
    book.begin(job, 0)
    job.status, job.running, job.finished_at = JobStatus.FAILED, False, 1.0
    job.reason = "it diverged"
    for _ in range(2):
        assert book.forgettable() == []
        (report,) = book.reports()
        assert (report.facts[-1].kind, report.facts[-1].status) == ("ended", "failed")
        assert report.facts[-1].text == "it diverged"
    book.acknowledge("job", report.run, report.facts[-1].number)
    assert book.forgettable() == [job] and book.reports() == []
