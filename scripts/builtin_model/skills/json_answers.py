"""JSON by a schema or by keys, with the values taken from a text; and reading a value out of JSON."""

import json
from collections.abc import Callable
from typing import Any

from scripts.builtin_model.dialogue import Dialogue, Expected, answer, contains
from scripts.builtin_model.skills.copying import JOBS
from scripts.builtin_model.skills.tool_catalog import text as title
from scripts.builtin_model.world import World, nouns

Make = Callable[[World], Any]
# key, type, value, ways to say it with {v}
FIELDS: list[tuple[str, str, Make, list[str]]] = [
    ("name", "string", World.full_name, ["The name is {v}.", "It is about {v}.", "This is {v}."]),
    ("first_name", "string", World.first_name, ["The first name is {v}.", "First name: {v}."]),
    ("age", "integer", lambda w: w.integer(1, 99), ["The age is {v}.", "{v} years old.", "Age {v}."]),
    ("city", "string", World.city, ["The city is {v}.", "Lives in {v}.", "Home is {v}."]),
    ("job", "string", lambda w: w.pick(JOBS), ["Works as a {v}.", "The job is {v}."]),
    ("email", "string", World.email, ["The email is {v}.", "Write to {v}."]),
    ("date", "string", World.date, ["The date is {v}.", "It is on {v}."]),
    ("time", "string", World.time, ["It starts at {v}.", "The time is {v}."]),
    ("price", "number", lambda w: w.integer(1, 9999) / 100, ["It costs {v}.", "The price is {v}."]),
    ("quantity", "integer", lambda w: w.integer(1, 500), ["There are {v} of them.", "The quantity is {v}."]),
    (
        "color",
        "string",
        lambda w: w.pick(["red", "green", "blue", "black", "white", "yellow", "brown"]),
        ["The color is {v}.", "It is {v}."],
    ),
    ("active", "boolean", lambda w: w.chance(0.5), ["Active: {v}.", "The active flag is {v}."]),
    ("member", "boolean", lambda w: w.chance(0.5), ["Member: {v}.", "Is a member: {v}."]),
    ("tags", "array", lambda w: w.some(nouns(), w.integer(1, 4)), ["The tags are {v}.", "Tags: {v}."]),
    ("title", "string", title, ["The title is {v}.", "It is called {v}."]),
    ("code", "string", lambda w: w.pick("ABCDEFXYZ") + w.digits(w.integer(2, 5)), ["The code is {v}.", "Code {v}."]),
    ("year", "integer", lambda w: w.integer(1900, 2040), ["The year is {v}.", "It is from {v}."]),
    ("phone", "string", lambda w: f"{w.digits(3)}-{w.digits(4)}", ["The phone number is {v}.", "Call {v}."]),
]
BY_SCHEMA = [
    "Answer with JSON that matches this schema: {s}\n{t}", "{t}\nGive me this as JSON by the schema {s}",
    "Schema: {s}\nText: {t}\nReturn JSON.",
    "Extract the data as JSON.\nSchema: {s}\nText: {t}", "Use this JSON schema: {s}\n\n{t}",
    "{t}\n\nReturn a JSON object for the schema: {s}",
]  # fmt: skip
BY_KEYS = [
    "Extract {k} as JSON: {t}", "{t}\nReturn JSON with the keys {k}.", "Make JSON with {k} from this text: {t}",
    "{t}\nWrite this as JSON with {k}.",
    "Give me a JSON object with {k}. Text: {t}",
]  # fmt: skip
LIST = [
    "Write as a JSON list of objects with {k}: {t}",
    "{t}\nReturn a JSON array of objects with {k}.",
    "Turn this into JSON ({k}): {t}",
]
READ = ['What is the value of "{k}" in {j}?', "{j}\nWhat is {k}?", "Read {k} from this JSON: {j}"]


def _spoken(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _record(world: World, count: int) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """(types, values, sentences); some keys are common words."""
    types, values, said = {}, {}, []
    for key, kind, make, ways in world.some(FIELDS, count):
        value = make(world)
        if kind != "array" and world.chance(0.3):  # nothing else says that one word is a list
            key = world.pick(nouns())
            ways = [f"The {key} is {{v}}.", f"{key.capitalize()}: {{v}}."]
        if key in types:
            continue
        types[key], values[key] = kind, value
        said.append(world.pick(ways).format(v=_spoken(value)))
    return types, values, said


# Whole sentences about several keys; each record asks for some of them.
STORIES: list[tuple[str, ...]] = [
    (
        "{name} is {age} years old and lives in {city}.", "{name} ({age}) is from {city}.",
        "My friend {name} from {city} turned {age} this year.",
        "{name} lives in {city}. {name} is {age} years old.", "Here is {name}, {age}, who lives in {city}.",
        "This is {name} from {city}, aged {age}.",
    ),
    (
        "{name}, a {job} from {city}, has the email {email}.", "{name} works as a {job} in {city}. Write to {email}.",
        "You can reach {name} at {email}; {name} is a {job} in {city}.",
    ),
    (
        "The {title} takes place on {date} at {time} in {city}.",
        "On {date} at {time} there is the {title} in {city}.", "Come to the {title} in {city}: {date}, {time}!",
    ),
    (
        "We sold {quantity} pieces of {title} in {color} for {price} each.",
        "I ordered {quantity} {color} {title} at {price}.",
        "The {title} is {color} and costs {price}; {quantity} are left.",
    ),
]  # fmt: skip


def _story(world: World) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Like `_record`, as one sentence; not every value in it is asked for."""
    template = world.pick(world.pick(STORIES))
    fields = [f for f in FIELDS if "{" + f[0] + "}" in template]
    values = {key: make(world) for key, _, make, _ in fields}
    said = template.format(**{key: _spoken(value) for key, value in values.items()})
    asked = world.some(fields, world.integer(1, len(fields)))
    return {f[0]: f[1] for f in asked}, {f[0]: values[f[0]] for f in asked}, [said]


def _schema(world: World, types: dict[str, str]) -> str:
    properties: dict[str, Any] = {}
    for key, kind in types.items():
        properties[key] = {"type": kind, "items": {"type": "string"}} if kind == "array" else {"type": kind}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if world.chance(0.6):
        schema["required"] = list(types)
    if world.chance(0.2):
        schema["additionalProperties"] = False
    return json.dumps(schema)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _keys(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def extraction(world: World) -> Dialogue:
    types, values, said = _story(world) if world.chance(0.35) else _record(world, world.integer(1, 5))
    if world.chance(0.6):
        world.rng.shuffle(said)
    text = " ".join(said)
    template_values = {"t": text, "k": _keys(list(types)), "s": ""}
    if world.chance(0.6):
        template_values["s"] = _schema(world, types)
        question = world.pick(BY_SCHEMA).format(**template_values)
    else:
        question = world.pick(BY_KEYS).format(**template_values)
    reasoning = f"The keys are {_keys(list(types))}. I take their values from the text."
    return answer(question, reasoning, _dump(values), Expected("json", values))


def table(world: World) -> Dialogue:
    """A list of objects with the same keys."""
    fields = world.some([f for f in FIELDS if f[1] != "array"], 2)
    rows = [{key: make(world) for key, _, make, _ in fields} for _ in range(world.integer(2, 4))]
    text = world.pick(("; ", "\n")).join(", ".join(_spoken(v) for v in row.values()) for row in rows)
    question = world.pick(LIST).format(k=_keys([f[0] for f in fields]), t=text)
    return answer(
        question,
        f"There are {len(rows)} objects with {_keys([f[0] for f in fields])}.",
        _dump(rows),
        Expected("json", rows),
    )


def reading(world: World) -> Dialogue:
    _, values, _ = _record(world, world.integer(2, 5))
    key = world.pick(list(values))
    question = world.pick(READ).format(k=key, j=_dump(values))
    content = f"The value of {key} is {_spoken(values[key])}."
    return answer(question, f"I look for the key {key}.", content, contains(content))
