"""A made-up world: people with a city, a job and a pet; cities, animals and numbers.

Everything is data and follows from the random generator that is given. What is written and said
about this world is in `documents.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


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
