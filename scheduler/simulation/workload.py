"""When requests arrive and how long they are: read from a trace, or drawn at random.

A trace is a CSV file with a header `arrival_s,prompt_tokens,output_tokens` (other columns are
ignored) and ascending arrivals in seconds from the start. Whatever is drawn depends on the seed
alone. Errors name the file and line.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
PROCESSES = ("poisson", "gamma", "uniform")


@dataclass(frozen=True)
class Arrival:
    """A request of `prompt_tokens` that arrives `arrival_s` seconds after the start."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Lognormal token counts of a mean and a coefficient of variation, clipped to [1, maximum].

    `cv=0` makes every count the mean. Lengths of chats are close to lognormal.
    """

    mean: float
    cv: float = 1.0
    maximum: int = 4096

    def __post_init__(self) -> None:
        if not (self.mean >= 1 and self.cv >= 0 and self.maximum >= 1):
            raise ValueError(f"{self}: need mean >= 1, cv >= 0 and maximum >= 1")

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """`count` lengths, int64."""
        sigma = math.sqrt(math.log1p(self.cv**2))
        drawn = generator.lognormal(math.log(self.mean) - sigma**2 / 2, sigma, count)
        return np.clip(np.rint(drawn), 1, self.maximum).astype(np.int64)


def load_trace(path: Path | str, time_scale: float = 1.0) -> list[Arrival]:
    """The arrivals of a trace, their times multiplied by `time_scale` (0.5 doubles the rate).

    ValueError, naming file and line, for a missing column, a bad number, or times that descend.
    """
    if not (time_scale > 0 and math.isfinite(time_scale)):
        raise ValueError(f"workload.time_scale={time_scale} must be a number above 0")
    arrivals: list[Arrival] = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}:1: no column {', '.join(missing)}; need {','.join(COLUMNS)}")
        for row in reader:
            arrival = _parse(row, f"{path}:{reader.line_num}", time_scale)
            if arrivals and arrival.arrival_s < arrivals[-1].arrival_s:
                raise ValueError(f"{path}:{reader.line_num}: arrival_s is before the line above")
            arrivals.append(arrival)
    if not arrivals:
        raise ValueError(f"{path}:1: the trace has no requests")
    return arrivals


def _parse(row: dict[str, str], where: str, time_scale: float) -> Arrival:
    try:
        arrival_s = float(row["arrival_s"])
        prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: need a number and two whole numbers ({error})") from error
    if not (0 <= arrival_s < math.inf) or prompt < 1 or output < 1:
        raise ValueError(
            f"{where}: arrival_s={arrival_s} must be finite and not negative, prompt_tokens="
            f"{prompt} and output_tokens={output} at least 1"
        )
    return Arrival(arrival_s * time_scale, prompt, output)


def make_arrivals(
    process: str,
    rate: float,
    duration_s: float,
    seed: int = 0,
    cv: float = 1.0,
    prompt_tokens: Lengths | None = None,
    output_tokens: Lengths | None = None,
) -> list[Arrival]:
    """Arrivals of a renewal process of `rate` per second within [0, duration_s).

    `poisson` has exponential gaps, `gamma` gaps of coefficient of variation `cv` (above 1 bursty,
    below 1 regular), `uniform` equal gaps. Lengths default to means of 256 and 128 tokens.
    """
    if process not in PROCESSES:
        raise ValueError(f"workload.arrivals.process={process!r} must be one of {PROCESSES}")
    for name, value in (("rate", rate), ("duration_s", duration_s), ("cv", cv)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"workload.arrivals.{name}={value} must be a number above 0")
    generator = np.random.default_rng(seed)
    blocks, last = [], 0.0
    while last < duration_s:
        # Whole blocks until the end is passed: a fixed block size keeps the draws independent of
        # the duration, so a longer workload begins like a shorter one.
        blocks.append(last + np.cumsum(_gaps(process, rate, cv, generator)))
        last = blocks[-1][-1]
    times = np.concatenate(blocks)
    times = times[times < duration_s]
    prompts = (prompt_tokens or Lengths(256)).draw(np.random.default_rng([seed, 1]), times.size)
    outputs = (output_tokens or Lengths(128)).draw(np.random.default_rng([seed, 2]), times.size)
    return [
        Arrival(*values)
        for values in zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    ]


def _gaps(process: str, rate: float, cv: float, generator: np.random.Generator) -> np.ndarray:
    count = 256
    if process == "uniform":
        return np.full(count, 1 / rate)
    shape = 1.0 if process == "poisson" else 1 / cv**2
    return generator.gamma(shape, 1 / (rate * shape), count)
