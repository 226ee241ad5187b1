"""Write an adapter in PEFT's format, and the base model with it merged in, as a HF checkpoint.

`adapter/` loads with `peft.PeftModel.from_pretrained`, `merged/` with
`transformers.AutoModelForCausalLM.from_pretrained`. Weights have the type model.dtype; with
auto it is the checkpoint's.
"""

from __future__ import annotations

from pathlib import Path

from rich import get_console

from flexllm_jax.config import ConfigError
from flexllm_jax.config.cli import (
    check_output_dir,
    find_adapter,
    make_parser,
    read_config,
    run_script,
    without_jobs,
)
from flexllm_jax.models.checkpoints.dtype import export_dtype
from flexllm_jax.models.checkpoints.hf_weights import load_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter, save_merged


def main() -> int:
    """Run; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="NAME",
        help="a preloaded adapter, a finished job, or a PEFT folder",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    arguments = parser.parse_args()
    config, out = without_jobs(read_config(arguments)), arguments.out
    config.require_inputs()
    source = find_adapter(config, arguments.adapter)
    check_output_dir(out, "--out")
    for folder in (out / "adapter", out / "merged"):
        if folder.exists():
            raise ConfigError(f"--out: {folder} exists; choose another or remove it")
    path = config.model.path
    model = ModelConfig.from_hf(path)
    adapter = load_adapter(source, model, path)
    params = load_parameters(path, model, export_dtype(config.model.dtype, path))
    save_adapter(adapter, model, path, out / "adapter")
    save_merged(params, adapter, model, path, out / "merged")
    get_console().print(f"written: {out / 'adapter'}, {out / 'merged'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_script(main)
