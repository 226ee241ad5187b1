"""Single kernels of a checkpoint, on the host."""

from pathlib import Path

import numpy as np

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.hf_weights import WeightsError, checkpoint_files, read_stored
from flexllm_jax.models.tensors import tensors


def read_kernel(path: str | Path, config: ModelConfig, layer: int, module: str) -> np.ndarray:
    """A projection's kernel, or the output head's, [d_in, d_out] float32. WeightsError if it is not
    there."""
    table = "embed" if config.head.tied else "head"
    where = (table, "weight") if module == "head" else ("layers", layer, module, "kernel")
    tensor = next(tensor for tensor in tensors(config) if tensor.path == where)
    directory = Path(path)
    file = checkpoint_files(directory).get(tensor.name)
    if file is None:
        raise WeightsError(f"{directory}: tensor {tensor.name} is missing")
    return read_stored(directory / file, tensor).astype(np.float32).T
