"""What a checkpoint was made with, and whether a job of another configuration may go on from it.

Everything that the saved arrays and the place in the data mean something by must be the same: the
weights of the model, the adapter, the bank's sizes, the method, the order of the rows. What only
says how to go on may change: the optimizer's settings, batch_tokens, epochs or steps, weight and
priority; the job then takes what is left of the data. Options of the dataset may change as long as
its tokens stay the same.
"""

import dataclasses
import json
import zlib
from typing import Any

from flexllm_jax.config import FinetuneConfig
from flexllm_jax.finetune.calls.source import CallSource
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.reinforcement import kept
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.bank import BankShape

_DATA_OPTIONS = ("dataset", "format", "train_on", "max_seq_len")


def made_with(
    job: FinetuneJob, config: FinetuneConfig, bank: BankShape, weights: str
) -> dict[str, Any]:
    """What a job's checkpoints depend on, as JSON data by the field that sets it. weights: the
    fingerprint of the model's."""
    peft = job.peft
    fields = {f"peft.{f.name}": getattr(peft, f.name) for f in dataclasses.fields(peft)}  # type: ignore[arg-type]
    fields |= {
        "model.path": f"weights {weights}",
        "peft.type": peft.kind,
        "init_adapter": _crc32(job.adapter) if config.init_adapter else None,
        "seed": config.seed,
        "optimizer.type": config.optimizer.type,
        "adapters.kinds": bank.kinds,
        "adapters.max_rank": bank.rank,
        "adapters.target_modules": bank.modules,
        "adapters.max_bottleneck": bank.bottleneck,
        "adapters.max_prefix": bank.prefix,
    }
    fields |= {f"method.{name}": value for name, value in config.method.model_dump().items()}
    fields |= {name: getattr(config, name) for name in _DATA_OPTIONS}
    return json.loads(json.dumps({name: _ordered(value) for name, value in fields.items()}))


def refusal(job: FinetuneJob, info: dict[str, Any]) -> str | None:
    """Why a job cannot go on from a checkpoint with that `info`, naming the fields; None: it can.

    A checkpoint of an earlier version does not say what it was made with: its arrays alone have to
    match.
    """
    before, now = info.get("made_with", {}), job.made_with
    changed = [name for name in now if name in before and before[name] != now[name]]
    assert not isinstance(job.source, CallSource)  # it writes no checkpoints
    if info["stream"]["fingerprint"] == job.source.dataset.fingerprint:
        changed = [name for name in changed if name not in _DATA_OPTIONS]
    if not changed:
        return None
    differences = ", ".join(f"{name}={before[name]!r} (now {now[name]!r})" for name in changed)
    return (
        f"it was made with {differences}; set what it was made with, or start the job anew under "
        "another name or with resume: false"
    )


def kept_arrays(like: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint with that `info` holds: a job's state like this, and the versions of its
    adapter and the answers that the work after it needs, if any."""
    versions = dict.fromkeys(info.get("versions", ()), like["master"])
    like = like | ({"versions": versions} if versions else {})
    return like | ({"answers": kept.shapes(info["answers"])} if "answers" in info else {})


def _ordered(value: Any) -> Any:
    """A value as JSON data in which the order of a mapping counts: of patterns, the first match
    does."""
    if isinstance(value, dict):
        return [list(item) for item in value.items()]
    return value if value is None or isinstance(value, bool | int | float | tuple) else str(value)


def _crc32(adapter: Adapter) -> int:
    """Checksum of an adapter's weights."""
    crc = 0
    for site in sorted(adapter.weights):
        for name, array in sorted(adapter.weights[site].items()):
            crc = zlib.crc32(f"{site} {name} {array.shape}".encode() + array.tobytes(), crc)
    return crc
