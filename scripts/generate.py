"""Answer prompts with the base model or an adapter; answers go to stdout or a file.

Prompts come from --prompt, or from --prompts-file: JSONL with a field `prompt`. The
configuration's jobs and workload are ignored. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import rich

from flexllm_jax import LLM, SamplingParams
from flexllm_jax.config import ConfigError
from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    read_config,
    run_script,
    shows_progress,
    without_jobs,
)
from flexllm_jax.launch.answers import ADAPTER, encode_prompts, render, with_adapter
from flexllm_jax.launch.replay import read_prompts
from flexllm_jax.launch.run import prepare


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="JSONL with `prompt`")
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    parser.add_argument(
        "--adapter", metavar="NAME", help="a preloaded adapter, a finished job, or a PEFT folder"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write; else stdout")
    parser.add_argument("--format", choices=("text", "jsonl"), default="text", help="of the output")
    sampling = parser.add_argument_group("sampling")
    kinds = {bool: bool, int: int, float: float, int | None: int}
    for name, kind in get_type_hints(SamplingParams).items():
        if kind not in kinds or name == "prompt_logprobs":
            continue  # what a line of the terminal cannot say, or answers do not show
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            sampling.add_argument(flag, action="store_true")
        else:
            default = 64 if name == "max_tokens" else getattr(SamplingParams, name)
            sampling.add_argument(
                flag, type=kinds[kind], default=default, help=f"default {default}"
            )
    sampling.add_argument("--stop", action="append", default=[], help="ends an answer; repeatable")
    return parser.parse_args(arguments)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The sampling that the arguments ask for; ConfigError for a value that cannot be."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in SamplingParams.__dataclass_fields__
    }
    try:
        return SamplingParams(**given)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


def main() -> int:
    """Run; returns the exit status."""
    rich.reconfigure(stderr=True)
    arguments = parse()
    config = without_jobs(read_config(arguments))
    params = sampling_params(arguments)
    texts = list(arguments.prompt)
    if arguments.prompts_file:
        texts += read_prompts(arguments.prompts_file, "--prompts-file")
    if not texts:
        raise ConfigError("give a prompt with --prompt or --prompts-file")
    if arguments.adapter:
        config = with_adapter(config, arguments.adapter)
    if arguments.output:
        check_output_dir(arguments.output.parent, "--output")
    inputs = prepare(config)
    prompts = encode_prompts(texts, inputs, params.max_tokens, "--prompt", raw=arguments.raw)
    with LLM.from_config(config, progress=shows_progress()) as llm:
        outputs = llm.generate(prompts, params, ADAPTER if arguments.adapter else None)
    lines = "".join(f"{line}\n" for line in render(texts, outputs, arguments.format))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(lines, encoding="utf-8")
    else:
        sys.stdout.write(lines)
    return 0


if __name__ == "__main__":
    run_script(main)
