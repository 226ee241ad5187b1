"""What callers hold is a prompt as they mean it, or refused."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from flexllm_jax.engine.prompts import read_prompt, read_prompts

PADDED = {"input_ids": [[0, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 1]]}


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ((5, 6), [[5, 6]]),
        ([[5, 6], "a", (7,)], [[5, 6], "a", [7]]),
        (np.array([5, 6]), [[5, 6]]),
        ([np.int64(5), np.int64(6)], [[5, 6]]),
        (list(torch.tensor([5, 6])), [[5, 6]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([np.array([5, 6]), torch.tensor([7])], [[5, 6], [7]]),
        (BatchEncoding({"input_ids": [5, 6], "attention_mask": [1, 1]}), [[5, 6]]),
        (BatchEncoding(PADDED), [[5, 6], [7, 8, 9]]),
        (BatchEncoding(PADDED, tensor_type="pt"), [[5, 6], [7, 8, 9]]),
        ([BatchEncoding({"input_ids": [5, 6]}), "a"], [[5, 6], "a"]),
        ({"prompt": "a"}, ["a"]),
        ({"prompt": "a", "prompt_token_ids": [5], "multi_modal_data": None}, [[5]]),
        ([{"prompt": "a"}, {"prompt_token_ids": np.array([5, 6])}], ["a", [5, 6]]),
        ((prompt for prompt in ("a", "b")), ["a", "b"]),
        ([], []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_prompts(given, prompts):
    assert read_prompts(given) == prompts


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "NoneType"),
        (3, "int"),
        (b"bytes", "bytes"),
        ([b"bytes"], "bytes"),
        ([5.0, 6.5], "5.0 is no token id"),
        (np.array([5.5]), "5.5 is no token id"),
        ([[True, False]], "True is no token id"),
        ([None], "None is no token id"),
        ([["a", "b"]], "'a' is no token id"),
        ([[[5], [6]]], r"\[5\] is no token id"),
        ({"role": "user", "content": "a"}, "LLM.chat"),
        ([{"role": "user", "content": "a"}], "LLM.chat"),
        ({"prompt": "a", "multi_modal_data": {}}, "'multi_modal_data' of a prompt"),
        ({"text": "a"}, "'text' of a prompt"),
        ({}, "dictionary"),
        ([PADDED], "2 of them where one is expected"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_prompt(given, says):
    with pytest.raises(ValueError, match=says):
        read_prompts(given)


def test_one_prompt():
    assert read_prompt(np.array([5, 6])) == [5, 6]
    assert read_prompt({"prompt_token_ids": [5]}) == [5]
