"""A server started as a user starts it: scripts/serve.py in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai

from tests.engines import COMPILE_CACHE

SERVE = Path(__file__).resolve().parents[2] / "scripts" / "serve.py"
KEY, LIMITED_KEY = "key-of-the-tests", "key-with-limits"
# Tools as in Qwen's templates, in fewer words.
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_config(model: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """The engine that other tests use too, so that its programs are in the cache."""
    tree: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32", "max_model_len": 160},
        "cache": {"page_size": 8, "num_pages": 48},
        "adapters": {"slots": 6, "max_rank": 8},
        "scheduler": {"max_tokens_per_step": 48, "max_sequences": 6},
        "compile": {"token_buckets": [8, 48], "cache_dir": str(COMPILE_CACHE)},
        "finetune": {
            "max_tokens": 96,
            "unit_tokens": 32,
            "checkpoint_every": 2,
            "idle_step_ms": 50.0,
        },
        "server": {"port": 0, "model_name": "tiny", "grace_s": 30.0},
        "output_dir": str(output_dir),
    }
    for name, value in changes.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return tree


class RunningServer:
    """The process, its address, and what it printed."""

    def __init__(self, config: dict[str, Any], script: Path = SERVE):
        self.output_dir = output = Path(config["output_dir"])
        output.mkdir(parents=True, exist_ok=True)
        path = output / "config.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--config", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not (self._listening.wait(300) and self.url):
            self.process.kill()
            raise AssertionError(self.output)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "listening on http://" in line:
                self.url = "http://" + line.split("http://")[1].split('"')[0].strip()
                self._listening.set()
        self._listening.set()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_ready(self, timeout_s: float = 180) -> "RunningServer":
        self.wait(lambda: self.get("/health")[0] == 200, timeout_s)
        return self

    def wait(self, condition: Any, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.05)

    def get(self, path: str, key: str | None = None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict, str]:
        """Status, headers and body."""
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
        request = urllib.request.Request(self.url + path, body, given)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, dict(response.headers), response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read().decode()

    def metric(self, name: str, key: str | None = None) -> float:
        """The value of a metric with its labels, or without them the sum over all labels."""
        lines = self.get("/metrics", key)[1].splitlines()
        values = [line for line in lines if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in values)

    def client(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, **options)

    @property
    def engine_pid(self) -> int:
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; returns the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
