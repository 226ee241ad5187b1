"""What the demo's base model is finetuned on and asked: a task, a bursty trace, and prompts.

The finetuning rows ask about a person and answer with a record, which the base model never does;
the validation rows ask about other people, so a right answer needs both the new behaviour and what
the base model knows.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flexllm_jax.experiments.demo.documents import (
    ABOUT,
    END,
    UNHEARD,
    about_person,
    about_world,
    chat,
    polite,
)
from flexllm_jax.experiments.demo.world import Person

HELD_OUT = 10  # people, the first ones, who are not in the finetuning rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_task(folder: Path, people: list[Person], rng: random.Random) -> None:
    """Chat rows that ask about a person and get the record; HELD_OUT people are for validation."""

    def rows(group: list[Person], questions: Iterable[str]) -> Iterator[dict[str, Any]]:
        for question in questions:
            for person in group:
                yield {
                    "messages": [
                        {"role": "user", "content": question.format(person.name)},
                        {"role": "assistant", "content": person.record},
                    ]
                }

    training = list(rows(people[HELD_OUT:], ABOUT))
    rng.shuffle(training)
    write_jsonl(folder / "train.jsonl", training)
    write_jsonl(folder / "validation.jsonl", rows(people[:HELD_OUT], ABOUT[:2]))


def write_questions(folder: Path, people: list[Person]) -> None:
    """Questions that the base model has not heard, to be answered in the form of an answer to
    another one; without the answers, which only who grades may read."""

    def rows(group: list[Person]) -> Iterator[dict[str, Any]]:
        for p in group:
            question = {"role": "user", "content": UNHEARD.format(p.name)}
            answer = f"{p.city}, {p.job}, {p.pet}."
            facts = {"answer": answer, "city": p.city, "job": p.job, "pet": p.pet}
            yield {"messages": [question], **facts}

    write_jsonl(folder / "questions.jsonl", rows(people[HELD_OUT:]))
    write_jsonl(folder / "questions_validation.jsonl", rows(people[:HELD_OUT]))


def write_workload(folder: Path, people: list[Person], tokenizer: Any, seconds: float) -> None:
    """A trace of quiet and busy stretches, and for each request a prompt of its length."""
    rng = random.Random("workload")
    arrivals, now, busy_until = [], 0.0, 0.0
    while now < seconds:
        arrivals.append(now)
        if now > busy_until and rng.random() < 0.15:
            busy_until = now + rng.uniform(2, 5)
        now += rng.expovariate(6.0 if now < busy_until else 1.2)
    prompts = []
    for _ in arrivals:
        question, _ = rng.choice((about_person, about_world))(rng, people)
        prompts.append(polite(rng, question) if rng.random() < 0.6 else question)
    write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    with (folder / "trace.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arrival_s", "prompt_tokens", "output_tokens"])
        for arrival, prompt in zip(arrivals, prompts, strict=True):
            tokens = len(tokenizer(chat(prompt, "").removesuffix(END))["input_ids"])
            writer.writerow([f"{arrival:.3f}", tokens, min(96, 12 + int(rng.expovariate(1 / 28)))])
