"""Make what `make demo` runs on: a small language model, and a task it does not know.

A Llama of 1.8 million parameters is trained for about a minute on a made-up world (people with a
city, a job and a pet; cities, animals, numbers) and written as a Hugging Face checkpoint. Asked
about a person it answers in two sentences. The finetuning rows ask the same and answer with a
record (`Anna: city = Lima | job = baker | pet = cat`), which it never does; the validation rows ask
about other people, so a right answer needs both the new behaviour and what the base model knows.
Beside them lie a bursty trace and prompts. Nothing is downloaded, everything follows from the
seed, and a folder that exists is left alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.hf_weights import abstract_parameters, save_parameters

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 1024
ROW = 128  # tokens of a training row
ROWS_PER_STEP = 8
HELD_OUT = 10  # people, the first ones, who are not in the finetuning rows
END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# --- the world


def words(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


WOMEN = words(
    "Ada Anna Beth Cara Clara Dina Elsa Emma Flora Grace Hana Helen Iris Jane Kate Laura Lena Lucy "
    "Mara Mia Nora Olga Petra Rosa Sara"
)
MEN = words(
    "Adam Alan Ben Bruno Carl David Emil Eric Felix Frank Hugo Ivan Jack James Kurt Leo Louis Mark "
    "Noah Oscar Paul Peter Simon Tom Walter"
)
CITIES = {
    "Paris": ("France", "sparrow"),
    "Lima": ("Peru", "pelican"),
    "Oslo": ("Norway", "gull"),
    "Cairo": ("Egypt", "ibis"),
    "Rome": ("Italy", "swift"),
    "Delhi": ("India", "peacock"),
    "Tokyo": ("Japan", "crane"),
    "Berlin": ("Germany", "hawk"),
    "Madrid": ("Spain", "stork"),
    "Athens": ("Greece", "owl"),
    "Dublin": ("Ireland", "robin"),
    "Quito": ("Ecuador", "condor"),
}
JOBS = words("baker doctor farmer painter pilot sailor singer teacher tailor writer")
COLOURS = words("black blue brown golden green grey red white")
PETS = {
    "cat": ("fish", "sleeps in the sun"),
    "dog": ("meat", "runs in the park"),
    "goat": ("grass", "climbs on the rocks"),
    "hen": ("corn", "walks in the yard"),
    "horse": ("hay", "runs over the hills"),
    "mouse": ("cheese", "hides in the wall"),
    "parrot": ("fruit", "sings in the tree"),
    "rabbit": ("carrots", "jumps in the garden"),
    "snake": ("eggs", "lies on the stones"),
    "turtle": ("leaves", "swims in the pond"),
}
NUMBERS = words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ABOUT = (
    "Tell me about {}.",
    "Who is {}?",
    "What do you know about {}?",
    "Describe {}.",
    "Introduce {}, please.",
    "Please say something about {}.",
)
POLITE = (
    "Good morning.",
    "I hope you are well.",
    "It is a fine day, and the sun is in the sky.",
    "I would like to know more about the world.",
    "Please help me.",
)


@dataclass(frozen=True)
class Person:
    """Somebody in the world, and all there is to know."""

    name: str
    pronoun: str
    city: str
    job: str
    pet: str

    @property
    def sentence(self) -> str:
        """How the base model answers a question about the person."""
        return (
            f"{self.name} lives in {self.city} and works as a {self.job}. "
            f"{self.pronoun} has a {self.pet}."
        )

    @property
    def record(self) -> str:
        """How the finetuned model answers it."""
        return f"{self.name}: {record(city=self.city, job=self.job, pet=self.pet)}"


def record(**fields: str) -> str:
    """Facts as data."""
    return " | ".join(f"{field} = {value}" for field, value in fields.items())


def make_people(rng: random.Random) -> list[Person]:
    """Everybody, in random order."""
    people = [
        Person(name, pronoun, rng.choice(list(CITIES)), rng.choice(JOBS), rng.choice(list(PETS)))
        for names, pronoun in ((WOMEN, "She"), (MEN, "He"))
        for name in names
    ]
    rng.shuffle(people)
    return people


# --- what is written and said in it


def chat(question: str, answer: str) -> str:
    """A conversation as the chat template renders it."""
    return f"{USER}{question}{END}{ASSISTANT}{answer}{END}"


def polite(rng: random.Random, question: str) -> str:
    """A longer way to ask."""
    first = rng.randrange(len(POLITE))
    return " ".join([*POLITE[first:], question])


def about_person(rng: random.Random, people: list[Person]) -> tuple[str, str]:
    """A question about a person, and its answer in prose."""
    p = rng.choice(people)
    if rng.random() < 0.6:
        return rng.choice(ABOUT).format(p.name), p.sentence
    return rng.choice(
        [
            (f"Where does {p.name} live?", f"{p.name} lives in {p.city}."),
            (f"What is the job of {p.name}?", f"{p.name} works as a {p.job}."),
            (f"Which pet does {p.name} have?", f"{p.name} has a {p.pet}."),
            (f"Name the city, job and pet of {p.name}.", f"{p.city}, {p.job}, {p.pet}."),
            (f"Name the pet, job and city of {p.name}.", f"{p.pet}, {p.job}, {p.city}."),
        ]
    )


def about_world(rng: random.Random, people: list[Person]) -> tuple[str, str]:
    """A question about cities, animals or numbers, and its answer."""
    city, (country, bird) = rng.choice(list(CITIES.items()))
    pet, (food, habit) = rng.choice(list(PETS.items()))
    low = rng.randrange(12)
    high = rng.randrange(low + 2, min(low + 8, 20))
    return rng.choice(
        [
            (f"Where is {city}?", f"{city} is a city in {country}."),
            (f"Which bird lives in {city}?", f"The bird of {city} is the {bird}."),
            (f"What does a {pet} eat?", f"A {pet} eats {food}."),
            (f"What does a {pet} do all day?", f"A {pet} {habit}."),
            (
                f"What comes after {NUMBERS[low]}?",
                f"After {NUMBERS[low]} comes {NUMBERS[low + 1]}.",
            ),
            (
                f"Count from {NUMBERS[low]} to {NUMBERS[high]}.",
                ", ".join(NUMBERS[low : high + 1]).capitalize() + ".",
            ),
        ]
    )


def story(rng: random.Random, people: list[Person]) -> str:
    """A few sentences about a person."""
    p = rng.choice(people)
    city, (_, bird) = rng.choice(list(CITIES.items()))
    food, habit = PETS[p.pet]
    sentences = [
        f"{p.name}, the {p.job} from {p.city}, went to {city} and saw a {bird}.",
        f"{p.pronoun} has a {p.pet}, and the {p.pet} eats {food}.",
        f"On {rng.choice(DAYS)} {p.name} was in {city}, but {p.pronoun.lower()} lives in {p.city}.",
        f"The {p.pet} of {p.name} {habit}.",
        f"{p.name} is a {p.job} and likes {rng.choice(COLOURS)} houses.",
    ]
    return " ".join(rng.sample(sentences, rng.randint(1, 3)))


def data(rng: random.Random, people: list[Person]) -> str:
    """A line of data: the base model has seen records, but never as an answer."""
    city, (country, bird) = rng.choice(list(CITIES.items()))
    pet, (food, _) = rng.choice(list(PETS.items()))
    p = rng.choice(people)
    things = [record(place=city, country=country, bird=bird), record(animal=pet, food=food)]
    return rng.choice([*things, *[p.record] * 4])


def document(rng: random.Random, people: list[Person]) -> str:
    """One document of the training text, ended."""
    kind = rng.random()
    if kind < 0.70:
        question, answer = (about_person if kind < 0.38 else about_world)(rng, people)
        if rng.random() < 0.05:
            question = polite(rng, question)
        return chat(question, answer)
    if kind < 0.77:
        return story(rng, people) + END
    if kind < 0.81:
        return " ".join(rng.choice((about_person, about_world))(rng, people)) + END
    return data(rng, people) + END


# --- the model


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template; turns and documents end with its EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )


def write_config(folder: Path, tokenizer: Any) -> ModelConfig:
    """Write config.json, generation_config.json and the tokenizer; return the config as read."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig.from_hf(folder)


def initial_parameters(config: ModelConfig, seed: int) -> Any:
    """Random float32 parameters: norms 1, embeddings 0.02, kernels by fan-in, outputs smaller."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [getattr(key, "key", None) for key in path]
        if len(shape.shape) == 1:
            return np.ones(shape.shape, np.float32)
        scale = 0.02 if "embed" in names else shape.shape[0] ** -0.5
        if "o" in names or "down" in names:
            scale /= (2 * config.num_layers) ** 0.5
        return rng.normal(0, scale, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_parameters(config, jnp.float32))


def mean_loss(decoder: Decoder, params: Any, rows: jax.Array, documents: jax.Array) -> jax.Array:
    """Next-token cross-entropy over rows [B, S+1] of token ids.

    Attention is causal and stays within a document; `documents` [B, S] numbers them.
    """
    config, (batch, length) = decoder.config, documents.shape
    mask = (documents[:, :, None] == documents[:, None, :])[:, None]  # [B, 1, S, S]
    x = decoder.embed(params, rows[:, :-1].reshape(-1))  # [T, D], T = B * S
    angles = decoder.angles(jnp.tile(jnp.arange(length), batch))
    for layer_params in params["layers"]:
        layer = decoder.layer(layer_params)
        q, k, v = (
            heads.reshape(batch, length, -1, config.head_dim)
            for heads in layer.attention_inputs(x, angles)
        )
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
        x = layer.attention_outputs(x, attended.reshape(batch * length, -1, config.head_dim))
    losses = optax.softmax_cross_entropy_with_integer_labels(
        decoder.logits(params, x), rows[:, 1:].reshape(-1)
    )
    return losses.mean()


def training_rows(
    tokenizer: Any, texts: Iterator[str], steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (token ids [B, S+1], document numbers [B, S]): documents in a row, the last one cut.

    Every document stands alone: other people's documents before it would hide for long which name
    a fact belongs to.
    """
    for _ in range(steps):
        rows = np.zeros((ROWS_PER_STEP, ROW + 1), np.int32)
        documents = np.zeros((ROWS_PER_STEP, ROW + 1), np.int32)
        for row, numbers in zip(rows, documents, strict=True):
            at = number = 0
            while at <= ROW:
                tokens = tokenizer(next(texts))["input_ids"][: ROW + 1 - at]
                row[at : at + len(tokens)] = tokens
                numbers[at : at + len(tokens)] = number
                at, number = at + len(tokens), number + 1
        yield rows, documents[:, :-1]


def train(
    config: ModelConfig,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
) -> Any:
    """Train with Muon, AdamW for what is no matrix; `report(step, loss)` after each step.

    Muon (Jordan et al. 2024) needs half of AdamW's steps here.
    """
    decoder = Decoder(config, jnp.dtype(jnp.float32))
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, min(20, steps // 5), steps, 2.5e-4)

    def kind(path: tuple[Any, ...], leaf: jax.Array) -> str:
        matrix = leaf.ndim == 2 and getattr(path[0], "key", None) != "embed"
        return "muon" if matrix else "adamw"

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {
                "muon": optax.contrib.muon(lambda step: 5 * rate(step)),
                "adamw": optax.adamw(rate, b2=0.98, weight_decay=0.0),
            },
            lambda params: jax.tree_util.tree_map_with_path(kind, params),
        ),
    )

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda p: mean_loss(decoder, p, *batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.asarray, initial_parameters(config, seed))
    state = optimizer.init(params)
    for index, batch in enumerate(batches):
        params, state, loss = step(params, state, batch)
        report(index + 1, float(loss))
    return params


# --- the task and the workload


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


# --- all of it


def make(folder: Path, steps: int, seed: int, seconds: float) -> None:
    """Make everything in `folder`, which appears only when it is whole."""
    rng = random.Random(seed)
    people = make_people(rng)
    texts = iter(lambda: document(rng, people), None)
    building = folder.with_name(folder.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    sample = [document(rng, people) for _ in range(4000)]
    tokenizer = train_tokenizer(sample)
    config = write_config(building / "config", tokenizer)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
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
    write_workload(building, people, tokenizer, seconds)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/demo-world", help="folder to make")
    parser.add_argument("--steps", type=int, default=210, help="training steps of the base model")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the trace")
    parser.add_argument("--seed", type=int, default=0, help="seeds all of it")
    parser.add_argument("--force", action="store_true", help="make it again if it exists")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seconds <= 0:
        parser.error("--steps and --seconds must be positive")
    if options.out.exists() and not options.force:
        print(f"{options.out} exists; --force makes it again")
        return 0
    make(options.out, options.steps, options.seed, options.seconds)
    print(f"made {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
