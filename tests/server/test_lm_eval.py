"""lm-eval, unmodified, against the server: its loglikelihoods are those of transformers."""

import json
import os
import subprocess
import sys

import pytest

from tests.engines import reference_logprobs, write_rows
from tests.server.running import KEY

pytest.importorskip("lm_eval", reason="pip install 'lm-eval[api]'")
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_loglikelihoods_are_those_of_transformers(
    server, chat_llama, llama_reference, tokenizer, tmp_path
):
    questions = [
        {"question": f"which letter comes after {a}?", "choices": [b, "zz", a + a], "answer": 0}
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    rows = write_rows(tmp_path / "rows.jsonl", questions)
    (tmp_path / "letters.yaml").write_text(TASK.format(rows=rows))
    arguments = {
        "model": "tiny",
        "base_url": server.url + "/v1/completions",
        "tokenizer": str(chat_llama),
        "tokenizer_backend": "huggingface",
        "num_concurrent": "2",
        "tokenized_requests": "True",
        "max_length": "160",
    }
    output = tmp_path / "out"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    command += ["--tasks", "letters", "--include_path", str(tmp_path)]
    command += ["--log_samples", "--output_path", str(output), "--batch_size", "3"]
    offline = {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (samples,) = output.rglob("samples_letters_*.jsonl")
    seen = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        document = sample["doc"]
        for choice, (loglikelihood, greedy) in zip(
            document["choices"], (answer[0] for answer in sample["resps"]), strict=True
        ):
            context = tokenizer.encode(document["question"])
            whole = tokenizer.encode(document["question"] + " " + choice)
            logprobs = reference_logprobs(llama_reference, whole)
            places = range(len(context), len(whole))
            expected = sum(logprobs[i - 1, whole[i]] for i in places)
            assert float(loglikelihood) == pytest.approx(expected, abs=1e-3)
            best = all(logprobs[i - 1].argmax() == whole[i] for i in places)
            assert str(greedy) == str(best)
            seen += 1
    assert seen == 24
