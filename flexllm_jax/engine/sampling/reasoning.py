"""What a model thinks before it answers, told apart from the answer.

Models write it between two marks, which their chat templates name: `FORMATS` has the ones that are
read. A prompt may end with the first mark, so that a model begins by thinking; else it thinks only
if its output begins with that mark. What a model of another template writes stays text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams, quote
from flexllm_jax.models.text.marks import overlap


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around a thought, and the text that follows the first one."""

    start: str
    end: str
    label: str = ""

    @property
    def opening(self) -> str:
        """What is before a thought."""
        return self.start + self.label


FORMATS = (
    # Qwen3, Qwen3.5, SmolLM3, GLM-4.5 and later, OLMo 3, Phi-4-reasoning, DeepSeek-R1
    ReasoningFormat("<think>", "</think>"),
    ReasoningFormat("<seed:think>", "</seed:think>"),  # Seed-OSS
    ReasoningFormat("[THINK]", "[/THINK]"),  # Magistral and Ministral
    ReasoningFormat("<|channel>", "<channel|>", "thought\n"),  # Gemma 4
    ReasoningFormat("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)


@dataclass(frozen=True)
class Thinking:
    """How one answer may begin. `begun`: the prompt ends inside of a thought. `budget`: most tokens
    of a thought; None: any number."""

    form: ReasoningFormat
    begun: bool
    budget: int | None = None

    @property
    def marks(self) -> tuple[str, str]:
        """What has to be in a text for thoughts to be found in it."""
        return self.form.start, self.form.end

    def before(
        self, answer: StructuredOutputsParams | None, literal: Callable[[str], str]
    ) -> StructuredOutputsParams | None:
        """A thought and then what matches `answer`, which binds the answer alone. `literal` writes
        a mark in a grammar."""
        if answer is None and self.budget is None:
            return None
        start, end = literal(self.form.start), literal(self.form.end)
        is_token = start.startswith("<[") and end.startswith("<[")
        if self.budget is not None and not is_token:
            raise ValueError(
                f"thinking_token_budget: {self.form.start} and {self.form.end} are no tokens of "
                f"this model's tokenizer, so thoughts cannot be counted; leave this out"
            )
        most = "" if self.budget is None else f"[max_tokens={self.budget}]"
        if is_token:
            rules = [f"thought: {end if self.budget == 0 else f'inside {end}'}"]
            rules += [] if self.budget == 0 else [f"inside{most}: /(?s:.*)/"]
        else:
            rules = [f"thought[suffix={end}]: /(?s:.*)/"]
        if answer is None:
            rules.append("answer: <[*]>*")
        else:
            rules.append(f"answer: /\\n{{0,2}}/ {answer.as_lark()}")
        label = f" {quote(self.form.label)}" if self.form.label else ""
        body = "thought answer" if self.begun else f"{start}{label} thought answer | unthought"
        if not self.begun:
            other = f"(<[^{start[2:]} <[*]>*)?"  # begins with another token
            rules.append(f"unthought: {other if answer is None else answer.as_lark()}")
        return StructuredOutputsParams(grammar="\n".join([*rules, f"start: {body}"]))


def find_thinking(template: str, prompt: str, budget: int | None = None) -> Thinking | None:
    """How the answer to `prompt`, which `template` wrote, may begin; None: with no thought that is
    known as one, or with none at all as the prompt has ended it."""
    form = next((each for each in FORMATS if each.start in template), None)
    end = prompt.rstrip()
    if form is None or end.endswith(form.end):
        return None
    return Thinking(form, end.endswith(form.opening.rstrip()), budget)


class ReasoningParser:
    """One output's text, piece by piece, split into what is thought and what is said."""

    def __init__(self, thinking: Thinking):
        self._start, self._end = thinking.form.opening, thinking.form.end
        self.inside = thinking.begun
        self._decided = thinking.begun  # whether it is known if the output begins with a thought
        self._held = ""  # not decided yet
        self._white = ""  # after a thought's text: of the thought if it goes on
        self._leading = True  # white space now is before a thought, or before the answer

    def push(self, text: str, *, final: bool) -> tuple[str, str]:
        """Take in what came; returns what is thought and what is said of it. `final`: nothing more
        will come. White space around thoughts belongs to neither."""
        self._held += text
        if not self._decided:
            begin = self._held.lstrip()
            if begin.startswith(self._start):
                self.inside, self._held = True, begin[len(self._start) :]
            elif not final and self._start.startswith(begin):
                return "", ""
            self._decided = True
            self._leading = self.inside
        thought = ""
        if self.inside:
            before, mark, after = self._held.partition(self._end)
            keep = 0 if final or mark else overlap(before, self._end)
            inner = self._white + before[: len(before) - keep]
            if self._leading:
                inner = inner.lstrip()
            thought = inner.rstrip()
            self._leading = self._leading and not thought
            self._white = "" if mark else inner[len(thought) :]
            self._held = after if mark else before[len(before) - keep :]
            if not mark:
                return thought, ""
            self.inside, self._leading = False, True
        said, self._held = self._held, ""
        if self._leading:
            said = said.lstrip()
            self._leading = not said
        return thought, said
