"""How prompts become tokens, where those stand in the text, and which tokens end an output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from flexllm_jax.models.text.tokenizer import (
    encode_text,
    end_token_ids,
    load_tokenizer,
    token_starts,
)
from tests.checkpoints import save_tokenizer
from tests.small_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")


class TestLoading:
    @pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
    @pytest.mark.parametrize(
        "named", ["TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", None]
    )
    def test_it_is_what_auto_tokenizer_makes_of_it(
        self, model_type: str, named: str | None, tmp_path: Path
    ) -> None:
        save_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        file = tmp_path / "tokenizer_config.json"
        fields = json.loads(file.read_text()) | {"tokenizer_class": named, "eos_token": "<unk>"}
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
        made, expected = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert type(made) is type(expected) and repr(made) == repr(expected)
        assert made.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert made.init_kwargs == expected.init_kwargs

    def test_neither_an_import_nor_a_general_tokenizer_needs_torch(self, llama: Path) -> None:
        """Both are waited for at every start."""
        program = f"""if True:
            import sys
            from flexllm_jax import LLM
            assert "transformers" not in sys.modules
            from flexllm_jax.models.text.tokenizer import load_tokenizer
            load_tokenizer({str(llama)!r})
            assert "transformers" in sys.modules and "torch" not in sys.modules
        """
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


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
        tokens, starts = encode_text(tokenizer, text), token_starts(tokenizer, [text])[0]
        assert len(starts) == len(tokens) and starts == sorted(starts)
        said = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        assert "".join(said) == text
        assert said[0] == ("<s>" if text.startswith("<s>") else "")  # its BOS was not sent

    def test_starts_are_in_the_text_as_it_was_before_normalization(self) -> None:
        tokenizer = byte_level_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        assert tokenizer.decode(encode_text(tokenizer, "xﬁy")) == "xfiy"
        assert token_starts(tokenizer, ["xﬁy"])[0] == [0, 1, 1, 2]


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
