"""A checkpoint's tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from flexllm_jax.config import ConfigError


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a checkpoint's folder. ConfigError when there is none to use."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={str(path)!r} has no usable tokenizer ({str(error).splitlines()[0]}): "
            f"give a complete Hugging Face checkpoint"
        ) from None
