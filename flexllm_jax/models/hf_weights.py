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
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flexllm_jax.errors import UserError
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.dtype import name_dtype
from flexllm_jax.models.names import HEAD
from flexllm_jax.models.rope import rotary_frequencies
from flexllm_jax.models.tensors import Tensor, tensors

logger = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Next to the weights, what transformers and tokenizers need to use them (chat templates may lie in
# a subfolder, `additional_chat_templates`), and the licence.
_SIDE_FILES = (
    *("*.json", "*.jinja", "*/*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*"),
)
_HEAD_WEIGHT = f"{HEAD}.weight"
_ROWS_COMPARED = 4096  # of two tensors, at a time


class WeightsError(UserError):
    """A checkpoint that is incomplete or does not fit its `config.json`; one line."""


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
    return _tree(config, {t.path: jax.ShapeDtypeStruct(t.shape, dtype) for t in tensors(config)})


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
    for tensor in sorted(expected.values(), key=lambda tensor: files[tensor.name]):
        leaf = _load(directory / files[tensor.name], tensor, dtype, _target(device, tensor.path))
        leaves[tensor.path] = leaf
        # JAX lets go of a transferred numpy array in a garbage collector callback; without this,
        # one tensor would still be in host memory while the next is read. Takes microseconds.
        gc.collect(0)
    return _tree(config, leaves)


def checkpoint_files(directory: Path) -> dict[str, str]:
    """Which file holds each tensor of the checkpoint, by the index if there is one."""
    index, single = directory / _INDEX, directory / _SINGLE
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    if not index.is_file():
        raise WeightsError(
            f"{directory} has neither {_SINGLE} nor {_INDEX}; give a checkpoint in safetensors "
            "format (transformers' save_pretrained writes it)"
        )
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} has no readable weight_map: {error!r}") from None
    for name in sorted(set(files.values())):
        if not (directory / name).is_file():
            raise WeightsError(
                f"{directory / name} is missing, but {_INDEX} lists it; download it again"
            )
    return files


def _open(file: Path) -> Any:
    # Its numpy framework gives bfloat16 arrays because jax registers ml_dtypes with numpy.
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not a whole safetensors file: {error}") from None


def _check_unexpected(directory: Path, config: ModelConfig, files: dict[str, str]) -> None:
    """Refuse tensors that would change what the model computes; say which others are left out.

    A head beside tied embeddings and rotary frequencies are copies of what is used, and refused
    when they are not.
    """
    expected = {tensor.name for tensor in tensors(config)}
    modules = {name.rpartition(".")[0] for name in expected}
    ignored = []
    for name in sorted(files.keys() - expected):
        layers = f"{config.names.layers}."
        layer = name.removeprefix(layers).split(".")[0]
        in_layer = name.startswith(layers) and layer.isdigit()
        with _open(directory / files[name]) as checkpoint:
            if name.endswith("rotary_emb.inv_freq"):
                copied = _are_frequencies(checkpoint.get_tensor(name), config)
                source = "what rope_theta and rope_scaling of config.json give"
            elif name == _HEAD_WEIGHT:
                copied = holds_tensor(directory, config, name, checkpoint.get_slice(name))
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
        logger.warning(
            "%s: %d tensors are not used: %s%s",
            directory,
            len(ignored),
            ", ".join(ignored[:5]),
            ", ..." if len(ignored) > 5 else "",
        )


def _are_frequencies(stored: np.ndarray, config: ModelConfig) -> bool:
    """Whether rotary frequencies are the model's, as far as their dtype can tell."""
    tolerance = max(1e-4, 2 * float(jnp.finfo(stored.dtype).eps))
    ropes = {(spec.attention.rope, spec.attention.head_dim) for spec in config.layers}
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
    file = checkpoint_files(directory).get(name)
    if file is None:
        return None
    with _open(directory / file) as checkpoint:
        own = checkpoint.get_slice(name)
        shape = own.get_shape()
        if shape != other.get_shape():
            return False
        for at in range(0, shape[0], _ROWS_COMPARED):
            rows = slice(at, min(at + _ROWS_COMPARED, shape[0]))
            theirs = other[rows]
            if not np.array_equal(own[rows].astype(theirs.dtype), theirs):
                return False
    return True


def _load(file: Path, tensor: Tensor, dtype: DTypeLike, sharding: Sharding | None) -> jax.Array:
    """Read a stored tensor and put it on its devices as the tree has it: transposed and cast."""
    source = sharding
    if tensor.transposed and isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, None, None)[:2]
        source = NamedSharding(sharding.mesh, PartitionSpec(*spec[::-1]))
    if isinstance(source, NamedSharding):  # every device its part, one after the other
        array = jax.make_array_from_callback(
            tensor.stored_shape, source, lambda part: read_stored(file, tensor, part)
        )
    else:
        array = jax.device_put(read_stored(file, tensor), source)
    # Waiting leaves no second transfer in flight, whose source would stay in host memory.
    return _convert(tensor.transposed, jnp.dtype(dtype), sharding)(array).block_until_ready()


def read_stored(file: Path, tensor: Tensor, part: Any = None) -> np.ndarray:
    """A stored tensor, or the part of it that a tuple of slices names."""
    # Opened for each tensor anew: a mapping kept open keeps the pages read in this process.
    with _open(file) as checkpoint:
        try:
            found = tuple(checkpoint.get_slice(tensor.name).get_shape())
            kind = checkpoint.get_slice(tensor.name).get_dtype()
            if found != tensor.stored_shape:
                raise WeightsError(
                    f"{file}: tensor {tensor.name} has shape {list(found)}, but config.json asks "
                    f"for {list(tensor.stored_shape)}"
                )
            if kind not in ("BF16", "F16", "F32", "F64"):
                raise WeightsError(
                    f"{file}: tensor {tensor.name} has dtype {kind}; use an unquantized checkpoint "
                    "(BF16, F16, F32)"
                )
            if part is not None:
                return checkpoint.get_slice(tensor.name)[part]
            return checkpoint.get_tensor(tensor.name)
        except SafetensorError as error:
            raise WeightsError(f"{file}: tensor {tensor.name} cannot be read: {error}") from None


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
    used. `read` brings an array to the host. Weights become `dtype`, or stay what they are.
    `out_dir` appears only once it is complete; it must not exist or be empty, else WeightsError.
    """
    source, out = Path(source_dir), Path(out_dir)
    if not (source / "config.json").is_file():
        raise WeightsError(f"source_dir={source} has no config.json; give the base checkpoint")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"out_dir={out} exists and is not empty; choose another or remove it")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in _SIDE_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                target = partial / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    dtype = jnp.dtype(dtype or params["embed"]["weight"].dtype)
    name_dtype(partial / "config.json", dtype.name)

    shards = _shards(params, config, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = [_SINGLE] if count == 1 else names
    for file, shard in zip(names, shards, strict=True):
        arrays = {
            tensor.name: _stored(read(_leaf(params, tensor.path)), tensor, edit_kernel, dtype)
            for tensor in shard
        }
        save_file(arrays, partial / file, metadata={"format": "pt"})
    if count > 1:
        total = sum(math.prod(t.shape) for shard in shards for t in shard) * dtype.itemsize
        files = {t.name: file for file, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    partial.replace(out)


def _shards(params: Any, config: ModelConfig, max_bytes: int) -> list[list[Tensor]]:
    """Cut the tensors, in order, into files of at most `max_bytes` (or one larger tensor)."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors(config):
        nbytes = _leaf(params, tensor.path).nbytes
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _stored(
    array: np.ndarray,
    tensor: Tensor,
    edit_kernel: Callable[[int, str, np.ndarray], np.ndarray] | None,
    dtype: jnp.dtype,
) -> np.ndarray:
    if edit_kernel is not None and tensor.transposed:
        _, layer, module, _ = tensor.path
        array = edit_kernel(int(layer), str(module), array)
    array = array.astype(dtype, copy=False)
    return np.ascontiguousarray(array.T) if tensor.transposed else array
