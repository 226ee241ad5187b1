"""The Python API: generate, finetune, and both at once.

    llm = LLM("path/to/model")
    job = llm.finetune(FinetuneConfig(name="mine", dataset="rows.jsonl", epochs=1))
    outputs = llm.generate(["Hello"], SamplingParams(max_tokens=32))     # beside the running job
    job.wait()
    outputs = llm.generate(["Hello"], SamplingParams(max_tokens=32), adapter="mine")

The engine runs in a thread of its own, which alone touches it: calls are queued to it and carried
out between two steps.
"""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flexllm_jax.config import Config, FinetuneConfig, build_config
from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.jobs.handle import JobHandle
from flexllm_jax.engine.jobs.tracking import JobTracking
from flexllm_jax.engine.loop import EngineLoop, NewRequest, RequestFuture
from flexllm_jax.engine.outputs import CompletionOutput, RequestOutput
from flexllm_jax.engine.prompts import read_prompt, read_prompts
from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.engine.sampling.reasoning import ReasoningParser, Thinking, find_thinking
from flexllm_jax.engine.sampling.structured_outputs import literal
from flexllm_jax.finetune.create import create_job
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.reinforcement.games import Environment, Reward
from flexllm_jax.finetune.reinforcement.make import Play
from flexllm_jax.models.checkpoints.dtype import export_dtype
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import read_conversation
from flexllm_jax.models.text.tokenizer import encode_text, load_tokenizer
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter, save_merged
from flexllm_jax.trackers import kinds as trackers


class LLM:
    """A model that serves requests and finetunes adapters at the same time.

    Args:
        model: folder of a Hugging Face checkpoint.
        adapters: name -> PEFT folder, served from the start.
        dtype: "float32", "bfloat16", or "auto", the default: the checkpoint's on a GPU, float32 on
            a CPU.
        max_model_len: longest prompt + output, tokens.
        load_format: "dummy" for random weights; only `config.json` and a tokenizer are read then.
        adapter_bank: size of the bank, e.g. `{"slots": 8, "max_rank": 16}` (section `adapters`).
        progress: show progress bars while starting.
        config_fields: other sections of the configuration, e.g. `cache={"num_pages": 512}`.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        load_format: str | None = None,
        adapter_bank: Mapping[str, Any] | None = None,
        progress: bool = True,
        **config_fields: Any,
    ):
        section = {
            "path": str(model),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "load_format": load_format,
        }
        tree = {"model": {k: v for k, v in section.items() if v is not None}, **config_fields}
        preload = [{"name": name, "path": str(path)} for name, path in (adapters or {}).items()]
        tree["adapters"] = {**(adapter_bank or {}), "preload": preload}
        self._start(build_config(tree, "LLM"), progress)

    @classmethod
    def from_config(cls, config: Config, *, progress: bool = True) -> "LLM":
        """The same from a whole configuration."""
        llm = cls.__new__(cls)
        llm._start(config, progress)
        return llm

    def _start(self, config: Config, progress: bool) -> None:
        trackers.require(config.trackers)
        self.config = config
        self.tokenizer = load_tokenizer(config.model.path)
        self.template = ChatTemplate(self.tokenizer)
        self.engine = Engine(config, self.tokenizer, progress=progress)
        self._loop = EngineLoop(self.engine)
        self._tracking = JobTracking(config, self._loop)
        weakref.finalize(self, self._loop.stop)  # also when the program ends without close()

    # -- inference --------------------------------------------------------------------------------

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, with the tokenizer's special tokens."""
        read = read_prompt(prompt)
        return encode_text(self.tokenizer, read) if isinstance(read, str) else read

    def submit(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        adapter: str | None = None,
        arrival: float | None = None,
    ) -> list[RequestFuture]:
        """Queue a prompt; a future of the finished RequestState for each of its `n` outputs.

        `arrival`: when the request arrived (time.monotonic), for its latencies; now by default.
        """
        futures = self.submit_all(
            self._requests(prompt, sampling_params or SamplingParams(), adapter, arrival)
        )
        self._raise_refused(futures)
        return futures

    def _requests(
        self, prompt: Any, params: SamplingParams, adapter: str | None, arrival: float | None
    ) -> list[NewRequest]:
        tokens = tuple(self.encode(prompt))
        arrival = time.monotonic() if arrival is None else arrival
        constraints = self.engine.constraints.make(params, params.n)
        return [
            NewRequest(tokens, params, adapter, arrival, seed_offset=i, constraint=constraint)
            for i, constraint in enumerate(constraints)
        ]

    def _raise_refused(self, futures: Sequence[RequestFuture]) -> None:
        """Raise the error of a request that was refused, and drop the others of the call."""
        refused = [f for f in futures if f.done() and isinstance(f.exception(), ValueError)]
        if refused:
            for future in futures:
                if future not in refused:
                    self._loop.cancel(future, "another prompt of the call was refused")
            raise refused[0].exception() or ValueError

    def submit_all(self, requests: Sequence[NewRequest]) -> list[RequestFuture]:
        """Queue requests at once; the future of one that can never be served holds the error."""
        return self._loop.submit(requests)

    @property
    def alive(self) -> bool:
        """Whether the engine runs: not closed, and not failed."""
        return self._loop.alive

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts with the base model or an adapter, in order.

        `prompts`: one or several, each a text or token ids (lists, arrays), or what the tokenizer
        returns, whose attention mask leaves out padding, or vLLM's `{"prompt": ...}` and
        `{"prompt_token_ids": ...}`. A job that runs goes on beside it. Raises ValueError for a
        prompt that can never be served; nothing is generated then.
        """
        prompts = read_prompts(prompts)
        return self._answer(
            prompts, _for_each(sampling_params, len(prompts)), adapter, [None] * len(prompts)
        )

    def _answer(
        self,
        prompts: Sequence[Any],
        sampling_params: Sequence[SamplingParams],
        adapter: str | None,
        thinkings: Sequence[Thinking | None],
    ) -> list[RequestOutput]:
        requests = [
            self._requests(prompt, params, adapter, None)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
        futures = self.submit_all([request for group in requests for request in group])
        self._raise_refused(futures)
        states = iter([future.result() for future in futures])
        return [
            self._output([next(states) for _ in group], thinking)
            for group, thinking in zip(requests, thinkings, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | None = None,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking_token_budget: int | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the tokenizer's chat template.

        The prompt is that of the HTTP server for the same fields, and what a model thinks before it
        answers is told apart in the same way, as `reasoning`: a structured output binds what comes
        after it, and `thinking_token_budget` ends it. `sampling_params`: one for all, or one for
        each conversation. Calls of tools stay text. Raises ValueError for what the template has no
        place for.
        """
        budget = thinking_token_budget
        if budget is not None and self.template.reads("thinking_budget"):
            chat_template_kwargs = {"thinking_budget": budget, **(chat_template_kwargs or {})}
        several = bool(messages) and isinstance(messages[0], list | tuple)
        prompts = [
            self.template.render(
                read_conversation(conversation, tools, documents, chat_template_kwargs),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                source=chat_template,
            )
            for conversation in (messages if several else [messages])
        ]
        tokens = [encode_text(self.tokenizer, p, add_special_tokens=False) for p in prompts]
        source = self.template.source() if chat_template is None else chat_template
        thinkings = [find_thinking(source, prompt, budget) for prompt in prompts]
        if budget is not None and None in thinkings:
            raise ValueError(
                "thinking_token_budget: the answer begins with no thought that is known as one; "
                "leave it out"
            )
        bound = [
            self._bind_answer(params, thinking)
            for params, thinking in zip(
                _for_each(sampling_params, len(prompts)), thinkings, strict=True
            )
        ]
        return self._answer(tokens, bound, adapter, thinkings)

    def _bind_answer(self, params: SamplingParams, thinking: Thinking | None) -> SamplingParams:
        """A structure is of the answer, not of the thought before it."""
        if thinking is None:
            return params
        structure = thinking.before(params.structured_outputs, partial(literal, self.tokenizer))
        return replace(params, structured_outputs=structure)

    def _output(self, states: list[RequestState], thinking: Thinking | None) -> RequestOutput:
        first = states[0]
        if error := next((state.error for state in states if state.error), None):
            raise RuntimeError(f"request failed: {error}")
        params, timing = first.params, first.timing
        said = [self._said(state, thinking) for state in states]
        return RequestOutput(
            prompt_token_ids=list(first.prompt),
            outputs=[
                CompletionOutput(
                    token_ids=state.output,
                    text=text,
                    finish_reason=state.finish_reason,
                    logprobs=None if params.logprobs is None else state.logprobs,
                    reasoning=thought or None,
                )
                for state, (thought, text) in zip(states, said, strict=True)
            ],
            prompt_logprobs=None if params.prompt_logprobs is None else first.prompt_logprobs,
            ttft_s=timing.ttft_s,
            tpot_s=timing.tpot_s,
        )

    def _said(self, state: RequestState, thinking: Thinking | None) -> tuple[str, str]:
        """What is thought in an output, and what is said."""
        if thinking is None:
            return "", state.text(self.engine.detokenizer)
        text = state.text(self.engine.detokenizer, thinking.marks)
        return ReasoningParser(thinking).push(text, final=True)

    # -- finetuning and adapters ------------------------------------------------------------------

    def finetune(
        self,
        config: FinetuneConfig,
        *,
        reward: Reward | None = None,
        environment: Callable[[dict[str, Any]], Environment] | None = None,
    ) -> JobHandle:
        """Start a job; it runs in what inference leaves, and is served by its name when it is
        done.

        Of a reinforcement job, `reward` gives the rewards of answers (a list of samples, each with
        `text` and the `item` that is its row, to as many numbers), or `environment` makes what the
        model acts in from a row; both are called in threads beside the engine's.
        """
        runner = self.engine.runner
        return self.start_job(
            create_job(
                config,
                runner.model,
                self.config.model.path,
                self.tokenizer,
                self.config.finetune,
                runner.sizes.max_model_len,
                Play(reward, None, environment, graders=self.config.graders),
            )
        )

    def start_job(self, job: FinetuneJob) -> JobHandle:
        """`finetune` with a job whose data is loaded already."""
        self._loop.call(self.engine.add_job, job)
        self._tracking.follow(job)
        return JobHandle(job, self._loop)

    def load_adapter(self, name: str, path: str | Path) -> int:
        """Serve a PEFT folder as `name`; returns its version."""
        adapters = self.engine.adapters
        adapter = load_adapter(path, self.engine.runner.model, self.config.model.path)
        row = adapters.to_row(name, adapter)
        return self._loop.call(lambda: adapters.publish(name, adapter, row).version)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it finish."""
        self._loop.call(self.engine.adapters.unload, name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that can be asked for."""
        return self._loop.call(lambda: sorted(self.engine.adapters.directory.current))

    def export_adapter(self, name: str, out_dir: str | Path) -> None:
        """Write a served adapter in PEFT's format."""
        adapter = self._read(name)
        save_adapter(adapter, self.engine.runner.model, self.config.model.path, out_dir)

    def export_merged(self, name: str, out_dir: str | Path) -> None:
        """Write the base model with a served adapter merged in, as a Hugging Face checkpoint."""
        adapter, runner = self._read(name), self.engine.runner
        save_merged(
            runner.params,
            adapter,
            runner.model,
            self.config.model.path,
            out_dir,
            read=lambda array: self._loop.call(runner.to_host, array),
            dtype=export_dtype(self.config.model.dtype, self.config.model.path),
        )

    def _read(self, name: str) -> Adapter:
        return self._loop.call(self.engine.adapters.read, name)

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop: running jobs write a checkpoint, unfinished requests fail, trackers are told."""
        self._tracking.settle()
        self._loop.stop()
        self._tracking.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _for_each(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if len(given) != count:
        raise ValueError(
            f"sampling_params has {len(given)} entries for {count} prompts: give one for all or "
            f"one for each"
        )
    return given
