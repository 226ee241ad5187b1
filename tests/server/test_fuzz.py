"""schemathesis, as its users run it: requests made up from /openapi.json, each field at the borders
of what is declared and beyond them. No server errors, and every answer is one that is declared."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.engines import letter_rows, write_rows
from tests.server.running import KEY

# Answers that depend on more than the request's form: a model's length, a file's content.
UNCHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def declared(server):
    return json.loads(server.get("/openapi.json")[1])


@pytest.fixture(scope="module")
def known(client, tmp_path_factory):
    """A file, a job, an upload, a batch and a response, for requests that name one; no job is left
    running."""
    folder = tmp_path_factory.mktemp("fuzz")
    rows = write_rows(folder / "rows.jsonl", letter_rows(4))
    file = client.files.create(file=rows, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    upload = {"bytes": 5, "filename": "a", "mime_type": "text/plain", "purpose": "batch"}
    uploads = [client.uploads.create(**upload).id, "upload_0"]
    ask = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    ask["body"] = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    asked = write_rows(folder / "requests.jsonl", [ask])
    asked = client.files.create(file=asked, purpose="batch")
    batch = client.batches.create(
        input_file_id=asked.id, endpoint="/v1/completions", completion_window="24h"
    )
    response = client.responses.create(model="tiny", input="a", max_output_tokens=2)
    yield {
        "file_id": [file.id, "file-0"],
        "job_id": [job.id, "ftjob-0"],
        "upload_id": uploads,
        "batch_id": [batch.id, "batch_0"],
        "input_file_id": [asked.id, file.id, "file-0"],
        "response_id": [response.id, "resp_0"],
    }
    for job in client.fine_tuning.jobs.list():
        if job.status not in ("succeeded", "failed", "cancelled"):
            client.fine_tuning.jobs.cancel(job.id)


def aim(declared, known):
    """The declared API with names that mean something: none would ever be hit upon at random."""
    aimed = json.loads(json.dumps(declared))
    for operations in aimed["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                names = {**known, "name": ["tiny", "absent"]}.get(parameter["name"])
                if names is not None:
                    parameter["schema"]["enum"] = names
    fields = {name: each.get("properties") for name, each in aimed["components"]["schemas"].items()}
    for name, each in fields.items():
        if "model" in (each or {}) and name in bodies(aimed):
            needed = "model" in aimed["components"]["schemas"][name].get("required", ())
            each["model"] = {"enum": ["tiny", "random", "absent", *([] if needed else [None])]}
    fields["CreateJob"]["training_file"]["enum"] = known["file_id"]
    fields["CreateBatch"]["input_file_id"]["enum"] = known["input_file_id"]
    fields["CompletionRequest"].pop("best_of", None)  # refused
    fields["CompletionRequest"]["slo"] = {"enum": ["standard", None]}
    for both in fields["CompletionRequest"]:  # tried once is enough
        if both != "model":
            fields["ChatCompletionRequest"].pop(both, None)
    tokens = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 271}}
    tokens |= {"minItems": 1}
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": 2048}
    fields["CompletionRequest"]["prompt"] = {"anyOf": [text, texts, tokens]}
    message = {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}}
    message = {"type": "object", "properties": message, "required": ["role", "content"]}
    for name in ("ChatCompletionRequest", "MessagesRequest", "CountTokensRequest"):
        fields[name]["messages"]["items"] = message
    for name in ("ResponseRequest", "InputTokensRequest"):
        fields[name]["input"] = {
            "anyOf": [text, {"type": "array", "items": message, "minItems": 1}]
        }
        fields[name]["previous_response_id"] = {"enum": [None, *known["response_id"]]}
    del fields["TokenizeRequest"]["messages"]  # which go with a prompt's absence
    return aimed


def bodies(declared):
    """The names of what requests send."""
    operations = (each for path in declared["paths"].values() for each in path.values())
    sent = [list(each.get("requestBody", {}).get("content", {}).values()) for each in operations]
    references = [kind["schema"].get("$ref", "") for kinds in sent for kind in kinds]
    return {reference.rpartition("/")[2] for reference in references}


def test_every_route_declares_its_answers(declared):
    for path, operations in declared["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert "422" not in answers, (method, path)
            content = [answer["content"] for answer in answers.values()]
            schemas = [each["schema"] for kinds in content for each in kinds.values()]
            assert schemas and all(schemas), (method, path)


def test_made_up_requests(server, declared, known, tmp_path):
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("needs schemathesis: pip install 'flexllm_jax[test-clients]'")
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(aim(declared, known)))
    options = ["--url", server.url, "--header", f"Authorization: Bearer {KEY}"]
    options += ["--phases", "coverage", "--generation-deterministic"]
    options += ["--exclude-checks", UNCHECKED, "--warnings", "off"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(path), *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert server.get("/health")[0] == 200
