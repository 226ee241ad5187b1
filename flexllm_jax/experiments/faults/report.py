"""A campaign's report: faults survived, rounds by kind, as JSON and as a table in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexllm_jax.experiments.faults.campaign import Round
from flexllm_jax.experiments.faults.plan import KINDS, ORDER


def make_report(
    seed: int, rounds: Sequence[Round], at_the_end: Sequence[str], seconds: float
) -> dict[str, Any]:
    """What the rounds brought, and all that went wrong."""
    problems = [f"round {r.number}: {text}" for r in rounds for text in r.problems]
    return {
        "seed": seed,
        "rounds": len(rounds),
        "seconds": round(seconds, 1),
        "requests": {
            "finished": sum(r.finished for r in rounds),
            "cut": sum(r.cut for r in rounds),
        },
        "faults": [
            {
                "round": r.number,
                "kind": h.fault.kind,
                "moment": h.fault.moment,
                "met": h.met,
                "away_s": round(h.away_s, 2),
                "survived": not r.problems,
            }
            for r in rounds
            for h in r.happened
        ],
        "problems": problems + [f"at the end: {text}" for text in at_the_end],
    }


def table(report: dict[str, Any]) -> str:
    """Faults survived by kind and moment, in Markdown; a dash where a kind does not come."""
    lines = [f"| fault | {' | '.join(ORDER)} | all |", "|---" * (len(ORDER) + 2) + "|"]
    for kind in KINDS:
        own = [f for f in report["faults"] if f["kind"] == kind and f["met"]]
        cells = [_share([f for f in own if f["moment"] == moment]) for moment in ORDER]
        lines.append(f"| {kind} | {' | '.join(cells)} | {_share(own)} |")
    return "\n".join(lines) + "\n"


def _share(faults: Sequence[dict[str, Any]]) -> str:
    if not faults:
        return ""
    return f"{sum(f['survived'] for f in faults)} of {len(faults)}"


def write(report: dict[str, Any], out: Path) -> None:
    """report.json and report.md."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(table(report), encoding="utf-8")
