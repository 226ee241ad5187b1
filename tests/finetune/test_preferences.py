"""Pairs of answers, as OpenAI and TRL write them: two sequences behind one prompt, of which only
the answers count; and the rows and files that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from flexllm_jax.finetune.data import DatasetError, TrainingPair, load_dataset
from tests.finetune.test_data import CHATML, THINKING, chatml, plain, with_template, write

__all__ = ["chatml", "plain"]  # fixtures

USER = {"role": "user", "content": "Where is the sun?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("In the sky.", "In the sea."))
OPENAI = {
    "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [GOOD],
    "non_preferred_output": [BAD],
}
ASKED = "<|im_start|>user\nWhere is the sun?<|im_end|>\n<|im_start|>assistant\n"
TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


def load(tmp_path: Path, tokenizer: Any, *rows: Any, **options: Any):
    path = write(tmp_path / "d.jsonl", *rows)
    return load_dataset(path, tokenizer, pairs=True, **options)


def one_pair(tmp_path: Path, tokenizer: Any, row: dict, **options: Any) -> TrainingPair:
    dataset = load(tmp_path, tokenizer, row, **options)
    (pair,) = dataset.items
    assert isinstance(pair, TrainingPair) and not dataset.unread and not dataset.skipped
    assert len(pair) == dataset.tokens == len(pair.preferred) + len(pair.rejected)
    return pair


def halves(tokenizer: Any, pair: TrainingPair) -> list[tuple[str, str]]:
    """Of both answers, what is not trained and what is."""
    return [
        (tokenizer.decode(s.tokens[~s.loss_mask]), tokenizer.decode(s.tokens[s.loss_mask]))
        for s in (pair.preferred, pair.rejected)
    ]


@pytest.mark.parametrize(
    "row",
    [
        OPENAI,
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Where is the sun?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": "In the sky.", "rejected": "In the sea."},
        {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["openai", "explicit", "implicit", "ultrafeedback", "text", "both", "said", "and messages"],
)
def test_every_way_to_write_it(tmp_path: Path, chatml: Any, row: dict) -> None:
    dataset = load(tmp_path, chatml, row)
    (pair,) = dataset.items
    assert halves(chatml, pair) == [
        (ASKED + "\n", "In the sky.<|im_end|>"),
        (ASKED + "\n", "In the sea.<|im_end|>"),
    ]
    assert dataset.unread == ({"messages": 1} if "messages" in row else {})


def test_text_with_and_without_a_prompt(tmp_path: Path, plain: Any) -> None:
    whole = {name: TEXT["prompt"] + TEXT[name] for name in ("chosen", "rejected")}
    expected = [("The sky is", " blue.<|im_end|>"), ("The sky is", " green.<|im_end|>")]
    for row in (TEXT, whole):
        assert halves(plain, one_pair(tmp_path, plain, row)) == expected


def test_only_the_answers_count_not_earlier_turns_nor_results_of_tools(
    tmp_path: Path, chatml: Any
) -> None:
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    result = {"role": "tool", "content": "sky"}
    row = {
        "input": {"messages": [*earlier, USER]},
        "preferred_output": [{"role": "assistant", "content": "One moment."}, result, GOOD],
        "non_preferred_output": [BAD],
    }
    pair = one_pair(tmp_path, chatml, row)
    (before, said), (_, other) = halves(chatml, pair)
    assert "Hello!" in before and "sky" in before
    assert said == "One moment.<|im_end|>In the sky.<|im_end|>" and other == "In the sea.<|im_end|>"


def test_messages_have_weights_here_too(tmp_path: Path, chatml: Any) -> None:
    row = OPENAI | {"preferred_output": [{**GOOD, "weight": 0.5}]}
    pair = one_pair(tmp_path, chatml, row)
    assert set(pair.preferred.weights) == {0, 0.5} and set(pair.rejected.weights) == {0, 1}


def test_tools_are_in_the_prompt(tmp_path: Path, plain: Any) -> None:
    tokenizer = with_template(
        plain, "{% if tools %}{{ tools[0].function.name }}{% endif %}" + CHATML
    )
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    row = OPENAI | {"input": {"messages": [USER], "tools": tools}}
    assert halves(tokenizer, one_pair(tmp_path, tokenizer, row))[0][0] == f"look_up{ASKED}\n"


def other(**changes: Any) -> dict:
    return {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]} | changes


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [USER], "chosen": [GOOD]}, "no field `rejected`"),
        (other(rejected=None), "`rejected` must be a list of messages, not None"),
        (other(rejected=[GOOD]), "its two answers are the same"),
        (other(rejected=[USER, BAD]), "`rejected` must begin with an assistant message"),
        (other(prompt=None, chosen=[GOOD], rejected=[BAD]), "no message before the answers"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Where?"}, BAD]},
            "the prompts differ, at message 0",
        ),
        (other(chosen=[{"role": "assistant", "content": "In the sky. " * 60}]), "more than 100"),
        (
            other(chosen=[{"role": "assistant", "content": "ABCDEFGHIJ" * 6}]),
            "tokens together, more than 110 (finetune.max_tokens)",
        ),
        ({"chosen": "Yes.", "rejected": "No."}, "the answers begin with nothing in common"),
        ("{", "not JSON"),
    ],
)
def test_rows_that_are_no_pair_are_skipped_with_their_reason(
    tmp_path: Path, chatml: Any, row: Any, reason: str
) -> None:
    rows = [other(), row, other()]
    dataset = load(tmp_path, chatml, *rows, max_seq_len=100, max_pair_tokens=110)
    assert len(dataset) == 2 and dataset.rows == 3 and dataset.truncated == 0
    (skipped,) = dataset.skipped
    assert skipped.line == 2 and reason in skipped.reason, skipped.reason
    assert f"line 2: {skipped.reason}" in dataset.summary()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": [USER], "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "`input`"),
        (OPENAI | {"preferred_output": []}, "`preferred_output` must be a list of messages"),
        (OPENAI | {"preferred_output": [USER]}, "must begin with an assistant message"),
        (OPENAI | {"input": {"messages": []}}, "`input.messages` must be a list of messages"),
    ],
)
def test_openai_rows_that_are_no_pair(tmp_path: Path, chatml: Any, row: Any, reason: str) -> None:
    (skipped,) = load(tmp_path, chatml, OPENAI, row).skipped
    assert skipped.line == 2 and reason in skipped.reason, skipped.reason


def test_an_answer_of_turns_that_the_template_rewrites_is_no_pair(
    tmp_path: Path, plain: Any
) -> None:
    row = OPENAI | {"preferred_output": [GOOD, USER, GOOD]}
    (skipped,) = load(tmp_path, with_template(plain, THINKING), OPENAI, row).skipped
    assert (
        "`preferred_output` has turns that the chat template writes differently" in skipped.reason
    )


def test_what_is_not_read_of_a_nested_column_is_told(tmp_path: Path, chatml: Any) -> None:
    row = OPENAI | {"input": OPENAI["input"] | {"note": "x"}, "score": 3}
    assert load(tmp_path, chatml, row).unread == {"score": 1, "input.note": 1}


def test_a_job_of_the_other_kind_is_told_in_one_line(tmp_path: Path, chatml: Any) -> None:
    for row, name in ((OPENAI, "openai_preference"), (TEXT, "preference")):
        path = write(tmp_path / "pairs.jsonl", row)
        for format in ("auto", name):
            with pytest.raises(DatasetError) as error:
                load_dataset(path, chatml, format)
            text = str(error.value)
            assert f"{name} rows are pairs of answers, and this job is supervised" in text
            assert "method dpo, ipo or simpo" in text and "\n" not in text
    path = write(tmp_path / "chats.jsonl", {"messages": [USER, GOOD]})
    for format in ("auto", "chat"):
        with pytest.raises(DatasetError) as error:
            load_dataset(path, chatml, format, pairs=True)
        text = str(error.value)
        assert "chat rows have one answer each, and method dpo, ipo or simpo needs pairs" in text
        assert "chosen, rejected" in text and "\n" not in text


def test_conversations_need_a_template(tmp_path: Path, plain: Any) -> None:
    with pytest.raises(DatasetError, match="need a chat template"):
        load(tmp_path, plain, OPENAI)


def test_the_fingerprint_is_of_both_answers_in_their_order(tmp_path: Path, plain: Any) -> None:
    turned = TEXT | {"chosen": TEXT["rejected"], "rejected": TEXT["chosen"]}
    prints = {
        load(tmp_path, plain, json.loads(json.dumps(row))).fingerprint for row in (TEXT, turned)
    }
    assert len(prints) == 2
