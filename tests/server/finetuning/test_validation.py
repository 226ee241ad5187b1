"""Files that end the server while they are read."""

from functools import partial

from flexllm_jax.server.database import Database, JobRow
from flexllm_jax.server.finetuning import transitions
from flexllm_jax.server.finetuning.records import find_job


def test_a_job_whose_files_end_the_server_again_and_again_fails():
    database = Database("sqlite://")
    row = JobRow(id="ftjob-1", status="validating_files", model="tiny", request={})
    row.hyperparameters, row.training_file = {}, "file-1"
    database.run_now(lambda session: session.add(row))

    def run(change):
        return database.run_now(partial(change, job_id="ftjob-1"))

    for _ in range(5):  # a server that is stopped meanwhile does not count
        assert run(transitions.begin_validation) is not None
        run(transitions.give_up_validation)
    for _ in range(3):
        assert run(transitions.begin_validation) is not None
    assert run(transitions.begin_validation) is None
    job = run(find_job)
    assert job and job.error and job.status == "failed" and "3 times" in job.error["message"]
    assert run(transitions.begin_validation) is None
    database.close()
