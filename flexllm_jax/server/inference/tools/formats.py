"""How models write tool calls: the formats, told apart by the chat template that asks for them.

    object      START {"name": ..., "arguments": {...}} END, one for each call
    list        START [{"name": ..., "arguments": {...}}, ...]
    named       START name [ARGS] {...}, one for each call
    parameters  START <function=name> <parameter=key> value </parameter> ... </function> END
    pairs       START name <arg_key> key </arg_key> <arg_value> value </arg_value> ... END
    gemma       START call:name{key:QUOTEtextQUOTE,key:1} END
    python      START name(key='text', key=1) END, with a call in each line

Adding one of these is a row of `FORMATS`. What models of no row write stays text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

NAME = re.compile(r"[\w.:/-]{1,256}")
_HEAD = (
    rf'\{{\s*"name"\s*:\s*"(?P<name>{NAME.pattern})"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True)
class Format:
    """One of them. Templates that ask for it have `asks` and `start`. Without a `start`, calls are
    all of an output. `opening`, `key`: as templates write lists and objects. `quote`: the mark
    around texts."""

    name: str
    asks: str
    body: Literal["object", "list", "named", "parameters", "pairs", "gemma", "python"]
    start: str = ""
    end: str = ""
    opening: str = ""
    key: str = "arguments"
    quote: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """What has to be in a text for calls to be found in it."""
        inner = {
            "named": ("[ARGS]", "[CALL_ID]"),
            "pairs": ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        }
        marks = (self.start, self.end, self.quote, *inner.get(self.body, ()))
        return tuple(filter(None, marks))

    @cached_property
    def head(self) -> re.Pattern[str] | None:
        """What comes before a call's arguments where those are JSON."""
        start = re.escape(self.start)
        if self.body == "object":
            return re.compile(rf"(?:{start})?\s*{_HEAD}")
        if self.body == "list":
            return re.compile(rf"(?:{start}\s*\[|,)\s*{_HEAD}")
        if self.body == "named":
            between = r"\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\])?\s*(?=\{)"
            return re.compile(rf"{start}\s*(?P<name>{NAME.pattern}){between}")
        return None


FORMATS = (
    Format("glm", "<arg_key>", "pairs", "<tool_call>", "</tool_call>"),  # GLM-4.5 and later
    Format("qwen3_coder", "<function=", "parameters", "<tool_call>", "</tool_call>"),
    Format("seed", "<function=", "parameters", "<seed:tool_call>", "</seed:tool_call>"),  # Seed-OSS
    # Hermes, Qwen2.5, Qwen3, SmolLM3, Granite 4
    Format("hermes", "<tool_call>", "object", "<tool_call>", "</tool_call>"),
    Format("granite", "<|tool_call|>", "list", "<|tool_call|>", opening="["),  # Granite 3
    # From its tokenizer's version 11 on: Mistral Small 3.2, Magistral, Devstral, Ministral 3
    Format("mistral_named", "[ARGS]", "named", "[TOOL_CALLS]"),
    Format("mistral", "[TOOL_CALLS]", "list", "[TOOL_CALLS]", opening=" ["),
    Format("phi", "functools[", "list", "functools", opening="["),  # vLLM's template of Phi-4-mini
    Format("olmo", "<function_calls>", "python", "<function_calls>", "</function_calls>"),  # OLMo 3
    Format("gemma4", "call:", "gemma", "<|tool_call>", "<tool_call|>", quote='<|"|>'),
    Format(
        "function_gemma",
        "call:",
        "gemma",
        "<start_function_call>",
        "<end_function_call>",
        quote="<escape>",
    ),
    Format("llama", '"parameters": dictionary', "object", key="parameters"),  # Llama 3.1 and later
)


def find_format(template: str) -> Format | None:
    """The format a chat template asks for; None: another one, or none."""
    return next((form for form in FORMATS if _asks(template, form)), None)


def _asks(template: str, form: Format) -> bool:
    return form.asks in template and form.start in template
