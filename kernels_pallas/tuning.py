"""The tuning table: which tiles each kernel uses, by chip and shape.

`tuning_table.json` maps kernel -> chip -> key -> tiles. A key says what the tiles depend on, e.g.
"decode/h128/g4"; `scripts/tune_kernels.py` measures candidates on the GPU at hand and writes it.
"""

import json
from functools import cache
from pathlib import Path

TABLE_FILE = Path(__file__).with_name("tuning_table.json")


@cache
def read_table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """The whole table."""
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


def tiles(kernel: str, chip: str, key: str, default: dict[str, int]) -> dict[str, int]:
    """The tiles for a key, or the default where the table has none."""
    return default | read_table().get(kernel, {}).get(chip, {}).get(key, {})
