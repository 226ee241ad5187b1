"""What is written and said in the demo's world: the text that the base model is trained on.

Most documents are conversations in which a question about a person is answered in two sentences.
Records (`Anna: city = Lima | job = baker | pet = cat`) occur, but never as an answer.
"""

from __future__ import annotations

import random

from flexllm_jax.experiments.demo.world import (
    CITIES,
    COLOURS,
    DAYS,
    NUMBERS,
    PETS,
    Person,
    record,
)

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
ABOUT = (
    "Tell me about {}.",
    "Who is {}?",
    "What do you know about {}?",
    "Describe {}.",
    "Introduce {}, please.",
    "Please say something about {}.",
)
UNHEARD = "Which city, job and pet has {}?"  # in no document
POLITE = (
    "Good morning.",
    "I hope you are well.",
    "It is a fine day, and the sun is in the sky.",
    "I would like to know more about the world.",
    "Please help me.",
)


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
