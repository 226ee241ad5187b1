"""vLLM's own tests of its HTTP server, against ours: a plugin of pytest, and how it is run.

The tests come from vLLM's source distribution, and are not changed but for the name of the model.
They import vllm, whose place is taken by modules that know what the tests ask of it: a tokenizer, a
vocabulary's size; and they start a server, whose place is taken by the one that runs. Tests that
ask no server are left out.

vLLM runs them with several models, of which some think before they answer and some do not. Where
the server has an adapter `instruct`, it takes the place of those that do not.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock
from urllib.request import urlopen

PLAIN = "instruct"  # an adapter that does not think
_FOLDER = Path("tests/entrypoints/openai")
# Those about text; the others need images, embeddings of prompts, tools that the server runs,
# gpt-oss, or `/v1/decisions`.
FILES = (
    *(
        f"chat_completion/test_{name}.py"
        for name in (
            "batched_chat_completions",
            "chat",
            "chat_completion",
            "chat_echo",
            "chat_logit_bias_validation",
            "completion_with_function_calling",
            "enable_force_include_usage",
            "include_reasoning",
            "logprob_token_ids",
            "root_path",
            "thinking_token_budget",
        )
    ),
    "completion/test_completion.py",
    "completion/test_prompt_validation.py",
    "completion/test_token_in_token_out.py",
    "models/test_models.py",
    *(
        f"responses/test_{name}.py"
        for name in (
            "basic",
            "function_call",
            "namespace_tool_separator",
            "simple",
            "stateful",
            "structured_output",
        )
    ),
    "test_chunked_prompt.py",
    "test_return_token_ids.py",
    "test_return_tokens_as_ids.py",
)
_MODELS = re.compile(r'"(?:Qwen|HuggingFaceH4|openai-community)/([\w.-]+)"')
_THINKING = re.compile("Qwen3")  # of their models


def run(sources: Path, url: str, model: str, checkpoint: Path, out: Path) -> tuple[str, str]:
    """Run the tests of an unpacked source distribution, with a copy and a log in `out`; the last
    line that pytest prints, and where the log is."""
    copy = out / "vllm-tests"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sources / _FOLDER, copy / _FOLDER)
    shutil.copy(sources / _FOLDER.parent / "conftest.py", copy / _FOLDER.parent)
    for package in ("tests", "tests/entrypoints"):
        (copy / package / "__init__.py").touch()
    plain = PLAIN if PLAIN in _served(url) else model
    for path in copy.rglob("*.py"):
        named = _MODELS.sub(
            lambda m: f'"{model if _THINKING.match(m[1]) else plain}"', path.read_text("utf-8")
        )
        path.write_text(named, "utf-8")
    log = out / "vllm-tests.log"
    options = ["-q", "--tb=line", "--continue-on-collection-errors", "-c", os.devnull]
    options += ["--rootdir", str(copy), "-p", __name__, "--asyncio-mode=auto"]
    environment = os.environ | {"SUITE_URL": url, "SUITE_CHECKPOINT": str(checkpoint)}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path[1:]])
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "pytest", *options, *(str(_FOLDER / f) for f in FILES)]
        subprocess.run(command, cwd=copy, env=environment, stdout=output, stderr=output)
    (*_, last) = log.read_text("utf-8").splitlines() or [""]
    return last, str(log)


def _served(url: str) -> dict[str, str]:
    """The models of a server, and the folders they come from."""
    with urlopen(f"{url}/v1/models") as answer:
        models = json.load(answer)["data"]
    return {each["id"]: each["root"] for each in models}


# -- the plugin -----------------------------------------------------------------------------------


class _Vllm(MetaPathFinder, Loader):
    """Finds `vllm` and all in it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _is_vllms(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__dict__["__getattr__"] = _named
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _is_vllms(name: str) -> bool:
    return name.partition(".")[0] == "vllm"


def _checkpoint() -> Path:
    return Path(os.environ["SUITE_CHECKPOINT"])


class _ModelConfig:
    def __init__(self, **_: Any):
        pass

    def get_vocab_size(self) -> int:
        from flexllm_jax.models.config import ModelConfig

        return ModelConfig.from_hf(_checkpoint()).vocab_size


def _tokenizer(*_: Any, **__: Any) -> Any:
    from flexllm_jax.models.text.tokenizer import load_tokenizer

    return load_tokenizer(_checkpoint())


class _Hub:
    """Where adapters come from."""

    def snapshot_download(self, **_: Any) -> str:
        """The folder of an adapter that the tests name: those that are served have one folder."""
        return list(_served(os.environ["SUITE_URL"]).values())[1]


_KNOWN: dict[str, Any] = {
    "ModelConfig": _ModelConfig,
    "get_tokenizer": _tokenizer,
    "VLLMValidationError": ValueError,
    "download_weights_from_hf": lambda name, **_: name,
    "hf_api": _Hub,
}


def _named(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _KNOWN.get(name) or MagicMock(name=name)


class RemoteOpenAIServer:
    """What the tests take for a server that they have started."""

    DUMMY_API_KEY = "none"

    def __init__(self, *_: Any, **__: Any):
        self.url_root = os.environ["SUITE_URL"]

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def url_for(self, *parts: str) -> str:
        """A path of the server."""
        return "/".join((self.url_root, *parts))

    def get_client(self, **options: Any) -> Any:
        """The SDK's client."""
        import openai

        return openai.OpenAI(**self._options(options))

    def get_async_client(self, **options: Any) -> Any:
        """The SDK's client for asyncio."""
        import openai

        return openai.AsyncOpenAI(**self._options(options))

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        own = {"base_url": f"{self.url_root}/v1", "api_key": "none", "max_retries": 0}
        return {"timeout": 60.0} | given | own


def _take_places() -> None:
    """Those of vllm and of the tests' own helpers."""
    helpers = ModuleType("tests.utils")
    helpers.__dict__["RemoteOpenAIServer"] = RemoteOpenAIServer
    helpers.__dict__["ROCM_EXTRA_ARGS"] = []
    for name in ("multi_gpu_only", "requires_fp8", "create_new_process_for_each_test"):
        # Decorators, with arguments or without.
        helpers.__dict__[name] = lambda function=None, **_: (
            function or (lambda decorated: decorated)
        )
    helpers.__dict__["__getattr__"] = _named
    sys.meta_path.insert(0, _Vllm())
    sys.modules["tests.utils"] = helpers


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave out what asks no server, and what is asked again of one that makes watermarks."""
    items[:] = [item for item in items if _asks(item) and "watermarked" not in item.name]


def _asks(item: Any) -> bool:
    fixtures = any("server" in name or "client" in name for name in item.fixturenames)
    return fixtures or "RemoteOpenAIServer" in inspect.getsource(item.function)


if "SUITE_URL" in os.environ:  # in pytest, and before it reads any conftest.py
    _take_places()
