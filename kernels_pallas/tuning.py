"""The tuning tables: which tiles each kernel uses, by chip and shape.

`<kernel>/tuning.json` maps chip -> key -> tiles. A key says what the tiles depend on, e.g.
"decode/h128/g4"; `scripts/tune_kernels.py` measures candidates on the GPU at hand and writes it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def trial(kernel: str, chip: str, key: str, candidate: dict[str, int]) -> Iterator[None]:
    """Other tiles for a key, for what is traced within the context."""
    own = read_table(kernel).setdefault(chip, {})
    kept = own.get(key)
    own[key] = candidate
    try:
        yield
    finally:
        own.pop(key)
        if kept is not None:
            own[key] = kept


def write_table(kernel: str, table: dict[str, dict[str, dict[str, int]]]) -> None:
    """Write a kernel's table, a key a line."""
    chips = []
    for chip, own in table.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(own[key])}" for key in sorted(own)]
        body = ",\n".join(lines)
        chips.append(
            f"  {json.dumps(chip)}: {{\n{body}\n  }}" if lines else f"  {json.dumps(chip)}: {{}}"
        )
    table_file(kernel).write_text("{\n" + ",\n".join(chips) + "\n}\n", encoding="utf-8")
    read_table.cache_clear()
