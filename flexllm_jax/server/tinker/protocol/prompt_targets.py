"""`target_prompt_logprobs` of a sample: tokens whose log-probabilities are asked for at each token
of its prompt after the first, as JSON, dense or in compressed sparse rows; the answer has the same
shape and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexllm_jax.server.tinker.protocol import schema
from flexllm_jax.server.tinker.protocol import tinker_pb2 as pb
from flexllm_jax.server.tinker.protocol.wire import densify

_NAME, NOTHING = "target_prompt_logprobs", -1


@dataclass(frozen=True)
class PromptTargets:
    """Token ids [len(prompt) - 1, K], NOTHING where none is asked for. sparse: the request's row
    ends and columns."""

    ids: np.ndarray
    sparse: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Those of each token of the prompt after the first, once each."""
        return tuple(tuple(sorted({*row} - {NOTHING})) for row in self.ids.tolist())

    def answer(self, told: Sequence[Mapping[int, float]]) -> pb.Tensor:
        """Their log-probabilities of `told`, which has those of each row; 0 where none was asked
        for."""
        pairs = zip(told, self.ids.tolist(), strict=True)
        found = [[0.0 if i == NOTHING else likely[i] for i in row] for likely, row in pairs]
        values = np.array(found, "<f4").reshape(self.ids.shape)
        tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=values.shape)
        if self.sparse is None:
            tensor.dense = values.tobytes()
            return tensor
        crow, columns = self.sparse
        named = values[np.repeat(np.arange(len(values)), np.diff(crow)), columns]
        tensor.sparse_csr.values = named.tobytes()
        tensor.sparse_csr.crow_indices = crow.astype("<i8").tobytes()
        tensor.sparse_csr.col_indices = columns.astype("<i8").tobytes()
        return tensor


def read(tensor: schema.Tensor, prompt_tokens: int, vocab_size: int) -> PromptTargets:
    """What a request asks for; ValueError in one line."""
    shape = tuple(tensor.shape or ())
    if len(shape) != 2 or shape[0] != prompt_tokens - 1 or shape[1] < 1:
        raise ValueError(
            f"{_NAME}: has shape {list(shape)}; must be [{prompt_tokens - 1}, K], a row for each "
            f"token of the prompt after the first"
        )
    ids, sparse = np.array(tensor.data), None
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{_NAME}: must be of whole numbers, the ids of tokens")
    if tensor.sparse_crow_indices is not None:
        crow = np.array(tensor.sparse_crow_indices, np.int64)
        columns = np.array(tensor.sparse_col_indices or (), np.int64)
        sparse = (crow, columns)
        ids = densify(ids, crow, columns, shape, _NAME, NOTHING)
    elif len(ids) != shape[0] * shape[1]:
        raise ValueError(f"{_NAME}: {len(ids)} values are not of shape {list(shape)}")
    wrong = ids[(ids < NOTHING) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{_NAME}: token {wrong.flat[0]} is not in the vocabulary of {vocab_size}; -1 stands "
            f"for no token"
        )
    if not (ids >= 0).any():
        raise ValueError(f"{_NAME}: names no token; give at least one, or leave it out")
    return PromptTargets(ids.reshape(shape), sparse)
