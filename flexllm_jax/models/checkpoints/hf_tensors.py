"""Where a checkpoint's tensors are stored, and one of them read, on the host."""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from flexllm_jax.errors import UserError
from flexllm_jax.models.checkpoints.tensors import Tensor, tensors
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.names import name_in_memory

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class WeightsError(UserError):
    """A checkpoint that is incomplete or does not fit its `config.json`; one line."""


class Stored(NamedTuple):
    """Where a tensor is: in which file, and by which name. rest: of one that is stored in parts,
    those behind the first, along its first axis there."""

    file: str
    name: str
    rest: "tuple[Stored, ...]" = ()


def checkpoint_files(directory: Path) -> dict[str, Stored]:
    """Where each tensor of the checkpoint is stored, by the name that transformers has for it; from
    the index if there is one."""
    found: dict[str, dict[int, Stored]] = {}
    for name, file in _files(directory).items():
        own, part = name_in_memory(name)
        found.setdefault(own, {})[part] = Stored(file, name)
    inorder = {name: [parts[i] for i in sorted(parts)] for name, parts in found.items()}
    return {name: first._replace(rest=tuple(rest)) for name, (first, *rest) in inorder.items()}


def stored_rows(directory: Path, stored: Stored) -> list[int]:
    """Of each part of a stored tensor, the length of its first axis."""
    rows = []
    for part in (stored, *stored.rest):
        with open_file(directory / part.file) as checkpoint:
            rows.append(checkpoint.get_slice(part.name).get_shape()[0])
    return rows


def fingerprint(path: str | Path, config: ModelConfig) -> str:
    """What tells a checkpoint's weights from those of other models: a checksum of the first row of
    each tensor, whatever files they lie in."""
    directory, crc = Path(path), 0
    files = checkpoint_files(directory)
    for tensor in tensors(config):
        if (stored := files.get(tensor.name)) is not None:  # a head may be the embeddings
            with open_file(directory / stored.file) as checkpoint:
                row = checkpoint.get_slice(stored.name)[:1]
            crc = zlib.crc32(f"{tensor.name} {row.dtype}".encode() + row.tobytes(), crc)
    return f"{crc:08x}"


def _files(directory: Path) -> dict[str, str]:
    index, single = directory / INDEX, directory / SINGLE
    if single.is_file():
        with open_file(single) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    if not index.is_file():
        raise WeightsError(
            f"{directory} has neither {SINGLE} nor {INDEX}; give a checkpoint in safetensors "
            "format (transformers' save_pretrained writes it)"
        )
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} has no readable weight_map: {error!r}") from None
    for name in sorted(set(files.values())):
        if not (directory / name).is_file():
            raise WeightsError(
                f"{directory / name} is missing, but {INDEX} lists it; download it again"
            )
    return files


def open_file(file: Path) -> Any:
    """A file of tensors, to be read one by one."""
    # Its numpy framework gives bfloat16 arrays because jax registers ml_dtypes with numpy.
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not a whole safetensors file: {error}") from None


def read_stored(directory: Path, stored: Stored, tensor: Tensor, part: Any = None) -> np.ndarray:
    """A stored tensor, or the part of it that a tuple of slices names."""
    if stored.rest:
        rows, (_, *others) = stored_rows(directory, stored), tensor.stored_shape
        if sum(rows) != tensor.stored_shape[0]:
            raise WeightsError(
                f"{directory}: the parts of tensor {tensor.name} have {rows} rows, but config.json "
                f"asks for {tensor.stored_shape[0]}"
            )
        parts = zip((stored, *stored.rest), rows, strict=True)
        whole = np.concatenate([_read(directory, own, (n, *others)) for own, n in parts])
        return whole if part is None else whole[part]
    return _read(directory, stored, tensor.stored_shape, part)


def _read(directory: Path, stored: Stored, shape: tuple[int, ...], part: Any = None) -> np.ndarray:
    # Opened for each tensor anew: a mapping kept open keeps the pages read in this process.
    file = directory / stored.file
    with open_file(file) as checkpoint:
        try:
            own = checkpoint.get_slice(stored.name)
            found, kind = tuple(own.get_shape()), own.get_dtype()
            if found != shape:
                raise WeightsError(
                    f"{file}: tensor {stored.name} has shape {list(found)}, but config.json asks "
                    f"for {list(shape)}"
                )
            if kind not in ("BF16", "F16", "F32", "F64"):
                raise WeightsError(
                    f"{file}: tensor {stored.name} has dtype {kind}; use an unquantized checkpoint "
                    "(BF16, F16, F32)"
                )
            if part is not None:
                return own[part]
            return checkpoint.get_tensor(stored.name)
        except SafetensorError as error:
            raise WeightsError(f"{file}: tensor {stored.name} cannot be read: {error}") from None


def read_kernel(path: str | Path, config: ModelConfig, layer: int, module: str) -> np.ndarray:
    """A projection's kernel, or the output head's, [d_in, d_out] float32. WeightsError if it is not
    there."""
    table = "embed" if config.head.tied else "head"
    where = (table, "weight") if module == "head" else ("layers", layer, module, "kernel")
    tensor = next(tensor for tensor in tensors(config) if tensor.path == where)
    directory = Path(path)
    stored = checkpoint_files(directory).get(tensor.name)
    if stored is None:
        raise WeightsError(f"{directory}: tensor {tensor.name} is missing")
    return read_stored(directory, stored, tensor).astype(np.float32).T
