"""What the scripts share: arguments, errors in one line, quiet libraries, a clean stop.

A wrong argument, field, path, value, adapter or dataset is one line on stderr and exit status 2,
with nothing written. Ctrl-C and SIGTERM raise KeyboardInterrupt in the main thread, which ends what
runs and exits with 130. Whatever else goes wrong is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import transformers
from rich.console import Console

from flexllm_jax.config import Config, ConfigError, Section, describe, load_config
from flexllm_jax.config.load import Root
from flexllm_jax.errors import UserError

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def make_parser(description: str | None, root: type[Section] = Config) -> argparse.ArgumentParser:
    """A parser with `--config` and `--set`, whose `--help` lists every field of `root`.

    `description` is a script's docstring, of which the first paragraph is taken.
    """
    parser = _Parser(
        description=(description or "").split("\n\n")[0],
        epilog=f"Fields of the configuration:\n\n{describe(root)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="YAML configuration"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="override a field, such as finetune.jobs.0.lr=1e-4; may be repeated",
    )
    return parser


def read_config(arguments: argparse.Namespace, root: type[Root] = Config) -> Root:
    """The configuration that the arguments name; ConfigError when it cannot be used."""
    return load_config(arguments.config, arguments.overrides, root)


def without_jobs(config: Config) -> Config:
    """The same configuration with no jobs and no workload."""
    finetune = config.finetune.model_copy(update={"jobs": ()})
    return config.model_copy(update={"finetune": finetune, "workload": None})


def check_output_dir(path: Path, field: str = "output_dir") -> None:
    """ConfigError unless `path` is, or can be made, a folder to write to."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return
        if folder.exists():
            raise ConfigError(f"{field}: {path} cannot be made, {folder} is a file; choose another")


def find_adapter(config: Config, given: str) -> Path:
    """The PEFT folder that `given` means: a preloaded adapter, a finished job in output_dir, or a
    path.

    Raises ConfigError when it is none of them.
    """
    preloaded = {adapter.name: adapter.path for adapter in config.adapters.preload}
    candidates = [preloaded.get(given), config.output_dir / given / "adapter", Path(given)]
    for folder in candidates:
        if folder is not None and (folder / "adapter_config.json").is_file():
            return folder
    finished = [path.parents[1].name for path in config.output_dir.glob("*/adapter/*_config.json")]
    known = ", ".join(sorted({*preloaded, *finished})) or "none"
    raise ConfigError(
        f"--adapter: {given!r} is neither a PEFT folder nor an adapter known to this configuration "
        f"(known: {known}; jobs are looked up in output_dir, {config.output_dir})"
    )


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with its status, or as its error demands."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quiet_libraries()
    name = Path(sys.argv[0]).name
    try:
        status = main()
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        status = INTERRUPTED
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def quiet_libraries() -> None:
    """Show our own messages and what libraries call an error, nothing else."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR, force=True)
    for ours in ("flexllm_jax", "scheduler"):
        logging.getLogger(ours).setLevel(logging.INFO)
    for theirs in ("absl", "jax", "orbax", "transformers"):
        logging.getLogger(theirs).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """For imports of what only an extra of the package installs; UserError, naming the extra, when
    something is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'flexllm_jax[{extra}]'"
        ) from None


def message_console() -> Console:
    """Where scripts say what they do: stderr, a message a line however long the path in it."""
    return Console(stderr=True, soft_wrap=True)


def shows_progress() -> bool:
    """Whether stderr is a terminal, on which bars can move."""
    return message_console().is_terminal
