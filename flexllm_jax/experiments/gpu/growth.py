"""What compiled programs were made of before, and which of them have grown since.

`compiled.json` beside this file holds the programs that continuous integration compiles
(`gpu_compile.py --quick --record`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "compiled.json"
_MOST = 1.05  # of what was recorded
_SLACK = {"temporary bytes": 2**16}  # of small programs


def measures(row: dict[str, Any]) -> dict[str, float]:
    """What is compared of a program; a row of `compile.compile_all`."""
    return {
        "launches": row["launches"],
        "launches outside graphs": sum(row["outside_graphs"].values()),
        "temporary bytes": row["temp"],
        "shared memory": sum(kernel["shared"] for kernel in row["kernels"]),
        "registers": sum(kernel["registers"] for kernel in row["kernels"]),
    }


def record(rows: Sequence[dict[str, Any]], versions: dict[str, str], file: Path = RECORD) -> None:
    """Keep what the programs are made of now."""
    programs = {name: measures(row) for name, row in _by_name(rows).items()}
    file.write_text(json.dumps({"versions": versions, "programs": programs}, indent=1) + "\n")


def grown(
    rows: Sequence[dict[str, Any]], versions: dict[str, str], file: Path = RECORD
) -> list[str]:
    """A line for everything that is over 5 % more than recorded. Nothing is compared with what
    other versions of the compiler made."""
    before = json.loads(file.read_text())
    if before["versions"] != versions:
        return []
    lines = []
    for name, row in _by_name(rows).items():
        then = before["programs"].get(name, {})
        for what, now in measures(row).items():
            if what in then and now > then[what] * _MOST + _SLACK.get(what, 0):
                lines.append(f"{name}: {what} {then[what]:,.0f} -> {now:,.0f}")
    return lines


def _by_name(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    compiled = [row for row in rows if "launches" in row]
    return {f"{row['chip']}/{row['kind']}/{row['name']}": row for row in compiled}
