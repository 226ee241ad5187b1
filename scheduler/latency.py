"""Predicts how long a step takes on the device.

    seconds = base[token_bucket] + sum of coefficient x feature        (all >= 0)

fitted from a profile taken at start-up, then corrected online by a running ratio of measured to
predicted time. Coefficients are nonnegative so that more work never predicts less time, which the
scheduler's searches rely on. The spread of recent errors gives the scheduler's safety margin.
FlexLLM's f(c, s), section 6 of the paper, has the same role.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

COEFFICIENTS = (
    "decode_tokens",
    "kv_tokens",
    "attention_pairs",
    "layer_units",
    "loss_units",
    "adapter_slots",
)


@dataclass(frozen=True)
class StepFeatures:
    """What a step's duration depends on.

    token_bucket     token slots of the forward program, 0 when none runs
    decode_tokens, prefill_tokens, finetune_tokens   slots in use, by kind
    kv_tokens        KV entries the decode tokens read
    attention_pairs  sum of query length x key length over prefill and finetuning chunks
    layer_units, loss_units   backward units after the forward, by kind
    adapters         whether any token of the forward carries an adapter
    """

    token_bucket: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    finetune_tokens: int = 0
    kv_tokens: int = 0
    attention_pairs: int = 0
    layer_units: int = 0
    loss_units: int = 0
    adapters: bool = False

    @property
    def has_units(self) -> bool:
        """Whether the step runs backward units."""
        return self.layer_units + self.loss_units > 0
