"""The text of an output is that of `tokenizer.decode`, however its tokens come."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexllm_jax.models.text.detokenizer import Detokenizer, OutputText
from tests.small_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

SENTENCEPIECE = sentencepiece_tokenizer(["\u2581the", "\u2581two"])
TOKENIZERS = {"byte level": byte_level_tokenizer(), "sentencepiece": SENTENCEPIECE}
DETOKENIZERS = {name: Detokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}
TEXTS = st.lists(st.text(max_size=3) | st.sampled_from([" the", " two", "\n", "中文", "👦🏳️"]))


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def streamed(output: OutputText, tokens: list[int]) -> tuple[list[str], list[tuple[int, str]]]:
    """What is sent with every token, and where every token stands and what it adds."""
    sent, told = [], []
    for at, token in enumerate(tokens):
        output.push(token)
        if at == len(tokens) - 1:
            output.finish()
        sent.append(output.take())
        told.append((output.offset, output.piece))
    return sent, told


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_any_tokens_stream_to_the_text_of_the_whole(name: str, data: st.DataObject) -> None:
    """Bytes that are no character too: they become U+FFFD as in transformers."""
    tokenizer, detokenizer = TOKENIZERS[name], DETOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    prompt = ids(tokenizer, data.draw(st.sampled_from(["", "x", "the", "x\n"])))
    sent, _ = streamed(OutputText(detokenizer, prompt), tokens)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    assert "".join(sent) == whole[len(before) :]
    assert detokenizer.output_text(prompt, tokens) == whole[len(before) :]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=TEXTS)
def test_tokens_of_a_text_add_up_to_it(name: str, texts: list[str]) -> None:
    tokenizer, detokenizer = TOKENIZERS[name], DETOKENIZERS[name]
    tokens = ids(tokenizer, "".join(texts))
    output, expected = OutputText(detokenizer), []
    for token in tokens:
        expected.append(output.would_add(token))
        output.push(token)
    _, told = streamed(OutputText(detokenizer), tokens)
    whole = tokenizer.decode(tokens)
    if "\ufffd" not in whole:  # as text, or for characters that the tokenizer has not
        assert [piece for _, piece in told] == expected
        assert "".join(expected) == whole
        assert all(whole[at : at + len(piece)] == piece for at, piece in told)


def test_an_output_keeps_its_first_space() -> None:
    tokenizer, detokenizer = SENTENCEPIECE, DETOKENIZERS["sentencepiece"]
    prompt, output = tokenizer.encode("the"), ids(tokenizer, "two")
    assert tokenizer.decode(output) == "two"
    assert tokenizer.decode(prompt + output, skip_special_tokens=True) == "the two"
    assert detokenizer.output_text(prompt, output) == " two"
    assert detokenizer.output_text([tokenizer.bos_token_id], output) == "two"


def test_a_character_of_several_tokens_is_told_with_its_last() -> None:
    """As in vLLM; and what has been told of a run of bytes is not told again."""
    tokens = ids(SENTENCEPIECE, "x中👦!")
    _, told = streamed(OutputText(DETOKENIZERS["sentencepiece"]), tokens)
    assert [piece for _, piece in told] == ["", "x", "", "", "中", "", "", "", "👦", "!"]
    assert [at for at, _ in told] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]


def test_bytes_of_tokens_join_to_those_of_the_text() -> None:
    text = "the 中文 👦"
    for name, detokenizer in DETOKENIZERS.items():
        tokens = ids(TOKENIZERS[name], text)
        _, told = streamed(OutputText(detokenizer), tokens)
        parts = zip(tokens, told, strict=True)
        data = b"".join(detokenizer.token_bytes(token, piece) for token, (_, piece) in parts)
        assert data == text.encode()


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text("ab\n中", max_size=8), stop=st.text("ab\n中", min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_at_once(name: str, include: bool, text: str, stop: str):
    """Wherever tokens begin and end, and bytes of a line break are decided by that it ends."""
    tokenizer, detokenizer = TOKENIZERS[name], DETOKENIZERS[name]
    output = OutputText(detokenizer, ids(tokenizer, "x"), [stop], include_stop=include)
    sent, read = [], ""
    for token in ids(tokenizer, "x" + text)[len(ids(tokenizer, "x")) :]:
        ended = output.push(token)
        sent.append(output.take())
        read += output.piece if not ended else ""
        if ended:
            break
    else:
        output.finish()
        sent.append(output.take())
    at = text.find(stop)
    assert output.stopped == (at >= 0)
    end = len(text) if at < 0 else at + len(stop) * include
    assert "".join(sent) == output.text == text[:end]


def test_special_tokens_are_named_and_add_nothing() -> None:
    tokenizer = SENTENCEPIECE
    tokens = [*ids(tokenizer, "the"), 1, *ids(tokenizer, "two")]
    _, told = streamed(OutputText(DETOKENIZERS["sentencepiece"]), tokens)
    assert told == [(0, "the"), (3, "<s>"), (3, " two")]
    kept = OutputText(DETOKENIZERS["sentencepiece"], skip_special_tokens=False)
    assert "".join(streamed(kept, tokens)[0]) == tokenizer.decode(tokens) == "the<s> two"
