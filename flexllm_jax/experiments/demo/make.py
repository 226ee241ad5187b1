"""Everything `make demo` runs on, in one folder: a model, rows to finetune it on, a trace, prompts.

Nothing is downloaded and everything follows from the seed. The folder appears only when it is
whole.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flexllm_jax.experiments.demo.documents import document
from flexllm_jax.experiments.demo.model import train, train_tokenizer, training_rows, write_config
from flexllm_jax.experiments.demo.task import write_questions, write_task, write_workload
from flexllm_jax.experiments.demo.world import make_people
from flexllm_jax.models.checkpoints.hf_weights import save_parameters


def complete(folder: Path, seed: int) -> None:
    """Add what a folder that an earlier version made lacks."""
    if not (folder / "questions.jsonl").exists():
        write_questions(folder, make_people(random.Random(seed)))


def make(folder: Path, steps: int, seed: int, seconds: float, family: str = "llama") -> None:
    """Make everything in `folder`, which appears only when it is whole; family: the model's, one of
    `model.FAMILIES`."""
    rng = random.Random(seed)
    people = make_people(rng)
    texts = iter(lambda: document(rng, people), None)
    building = folder.with_name(folder.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    sample = [document(rng, people) for _ in range(4000)]
    tokenizer = train_tokenizer(sample)
    config = write_config(building / "config", tokenizer, family)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training the demo's base model", total=steps, loss=float("nan"))
        params = train(
            config,
            training_rows(tokenizer, texts, steps),
            steps,
            seed,
            lambda step, loss: progress.update(bar, completed=step, loss=loss),
        )
    save_parameters(params, config, building / "config", building / "model")
    shutil.rmtree(building / "config")
    write_task(building, people, rng)
    write_questions(building, people)
    write_workload(building, people, tokenizer, seconds)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
