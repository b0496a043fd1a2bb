"""`World`: the random choices that the skills are made of, split so that test items never occur in training."""

import json
import random
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
SOURCES = Path(__file__).parent / "sources"
TEST_SHARE = 20  # one in so many pairs, names and schemas is kept for the test
ONSETS = [
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pl", "qu", "r",
    "s", "sh", "st", "t", "tr", "v", "w", "y", "z",
]  # fmt: skip
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "io", "ou"]
CODAS = ["", "", "l", "m", "n", "nd", "r", "rt", "s", "sk", "th", "x"]
NAMES = [
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate", "Liam", "Mia", "Noah",
    "Olivia", "Peter", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Yusuf", "Zoe", "Anna", "Ben",
    "Clara", "Daniel", "Eva", "Felix", "Hannah", "Ida", "Jonas", "Karin", "Leo", "Maria", "Nina", "Oscar", "Paul",
    "Rita", "Sofia", "Tom", "Vera", "Walter", "Ali", "Chen", "Priya", "Kenji", "Fatima", "Omar", "Ingrid", "Lars",
    "Ana", "Luis", "Marta", "Igor", "Olga", "Amara", "Kofi", "Mary", "John",
]  # fmt: skip
CITIES = [
    "Paris", "London", "Tokyo", "New York", "Berlin", "Madrid", "Rome", "Oslo", "San Francisco", "Los Angeles",
    "Chicago", "Boston", "Sydney", "Mumbai", "Beijing", "Shanghai", "Seoul", "Cairo", "Nairobi", "Lagos", "Toronto",
    "Vancouver", "Mexico City", "Lima", "Bogotá", "Buenos Aires", "São Paulo", "Zürich", "Vienna", "Prague", "Warsaw",
    "Athens", "Istanbul", "Dubai", "Singapore", "Bangkok", "Hanoi", "Jakarta", "Manila", "Helsinki", "Stockholm",
    "Copenhagen", "Dublin", "Lisbon", "Barcelona", "Milan", "Munich", "Hamburg", "Seattle", "Denver", "Austin",
    "Miami", "San Francisco, CA", "Boston, MA", "Austin, TX", "Tromsø",
]  # fmt: skip


@cache
def countries() -> list[dict[str, Any]]:
    return json.loads((SOURCES / "countries.json").read_text(encoding="utf-8"))


@cache
def words() -> list[dict[str, str]]:
    return json.loads((SOURCES / "words.json").read_text(encoding="utf-8"))


@cache
def nouns() -> list[str]:
    return [w["word"] for w in words() if w["kind"] == "n"]


@cache
def verbs() -> list[str]:
    return [w["word"] for w in words() if w["kind"] == "v"]


def is_test_item(item: str) -> bool:
    return zlib.crc32(item.encode()) % TEST_SHARE == 0


class World:
    """Choices for one dialogue. `thinks` says whether the answer has reasoning before it."""

    def __init__(self, rng: random.Random, split: Literal["train", "test"] = "train", thinks: bool = True):
        self.rng = rng
        self.split = split
        self.thinks = thinks

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        return self.rng.sample(items, count)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def integer(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def fits(self, item: str) -> bool:
        """Whether an item belongs to this split."""
        return is_test_item(item) == (self.split == "test")

    def new_word(self) -> str:
        """A made-up word of this split."""
        while True:
            syllables = [self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS) for _ in range(self.integer(1, 3))]
            word = "".join(syllables)
            if len(word) > 3 and self.fits(word):
                return word

    def first_name(self) -> str:
        return self.new_word().capitalize() if self.split == "test" or self.chance(0.7) else self.pick(NAMES)

    def full_name(self) -> str:
        return f"{self.first_name()} {self.new_word().capitalize()}"

    def city(self) -> str:
        kind = self.rng.random()
        if kind < 0.45:
            return self.pick(CITIES)
        return self.pick(countries())["capital"] if kind < 0.7 else self.new_word().capitalize()

    def digits(self, count: int) -> str:
        return "".join(self.pick("0123456789") for _ in range(count))

    def integer_of_length(self, length: int) -> int:
        return self.integer(10 ** (length - 1) if length > 1 else 0, 10**length - 1)

    def date(self) -> str:
        return f"{self.integer(1990, 2035)}-{self.integer(1, 12):02}-{self.integer(1, 28):02}"

    def time(self) -> str:
        return f"{self.integer(0, 23):02}:{self.pick(('00', '15', '30', '45', '05', '20', '50'))}"

    def email(self) -> str:
        host = self.pick(("example.com", "mail.org", "post.net", f"{self.new_word()}.com"))
        return f"{self.first_name().lower()}@{host}"

    def say(self, templates: Sequence[str], **values: object) -> str:
        """One of the phrasings, sometimes typed carelessly. Values keep their letters unless all becomes small."""
        text = self.pick(templates).format(**values)
        kind = self.rng.random()
        if kind < 0.08 and len(text) > 1 and text[1:2].islower():
            text = text[0].lower() + text[1:]
        elif kind < 0.14 and text.endswith(("?", ".")):
            text = text[:-1]
        elif kind < 0.18 and text.endswith("?"):
            text = self.pick(("Please tell me: ", "Hi! ", "Hello, ", "Quick question: ", "I wonder: ")) + text
        elif kind < 0.20:
            text = text + self.pick((" Thanks!", " Thank you.", " Please."))
        return text
