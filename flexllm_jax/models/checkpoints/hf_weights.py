"""Hugging Face safetensors to the parameter tree and back, one tensor at a time.

The parameter tree is a plain nested pytree (dicts, and a list of layers) whose kernels are
[in, out]; checkpoints store [out, in]. `tensors` describes every tensor once; abstract parameters,
loading and saving all follow it. Invariant: loading never holds two tensors of the checkpoint in
host memory (transposes and casts happen on the device); saving holds one output file's tensors.
"""

import gc
import json
import logging
import math
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from flexllm_jax.models.checkpoints.dtype import name_dtype
from flexllm_jax.models.checkpoints.hf_tensors import (
    INDEX,
    SINGLE,
    Stored,
    WeightsError,
    checkpoint_files,
    open_file,
    read_stored,
    stored_rows,
)
from flexllm_jax.models.checkpoints.tensors import Tensor, tensors, unused_tensors
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.names import HEAD, WRAPPED
from flexllm_jax.models.rope import rotary_frequencies
from flexllm_jax.models.shares import as_stored, own_columns

logger = logging.getLogger(__name__)

# Next to the weights, what transformers and tokenizers need to use them (chat templates may lie in
# a subfolder, `additional_chat_templates`), and the licence.
_SIDE_FILES = (
    *("*.json", "*.jinja", "*/*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*"),
)
_HEAD_WEIGHT = f"{HEAD}.weight"
_ROWS_COMPARED = 4096  # of two tensors, at a time


def _tree(config: ModelConfig, leaves: dict[tuple[str | int, ...], Any]) -> Any:
    """Nest leaves, given by path, into the parameter tree."""
    tree: dict[str, Any] = {"layers": [{} for _ in range(config.num_layers)]}
    for path, leaf in leaves.items():
        node: Any = tree
        for key in path[:-1]:
            node = node[key] if isinstance(key, int) else node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _leaf(tree: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def abstract_parameters(config: ModelConfig, dtype: DTypeLike) -> Any:
    """Return the parameter tree with jax.ShapeDtypeStruct leaves: the layout, nothing allocated."""
    return _tree(
        config,
        {t.path: jax.ShapeDtypeStruct(t.shape, t.dtype(dtype)) for t in tensors(config)},
    )


def load_parameters(
    path: str | Path, config: ModelConfig, dtype: DTypeLike, device: Any = None
) -> Any:
    """Load a checkpoint's tensors, cast to `dtype`, one at a time.

    `device` says where they go: a jax.Device, a Sharding for all of them, a tree of Shardings in
    the layout of `abstract_parameters`, or None for JAX's default device. Raises WeightsError
    naming the tensor or file that is missing or does not fit.
    """
    directory = Path(path)
    files = checkpoint_files(directory)
    expected = {tensor.name: tensor for tensor in tensors(config)}
    missing = [name for name in expected if name not in files]
    if missing:
        raise WeightsError(
            f"{directory}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); "
            "download the checkpoint again, or correct its config.json"
        )
    _check_unexpected(directory, config, files)

    leaves: dict[tuple[str | int, ...], Any] = {}
    # File by file: a network file system is then read in order.
    for tensor in sorted(expected.values(), key=lambda tensor: files[tensor.name].file):
        stored, where = files[tensor.name], _target(device, tensor.path)
        leaf = _load(directory, stored, tensor, dtype, where)
        leaves[tensor.path] = leaf
        # JAX lets go of a transferred numpy array in a garbage collector callback; without this,
        # one tensor would still be in host memory while the next is read. Takes microseconds.
        gc.collect(0)
    return _tree(config, leaves)


def _check_unexpected(directory: Path, config: ModelConfig, files: dict[str, Stored]) -> None:
    """Refuse tensors that would change what the model computes; say which others are left out.

    A head beside tied embeddings and rotary frequencies are copies of what is used, and refused
    when they are not.
    """
    expected = {tensor.name for tensor in tensors(config)}
    modules = {name.rpartition(".")[0] for name in expected}
    ignored = []
    for name in sorted(files.keys() - expected - unused_tensors(config)):
        layers = f"{config.names.layers}."
        layer = name.removeprefix(layers).split(".")[0]
        in_layer = name.startswith(layers) and layer.isdigit()
        file, stored, _ = files[name]
        with open_file(directory / file) as checkpoint:
            if name.endswith("rotary_emb.inv_freq"):
                copied = _are_frequencies(checkpoint.get_tensor(stored), config)
                source = "what rope_theta and rope_scaling of config.json give"
            elif name == _HEAD_WEIGHT:
                copied = holds_tensor(directory, config, name, checkpoint.get_slice(stored))
                source = (
                    "the embeddings, as tie_word_embeddings in config.json says: set it to false"
                )
            elif name.rpartition(".")[0] in modules or (
                in_layer and int(layer) < config.num_layers
            ):
                raise WeightsError(
                    f"{directory}: tensor {name} has no place in {config.architecture} as "
                    "config.json describes it; use the config.json that belongs to the checkpoint"
                )
            else:
                ignored.append(name)
                continue
        if not copied:
            raise WeightsError(
                f"{directory}: tensor {name} is not {source}; correct config.json, or remove the "
                "tensor from the checkpoint"
            )
    if ignored:
        text = ", as this engine serves the text's part of the model" if _is_wrapped(config) else ""
        logger.warning(
            "%s: %d tensors are not used%s: %s%s",
            *(directory, len(ignored), text),
            ", ".join(ignored[:5]),
            ", ..." if len(ignored) > 5 else "",
        )


def _is_wrapped(config: ModelConfig) -> bool:
    """Whether the checkpoint holds a model of more than text."""
    return config.names.root == WRAPPED.root


def _are_frequencies(stored: np.ndarray, config: ModelConfig) -> bool:
    """Whether rotary frequencies are the model's, as far as their dtype can tell."""
    tolerance = max(1e-4, 2 * float(jnp.finfo(stored.dtype).eps))
    ropes = {(spec.rope, spec.head_dim) for spec in config.attention}
    used = [np.asarray(rotary_frequencies(rope, size)) for rope, size in ropes if rope is not None]
    return any(
        stored.shape == own.shape
        and np.allclose(stored.astype(np.float32), own, rtol=tolerance, atol=0)
        for own in used
    )


def tensor_names(config: ModelConfig) -> set[str]:
    """Names of the model's tensors, that of a tied head too."""
    return {tensor.name for tensor in tensors(config)} | {_HEAD_WEIGHT}


def holds_tensor(path: str | Path, config: ModelConfig, name: str, other: Any) -> bool | None:
    """Whether `other`, an open slice of a safetensors file, has the values that the model at `path`
    uses for its tensor `name`, rounded to other's dtype; None when it has no such tensor."""
    directory = Path(path)
    if name == _HEAD_WEIGHT and config.head.tied:
        name = f"{config.names.embed}.weight"
    stored = checkpoint_files(directory).get(name)
    if stored is None:
        return None
    shape, start = other.get_shape(), 0
    if sum(stored_rows(directory, stored)) != shape[0]:
        return False
    for part in (stored, *stored.rest):
        with open_file(directory / part.file) as checkpoint:
            own = checkpoint.get_slice(part.name)
            count, *others = own.get_shape()
            if others != shape[1:]:
                return False
            for at in range(0, count, _ROWS_COMPARED):
                end = min(at + _ROWS_COMPARED, count)
                theirs = other[start + at : start + end]
                if not np.array_equal(own[at:end].astype(theirs.dtype), theirs):
                    return False
        start += count
    return True


def _load(
    directory: Path, stored: Stored, tensor: Tensor, dtype: DTypeLike, sharding: Sharding | None
) -> jax.Array:
    """Read a stored tensor and put it on its devices as the tree has it: transposed and cast."""
    source = sharding
    if tensor.transposed and isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, None, None)[:2]
        source = NamedSharding(sharding.mesh, PartitionSpec(*spec[::-1]))
    if isinstance(source, NamedSharding):  # every device its part, one after the other
        devices = _devices(source, tensor.stored_shape, axis=0)  # where its columns are there

        def read(part: Any) -> np.ndarray:
            runs = own_columns(tensor.parts, devices, part[0]) if devices > 1 else [part[0]]
            own = [read_stored(directory, stored, tensor, (run, *part[1:])) for run in runs]
            return own[0] if len(own) == 1 else np.concatenate(own)

        array = jax.make_array_from_callback(tensor.stored_shape, source, read)
    else:
        array = jax.device_put(read_stored(directory, stored, tensor), source)
    # Waiting leaves no second transfer in flight, whose source would stay in host memory.
    kept, shape = jnp.dtype(tensor.dtype(dtype)), tensor.shape
    array = array.reshape(shape[::-1] if tensor.transposed else shape)
    return _convert(tensor.transposed, kept, sharding)(array).block_until_ready()


def _devices(sharding: Any, shape: tuple[int, ...], axis: int) -> int:
    """Over how many devices an axis is split."""
    return shape[axis] // sharding.shard_shape(shape)[axis]


def _target(device: Any, path: tuple[str | int, ...]) -> Sharding | None:
    if device is None or isinstance(device, Sharding):
        return device
    if isinstance(device, jax.Device):
        return SingleDeviceSharding(device)
    return _leaf(device, path)


@lru_cache
def _convert(
    transpose: bool, dtype: jnp.dtype, sharding: Sharding | None
) -> Callable[[jax.Array], jax.Array]:
    """One program for all tensors that need the same; jit keeps them apart by shape."""

    def convert(array: jax.Array) -> jax.Array:
        return (array.T if transpose else array).astype(dtype)

    return jax.jit(convert, out_shardings=sharding)


def save_parameters(
    params: Any,
    config: ModelConfig,
    source_dir: str | Path,
    out_dir: str | Path,
    *,
    edit_kernel: Callable[[int, str, np.ndarray], np.ndarray] | None = None,
    read: Callable[[jax.Array], np.ndarray] = np.asarray,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face checkpoint: the weights, and the config and tokenizer of `source_dir`.

    `edit_kernel(layer, module, kernel [in, out])` is applied to each projection on the host, just
    before it is written: an edited model is never in memory as a whole, and no device memory is
    used. `read` brings an array to the host. Weights become `dtype`, or stay what they are. Names
    are those of `source_dir`'s files; of a model of more than text, the other parts are copied.
    `out_dir` appears only once it is complete; it must not exist or be empty, else WeightsError.
    """
    source, out = Path(source_dir), Path(out_dir)
    if not (source / "config.json").is_file():
        raise WeightsError(f"source_dir={source} has no config.json; give the base checkpoint")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"out_dir={out} exists and is not empty; choose another or remove it")
    hidden = out.with_name(f".{out.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    for pattern in _SIDE_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                target = hidden / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    kept = jnp.dtype(dtype or params["embed"]["weight"].dtype)
    name_dtype(hidden / "config.json", kept.name)

    own = [
        _Output(
            tensor.name,
            math.prod(tensor.shape) * jnp.dtype(tensor.dtype(kept)).itemsize,
            lambda tensor=tensor: _stored(
                _as_stored(_leaf(params, tensor.path), tensor, read), tensor, edit_kernel, kept
            ),
        )
        for tensor in tensors(config)
    ]
    shards = _shards(_as_in(source, own, config), max_shard_bytes)
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = [SINGLE] if count == 1 else names
    for file, shard in zip(names, shards, strict=True):
        arrays = {output.name: output.read() for output in shard}
        save_file(arrays, hidden / file, metadata={"format": "pt"})
    if count > 1:
        total = sum(output.nbytes for shard in shards for output in shard)
        files = {o.name: file for file, shard in zip(names, shards, strict=True) for o in shard}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (hidden / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    hidden.replace(out)


class _Output(NamedTuple):
    """A tensor to be written."""

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]


def _as_in(source: Path, own: list[_Output], config: ModelConfig) -> list[_Output]:
    """The tensors by the names that the checkpoint at `source` has for them, in the parts that it
    has, and what else it has if it is of more than text."""
    if not any((source / name).is_file() for name in (SINGLE, INDEX)):
        return own  # a configuration alone
    files = checkpoint_files(source)
    named = [part for output in own for part in _in_parts(source, output, files.get(output.name))]
    if not _is_wrapped(config):
        return named
    for name in sorted(files.keys() - {output.name for output in own}):
        file, stored, _ = files[name]

        def copied(file: str = file, stored: str = stored) -> np.ndarray:
            with open_file(source / file) as checkpoint:
                return checkpoint.get_tensor(stored)

        named.append(_Output(stored, copied().nbytes, copied))
    return named


def _in_parts(source: Path, output: _Output, stored: Stored | None) -> list[_Output]:
    if stored is None:
        return [output]
    if not stored.rest:
        return [output._replace(name=stored.name)]
    rows = stored_rows(source, stored)
    ends = np.cumsum(rows)

    def part(start: int, end: int) -> np.ndarray:
        return np.ascontiguousarray(output.read()[start:end])

    return [
        _Output(own.name, output.nbytes * count // int(ends[-1]), partial(part, end - count, end))
        for own, count, end in zip((stored, *stored.rest), rows, map(int, ends), strict=True)
    ]


def _shards(outputs: list[_Output], max_bytes: int) -> list[list[_Output]]:
    """Cut the tensors, in order, into files of at most `max_bytes` (or one larger tensor)."""
    shards: list[list[_Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def _as_stored(
    array: jax.Array | np.ndarray, tensor: Tensor, read: Callable[[Any], np.ndarray]
) -> np.ndarray:
    """A parameter on the host, its columns in the checkpoint's order."""
    if not tensor.parts or isinstance(array, np.ndarray):
        return read(array)
    devices = _devices(array.sharding, array.shape, axis=-1)
    return as_stored(read(array), tensor.parts, devices) if devices > 1 else read(array)


def _stored(
    array: np.ndarray,
    tensor: Tensor,
    edit_kernel: Callable[[int, str, np.ndarray], np.ndarray] | None,
    dtype: jnp.dtype,
) -> np.ndarray:
    if edit_kernel is not None and tensor.path[-1] == "kernel" and tensor.path[0] == "layers":
        _, layer, module, _ = tensor.path
        array = edit_kernel(int(layer), str(module), array)
    array = array.astype(tensor.dtype(dtype), copy=False)
    array = np.ascontiguousarray(array.T) if tensor.transposed else array
    return array.reshape(tensor.stored_shape)
