"""Datasets: what is trained in each format, and that no broken row stops a job."""

import copy
import json
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexllm_jax.finetune.data import (
    BatchStream,
    Dataset,
    DatasetError,
    TrainingSequence,
    detect_format,
    load_dataset,
    pack,
)

GSM8K = Path(__file__).resolve().parents[2] / "../shared/data/sft_gsm8k_1500.jsonl"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3's: an empty thought before the last answer only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Gemma's: it refuses conversations that do not start with the user.
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven, of course."},
]


SHAREGPT = [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def says(who: str, text: str) -> dict:
    return {"from": who, "value": text}


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    """A small byte-level BPE without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(CONVERSATION)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def with_template(plain: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=template,
    )


@pytest.fixture(scope="module")
def chatml(plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(plain, CHATML)


def write(path: Path, *rows: Any) -> Path:
    """Rows as JSONL; text is written as it is, to make broken lines."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def trained(tokenizer: Any, sequence: TrainingSequence) -> list[str]:
    """The stretches of text that count in the loss."""
    stretches: list[list[int]] = []
    for index, counts in enumerate(sequence.loss_mask):
        if counts:
            if index == 0 or not sequence.loss_mask[index - 1]:
                stretches.append([])
            stretches[-1].append(int(sequence.tokens[index]))
    return [tokenizer.decode(tokens) for tokens in stretches]


def trained_at(tokenizer: Any, sequence: TrainingSequence, weight: float) -> str:
    """The tokens of a weight."""
    return tokenizer.decode(sequence.tokens[sequence.weights == weight])


class TestChat:
    def test_only_what_the_assistant_says_is_trained(self, chatml: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
        (sequence,) = load_dataset(path, chatml).sequences
        assert trained(chatml, sequence) == ["Four.<|im_end|>", "Seven, of course.<|im_end|>"]

    def test_tokens_are_those_of_the_template(self, chatml: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
        (sequence,) = load_dataset(path, chatml).sequences
        expected = chatml.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
        assert sequence.tokens.tolist() == expected
        assert sequence.tokens.dtype == np.int32 and sequence.weights.dtype == np.float32

    def test_a_trained_turn_follows_the_prompt_of_serving(
        self, chatml: Any, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION[:3]})
        (sequence,) = load_dataset(path, chatml).sequences
        prompt = chatml.apply_chat_template(
            CONVERSATION[:2], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert sequence.tokens[: len(prompt)].tolist() == prompt
        assert int(np.argmax(sequence.loss_mask)) == len(prompt)

    def test_train_on_all(self, chatml: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
        (sequence,) = load_dataset(path, chatml, train_on="all").sequences
        assert not sequence.loss_mask[0] and sequence.loss_mask[1:].all()

    def test_a_template_that_rewrites_earlier_turns(self, plain: Any, tmp_path: Path) -> None:
        """Every turn is trained once, in the context and form in which it would be served."""
        tokenizer = with_template(plain, THINKING)
        path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
        first, last = load_dataset(path, tokenizer).sequences
        assert trained(tokenizer, first) == ["<think></think>Four.<|im_end|>"]
        assert trained(tokenizer, last) == ["<think></think>Seven, of course.<|im_end|>"]
        expected = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
        assert last.tokens.tolist() == expected

    def test_weight_zero_is_not_trained(self, chatml: Any, tmp_path: Path) -> None:
        messages: list[dict] = [dict(message) for message in CONVERSATION]
        messages[2]["weight"] = 0
        path = write(tmp_path / "d.jsonl", {"messages": messages})
        (sequence,) = load_dataset(path, chatml).sequences
        assert trained(chatml, sequence) == ["Seven, of course.<|im_end|>"]

    def test_a_message_counts_as_its_weight_says(self, chatml: Any, tmp_path: Path) -> None:
        messages: list[dict] = [dict(message) for message in CONVERSATION]
        messages[2]["weight"] = 0.25
        (sequence,) = load_dataset(
            write(tmp_path / "d.jsonl", {"messages": messages}), chatml
        ).sequences
        counted = {w: trained_at(chatml, sequence, w) for w in set(sequence.weights.tolist())}
        assert counted.keys() == {0, 0.25, 1}
        assert counted[0.25] == "Four.<|im_end|>" and counted[1] == "Seven, of course.<|im_end|>"

    def test_text_parts_are_joined(self, chatml: Any, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur."}]
        row = {"messages": [CONVERSATION[1], {"role": "assistant", "content": parts}]}
        (sequence,) = load_dataset(write(tmp_path / "d.jsonl", row), chatml).sequences
        assert trained(chatml, sequence) == ["Four.<|im_end|>"]

    def test_sharegpt_means_the_same(self, chatml: Any, tmp_path: Path) -> None:
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        turns = [{"from": names[m["role"]], "value": m["content"]} for m in CONVERSATION]
        chat = load_dataset(write(tmp_path / "a.jsonl", {"messages": CONVERSATION}), chatml)
        shared = load_dataset(write(tmp_path / "b.jsonl", {"conversations": turns}), chatml)
        assert shared.format == "sharegpt"
        assert shared.fingerprint == chat.fingerprint

    def test_a_model_without_a_template_is_named(self, plain: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
        with pytest.raises(DatasetError, match="chat template"):
            load_dataset(path, plain)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"messages": "hello"}, "`messages` must be a list"),
            ({"messages": []}, "`messages` must be a list"),
            ({"messages": ["hello"]}, "messages[0] must have `role` and `content`"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
            ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text"),
            ({"messages": [{"role": "user"}]}, "messages[0].content must be text, not None"),
            ({"messages": CONVERSATION[:2]}, "no assistant message"),
            ({"messages": [CONVERSATION[1], {**CONVERSATION[2], "weight": 0}]}, "weight 0"),
            ({"messages": CONVERSATION[2:3]}, "no assistant message that answers"),
            *(
                (
                    {"messages": [CONVERSATION[1], {**CONVERSATION[2], "weight": weight}]},
                    "messages[1].weight must be 0 or a number from 1e-06 to 1000000 (the loss",
                )
                for weight in (-1, 1e-9, 1e9, "1")
            ),
            ({"messages": CONVERSATION, "tools": 3}, "`tools` must be a list"),
            (
                {"messages": [CONVERSATION[1], {"role": "assistant", "content": "\ud800"}]},
                "surrogate",
            ),
        ],
    )
    def test_an_unusable_row_is_told_why(
        self, chatml: Any, tmp_path: Path, row: dict, reason: str
    ) -> None:
        path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION}, row)
        dataset = load_dataset(path, chatml)
        assert len(dataset) == 1
        ((line, told),) = [(row.line, row.reason) for row in dataset.skipped]
        assert line == 2 and reason in told

    def test_what_the_template_refuses_is_skipped(self, plain: Any, tmp_path: Path) -> None:
        tokenizer = with_template(plain, STRICT + CHATML)
        rows = [{"messages": CONVERSATION[1:3]}, {"messages": CONVERSATION[:3]}]
        dataset = load_dataset(write(tmp_path / "d.jsonl", *rows), tokenizer)
        assert len(dataset) == 1 and dataset.skipped[0].line == 2
        assert "template refuses" in dataset.skipped[0].reason


class TestTokens:
    """Rows that are tokens already, as transformers' collators take them."""

    ROW: ClassVar[dict] = {"input_ids": [5, 6, 7, 8]}

    @pytest.mark.parametrize(
        ("columns", "tokens", "weights"),
        [
            ({}, [5, 6, 7, 8], [0, 1, 1, 1]),
            ({"labels": [-100, -100, 7, 8]}, [5, 6, 7, 8], [0, 0, 1, 1]),
            ({"weights": [9, 0, 0.5, 2]}, [5, 6, 7, 8], [0, 0, 0.5, 2]),
            ({"labels": [5, 6, -100, 8], "weights": [1, 2, 3, 4]}, [5, 6, 7, 8], [0, 2, 0, 4]),
            ({"completion_mask": [0, 0, 0, 1]}, [5, 6, 7, 8], [0, 0, 0, 1]),
            ({"assistant_masks": [0, 1, 0, 1]}, [5, 6, 7, 8], [0, 1, 0, 1]),
            ({"attention_mask": [0, 1, 1, 1]}, [6, 7, 8], [0, 1, 1]),
        ],
    )
    def test_what_counts(
        self, plain: Any, tmp_path: Path, columns: dict, tokens: list, weights: list
    ) -> None:
        path = write(tmp_path / "d.jsonl", {**self.ROW, **columns})
        for train_on in ("completion", "all"):
            dataset = load_dataset(path, plain, train_on=train_on)
            assert dataset.format == "tokenized" and not dataset.unread
            (sequence,) = dataset.sequences
            assert sequence.tokens.tolist() == tokens and sequence.weights.tolist() == weights

    @pytest.mark.parametrize(
        ("columns", "reason"),
        [
            ({"input_ids": "5 6"}, "`input_ids` must be a list of tokens"),
            ({"input_ids": [5, 6.5]}, "`input_ids` must be a list of tokens"),
            ({"input_ids": [5, -1]}, "`input_ids` must be a list of tokens"),
            ({"input_ids": [5, 10**30]}, "`input_ids` must be a list of tokens"),
            ({"input_ids": [5, 10**6]}, "has id 1000000, and the model embeds ids 0 to 299"),
            ({"input_ids": []}, "nothing to train on"),
            ({"labels": [5, 6]}, "`labels` must be a list of 4 items"),
            ({"labels": [5, 6, 6, 8]}, "labels[2] is 6: it must be -100 or input_ids[2]"),
            ({"labels": [-100] * 4}, "nothing to train on"),
            ({"weights": [0, 0, 0, -1]}, "weights[3] must be 0 or a number from"),
            ({"weights": [0, 0, 0, None]}, "weights[3] must be 0 or a number from"),
        ],
    )
    def test_an_unusable_row_is_told_why(
        self, plain: Any, tmp_path: Path, columns: dict, reason: str
    ) -> None:
        path = write(tmp_path / "d.jsonl", self.ROW, {**self.ROW, **columns})
        dataset = load_dataset(path, plain, vocab_size=300)
        assert len(dataset) == 1 and dataset.sequences[0].tokens.tolist() == [5, 6, 7, 8]
        ((line, told),) = [(row.line, row.reason) for row in dataset.skipped]
        assert line == 2 and reason in told

    def test_a_fingerprint_knows_weights_but_not_their_type(self, plain: Any) -> None:
        """Of data without weights it is what earlier versions wrote in their checkpoints."""
        tokens, mask = np.array([5, 6, 7], np.int32), np.array([False, True, True])

        def fingerprint(weights: Any) -> int:
            sequences = (TrainingSequence(tokens, np.array(weights, np.float32)),)
            return Dataset(None, "text", 1, sequences, (), 0).fingerprint  # type: ignore[arg-type]

        assert fingerprint([0, 1, 1]) == zlib.crc32(tokens.tobytes() + mask.tobytes())
        assert len({fingerprint([0, 1, w]) for w in (0, 0.5, 1, 2)}) == 4


class TestPlainFormats:
    def test_prompt_completion_ends_with_eos(self, plain: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "d.jsonl", {"prompt": "One, two,", "completion": " three"})
        dataset = load_dataset(path, plain)
        (sequence,) = dataset.sequences
        assert dataset.format == "prompt_completion"
        assert plain.decode(sequence.tokens) == "One, two, three<|im_end|>"
        assert trained(plain, sequence) == [" three<|im_end|>"]

    def test_text_is_trained_whole_but_its_first_token(self, plain: Any, tmp_path: Path) -> None:
        (sequence,) = load_dataset(
            write(tmp_path / "d.jsonl", {"text": "Seven, of"}), plain
        ).sequences
        assert plain.decode(sequence.tokens) == "Seven, of<|im_end|>"
        assert not sequence.loss_mask[0] and sequence.loss_mask[1:].all()

    def test_bos_comes_first(self, plain: Any, tmp_path: Path) -> None:
        from tokenizers.processors import TemplateProcessing

        backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
        bos = backend.token_to_id("<|im_start|>")
        backend.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
        (sequence,) = load_dataset(
            write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}), tokenizer
        ).sequences
        assert tokenizer.decode(sequence.tokens) == "<|im_start|>ab<|im_end|>"
        assert trained(tokenizer, sequence) == ["b<|im_end|>"]

    @pytest.mark.parametrize(
        ("row", "format", "prompt"),
        [
            (
                {"instruction": "Add.", "input": "2 2", "output": "4"},
                "alpaca",
                "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n",
            ),
            (
                {"instruction": "Add.", "input": "", "output": "4"},
                "alpaca",
                "### Instruction:\nAdd.\n\n### Response:\n",
            ),
            ({"question": "2+2?", "answer": "4"}, "question_answer", "Question: 2+2?\nAnswer: "),
        ],
    )
    def test_instructions_without_a_template(
        self, plain: Any, tmp_path: Path, row: dict, format: str, prompt: str
    ) -> None:
        dataset = load_dataset(write(tmp_path / "d.jsonl", row), plain)
        (sequence,) = dataset.sequences
        assert dataset.format == format
        assert plain.decode(sequence.tokens) == prompt + "4<|im_end|>"
        assert trained(plain, sequence) == ["4<|im_end|>"]

    def test_instructions_with_a_template_are_conversations(
        self, chatml: Any, tmp_path: Path
    ) -> None:
        row = {"instruction": "Add.", "input": "2 2", "output": "4"}
        (sequence,) = load_dataset(write(tmp_path / "d.jsonl", row), chatml).sequences
        text = "<|im_start|>user\nAdd.\n\n2 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        assert chatml.decode(sequence.tokens) == text
        assert trained(chatml, sequence) == ["4<|im_end|>"]

    def test_detection(self) -> None:
        assert detect_format({"messages": [], "prompt": "x"}) == "chat"
        assert detect_format({"question": "", "answer": "", "n_tokens": 3}) == "question_answer"
        assert detect_format({"prompt": "x"}) is None


GOOD = {"prompt": "One", "completion": " two"}


class TestBrokenInput:
    def test_broken_rows_are_counted_named_and_skipped(self, plain: Any, tmp_path: Path) -> None:
        path = write(
            tmp_path / "d.jsonl",
            '{"prompt": "cut off',
            GOOD,
            "",
            [1, 2],
            {"prompt": "no completion"},
            {"prompt": "x", "completion": 3},
            {"prompt": "x", "completion": "  "},
            '{"prompt": ' + "9" * 5000 + "}",
            "[" * 100_000,
            GOOD,
        )
        with path.open("ab") as file:
            file.write(b'{"prompt": "\xff"}\n')
        dataset = load_dataset(path, plain)
        assert len(dataset) == 2
        reasons = {row.line: row.reason for row in dataset.skipped}
        assert list(reasons) == [1, 4, 5, 6, 7, 8, 9, 11], "blank lines are no rows"
        assert "not JSON" in reasons[1] and "column" in reasons[1]
        assert "list instead of an object" in reasons[4]
        assert "no field `completion`" in reasons[5]
        assert "`completion` must be text, not int" in reasons[6]
        assert "`completion` is empty" in reasons[7]
        assert "not JSON" in reasons[8] and "not JSON" in reasons[9]
        assert reasons[11] == "not UTF-8"
        assert dataset.rows == 10
        assert "8 rows skipped" in dataset.summary() and "line 1: not JSON" in dataset.summary()

    def test_long_rows_are_cut_if_something_trained_is_left(
        self, plain: Any, tmp_path: Path
    ) -> None:
        long_answer = {"prompt": "One", "completion": " two" * 50}
        long_prompt = {"prompt": "One" * 50, "completion": " two"}
        path = write(tmp_path / "d.jsonl", long_answer, long_prompt, GOOD)
        dataset = load_dataset(path, plain, max_seq_len=16)
        assert [len(sequence) <= 16 for sequence in dataset.sequences] == [True, True]
        assert dataset.truncated == 1 and len(dataset.sequences[0]) == 16
        assert [row.line for row in dataset.skipped] == [2]
        assert "max_seq_len" in dataset.skipped[0].reason

    @pytest.mark.parametrize(
        ("good", "bad"),
        [
            ({"text": "a b"}, {"text": "a <new> b"}),
            ({"prompt": "a", "completion": "b"}, {"prompt": "a<new>", "completion": "b"}),
            ({"question": "a", "answer": "b"}, {"question": "a", "answer": "<new>"}),
            ({"instruction": "a", "output": "b"}, {"instruction": "<new>", "output": "b"}),
            ({"messages": CONVERSATION}, {"messages": [*CONVERSATION[:4], said("<new>")]}),
            ({"conversations": SHAREGPT}, {"conversations": [*SHAREGPT[:1], says("gpt", "<new>")]}),
        ],
        ids=lambda row: next(iter(row)),
    )
    def test_tokens_that_the_model_has_no_embedding_of(
        self, plain: Any, chatml: Any, tmp_path: Path, good: dict, bad: dict
    ) -> None:
        tokenizer = chatml if good.keys() & {"messages", "conversations"} else plain
        size = len(tokenizer)
        grown = copy.deepcopy(tokenizer)
        grown.add_tokens(["<new>"])
        path = write(tmp_path / "d.jsonl", good, bad, good)
        dataset = load_dataset(path, grown, vocab_size=size)
        assert (len(dataset), [row.line for row in dataset.skipped]) == (2, [2])
        assert f"token '<new>' has id {size}, and the model embeds ids 0 to {size - 1}" in (
            dataset.skipped[0].reason
        )
        assert len(load_dataset(path, grown, vocab_size=size + 1)) == 3

    def test_an_end_token_that_the_model_has_no_embedding_of(
        self, plain: Any, tmp_path: Path
    ) -> None:
        grown = copy.deepcopy(plain)
        grown.add_special_tokens({"eos_token": "<end>"})
        path = write(tmp_path / "d.jsonl", GOOD, GOOD)
        with pytest.raises(DatasetError, match=f"token '<end>' has id {len(plain)}"):
            load_dataset(path, grown, vocab_size=len(plain))

    def test_a_json_array_is_rows_too(self, plain: Any, tmp_path: Path) -> None:
        path = tmp_path / "d.json"
        path.write_text(json.dumps([GOOD, 3, GOOD], indent=2))
        dataset = load_dataset(path, plain)
        assert len(dataset) == 2 and dataset.skipped[0].line == 2

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ("", "no row in it can be read"),
            ("not json\nat all\n", "no row in it can be read"),
            ('[{"prompt": "x"},', "not a JSON array"),
            ('{"a": 1, "b": 2}\n', "rows have the fields a, b"),
            ('{"prompt": "x", "completion": ""}\n', "none of its 1 rows can be trained on; line 1"),
        ],
    )
    def test_an_unusable_file_is_one_clear_error(
        self, plain: Any, tmp_path: Path, content: str, named: str
    ) -> None:
        path = tmp_path / "d.jsonl"
        path.write_text(content)
        with pytest.raises(DatasetError) as caught:
            load_dataset(path, plain)
        message = str(caught.value)
        assert named in message and str(path) in message and "\n" not in message

    def test_missing_files_and_unknown_formats_are_named(self, plain: Any, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no such file"):
            load_dataset(tmp_path / "none.jsonl", plain)
        with pytest.raises(DatasetError, match="is a folder"):
            load_dataset(tmp_path, plain)
        with pytest.raises(DatasetError, match="unknown format 'csv'"):
            load_dataset(tmp_path, plain, format="csv")

    def test_a_named_format_is_not_guessed(self, plain: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "d.jsonl", {**GOOD, "text": "Seven"})
        (sequence,) = load_dataset(path, plain, format="text").sequences
        assert plain.decode(sequence.tokens) == "Seven<|im_end|>"


class TestRealRows:
    def test_every_answer_is_trained_to_its_end(self, chatml: Any) -> None:
        if not GSM8K.exists():
            pytest.skip(f"{GSM8K.name} is not beside the checkout")
        dataset = load_dataset(GSM8K, chatml, max_seq_len=1024)
        assert dataset.format == "question_answer"
        assert dataset.rows == 1500 and not dataset.skipped
        with GSM8K.open() as file:
            rows = [json.loads(line) for line in file]
        whole = [s for s in dataset.sequences if len(s) < 1024]
        assert len(whole) + dataset.truncated >= 1500
        for row, sequence in zip(rows[:50], dataset.sequences[:50], strict=True):
            assert trained(chatml, sequence) == [row["answer"] + "<|im_end|>"]


def made_dataset(lengths: list[int]) -> Dataset:
    sequences = tuple(
        TrainingSequence(np.full(n, i, np.int32), np.arange(n) > 0) for i, n in enumerate(lengths)
    )
    return Dataset(Path("made"), "text", len(lengths), sequences, (), 0)


def rows_of(batch: list[TrainingSequence]) -> list[int]:
    return [int(sequence.tokens[0]) for sequence in batch]


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


class TestBatchStream:
    @given(lengths=LENGTHS, batch_tokens=st.integers(1, 100), seed=st.integers(0, 9))
    def test_an_epoch_is_every_row_once(
        self, lengths: list[int], batch_tokens: int, seed: int
    ) -> None:
        stream = BatchStream(made_dataset(lengths), batch_tokens, seed)
        for epoch in range(2):
            batches = [stream.next_batch() for _ in range(stream.batches_per_epoch)]
            assert stream.epoch == epoch + 1
            for batch in batches:
                assert len(batch) == 1 or sum(map(len, batch)) <= batch_tokens
            order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
            assert [row for batch in batches for row in rows_of(batch)] == order.tolist()

    @given(lengths=LENGTHS, done=st.integers(0, 20))
    def test_a_restored_stream_goes_on_as_if_nothing_happened(
        self, lengths: list[int], done: int
    ) -> None:
        stream = BatchStream(made_dataset(lengths), 50, seed=3)
        for _ in range(done):
            stream.next_batch()
        state = json.loads(json.dumps(stream.state()))
        resumed = BatchStream(made_dataset(lengths), 50, seed=0)
        resumed.restore(state)
        for _ in range(10):
            assert rows_of(resumed.next_batch()) == rows_of(stream.next_batch())

    def test_total_batches_counts_shuffled_epochs(self) -> None:
        stream = BatchStream(made_dataset([3, 30, 7, 20, 11, 2, 28]), 40, seed=1)
        total = stream.batches_left(3)
        for _ in range(total):
            assert stream.epoch < 3
            stream.next_batch()
        assert stream.epoch == 3

    def test_without_shuffling_rows_keep_their_order(self) -> None:
        stream = BatchStream(made_dataset([4, 4, 4]), 8, seed=0, shuffle=False)
        assert [rows_of(stream.next_batch()) for _ in range(3)] == [[0, 1], [2], [0, 1]]

    def test_other_data_is_refused_on_resume(self) -> None:
        state = BatchStream(made_dataset([4, 4]), 8, seed=0).state()
        with pytest.raises(DatasetError, match="changed since the checkpoint"):
            BatchStream(made_dataset([4, 5]), 8, seed=0).restore(state)


class TestPacking:
    @given(lengths=LENGTHS, max_tokens=st.integers(40, 100))
    def test_first_fit(self, lengths: list[int], max_tokens: int) -> None:
        sequences = list(made_dataset(lengths).sequences)
        bins: list[list[int]] = []
        for row, length in enumerate(lengths):
            for rows in bins:
                if sum(lengths[r] for r in rows) + length <= max_tokens:
                    rows.append(row)
                    break
            else:
                bins.append([row])
        assert [rows_of(packed) for packed in pack(sequences, max_tokens)] == bins

    def test_what_never_fits_is_named(self) -> None:
        with pytest.raises(ValueError, match="41 tokens does not fit a microbatch of 40"):
            pack(made_dataset([41]).sequences, 40)
