"""DELETE /v1/models: what jobs have made goes for good, and nothing else does."""

from pathlib import Path

import openai
import pytest

from tests.server.finetuning.test_jobs import GREEDY, PROMPT, create, upload, wait
from tests.server.running import RunningServer, make_config


def names(client):
    return [model.id for model in client.models.list()]


def test_finetuned_models_are_deleted(chat_llama, adapter, tmp_path):
    config = make_config(
        chat_llama, tmp_path, adapters={"preload": [{"name": "random", "path": str(adapter)}]}
    )
    with RunningServer(config) as server:
        client = server.wait_ready().client()
        file_id = upload(client)
        job = wait(client, create(client, file_id, extra={"max_steps": 4}), "succeeded")
        (first, *_) = client.fine_tuning.jobs.checkpoints.list(job.id)
        made, passed = str(job.fine_tuned_model), first.fine_tuned_model_checkpoint
        roots = {m.id: getattr(m, "root", "") for m in client.models.list()}
        for name in (made, passed):
            client.completions.create(model=name, prompt=PROMPT, max_tokens=2, **GREEDY)
        for name, reason in (("tiny", "base model"), ("random", "was not finetuned here")):
            with pytest.raises(openai.BadRequestError, match=reason):
                client.models.delete(name)
        extra = {"lora_rank": 4, "lora_alpha": 8, "max_steps": 5000}
        on_top = client.fine_tuning.jobs.create(
            model=passed, training_file=file_id, extra_body=extra
        )
        with pytest.raises(openai.ConflictError, match=f"job {on_top.id} still needs the model"):
            client.models.delete(passed)
        client.fine_tuning.jobs.cancel(on_top.id)
        answer = client.models.delete(passed)
        assert (answer.id, answer.deleted, answer.object) == (passed, True, "model")
        assert client.models.delete(made).deleted
        for name in (made, passed):
            assert not Path(roots[name]).exists() and name not in names(client)
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model=name, prompt=PROMPT, max_tokens=2)
            with pytest.raises(openai.NotFoundError):
                client.models.delete(name)
        left = [c.id for c in client.fine_tuning.jobs.checkpoints.list(job.id)]
        assert first.id not in left and left
        assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
        assert server.metric("flexllm:xla_recompiles") == 0
        # A process that was killed before the files went.
        Path(roots[made]).mkdir()
        kept = names(client)
    with RunningServer(config) as again:
        assert names(again.client()) == kept
        assert not Path(roots[made]).exists()
