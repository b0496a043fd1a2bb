"""Repeating unseen text exactly, and finding a value in a short text."""

from scripts.builtin_model.dialogue import Dialogue, answer, contains, exact
from scripts.builtin_model.world import World, nouns, verbs

REPEAT = [
    "Repeat after me: {x}", "Say exactly: {x}", "Repeat this: {x}", "Copy this text: {x}", "Write exactly this: {x}",
    'Say "{x}".',
    "Please repeat: {x}", "Echo: {x}", "Say {x}",
]  # fmt: skip
FIELDS = {
    "phone number": ["The phone number of {n} is {v}.", "You can call {n} at {v}."],
    "room": ["{n} is in room {v}.", "You find {n} in room {v}."],
    "email": ["The email of {n} is {v}.", "Write to {n} at {v}."],
    "city": ["{n} lives in {v}.", "The home of {n} is {v}."],
    "age": ["{n} is {v} years old.", "{n} turned {v} this year."],
    "code": ["The code of {n} is {v}.", "{n} uses the code {v}."],
    "job": ["{n} works as a {v}.", "{n} is a {v}."],
}
ASK = {
    "phone number": "What is the phone number of {n}?", "room": "In which room is {n}?",
    "email": "What is the email of {n}?",
    "city": "Where does {n} live?", "age": "How old is {n}?", "code": "What is the code of {n}?",
    "job": "What is the job of {n}?",
}  # fmt: skip
JOBS = [
    "teacher", "nurse", "baker", "pilot", "farmer", "doctor", "cook", "driver", "painter", "writer", "singer",
    "engineer", "lawyer", "clerk", "judge", "dentist",
]  # fmt: skip


def value(world: World, field: str) -> str:
    return {
        "phone number": lambda: f"{world.digits(3)}-{world.digits(4)}",
        "room": lambda: str(world.integer(1, 999)),
        "email": world.email,
        "city": world.city,
        "age": lambda: str(world.integer(4, 96)),
        "code": lambda: (
            world.pick("ABCDEFGHKLMNPRSTXZ") + world.pick("ABCDEFGHKLMNPRSTXZ") + world.digits(world.integer(2, 5))
        ),
        "job": lambda: world.pick(JOBS),
    }[field]()


def sentence(world: World) -> str:
    """Nonsense with names, numbers and words in a row."""
    parts = []
    for _ in range(world.integer(1, 8)):
        kind = world.integer(0, 8)
        parts.append(
            [
                world.first_name, world.new_word, lambda: world.digits(world.integer(1, 7)),
                lambda: world.pick(nouns()),
                lambda: world.pick(verbs()), world.city, lambda: value(world, "code"), world.email,
                lambda: "".join(world.pick("abcdefghijklmnopqrstuvwxyz") for _ in range(world.integer(2, 8))),
            ][kind]()
        )  # fmt: skip
    return " ".join(parts)


def repeating(world: World) -> Dialogue:
    text = sentence(world)
    return answer(world.pick(REPEAT).format(x=text), "I repeat the text as it is.", text, exact(text))


def _looked_through(people: list[str], wanted: str) -> str:
    """The names of the text in order, each beside the wanted one, up to that one."""
    lines = []
    for name in people:
        lines.append(f"{name} = {wanted}? {'Yes' if name == wanted else 'No'}.")
        if name == wanted:
            break
    return "\n".join(lines)


def lookup(world: World) -> Dialogue:
    field = world.pick(list(FIELDS))
    people = list(dict.fromkeys(world.first_name() for _ in range(world.integer(1, 4))))
    values = [value(world, field) for _ in people]
    facts = [world.pick(FIELDS[field]).format(n=n, v=v) for n, v in zip(people, values, strict=True)]
    i = world.integer(0, len(people) - 1)
    asked = ASK[field].format(n=people[i])
    text = " ".join(facts)
    question = f"{text} {asked}" if world.chance(0.6) else f"{asked}\n{text}"
    if world.chance(0.3):
        stranger = world.first_name()
        if stranger not in people:
            question = question.replace(asked, ASK[field].format(n=stranger))
            return answer(
                question,
                f"{_looked_through(people, stranger)}\nNobody else is there.",
                f"The text does not say it about {stranger}.",
                contains("does not say"),
            )
    names = {
        "city": "{n} lives in {v}.",
        "age": "{n} is {v} years old.",
        "room": "{n} is in room {v}.",
        "job": "{n} is a {v}.",
    }
    content = names.get(field, "The " + field + " of {n} is {v}.").format(n=people[i], v=values[i])
    thought = f"{_looked_through(people, people[i])}\nIt says: {facts[i]}"
    return answer(question, thought, content, contains(values[i]))
