"""Columns beside those that make a format are read or told; any chat template can be trained."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexllm_jax.finetune.data import DatasetError, load_dataset

CHAT = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '!' if loud }}{% endif %}"
)
# As DeepSeek's R1 distillations have it: prompts open the thinking, which answers leave out.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
    "{% if m.content is none %}{% for c in m.tool_calls %}<|call|>{{ c.function.name }}"
    "{% endfor %}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ eos_token }}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# The last question is written otherwise while it waits for its answer.
HINT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if loop.last and m.role == 'user' %} Think!{% endif %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"name": "tide", "description": "", "parameters": {"type": "object", "properties": {}}}
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
ROWS = {
    "chat": {"messages": MESSAGES},
    "sharegpt": {"conversations": TURNS},
    "alpaca": {"instruction": "Hi", "output": "Ho"},
    "question_answer": {"question": "Hi", "answer": "Ho"},
}


def make_tokenizer(template):
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=template
    )


@pytest.fixture
def load(tmp_path):
    """Rows as (untrained text, trained text) of every sequence, and the dataset."""

    def load(*rows, template=CHAT):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = make_tokenizer(template)
        dataset = load_dataset(path, tokenizer)
        texts = [
            (tokenizer.decode(s.tokens), tokenizer.decode(s.tokens[s.loss_mask]))
            for s in dataset.sequences
        ]
        return texts, dataset

    return load


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
class TestColumns:
    @pytest.mark.parametrize(
        ("columns", "text"),
        [
            ({"system": "Arr."}, "<system>Arr.\n<user>Hi\n"),
            ({"tools": [TOOL]}, "[tide]<user>Hi\n"),
            ({"tools": json.dumps([{"type": "function", "function": TOOL}])}, "[tide]<user>Hi\n"),
            ({"functions": [TOOL]}, "[tide]<user>Hi\n"),
            ({"functions": json.dumps([TOOL]), "tools": "[]"}, "[tide]<user>Hi\n"),
            ({"chat_template_kwargs": {"loud": True}}, "<user>Hi\n"),
            ({"system": "", "history": [], "tools": None, "context": None}, "<user>Hi\n"),
        ],
    )
    def test_they_are_read(self, load, row, columns, text):
        ((whole, trained),), dataset = load(row | columns)
        loud = "!" if "chat_template_kwargs" in columns else ""
        assert whole == f"{text}<assistant>{loud}Ho</s>\n"
        assert trained == "Ho</s>"
        assert not dataset.unread

    @pytest.mark.parametrize(
        "history",
        [
            [["One", "Two"]],
            [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}],
            [{"from": "human", "value": "One"}, {"from": "gpt", "value": "Two"}],
        ],
    )
    def test_history_comes_before_and_is_trained_as_turns_are(self, load, row, history):
        ((whole, trained),), _ = load(row | {"system": "Arr.", "history": history})
        before = "<system>Arr.\n<user>One\n<assistant>Two</s>\n"
        assert whole == f"{before}<user>Hi\n<assistant>Ho</s>\n"
        assert trained == "Two</s>Ho</s>"

    @pytest.mark.parametrize("context", ["A port.", ["A port.", "A sea."]])
    def test_a_context_belongs_to_the_question(self, load, row, context):
        ((whole, trained),), _ = load(row | {"context": context})
        assert whole.startswith("<user>") and whole.endswith("<assistant>Ho</s>\n")
        assert "A port." in whole.split("<assistant>")[0] and "Hi" in whole
        assert trained == "Ho</s>"

    def test_what_is_not_read_is_told_once_with_its_count(self, load, row):
        extra = [{"id": 1, "source": "here"}, {"id": 2, "source": ""}]
        _, dataset = load(row | extra[0], row | extra[1])
        assert dataset.unread == {"id": 2, "source": 1}
        assert dataset.summary().count("not read: id (2 rows), source (1 rows)") == 1

    @pytest.mark.parametrize(
        "columns", [{"tools": "tide"}, {"system": 3}, {"history": "One"}, {"context": {"a": 1}}]
    )
    def test_what_cannot_be_read_is_refused_by_name(self, load, row, columns):
        with pytest.raises(DatasetError, match=f"`{next(iter(columns))}` must be"):
            load(row | columns)


def test_a_system_prompt_that_is_a_message_too_is_there_once(load):
    system = {"role": "system", "content": "Arr."}
    ((whole, _),), _ = load({"system": "Arr.", "messages": [system, *MESSAGES]})
    assert whole.count("Arr.") == 1
    ((whole, _),), _ = load({"system": "Yo.", "messages": [system, *MESSAGES]})
    assert "Yo." in whole and "Arr." in whole


def test_sharegpt_calls_are_calls(load):
    """LLaMA-Factory's roles."""
    turns = [
        TURNS[0],
        {"from": "function_call", "value": '{"name": "tide", "arguments": {"at": 3}}'},
        {"from": "observation", "value": "high"},
        TURNS[1],
    ]
    ((whole, trained),), _ = load({"conversations": turns, "tools": json.dumps([TOOL])})
    said = '(tide {"at": 3})</s>'
    assert whole == f"[tide]<user>Hi\n<assistant>{said}\n<tool>high\n<assistant>Ho</s>\n"
    assert trained == f"{said}Ho</s>"


def test_prompt_and_completion_may_be_messages(load):
    """TRL's; the answers within the prompt are not trained."""
    row = {"prompt": [*MESSAGES, MESSAGES[0]], "completion": [MESSAGES[1]], "tools": [TOOL]}
    ((whole, trained),), _ = load(row)
    assert whole == "[tide]" + "<user>Hi\n<assistant>Ho</s>\n" * 2
    assert trained == "Ho</s>"


def test_functions_as_openai_once_had_them(load):
    call = {"name": "tide", "arguments": "{}"}
    messages = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "tide", "content": "high"},
        MESSAGES[1],
    ]
    ((whole, _),), _ = load({"messages": messages, "functions": [TOOL]})
    assert whole == "[tide]<user>Hi\n<assistant>(tide {})</s>\n<tool>high\n<assistant>Ho</s>\n"


def test_plain_text_has_a_place_for_some_columns(load):
    columns = {"system": "Arr.", "context": "A port.", "history": [["One", "Two"]]}
    row = {"prompt": "Hi ", "completion": "Ho", "tools": [TOOL], **columns}
    ((whole, trained),), dataset = load(row, template=None)
    assert whole == "Arr.\n\nOne\n\nTwo\n\nA port.\n\nHi Ho</s>"
    assert trained == "Ho</s>"
    assert dataset.unread == {"tools": 1}
    ((whole, _),), dataset = load({"text": "Hi", "system": "Arr."}, template=None)
    assert whole == "Hi</s>" and dataset.unread == {"system": 1}
    ((whole, _),), _ = load(ROWS["question_answer"] | columns, template=None)
    assert whole == "Arr.\n\nOne\n\nTwo\n\nQuestion: A port.\n\nHi\nAnswer: Ho</s>"
    with pytest.raises(DatasetError, match="need a chat template"):
        load(ROWS["alpaca"] | {"tools": [TOOL]}, template=None)


class TestAnyTemplate:
    """A turn is trained behind the prompt that is served."""

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("<think>\neasy\n</think>\n\nFour.", "easy\n</think>\n\nFour.</s>"),
            ("<think>easy</think>Four.", "easy</think>Four.</s>"),
            ("easy\n</think>\n\nFour.", "easy\n</think>\n\nFour.</s>"),  # as it is served
            ("Four.", "Four.</s>"),
        ],
    )
    def test_prompts_that_begin_the_answer(self, load, content, said):
        ask = {"role": "user", "content": "2+2?"}
        answer = {"role": "assistant", "content": content}
        ((whole, trained),), _ = load({"messages": [ask, answer]}, template=R1)
        assert whole == f"<|user|>2+2?<|Assistant|><think>\n{said}"
        assert trained == said
        texts, _ = load({"messages": [ask, answer, ask, answer]}, template=R1)
        assert texts[0] == (whole, said)
        before = f"<|user|>2+2?<|Assistant|>{content.split('</think>')[-1]}</s>"
        assert texts[1] == (f"{before}{whole}", said)

    def test_calls_behind_such_prompts(self, load):
        call = {"function": {"name": "tide", "arguments": {}}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        ((whole, trained),), _ = load({"messages": [MESSAGES[0], answer]}, template=R1)
        assert whole == "<|user|>Hi<|Assistant|><think>\n<|call|>tide</s>"
        assert trained == "<|call|>tide</s>"

    def test_turns_that_are_written_otherwise_once_they_are_answered(self, load):
        texts, _ = load({"messages": MESSAGES * 2}, template=HINT)
        assert texts == [
            ("<user>Hi Think!<assistant>Ho</s>", "Ho</s>"),
            ("<user>Hi<assistant>Ho</s><user>Hi Think!<assistant>Ho</s>", "Ho</s>"),
        ]

    def test_roles_that_a_template_does_not_know(self, load):
        messages = [{"role": "developer", "content": "Arr."}, *MESSAGES]
        ((whole, _),), _ = load({"messages": messages})
        assert whole == "<system>Arr.\n<user>Hi\n<assistant>Ho</s>\n"
        drops = "{% for m in messages if m.role in ('user', 'assistant') %}"
        template = CHAT.replace("{% for m in messages %}", drops)
        with pytest.raises(DatasetError, match="leaves out developer messages"):
            load({"messages": messages}, template=template)
