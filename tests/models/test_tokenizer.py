"""How prompts become tokens, where those stand in the text, and which tokens end an output."""

import pytest
from tokenizers import normalizers

from flexllm_jax.models.tokenizer import encode_text, end_token_ids, token_starts
from tests.small_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")


class TestPrompts:
    def test_special_tokens_are_those_of_transformers(self) -> None:
        tokenizer = sentencepiece_tokenizer()
        for text in ("", "hello", "a </s> b"):
            assert encode_text(tokenizer, text) == tokenizer.encode(text)
            bare = encode_text(tokenizer, text, add_special_tokens=False)
            assert bare == tokenizer.encode(text, add_special_tokens=False)

    def test_a_bos_that_is_there_is_not_added_again(self) -> None:
        tokenizer = sentencepiece_tokenizer()
        assert encode_text(tokenizer, "<s>hello") == tokenizer.encode("hello")

    @pytest.mark.parametrize("text", ["the two", "中 x", "<s>a\nb", " 👦"])
    def test_starts_count_characters_that_are_complete(self, text: str) -> None:
        tokenizer = sentencepiece_tokenizer(["\u2581the", "\u2581two"])
        tokens, starts = encode_text(tokenizer, text), token_starts(tokenizer, text)
        assert len(starts) == len(tokens) and starts == sorted(starts)
        said = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        assert "".join(said) == text
        assert said[0] == ("<s>" if text.startswith("<s>") else "")  # its BOS was not sent

    def test_starts_are_in_the_text_as_it_was_before_normalization(self) -> None:
        tokenizer = byte_level_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        assert tokenizer.decode(encode_text(tokenizer, "xﬁy")) == "xfiy"
        assert token_starts(tokenizer, "xﬁy") == [0, 1, 1, 2]


class TestEnds:
    def test_the_models_and_the_tokenizers(self) -> None:
        tokenizer = byte_level_tokenizer(SPECIAL, eos="<|im_end|>")
        assert end_token_ids(tokenizer) == (2,)
        assert end_token_ids(tokenizer, [1, 2]) == (1, 2)

    def test_a_base_models_chat_template_ends_turns_with_a_token_of_its_own(self) -> None:
        tokenizer = byte_level_tokenizer(SPECIAL, "<|endoftext|>", CHATML)
        assert end_token_ids(tokenizer, [1]) == (1, 2)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ raise_exception('no') }}",
            "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
            "<|im_start|>{{ messages[0]['content'] }}",
        ],
        ids=["refuses", "without marks", "answers are left out"],
    )
    def test_a_template_that_shows_no_end_adds_none(self, template: str) -> None:
        tokenizer = byte_level_tokenizer(SPECIAL, "<|endoftext|>", template)
        assert end_token_ids(tokenizer) == (1,)
