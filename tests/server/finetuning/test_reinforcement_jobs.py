"""Reinforcement jobs through the unmodified openai SDK: how they are asked for, what is told of
them, what is refused."""

import csv
import io
import json
import os
import signal

import openai
import pytest

from tests.engine.test_reinforcement_jobs import prompt_rows
from tests.server.finetuning.test_jobs import LORA, wait
from tests.server.running import RunningServer, make_config

GRADER = {
    "type": "string_check",
    "name": "letter",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.letter }}",
    "operation": "like",
}
HYPER = {
    "batch_size": 4,
    "compute_multiplier": 0.5,
    "n_epochs": 2,
    "eval_interval": 2,
    "max_tokens": 20,
}


def letters(count, seed=0):
    return [{"prompt": r["prompt"], "letter": r["prompt"][0]} for r in prompt_rows(count, seed)]


def upload(client, rows):
    data = ("prompts.jsonl", "\n".join(map(json.dumps, rows)).encode())
    return client.files.create(file=data, purpose="fine-tune").id


def reinforcement(grader=GRADER, **hyperparameters):
    own = {"grader": grader, "hyperparameters": HYPER | hyperparameters}
    return {"type": "reinforcement", "reinforcement": own}


def create(client, file_id, method, **fields):
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=3, method=method, extra_body=LORA, **fields
    )


def test_from_upload_to_rewards_and_a_served_adapter(client):
    assistant = {"prompt": [{"role": "assistant", "content": "a"}], "letter": "a"}
    training = upload(client, [*letters(8), assistant, {"prompt": "a"}])
    validation = upload(client, letters(3, seed=1))
    job = create(client, training, reinforcement(), validation_file=validation)
    assert job.method.reinforcement.grader.operation == "like"
    job = wait(client, job, "succeeded")
    shown = job.method.reinforcement.hyperparameters
    assert (shown.batch_size, shown.n_epochs, shown.compute_multiplier) == (4, 2, 0.5)
    assert (shown.eval_interval, shown.eval_samples) == (2, 1)
    assert shown.model_dump()["num_generations"] == 4

    events = list(client.fine_tuning.jobs.list_events(job.id))[::-1]
    skipped = {e.data["line"]: e.data["reason"] for e in events if e.data and "line" in e.data}
    assert "no field `letter`, which the grader reads" in skipped[10]
    assert "last message is the assistant's" in skipped[9]
    steps = [e.data for e in events if e.type == "metrics" and "train_reward" in e.data]
    assert [data["step"] for data in steps] == [1, 2, 3, 4]
    for data in steps:
        assert abs(data["train_kl_sampler"]) < 1e-6
        assert data["train_grader_errors"] == data["train_clipped"] == 0
        assert 0 <= data["train_reward"] <= 1 and 0 < data["train_length"] <= 20
        assert data["train_rollout_tokens_per_s"] > 0 and "train_dropped_groups" in data
    validated = [e.data for e in events if e.type == "metrics" and "valid_reward" in e.data]
    assert [data["step"] for data in validated] == [2, 4]
    assert any("reward=" in e.message for e in events)

    content = client.files.content(job.result_files[0]).read().decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    assert float(rows[-1]["valid_reward"]) == validated[-1]["valid_reward"]
    checkpoint = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id)))
    assert "train_reward" in checkpoint.metrics.model_dump()
    answer = client.completions.create(model=job.fine_tuned_model, prompt="abc", max_tokens=3)
    assert answer.usage.completion_tokens <= 3

    answers = client.get(f"/fine_tuning/jobs/{job.id}/samples", cast_to=object)["data"]
    assert len(answers) == 16
    for own in answers:
        assert own["reward"] == float(own["item"]["letter"] in own["text"])


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"type": "reinforcement", "reinforcement": {}}, "grader"),
        (reinforcement(grader={"type": "string_check"}), "method.reinforcement.grader"),
        (reinforcement(grader=GRADER | {"input": "{{ item.x | up }}"}), "grader.input"),
        (reinforcement(num_generations=1), "num_generations"),
        (reinforcement(max_tokens=4000), "hyperparameters.max_tokens: 4000"),
        (reinforcement(loss="ppo", clip_low=2.0, clip_high=1.5), "is more than clip_high"),
        (reinforcement(beta=1.0), "beta is none of its hyperparameters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, method, says):
    with pytest.raises(openai.BadRequestError) as error:
        create(client, "file-absent", method)
    assert says in error.value.message and "\n" not in error.value.message


def failed(client, job):
    while (now := client.fine_tuning.jobs.retrieve(job.id)).status != "failed":
        assert now.status in ("validating_files", "queued", "running"), now
    assert "\n" not in now.error.message
    return now.error.message


def test_files_without_a_usable_prompt_fail_the_job_in_one_line(client):
    file = upload(client, letters(3))
    unknown = reinforcement(grader=GRADER | {"reference": "{{ item.word }}"})
    assert "no field `word`, which the grader reads" in failed(
        client, create(client, file, unknown)
    )
    long = upload(client, [{"prompt": "a" * 500, "letter": "a"}])
    assert "its prompt has" in failed(client, create(client, long, reinforcement()))


def test_models_of_the_server_grade(client):
    """The base model, and an adapter by its name, give labels that their grammar holds them to."""
    file = upload(client, letters(4))
    hyper = {"n_epochs": 1, "batch_size": 2, "num_generations": 2, "max_tokens": 8}
    first = wait(client, create(client, file, reinforcement(**hyper)), "succeeded")
    judges = {
        name: {
            "type": "label_model",
            "name": name,
            "model": model,
            "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
            "labels": ["a", "b"],
            "passing_labels": ["a", "b"],
            "sampling_params": {"max_completions_tokens": 60},
        }
        for name, model in (("base", "tiny"), ("tuned", first.fine_tuned_model))
    }
    grader = {"type": "multi", "graders": judges, "calculate_output": "base + 2 * tuned"}
    other = grader | {"graders": judges | {"base": judges["base"] | {"model": "other"}}}
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        create(client, file, reinforcement(grader=other))
    job = create(client, file, reinforcement(grader=grader, **hyper))
    job = wait(client, job, "succeeded")
    answers = client.get(f"/fine_tuning/jobs/{job.id}/samples", cast_to=object)["data"]
    assert {answer["reward"] for answer in answers} == {3.0}


def test_a_kill_of_either_process_changes_nothing(chat_llama, tmp_path):
    """Two equal jobs, asynchronous by one batch: one is undisturbed, the other's engine is killed
    amid its steps, and then the server with its engine."""

    def measured(client, job):
        events = client.fine_tuning.jobs.list_events(job.id, limit=1000)
        data = [e.data for e in events if e.data and "train_reward" in e.data]
        names = ("train_reward", "train_loss", "train_gradient_norm", "train_length")
        return {d["step"]: [d[name] for name in names] for d in data}

    def wait_for_step(server, client, job, step):
        server.wait(lambda: step in measured(client, job))

    method = reinforcement(n_epochs=20, steps_ahead=1, batch_size=4)  # 40 steps
    config = make_config(chat_llama, tmp_path)
    with RunningServer(config) as server:
        client = server.wait_ready().client()
        file = upload(client, letters(8))
        whole = wait(client, create(client, file, method), "succeeded", timeout_s=120)
        expected = measured(client, whole)
        job = create(client, file, method)
        wait_for_step(server, client, job, 3)
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for_step(server, client, job, 7)
        engine = server.engine_pid
        server.process.kill()
        server.process.wait()
        os.kill(engine, signal.SIGKILL)
    with RunningServer(config) as server:
        client = server.wait_ready().client()
        wait(client, job, "succeeded", timeout_s=120)
        found = measured(client, job)
        messages = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=1000)]
        assert server.stop() == 0
    assert sum("Resumed from step" in message for message in messages) == 2
    assert sorted(found) == sorted(expected) == list(range(1, 41))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-3, abs=1e-5), step
