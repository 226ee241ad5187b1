"""Bad input is one clear line that names what is wrong, and disturbs nobody."""

import json
import time

import pytest

from flexllm_jax import LLM, SamplingParams
from flexllm_jax.config import ConfigError
from flexllm_jax.finetune.data import DatasetError
from flexllm_jax.peft.adapter import AdapterError
from tests.checkpoints import make_llama
from tests.engines import job_config, letter_rows, random_prompts, reference_greedy

SHORT = SamplingParams(max_tokens=5)


@pytest.mark.parametrize(
    ("prompt", "params", "adapter", "message"),
    [
        ([5] * 160, SHORT, None, "prompt of 160 tokens + max_tokens=5 exceeds max_model_len=160"),
        ([5] * 900, SHORT, None, "prompt of 900 tokens"),
        ([5] * 10, SamplingParams(max_tokens=151), None, "prompt of 10 tokens + max_tokens=151"),
        ([], SHORT, None, "prompt of 0 tokens"),
        ([5, 272], SHORT, None, "prompt has token id 272, the vocabulary has ids 0 to 271"),
        ([5, -1], SHORT, None, "prompt has token id -1"),
        ([5], SHORT, "nobody", "adapter 'nobody' is not loaded; loaded adapters: none"),
        (
            [5],
            SamplingParams(max_tokens=5, min_tokens=1, stop_token_ids=tuple(range(100, 120))),
            None,
            "min_tokens=1 with 21 stop tokens",
        ),
    ],
    ids=[
        "context",
        "far beyond",
        "max_tokens",
        "empty",
        "vocabulary",
        "negative",
        "adapter",
        "ban",
    ],
)
def test_a_request_that_can_never_be_served(llm, llama_reference, prompt, params, adapter, message):
    (good,) = random_prompts([20])
    running = llm.submit(good, SamplingParams(max_tokens=40, ignore_eos=True))[0]
    with pytest.raises(ValueError) as error:
        llm.generate([[7, 8, 9], prompt], params, adapter=adapter)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert running.result(60).output == reference_greedy(llama_reference, good, 40)
    assert not llm.engine.has_work


def test_a_request_whose_future_is_cancelled_is_dropped(llm, llama_reference):
    (good,) = random_prompts([20])
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    (dropped,) = llm.submit(good, params)
    (kept,) = llm.submit(good, SamplingParams(max_tokens=20, ignore_eos=True))
    while not dropped.state.output:
        time.sleep(0.001)
    assert dropped.cancel()
    assert kept.result(60).output == reference_greedy(llama_reference, good, 20)
    assert dropped.state.finished and len(dropped.state.output) < 100
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0},
        {"min_tokens": 20},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": float("nan")},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"stop": ("fine", "")},
        {"n": 0},
    ],
    ids=str,
)
def test_sampling_parameters_out_of_range(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"^{name}=.* must be ") as error:
        SamplingParams(**field)
    assert "\n" not in str(error.value)


class TestDatasets:
    def test_broken_rows_are_skipped_counted_and_reported(self, llm, tmp_path):
        good = [json.dumps(row) for row in letter_rows(12)]
        broken = [
            '{"prompt": "cut off',
            '{"prompt": "no completion"}',
            '{"prompt": "empty", "completion": ""}',
            '{"prompt": 3, "completion": "x"}',
            "[1, 2]",
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(good[:6] + broken + good[6:]) + "\n")
        job = llm.finetune(job_config("broken", path, steps=3)).wait(60)
        assert job.status == "succeeded", job.reason
        (message,) = job.messages
        assert "17 prompt_completion rows, 12 sequences" in message
        assert "5 rows skipped" in message
        assert all(f"line {line}: " in message for line in range(7, 12))
        assert len(job._job.source.dataset) == 12

    def test_a_file_without_a_usable_row(self, llm, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"prompt": "a", "completion": ""}\n')
        with pytest.raises(DatasetError, match="none of its 1 rows can be trained on") as error:
            llm.finetune(job_config("unusable", path))
        assert "\n" not in str(error.value)
        assert "unusable" not in llm.engine.adapters.directory.training

    def test_an_adapter_the_bank_has_no_room_for(self, llm, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(letter_rows(1)[0]))
        with pytest.raises(AdapterError, match="has rank 9, the bank holds at most 8"):
            llm.finetune(job_config("wide", path, peft={"r": 9}))
        assert "wide" not in llm.engine.adapters.directory.training


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path=.* has no usable tokenizer") as error:
        LLM(make_llama(tmp_path))
    assert "\n" not in str(error.value)
