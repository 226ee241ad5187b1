"""What is thought before an answer: told apart from it however the text is cut, kept within its
budget, and never bound by the answer's form; through the unmodified openai SDK."""

import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from flexllm_jax import SamplingParams
from flexllm_jax.engine.sampling.reasoning import (
    FORMATS,
    ReasoningFormat,
    ReasoningParser,
    Thinking,
    find_thinking,
)
from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import read_messages
from tests.engines import start_engine
from tests.server.inference.test_tool_calls import PLACES, cut
from tests.small_tokenizers import byte_level_tokenizer

THINK = FORMATS[0]
INNER = st.text(st.characters(exclude_characters="<>[]/", codec="utf-8"))
ASK = {"model": "thinker", "messages": [{"role": "user", "content": "Who?"}], "temperature": 0}
CHOICE = {"structured_outputs": {"choice": ["yes", "no"]}}


def split(thinking, pieces):
    parser = ReasoningParser(thinking)
    parts = [parser.push(piece, final=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    return "".join(thought for thought, _ in parts), "".join(said for _, said in parts)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.booleans(), INNER, INNER, PLACES)
def test_thoughts_are_found_however_the_text_is_cut(form, begun, thought, said, places):
    text = ("" if begun else f"\n{form.opening}") + f"\n{thought}\n{form.end}\n\n{said}"
    for pieces in (cut(text, places), list(text)):
        assert split(Thinking(form, begun), pieces) == (thought.strip(), said.lstrip())


@settings(max_examples=60, deadline=None)
@given(INNER, PLACES)
def test_a_text_without_thoughts_stays_as_it_is(text, places):
    assert split(Thinking(THINK, False), cut(text, places)) == ("", text)
    assert split(Thinking(THINK, True), cut(text, places))[1] == ""


def test_granites_sentences_are_marks():
    granite = Thinking(FORMATS[-1], False)
    text = "Here is my thought process: Here is it.\n\nHere is my response: Here is 4."
    assert split(granite, list(text)) == ("Here is it.", "Here is 4.")
    for other in ("Here is my dog: a", "So. Here is my response: a"):
        assert split(granite, list(other)) == ("", other)


@pytest.mark.parametrize("text", [" <thin", "<think", "so <think>a</think>b", "a</think>b"])
def test_what_only_looks_like_a_thought_is_text(text):
    assert split(Thinking(THINK, False), list(text)) == ("", text)


@pytest.mark.parametrize(
    ("template", "prompt", "begun"),
    [
        ("...<think>\\n\\n</think>...", "<|im_start|>assistant\n", False),
        ("...<think>\\n...", "<|im_start|>assistant\n<think>\n", True),
        ("...<think>\\n\\n</think>...", "<|im_start|>assistant\n<think>\n\n</think>\n\n", None),
        ("{{ message.content }}", "<think>", None),
        ("...<seed:think>...", "<seed:bos>assistant\n", False),
        ("...[THINK]...", "[/INST]", False),
        ("...<|channel>thought\\n<channel|>...", "<|turn>model\n", False),
        ("...<|channel>thought\\n<channel|>...", "<|channel>thought\n", True),
        ("...<|channel>thought\\n<channel|>...", "<|channel>thought\n<channel|>", None),
        ("...<|channel|>analysis...", "<|start|>assistant", None),  # gpt-oss
        ("Write your thoughts after 'Here is my thought process:' and", "assistant:", False),
    ],
)
def test_the_template_and_the_prompt_tell_how_an_answer_begins(template, prompt, begun):
    found = find_thinking(template, prompt)
    assert (found and found.begun) == begun


@pytest.mark.parametrize("special", [True, False])
def test_an_answers_form_binds_no_thought(special):
    marks = ("<think>", "</think>")
    tokenizer = byte_level_tokenizer(("<unk>", "<s>", "</s>", *(marks if special else ())))
    tokenizer.add_tokens([] if special else list(marks))
    vocabulary = from_tokenizer(tokenizer)

    def matches(thinking, answer, text):
        grammar = thinking.before(answer, lambda t: f"<[{tokenizer.convert_tokens_to_ids(t)}]>")
        matcher = LLMatcher(vocabulary, grammar.to_grammar(), log_level=0)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    yes = StructuredOutputsParams(choice=("yes", "no"))
    inside, free = Thinking(THINK, True), Thinking(THINK, False)
    assert matches(inside, yes, "any{thing</think>\n\nyes")
    assert not matches(inside, yes, "yes")
    assert not matches(inside, yes, "a</think>maybe")
    assert matches(free, yes, "no") and matches(free, yes, "<think>a</think>no")
    assert not matches(free, yes, "<think>no")
    labelled = Thinking(ReasoningFormat("<think>", "</think>", "thought\n"), False)
    assert matches(labelled, yes, "<think>thought\na</think>no") and matches(labelled, yes, "no")
    assert not matches(labelled, yes, "<think>a</think>no")
    for answer in (yes, None):
        for begun in (True, False):
            start, short = "" if begun else "<think>", Thinking(THINK, begun, 3)
            assert matches(short, answer, f"{start}abc</think>yes")
            assert matches(short, answer, f"{start}</think>yes")
            assert not matches(short, answer, f"{start}abcd</think>yes")
            assert not matches(Thinking(THINK, begun, 0), answer, f"{start}a</think>yes")
    assert matches(Thinking(THINK, False, 3), None, "anything <think> at all")


def test_a_budget_needs_marks_that_are_tokens():
    with pytest.raises(ValueError, match="thinking_token_budget: <think>"):
        Thinking(THINK, True, 3).before(None, json.dumps)


@pytest.mark.parametrize(
    ("template", "effort", "options"),
    [
        ("{{ reasoning_effort }}{{ enable_thinking }}", "low", {"reasoning_effort": "low"}),
        ("{{ enable_thinking }}", "low", {"enable_thinking": True}),
        ("{{ enable_thinking }}", "none", {"enable_thinking": False}),
        ("{{ thinking }}", "high", {"thinking": True}),
        ("{{ thinking_budget }}", "none", {"thinking_budget": 0}),
        ("{{ thinking_budget }}", "low", None),
        ("{{ messages }}", "low", None),
    ],
)
def test_an_effort_is_said_as_the_template_knows_it(template, effort, options):
    tokenizer = byte_level_tokenizer(chat_template=template)
    assert ChatTemplate(tokenizer).effort(effort) == options


def test_thoughts_of_earlier_answers_reach_the_template_by_both_names():
    for name in ("reasoning", "reasoning_content"):
        (message,) = read_messages([{"role": "assistant", "content": "a", name: "b"}])
        assert message["reasoning"] == message["reasoning_content"] == "b"


def test_a_thought_is_told_apart(thinking_client):
    ask = thinking_client.chat.completions.create
    extra = CHOICE | {"thinking_token_budget": 5}
    answer = ask(**ASK, extra_body=extra)
    (choice,) = answer.choices
    assert choice.message.content in ("yes", "no") and choice.finish_reason == "stop"
    thought = choice.message.reasoning
    assert thought and thought == choice.message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens == 6  # with the mark
    assert answer.usage.completion_tokens <= 6 + 4

    chunks = list(ask(**ASK, extra_body=extra, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[1:-1]]
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == thought
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    both = [delta for delta in deltas if delta.content and hasattr(delta, "reasoning")]
    assert not both
    assert chunks[-1].usage.completion_tokens_details == answer.usage.completion_tokens_details

    hidden = ask(**ASK, extra_body=extra | {"include_reasoning": False}).choices[0].message
    assert hidden.content == choice.message.content and not hasattr(hidden, "reasoning")


def test_the_python_api_tells_thoughts_apart_as_the_server_does(
    thinking_client, thinking_llama, tmp_path
):
    ask = thinking_client.chat.completions.create
    messages = ASK["messages"]
    with start_engine(thinking_llama, tmp_path) as llm:
        answers = StructuredOutputsParams(choice=("yes", "no"))
        params = [
            SamplingParams(max_tokens=40, structured_outputs=answers),
            SamplingParams(max_tokens=5, stop=("never",)),
        ]
        short, cut_off = llm.chat([messages] * 2, params, thinking_token_budget=5)
        told = ask(**ASK, extra_body=CHOICE | {"thinking_token_budget": 5}).choices[0].message
        assert (short.reasoning, short.text) == (told.reasoning, told.content)
        assert short.reasoning and short.text in ("yes", "no")
        told = ask(**ASK, max_tokens=5, extra_body={"thinking_token_budget": 5}).choices[0].message
        assert (cut_off.reasoning, cut_off.text) == (told.reasoning, "") and told.content is None
        # A stop string ends a thought, too; a prompt that thinks no more has an answer alone.
        stop = SamplingParams(max_tokens=5, stop=(short.reasoning[:2],))
        (stopped,) = llm.chat(messages, stop)
        assert (stopped.reasoning, stopped.text, stopped.finish_reason) == (None, "", "stop")
        off = {"enable_thinking": False}
        (plain,) = llm.chat(messages, params[0], chat_template_kwargs=off)
        assert plain.reasoning is None and plain.text in ("yes", "no")
        with pytest.raises(ValueError, match="thinking_token_budget: the answer begins with no"):
            llm.chat(messages, params[0], chat_template_kwargs=off, thinking_token_budget=5)
        with pytest.raises(ValueError, match="sampling_params has 2 entries for 1 prompts"):
            llm.chat(messages, params)


def test_an_answer_without_thinking(thinking_client):
    answer = thinking_client.chat.completions.create(
        **ASK, reasoning_effort="none", extra_body=CHOICE
    )
    assert answer.choices[0].message.content in ("yes", "no")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_thought_that_does_not_end(thinking_client):
    answer = thinking_client.chat.completions.create(**ASK, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content is None and answer.choices[0].message.reasoning
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5


def test_calls_come_after_thoughts(thinking_client):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    other = {"type": "function", "function": {"name": "g"}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}
    answer = thinking_client.chat.completions.create(
        **ASK,
        tools=[*tools, other],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        parallel_tool_calls=False,
        extra_body={"thinking_token_budget": 4},
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.reasoning
    (call,) = choice.message.tool_calls
    assert call.function.name == "f" and json.loads(call.function.arguments) == {"a": 1}


def test_a_tool_that_is_allowed_is_a_tool(thinking_client):
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(openai.BadRequestError, match="allows 'f', which is not among the tools"):
        thinking_client.chat.completions.create(
            **ASK, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}
        )


def test_a_budget_for_no_thought_is_refused(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            **ASK | {"model": "tiny"}, extra_body={"thinking_token_budget": 4}
        )
    assert error.value.param == "thinking_token_budget"
