"""Every night: other projects' programs and libraries, too heavy for continuous integration and
unmodified, against a server started as a user starts it, then a load of many clients beside
finetuning jobs.

`vllm bench serve`, `guidellm`, `aiperf`, `lm_eval` and `st` (schemathesis) are programs looked up
on PATH. Their requirements exclude one another, so install each in an environment of its own, as
`pipx install` does. One that is missing is told and left out. The exit status is 1 when a client
failed a request or counted other tokens than it asked for.

`--environments` is a folder with an environment for each library: `litellm/bin/python` and so on,
for huggingface_hub, instructor, langchain, litellm, llama_index, outlines and pydantic_ai. Their
prompts and answers need a `model.max_model_len` of 2048.

tinker-cookbook's recipes are run where it is installed (tests/server/tinker/test_recipes.py says
how), with a server of their own.

`--vllm-sources` is an unpacked source distribution of vLLM, whose tests of its server are then run
against this one (with pytest-asyncio, httpx, requests and pybase64); what passed is printed, and
the log says what did not. An adapter `instruct`, if there is one, answers in place of those of
vLLM's models that do not think.

    python scripts/nightly_clients.py --config configs/serve.yaml --out runs/nightly
"""

from __future__ import annotations

from pathlib import Path

from rich import get_console

from flexllm_jax.config.cli import make_parser, needs_extra, read_config, run_script

SERVE = Path(__file__).with_name("serve.py")
TINKER = Path(__file__).parents[1] / "tests" / "server" / "tinker"


def main() -> int:
    """Run; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/nightly"))
    parser.add_argument("--environments", type=Path, help="a folder; none: without libraries")
    parser.add_argument("--vllm-sources", type=Path, help="a folder; none: without its tests")
    parser.add_argument("--no-load", action="store_true", help="leave our own load out")
    arguments = parser.parse_args()
    config = read_config(arguments)
    with needs_extra("load"):
        from flexllm_jax.experiments.load.client import first_model
        from flexllm_jax.experiments.load.generator import LoadShape
        from flexllm_jax.experiments.load.library_flows import LIBRARIES
        from flexllm_jax.experiments.load.outside_clients import (
            outside_clients,
            run_library,
            run_recipes,
        )
        from flexllm_jax.experiments.load.run import run_load
        from flexllm_jax.experiments.load.server import ServerProcess
        from flexllm_jax.experiments.load.vllm_suite import run as run_vllms_tests
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    console, failed = get_console(), False
    server = ServerProcess(SERVE, arguments.config, arguments.overrides, out)
    try:
        model = first_model(server.client)
        for client in outside_clients(server.url, model, config.model.path.absolute(), out):
            told = client.run(out)
            failed |= told.startswith("FAILED")
            console.print(f"{client.name}: {told}", soft_wrap=True, highlight=False)
        for library in LIBRARIES if arguments.environments else ():
            told = run_library(library, arguments.environments, server.url, model, out)
            failed |= told.startswith("FAILED")
            console.print(f"{library}: {told}", soft_wrap=True, highlight=False)
        if arguments.vllm_sources:
            sources, checkpoint = arguments.vllm_sources.absolute(), config.model.path.absolute()
            counted, log = run_vllms_tests(sources, server.url, model, checkpoint, out)
            console.print(f"vLLM's tests: {counted}; see {log}", soft_wrap=True, highlight=False)
        if not server.healthy():
            failed = True
            console.print("FAILED: the server is not healthy after that")
    finally:
        server.stop()
    told = run_recipes(TINKER, out)
    failed |= told.startswith("FAILED")
    console.print(f"tinker-cookbook: {told}", soft_wrap=True, highlight=False)
    if not arguments.no_load:
        overrides = [*arguments.overrides, "finetune.floor=0.2"]
        report = run_load(SERVE, arguments.config, overrides, out / "load", LoadShape())
        failed |= bool(report["problems"])
    return int(failed)


if __name__ == "__main__":
    run_script(main)
