"""What is trained is what is served, token by token, whatever the tokenizer does to a text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexllm_jax.finetune.data import TrainingSequence, load_dataset
from flexllm_jax.finetune.data.tokens import split_tokens
from flexllm_jax.models.text.tokenizer import encode_text
from tests.models.test_tokenizer import CHATML, SPECIAL
from tests.small_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = ["\u2581three", "\u2581two", "\u2581Four", "\u2581hello"]
MESSAGES = [
    {"role": "user", "content": "hello two"},
    {"role": "assistant", "content": "Four three"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "three two"},
]


def loaded(tmp_path: Path, tokenizer: Any, row: dict, **options: Any) -> TrainingSequence:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (sequence,) = load_dataset(path, tokenizer, **options).sequences
    return sequence


def trained(sequence: TrainingSequence) -> list[int]:
    return sequence.tokens[sequence.loss_mask].tolist()


class TestSentencePiece:
    def test_a_conversation_is_tokenized_as_transformers_does(self, tmp_path: Path) -> None:
        tokenizer = sentencepiece_tokenizer(WORDS, TEMPLATE)
        sequence = loaded(tmp_path, tokenizer, {"messages": MESSAGES})
        expected = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
        assert sequence.tokens.tolist() == expected
        assert tokenizer.decode(trained(sequence)) == "Four three</s>three two</s>"

    def test_a_completion_goes_on_from_the_prompt_that_is_served(self, tmp_path: Path) -> None:
        tokenizer = sentencepiece_tokenizer(WORDS)
        row = {"prompt": "One, two", "completion": " three"}
        sequence = loaded(tmp_path, tokenizer, row)
        assert sequence.tokens.tolist() == [*tokenizer.encode("One, two three"), 2]
        assert trained(sequence) == tokenizer.convert_tokens_to_ids(["\u2581three", "</s>"])

    def test_the_prompt_stays_as_it_is_served_where_a_token_would_reach_over(
        self, tmp_path: Path
    ) -> None:
        tokenizer = sentencepiece_tokenizer(WORDS)
        prompt = tokenizer.encode("One, ")
        sequence = loaded(tmp_path, tokenizer, {"prompt": "One, ", "completion": "two"})
        assert sequence.tokens[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(sequence.tokens) == "<s> One, two</s>"
        assert tokenizer.convert_ids_to_tokens(trained(sequence)) == ["t", "w", "o", "</s>"]

    @given(pieces=st.lists(st.text("tw o中\n", max_size=4), max_size=4))
    def test_pieces_say_the_text_and_begin_as_served(self, pieces: list[str]) -> None:
        tokenizer = sentencepiece_tokenizer(WORDS)
        (split,) = split_tokens(tokenizer, [pieces])
        assert len(split) == len(pieces)
        whole, text = [token for piece in split for token in piece], "".join(pieces)
        assert tokenizer.decode(whole) == tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False)
        )
        if pieces:
            assert split[0] == tokenizer.encode(pieces[0], add_special_tokens=False)


class TestEnds:
    @pytest.mark.parametrize(
        "row", [{"text": "hello</s>"}, {"prompt": "q", "completion": " a</s>"}]
    )
    def test_an_end_that_is_there_is_not_added_again(self, tmp_path: Path, row: dict) -> None:
        sequence = loaded(tmp_path, byte_level_tokenizer(), row)
        assert sequence.tokens.tolist().count(2) == 1
        assert sequence.tokens[-1] == 2 and sequence.loss_mask[-1]

    def test_nor_one_of_the_models_config(self, tmp_path: Path) -> None:
        tokenizer = byte_level_tokenizer(SPECIAL, eos="<|im_end|>")
        row = {"text": "hello<|endoftext|>"}
        sequence = loaded(tmp_path, tokenizer, row, eos_token_ids=[1])
        assert sequence.tokens[-1] == 1

    def test_a_bos_that_is_there_is_not_added_again(self, tmp_path: Path) -> None:
        tokenizer = sentencepiece_tokenizer()
        for text in ("<s>hello", "hello"):
            sequence = loaded(tmp_path, tokenizer, {"text": text})
            assert sequence.tokens.tolist() == [*encode_text(tokenizer, text), 2]
            assert sequence.tokens.tolist().count(1) == 1

    def test_a_tokenizer_without_an_end_ends_as_the_models_config_says(
        self, tmp_path: Path
    ) -> None:
        tokenizer = byte_level_tokenizer(SPECIAL, eos=None)
        sequence = loaded(tmp_path, tokenizer, {"text": "hello"}, eos_token_ids=[1])
        assert sequence.tokens[-1] == 1 and sequence.loss_mask[-1]

    def test_a_turn_ends_with_the_templates_token_and_not_with_what_follows_it(
        self, tmp_path: Path
    ) -> None:
        tokenizer = byte_level_tokenizer(SPECIAL, "<|endoftext|>", CHATML)
        sequence = loaded(tmp_path, tokenizer, {"messages": MESSAGES[:2]})
        assert tokenizer.decode(trained(sequence)) == "Four three<|im_end|>"
