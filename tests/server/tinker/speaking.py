"""The Tinker API as bytes over HTTP, without its SDK: what a client sends, and reads."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import numpy as np

from flexllm_jax.server.tinker.protocol import tinker_pb2 as pb
from tests.server.running import RunningServer

ALL_MODULES = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
]


class Refused(Exception):
    """Another status than 200."""

    def __init__(self, status: int, body: bytes):
        super().__init__(f"{status}: {body.decode(errors='replace')}")
        self.status, self.body = status, body


class Failed(Exception):
    """A future that failed."""

    def __init__(self, told: dict[str, Any]):
        super().__init__(told["error"])
        self.category = told["category"]


def datum(tokens: list[int], **inputs: Any) -> pb.Datum:
    """A datum whose inputs are lists or arrays; floats are float32, others int64."""
    made = pb.Datum()
    made.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
    for name, values in inputs.items():
        array = np.asarray(values)
        is_float = array.dtype.kind == "f"
        tensor = made.loss_fn_inputs[name]
        tensor.dense = array.astype("<f4" if is_float else "<i8").tobytes()
        tensor.dtype = pb.DTYPE_FLOAT32 if is_float else pb.DTYPE_INT64
        tensor.shape.extend(array.shape)
    return made


def next_tokens(tokens: list[int]) -> pb.Datum:
    """A datum that asks for each next token."""
    return datum(tokens[:-1], target_tokens=tokens[1:], weights=[1.0] * (len(tokens) - 1))


def arrays(tensor: pb.BatchedTensor) -> list[np.ndarray]:
    """A field of a record, by datum."""
    flat = np.frombuffer(tensor.data, "<f4")
    ends = np.frombuffer(tensor.offsets, "<i8") // 4
    shape = (-1, *tensor.trailing_shape)
    return [flat[a:b].reshape(shape) for a, b in pairwise(ends)]


@dataclass
class Output:
    """What a forward_backward answers."""

    logprobs: list[np.ndarray]
    metrics: dict[str, float]


@dataclass
class Speaker:
    """A client with a key."""

    server: RunningServer
    key: str | None = None
    session_id: str = ""
    numbers: Any = field(default_factory=count)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """JSON in, or bytes as they are; JSON or bytes out."""
        data, given = None, {"X-API-Key": self.key} if self.key else {}
        if body is not None:
            raw = isinstance(body, bytes)
            data = body if raw else json.dumps(body).encode()
            given["Content-Type"] = "application/x-protobuf" if raw else "application/json"
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"{self.server.url}/api/v1/{path}"
        request = urllib.request.Request(url, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                kind, content = answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read()) from None
        return json.loads(content) if kind == "application/json" else content

    def post(self, path: str, /, **body: Any) -> Any:
        return self.ask("POST", path, body)

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def begin(self) -> "Speaker":
        """A session of its own."""
        self.session_id = self.post("create_session", tags=[], sdk_version="test")["session_id"]
        return self

    def result(self, promise: dict[str, Any] | str, timeout_s: float = 120) -> Any:
        """Poll until a future is done."""
        request_id = promise if isinstance(promise, str) else promise["request_id"]
        end = time.monotonic() + timeout_s
        while True:
            try:
                told = self.ask("POST", "retrieve_future", {"request_id": request_id})
            except Refused as error:
                if error.status != 408 or time.monotonic() > end:
                    raise
                continue
            if isinstance(told, dict) and "error" in told:
                raise Failed(told)
            return told

    def sampler(self, **what: Any) -> str:
        """A sampler of a path, or of the base model."""
        what = what or {"base_model": "tiny"}
        number = next(self.numbers)
        made = self.post(
            "create_sampling_session",
            session_id=self.session_id,
            sampling_session_seq_id=number,
            **what,
        )
        return made["sampling_session_id"]

    def sample(self, sampler: str, prompt: list[int], seq_id: int = 0, **asked: Any) -> Any:
        """A SampleResponse; `params` are the sampling parameters."""
        promise = self.ask_sample(sampler, prompt, seq_id, **{"num_samples": 1} | asked)
        return pb.SampleResponse.FromString(self.result(promise))

    def ask_sample(self, sampler: str, prompt: list[int], seq_id: int, **asked: Any) -> Any:
        """The promise of it."""
        return self.post(
            "asample",
            sampling_session_id=sampler,
            seq_id=seq_id,
            prompt={"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            sampling_params=asked.pop("params", {"max_tokens": 4}),
            **asked,
        )

    def logprobs(self, sampler: str, tokens: list[int], seq_id: int) -> np.ndarray:
        """Of a text's tokens, the first one NaN."""
        response = self.sample(
            sampler, tokens, seq_id, params={"max_tokens": 1}, prompt_logprobs=True
        )
        return np.frombuffer(response.prompt_logprobs, "<f4")


@dataclass
class Model:
    """A model that is trained, and the numbers of its requests."""

    speaker: Speaker
    id: str
    seq: int = 0

    @classmethod
    def make(cls, speaker: Speaker, rank: int = 4, **lora: Any) -> "Model":
        promise = speaker.post(
            "create_model",
            session_id=speaker.session_id,
            model_seq_id=next(speaker.numbers),
            base_model="tiny",
            lora_config={"rank": rank, "seed": 1} | lora,
        )
        return cls(speaker, speaker.result(promise)["model_id"])

    @classmethod
    def load(cls, speaker: Speaker, path: str, optimizer: bool) -> "Model":
        promise = speaker.post(
            "load_weights",
            session_id=speaker.session_id,
            model_seq_id=next(speaker.numbers),
            path=path,
            optimizer=optimizer,
        )
        return cls(speaker, speaker.result(promise)["model_id"])

    def body(self, data: list[pb.Datum], loss: str, forward_only: bool, seq: int, **config: float):
        request = pb.ForwardBackwardRequest(
            model_id=self.id, seq_id=seq, data=data, loss_fn=loss, forward_only=forward_only
        )
        for name, value in config.items():
            request.loss_fn_config_v2[name].number = value
        return request.SerializeToString()

    def send(
        self, data: list[pb.Datum], loss: str = "cross_entropy", forward_only=False, **config
    ) -> dict[str, Any]:
        """The promise of a forward_backward."""
        self.seq += 1
        body = self.body(data, loss, forward_only, self.seq, **config)
        return self.speaker.ask("POST", "forward_backward", body)

    def train(self, *data: pb.Datum, **options: Any) -> Output:
        return self.output(self.send(list(data), **options))

    def output(self, promise: dict[str, Any]) -> Output:
        output = pb.ForwardBackwardOutput.FromString(self.speaker.result(promise))
        logprobs = [a for r in output.loss_fn_outputs for a in arrays(r.fields["logprobs"])]
        return Output(logprobs, dict(output.metrics))

    def call(self, what: str, /, **fields: Any) -> dict[str, Any]:
        """The promise of another request."""
        self.seq += 1
        return self.speaker.post(what, model_id=self.id, seq_id=self.seq, **fields)

    def step(self, **adam: float) -> dict[str, float]:
        promise = self.call("optim_step", adam_params={"learning_rate": 1e-2} | adam)
        return self.speaker.result(promise)["metrics"]

    def save(self, name: str, what: str = "save_weights", **fields: Any) -> str:
        return self.speaker.result(self.call(what, path=name, **fields))["path"]

    def sampler(self) -> str:
        """A sampler of the weights as they are now."""
        number = next(self.speaker.numbers)
        promise = self.call("save_weights_for_sampler", sampling_session_seq_id=number)
        return self.speaker.result(promise)["sampling_session_id"]
