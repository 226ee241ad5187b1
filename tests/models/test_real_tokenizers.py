"""Real tokenizers: streams are the text of the whole, what is trained is what is served, and
structured outputs are kept to over 128,000 and 200,000 tokens."""

import json
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from flexllm_jax.engine.sampling.constraints import Constraints
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from flexllm_jax.finetune.data import load_dataset
from flexllm_jax.models.text.detokenizer import Detokenizer, OutputText
from flexllm_jax.models.text.tokenizer import encode_text, end_token_ids, token_starts

FOLDER = Path(__file__).resolve().parents[2] / "../shared/data/tokenizers"
NAMES = ("qwen3", "deepseek_v3", "gptoss")
TEXTS = [
    "世界は広い。안녕하세요, 你好。ภาษาไทย नमस्ते दुनिया مرحبا",
    "👩‍👩‍👧‍👦🏳️‍🌈 😀 \U00020000 ¡Olé! “quotes” …",
    "def f(x):\n\tif x:  # ok\n\n\n        return {'a': 1}\r\n",
    "Grüße, 1234567 + 89 = ? <b>x</b> \\alpha",
]


@cache
def tokenizer_of(name: str) -> Any:
    path = FOLDER / name
    if not path.is_dir():
        pytest.skip(f"{path.parent.name}/{name} is not beside the checkout")
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", NAMES)
def test_streams_are_the_text_of_the_whole(name: str) -> None:
    tokenizer = tokenizer_of(name)
    detokenizer = Detokenizer(tokenizer)
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        for end in (len(tokens), len(tokens) // 2):  # also cut off amid a character
            output, sent = OutputText(detokenizer, tokens[:3]), ""
            for token in tokens[:end]:
                output.push(token)
                sent += output.take()
                assert tokenizer.decode(tokens[:end]).startswith(sent)
            output.finish()
            assert sent + output.take() == tokenizer.decode(tokens[:end])


@pytest.mark.parametrize("name", NAMES)
def test_tokens_stand_where_their_text_is(name: str) -> None:
    tokenizer = tokenizer_of(name)
    output, text = OutputText(Detokenizer(tokenizer)), "".join(TEXTS)
    starts = token_starts(tokenizer, [text], add_special_tokens=False)[0]
    for token, start in zip(
        encode_text(tokenizer, text, add_special_tokens=False), starts, strict=True
    ):
        output.push(token)
        assert output.offset == start
        assert text[start:].startswith(output.piece)


@pytest.mark.parametrize("name", ("qwen3", "deepseek_v3"))
def test_a_thousand_rows_are_trained_as_they_are_served(name: str, tmp_path: Path) -> None:
    """Prompts are those of serving, and what follows them is the answer with its end."""
    tokenizer = tokenizer_of(name)
    rows = [
        [{"role": "user", "content": f"{i} {text}"}, {"role": "assistant", "content": answer}]
        for i, text, answer in zip(
            range(1000), cycle(TEXTS), islice(cycle(TEXTS), 1, None), strict=False
        )
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    dataset = load_dataset(path, tokenizer)
    assert len(dataset) == 1000 and not dataset.skipped
    (end,) = end_token_ids(tokenizer)
    for row, sequence in zip(rows, dataset.sequences, strict=True):
        prompt = tokenizer.apply_chat_template(
            row[:1], add_generation_prompt=True, return_dict=False
        )
        assert sequence.tokens[: len(prompt)].tolist() == prompt
        assert int(np.argmax(sequence.loss_mask)) == len(prompt)
        trained = sequence.tokens[sequence.loss_mask]
        assert trained[-1] == end
        assert tokenizer.decode(trained[:-1]).strip().endswith(row[1]["content"].strip())


def test_masks_are_those_of_the_templates_generation_marks(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        roles = cycle(["user", "assistant"])
        row = [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=False)]
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": row}) + "\n")
        (sequence,) = load_dataset(path, tokenizer).sequences
        expected = tokenizer.apply_chat_template(
            row, return_dict=True, return_assistant_tokens_mask=True
        )
    finally:
        tokenizer.chat_template = own
    assert sequence.tokens.tolist() == expected["input_ids"]
    assert sequence.loss_mask.tolist() == [bool(m) for m in expected["assistant_masks"]]


@pytest.mark.parametrize("name", ("deepseek_v3", "gptoss"))
def test_outputs_match_over_large_vocabularies(name: str) -> None:
    """Random tokens of those that may follow. Making the trie of all tokens takes seconds."""
    tokenizer, choices = tokenizer_of(name), ("def ghi", "世界 😀", " x")
    end = tokenizer.eos_token_id
    constraints = Constraints(tokenizer, len(tokenizer) + 100, [end])
    detokenizer, random = Detokenizer(tokenizer), np.random.default_rng(0)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=choices))
    for constraint in constraints.make(params, 10):
        assert constraint is not None
        output: list[int] = []
        while output[-1:] != [end]:
            bits = constraints.allowed([(constraint, 0)], 1)[0].view(np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            output.append(int(random.choice(allowed)))
            constraint.consume(output[-1])
        assert detokenizer.output_text(tokenizer.encode("the"), output) in choices
