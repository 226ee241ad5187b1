"""Files whose rows are too long, too many-voiced or broken: they cost what a row may cost."""

import json
import time
from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexllm_jax.finetune.data import DatasetError, formats, load_dataset, rows, tokens
from flexllm_jax.finetune.data.chat import MOST_MESSAGES
from flexllm_jax.finetune.data.rows import MOST_ROW_BYTES, read_rows
from flexllm_jax.models.text.tokenizer import encode_texts
from tests.finetune.test_data import CHATML
from tests.small_tokenizers import byte_level_tokenizer

GOOD = {"prompt": "a", "completion": "b"}
LIMIT = 64


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def write(path, *given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def load(path, tokenizer, **options):
    return load_dataset(path, tokenizer, max_seq_len=LIMIT, **options)


def test_a_line_without_end_is_skipped(tmp_path, tokenizer):
    text = "ab " * 10_000_000
    path = write(tmp_path / "rows.jsonl", GOOD, {"prompt": text, "completion": text}, GOOD)
    began = time.monotonic()
    data = load(path, tokenizer)
    assert time.monotonic() - began < 5
    assert len(data) == 2 and data.rows == 3
    assert [(row.line, row.reason) for row in data.skipped] == [
        (2, f"longer than {MOST_ROW_BYTES} bytes")
    ]


def test_of_a_long_text_only_what_can_matter_is_tokenized(tmp_path, tokenizer, monkeypatch):
    asked = []

    def spy(tokenizer, texts, **options):
        asked.extend(map(len, texts))
        return encode_texts(tokenizer, texts, **options)

    monkeypatch.setattr(tokens, "encode_texts", spy)
    longest = max(map(len, tokenizer.get_vocab()))
    long = " ".join(f"word{i}" for i in range(50_000))
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "completion": long},
        {"prompt": long, "completion": "b"},
    )
    data = load(path, tokenizer)
    whole = tokenizer("a" + long, add_special_tokens=False)["input_ids"]
    assert data.sequences[0].tokens.tolist() == whole[:LIMIT]
    assert data.truncated == 1
    assert "nothing to train in the first 64" in data.skipped[0].reason
    assert sum(asked) < 4 * (LIMIT + 20) * longest


def test_turns_are_limited(tmp_path, tokenizer, monkeypatch):
    """Each is rendered and tokenized with all before it."""
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}] * 30_000
    few = turns[:120]
    path = write(tmp_path / "rows.jsonl", {"messages": turns}, {"messages": turns[:4]})
    began = time.monotonic()
    data = load(path, tokenizer)
    assert time.monotonic() - began < 5 and len(data) == 1
    assert str(MOST_MESSAGES) in data.skipped[0].reason
    monkeypatch.setattr(formats, "MOST_WORK", 1)
    short = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", short)
    path = write(tmp_path / "more.jsonl", {"messages": few}, {"messages": turns[:4]})
    data = load(path, tokenizer)
    assert len(data) == 1 and "too many for its length" in data.skipped[0].reason


def test_it_stops_when_it_is_told_to(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 50)
    asked = accumulate([1] * 100)
    with pytest.raises(DatasetError, match="not read to its end"):
        load(path, tokenizer, go_on=lambda: next(asked) < 7)
    assert next(asked) == 8


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.integers(1, 40), st.data())
def test_an_array_is_read_in_parts(tmp_path, monkeypatch, items, indent, size, data):
    monkeypatch.setattr(rows, "_READ", size)
    path, text = tmp_path / "rows.json", json.dumps(items, indent=indent)
    path.write_text(f" {text}\n")
    told = [row for _, row in read_rows(path)]
    assert len(told) == len(items)
    assert [r for r in told if isinstance(r, dict)] == [i for i in items if isinstance(i, dict)]
    cut = data.draw(st.integers(1, len(text) - 1))
    for broken in (text[:cut], text + "]", text[:cut] + "\x01" + text[cut:]):
        path.write_text(broken)
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(broken)
        with pytest.raises(DatasetError) as error:
            list(read_rows(path))
        place = f"{expected.value.lineno}:{expected.value.colno}"
        if "Extra data" in str(expected.value):
            assert f"{path}:{place}:" in str(error.value)


def test_an_item_of_an_array_is_limited(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, {"text": "a" * (3 * MOST_ROW_BYTES)}]))
    with pytest.raises(DatasetError, match=rf"longer than {MOST_ROW_BYTES} characters; as JSONL"):
        list(read_rows(path))
