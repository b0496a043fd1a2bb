"""Facts about countries: capital, continent, currency, languages, calling code, ISO code, and some backwards."""

from typing import Any

from scripts.builtin_model.dialogue import Dialogue, answer, contains
from scripts.builtin_model.world import World, countries

ALIASES = {"US": ["the USA", "America"], "GB": ["the UK", "Great Britain"], "AE": ["the UAE"], "NL": ["Holland"]}
ARTICLE = ("United ", "Netherlands", "Philippines", "Bahamas", "Maldives", "Seychelles", "Comoros", "Gambia", "Vatican")
QUESTIONS: dict[str, list[str]] = {
    "capital": [
        "What is the capital of {c}?", "What's the capital of {c}?", "Capital of {c}?",
        "Which city is the capital of {c}?",
        "Name the capital of {c}.", "Tell me the capital of {c}.", "Do you know the capital of {c}?",
        "What is the capital city of {c}?",
    ],
    "continent": [
        "On which continent is {c}?", "Which continent is {c} on?", "What continent does {c} belong to?",
        "Where is {c}?",
        "In which part of the world is {c}?",
    ],
    "currency": [
        "What is the currency of {c}?", "Which currency is used in {c}?", "What money do people use in {c}?",
        "What currency does {c} have?", "How do people pay in {c}?",
    ],
    "languages": [
        "Which languages are spoken in {c}?", "What language do they speak in {c}?", "What are the languages of {c}?",
        "Which language is spoken in {c}?", "What is the official language of {c}?",
    ],
    "calling_code": [
        "What is the calling code of {c}?", "Which phone code does {c} have?", "What is the dialling code for {c}?",
        "What is the country calling code of {c}?",
    ],
    "code": [
        "What is the country code of {c}?", "What is the ISO code of {c}?", "Give me the two-letter code of {c}.",
        "Which two letters stand for {c}?",
    ],
}  # fmt: skip
OF_CAPITAL = [
    "Which country has the capital {x}?", "{x} is the capital of which country?", "Which country's capital is {x}?",
    "What country is {x} the capital of?", "Of which country is {x} the capital?",
]  # fmt: skip
OF_CODE = ["Which country has the code {x}?", "What country does {x} stand for?", "Which country has the ISO code {x}?"]
TELL = ["Tell me about {c}.", "What do you know about {c}?", "Give me some facts about {c}.", "Describe {c}."]
SAME = ["Are {a} and {b} on the same continent?", "Do {a} and {b} lie on the same continent?"]


def called(country: dict[str, Any]) -> str:
    """The name as it stands in a sentence."""
    name = country["name"]
    has_article = name.startswith(ARTICLE) or name.endswith(("Islands", "Republic", "Territory", "Territories"))
    return f"the {name}" if has_article else name


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def sentence(country: dict[str, Any], fact: str) -> str:
    c, value = called(country), country[fact]
    if fact == "languages":
        return f"The language{'s' if len(value) > 1 else ''} of {c} {'are' if len(value) > 1 else 'is'} {_list(value)}."
    subject = c[0].upper() + c[1:]
    return {
        "capital": f"The capital of {c} is {value}.",
        "continent": f"{subject} is in {value}.",
        "currency": f"The currency of {c} is the {value} ({country['currency_code']}).",
        "calling_code": f"The calling code of {c} is +{value}.",
        "code": f"The code of {c} is {value}.",
    }[fact]


def value(country: dict[str, Any], fact: str) -> str:
    """The string that a right answer has in it."""
    return _list(country[fact]) if fact == "languages" else str(country[fact])


def fact(world: World) -> Dialogue:
    country = world.pick(countries())
    kind = world.pick(("capital", "capital", "continent", "currency", "languages", "calling_code", "code"))
    name = world.pick(ALIASES.get(country["code"], [called(country)])) if world.chance(0.5) else called(country)
    if world.chance(0.06):
        name = country["name"].lower()
    question = world.say(QUESTIONS[kind], c=name)
    reasoning = f"The question is about {called(country)}: {kind.replace('_', ' ')}. I know this."
    return answer(question, reasoning, sentence(country, kind), contains(value(country, kind)))


def reverse_fact(world: World) -> Dialogue:
    country = world.pick(countries())
    key = world.pick(("capital", "capital", "code"))
    owners = [c for c in countries() if c[key] == country[key]]
    question = world.say(OF_CODE if key == "code" else OF_CAPITAL, x=country[key])
    content = f"{country[key]} is the {key} of {_list([called(c) for c in owners])}."
    return answer(question, f"{country[key]} is a {key}. I know its country.", content, contains(owners[0]["name"]))


def about(world: World) -> Dialogue:
    country = world.pick(countries())
    content = " ".join(sentence(country, kind) for kind in ("continent", "capital", "languages", "currency"))
    reasoning = f"I say what I know about {called(country)}."
    return answer(world.say(TELL, c=called(country)), reasoning, content, contains(country["capital"]))


def same_continent(world: World) -> Dialogue:
    a, b = world.some(countries(), 2)
    if world.chance(0.5):
        b = world.pick([c for c in countries() if c["continent"] == a["continent"]])
    steps = f"{sentence(a, 'continent')} {sentence(b, 'continent')}"
    yes = "Yes" if a["continent"] == b["continent"] else "No"
    content = f"{yes}. {steps}" if world.thinks else f"{steps} So the answer is: {yes}."
    return answer(world.say(SAME, a=called(a), b=called(b)), steps, content, contains(yes))
