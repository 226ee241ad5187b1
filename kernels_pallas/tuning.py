"""The tuning tables: which tiles each kernel uses, by chip and shape.

`<kernel>/tuning.json` maps chip -> key -> tiles. A key says what the tiles depend on, e.g.
"decode/h128/g4"; `scripts/tune_kernels.py` measures candidates on the GPU at hand and writes it.
"""

import json
from functools import cache
from pathlib import Path


def table_file(kernel: str) -> Path:
    """Where a kernel's table lies."""
    return Path(__file__).parent / kernel / "tuning.json"


@cache
def read_table(kernel: str) -> dict[str, dict[str, dict[str, int]]]:
    """A kernel's table: chip -> key -> tiles."""
    return json.loads(table_file(kernel).read_text(encoding="utf-8"))


def tiles(kernel: str, chip: str, key: str, default: dict[str, int]) -> dict[str, int]:
    """The tiles for a key; what the table does not name is as in `default`."""
    return default | read_table(kernel).get(chip, {}).get(key, {})
