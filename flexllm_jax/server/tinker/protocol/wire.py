"""Bodies of the Tinker API that are not JSON: protobuf to numpy arrays, and back.

What a request holds is read in two parts, as a request whose model and number can be read is never
refused (`open_request`); what is wrong with its data is the failure of its future (`read_data`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from flexllm_jax.server.tinker.protocol import tinker_pb2 as pb

PROTOBUF = "application/x-protobuf"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
NO_TOKEN, NO_LOGPROB = 0, -99999.0  # of an empty cell of the most likely tokens
_DTYPES = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}


class Unreadable(ValueError):
    """A body that is none of the protocol; one line."""


@dataclass(frozen=True)
class Datum:
    """A sequence, and what the loss needs of it: arrays with a row for each token."""

    tokens: np.ndarray  # int32 [N]
    inputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LossCall:
    """The data of a `forward_backward`. `config`: what the loss is configured by."""

    data: Sequence[Datum]
    loss_fn: str
    config: Mapping[str, float]
    forward_only: bool


def decompress(body: bytes, limit: int) -> bytes:
    """A zstd body; Unreadable when it is none, or larger than `limit` bytes."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            plain = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise Unreadable(f"the body is not zstd: {error}") from None
    if len(plain) > limit:
        raise Unreadable(f"the body has more than {limit} bytes when decompressed: send less")
    return plain


def open_request(body: bytes) -> pb.ForwardBackwardRequest:
    """A `forward_backward` whose model and number can be read; Unreadable."""
    request = pb.ForwardBackwardRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        raise Unreadable("the body is no protobuf ForwardBackwardRequest") from None
    if not request.model_id:
        raise Unreadable("model_id: is missing")
    if request.seq_id < 1:
        raise Unreadable(f"seq_id: got {request.seq_id}; must be 1 or more")
    return request


def read_data(request: pb.ForwardBackwardRequest) -> LossCall:
    """What is to be trained on; ValueError in one line that names the datum and the field."""
    config: dict[str, float] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") == "text":
            raise ValueError(f"loss_fn_config.{name}: got {value.text!r}; must be a number")
        config[name] = value.number
    if not request.data:
        raise ValueError("data: is empty; give at least one datum")
    data = []
    for index, datum in enumerate(request.data):
        try:
            data.append(_read_datum(datum))
        except ValueError as error:
            raise ValueError(f"datum {index}: {error}") from None
    return LossCall(data, request.loss_fn, config, request.forward_only)


def _read_datum(datum: pb.Datum) -> Datum:
    parts = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("kind")
        if kind != "encoded_text":
            raise ValueError(f"model_input: has a chunk of {kind or 'no kind'}; text only")
        parts.append(_array(chunk.encoded_text.tokens, np.dtype("<i4"), "model_input"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if not len(tokens):
        raise ValueError("model_input: has no tokens")
    inputs = {name: _read_tensor(t, name) for name, t in sorted(datum.loss_fn_inputs.items())}
    for name, array in inputs.items():
        if array.ndim not in (1, 2) or len(array) != len(tokens):
            raise ValueError(
                f"{name}: has shape {list(array.shape)}; must have a row for each of the "
                f"{len(tokens)} tokens of model_input"
            )
    return Datum(tokens, inputs)


def _array(data: bytes, dtype: np.dtype, name: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise ValueError(f"{name}: {len(data)} bytes are no array of {dtype.name}")
    return np.frombuffer(data, dtype)


def _read_tensor(tensor: pb.Tensor, name: str) -> np.ndarray:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"{name}: has dtype {tensor.dtype}; must be float32, int64 or int32")
    if tensor.WhichOneof("layout") != "sparse_csr":
        array = _array(tensor.dense, dtype, name)
        shape = tuple(tensor.shape) or (len(array),)
        if min(shape) < 0 or int(np.prod(shape, dtype=object)) != len(array):
            raise ValueError(f"{name}: {len(array)} values are not of shape {list(shape)}")
        return array.reshape(shape)
    csr, indices = tensor.sparse_csr, np.dtype("<i8")
    return densify(
        _array(csr.values, dtype, name),
        _array(csr.crow_indices, indices, name),
        _array(csr.col_indices, indices, name),
        tuple(tensor.shape),
        name,
    )


def densify(
    values: np.ndarray,
    crow: np.ndarray,
    columns: np.ndarray,
    shape: tuple[int, ...],
    name: str,
    empty: float = 0,
) -> np.ndarray:
    """A matrix in compressed sparse rows as a dense one, `empty` where it says nothing."""
    fits = (
        len(shape) == 2
        and min(shape) >= 0
        and len(crow) == shape[0] + 1
        and len(values) == len(columns) == crow[-1]
        and crow[0] == 0
        and bool((np.diff(crow) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    # One row cannot hold more than its values: a huge width would only be zeros.
    if not fits or shape[1] > max(1024, len(values)):
        raise ValueError(f"{name}: is no sparse matrix of shape {list(shape)}")
    dense = np.full(shape, empty, values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(crow)), columns] = values
    return dense


def loss_output(fields: Mapping[str, Sequence[np.ndarray]], metrics: Mapping[str, float]) -> bytes:
    """A ForwardBackwardOutput: `fields` have an array for each datum, float32, in their order."""
    output = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    output.metrics.update(metrics)
    count = len(next(iter(fields.values())))

    def trailing(index: int) -> tuple[tuple[int, ...], ...]:
        return tuple(arrays[index].shape[1:] for arrays in fields.values())

    # A record holds datums of equal trailing shapes.
    for _, group in groupby(range(count), trailing):
        indices = list(group)
        record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(indices))
        for name, arrays in fields.items():
            chosen = [np.ascontiguousarray(arrays[i], "<f4") for i in indices]
            offsets = np.cumsum([0, *(array.nbytes for array in chosen)], dtype="<i8")
            tensor = record.fields[name]
            tensor.data = b"".join(array.tobytes() for array in chosen)
            tensor.offsets, tensor.dtype = offsets.tobytes(), pb.DTYPE_FLOAT32
            tensor.trailing_shape.extend(chosen[0].shape[1:])
    return output.SerializeToString()


Top = dict[int, float]  # token -> log-probability


@dataclass(frozen=True)
class Sampled:
    """An output: its tokens, up to the one that ended it, and what was likely at each."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    stopped: bool  # else it has become as long as it may
    top: Sequence[Top] | None = None


def sample_response(
    sequences: Sequence[Sampled],
    k: int,
    prompt_logprobs: Sequence[float] | None,
    prompt_top: Sequence[Top] | None,
    prompt_k: int,
    cached_tokens: int,
    targets: pb.Tensor | None = None,
) -> bytes:
    """A SampleResponse; `k` and `prompt_k` alternatives a token. `targets`: log-probabilities of
    the tokens that were asked for."""
    response = pb.SampleResponse(prompt_cache_hit_tokens=cached_tokens)
    for sequence in sequences:
        response.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stopped else pb.STOP_REASON_LENGTH,
            tokens=np.array(sequence.tokens, "<i4").tobytes(),
            logprobs=np.array(sequence.logprobs, "<f4").tobytes(),
            topk_sampled_logprobs=None if sequence.top is None else _top(sequence.top, k),
        )
    if prompt_logprobs is not None:
        response.prompt_logprobs = np.array(prompt_logprobs, "<f4").tobytes()
    if prompt_top is not None:
        response.topk_prompt_logprobs.CopyFrom(_top(prompt_top, prompt_k))
    if targets is not None:
        response.target_prompt_logprobs.CopyFrom(targets)
    return response.SerializeToString()


def _top(rows: Sequence[Top], k: int) -> Any:
    """The `k` most likely tokens of each row, the likeliest first."""
    ids = np.full((len(rows), k), NO_TOKEN, "<i4")
    logprobs = np.full((len(rows), k), NO_LOGPROB, "<f4")
    for row, likely in enumerate(rows):
        best = sorted(likely.items(), key=lambda item: (-item[1], item[0]))[:k]
        for rank, (token, logprob) in enumerate(best):
            ids[row, rank], logprobs[row, rank] = token, logprob
    return pb.TopkLogprobs(
        token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(rows)
    )
