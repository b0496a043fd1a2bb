"""Two and three turns: what the user said before, and questions that lean on the one before."""

from scripts.builtin_model.dialogue import Dialogue, Message, assistant, contains, number, user
from scripts.builtin_model.skills import countries as facts
from scripts.builtin_model.skills import digits
from scripts.builtin_model.skills.copying import JOBS
from scripts.builtin_model.world import World, countries

# key -> (ways to say it, ways to ask for it, answer)
ABOUT_ME: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "name": (
        ("My name is {v}.", "I am {v}.", "Hi, I'm {v}!", "Call me {v}.", "Hello, my name is {v}.", "my name is {v}"),
        ("What is my name?", "Who am I?", "Do you know my name?", "What's my name?", "Do you remember my name?"),
        "Your name is {v}.",
    ),
    "city": (
        ("I live in {v}.", "I am from {v}.", "My home is {v}."),
        ("Where do I live?", "Where am I from?", "Which city do I live in?"), "You live in {v}.",
    ),
    "age": (("I am {v} years old.", "My age is {v}."), ("How old am I?", "What is my age?"), "You are {v} years old."),
    "color": (
        ("My favourite colour is {v}.", "I like the colour {v}."),
        ("What is my favourite colour?", "Which colour do I like?"), "Your favourite colour is {v}.",
    ),
    "job": (("I work as a {v}.", "I am a {v}."), ("What is my job?", "What do I do for work?"), "You work as a {v}."),
    "pet": (
        ("My dog is called {v}.", "I have a dog, {v}."), ("What is my dog called?", "What is the name of my dog?"),
        "Your dog is called {v}.",
    ),
    "number": (
        ("My lucky number is {v}.", "Remember the number {v}."), ("What was my number?", "Which number did I say?"),
        "Your number is {v}.",
    ),
    "word": (
        ("Remember the word {v}.", "The secret word is {v}."), ("What is the word?", "Which word did I tell you?"),
        "The word is {v}.",
    ),
}  # fmt: skip


def _value(world: World, key: str) -> str:
    return {
        "name": lambda: world.first_name() if world.chance(0.7) else world.full_name(),
        "city": world.city,
        "age": lambda: str(world.integer(5, 95)),
        "color": lambda: world.pick(
            ["red", "green", "blue", "black", "white", "yellow", "brown", "grey", "purple", "orange"]
        ),
        "job": lambda: world.pick(JOBS),
        "pet": world.first_name,
        "number": lambda: str(world.integer(0, 9999)),
        "word": world.new_word,
    }[key]()


def _noted(key: str, value: str) -> str:
    return f"Nice to meet you, {value}!" if key == "name" else "All right, I will remember that."


def recall(world: World) -> Dialogue:
    """The user tells one to three things; the last turn asks for one of them."""
    keys = world.some(list(ABOUT_ME), world.integer(1, 3))
    values = {key: _value(world, key) for key in keys}
    messages: list[Message] = []
    for key in keys:
        messages += [user(world.pick(ABOUT_ME[key][0]).format(v=values[key])), assistant(_noted(key, values[key]))]
    if world.chance(0.12):  # learn to take note as well
        key = keys[-1]
        content = messages[-1]["content"]
        return Dialogue(
            [*messages[:-1], assistant(content, "The user tells me something. I take note.")], contains(content)
        )
    key = world.pick(keys)
    content = ABOUT_ME[key][2].format(v=values[key])
    messages += [user(world.pick(ABOUT_ME[key][1])), assistant(content, f"The user told me: {values[key]}.")]
    return Dialogue(messages, contains(content))


def told_at_once(world: World) -> Dialogue:
    """All in one turn: "I am Anna. I live in Oslo. Where do I live?" """
    keys = world.some(list(ABOUT_ME), world.integer(1, 3))
    values = {key: _value(world, key) for key in keys}
    key = world.pick(keys)
    said = " ".join(world.pick(ABOUT_ME[k][0]).format(v=values[k]) for k in keys)
    content = ABOUT_ME[key][2].format(v=values[key])
    messages = [user(f"{said} {world.pick(ABOUT_ME[key][1])}"), assistant(content, f"The user told me: {values[key]}.")]
    return Dialogue(messages, contains(content))


def next_country(world: World) -> Dialogue:
    """ "And of Norway?" after a question about another country."""
    kind = world.pick(("capital", "capital", "currency", "continent", "languages"))
    chain = world.some(countries(), world.integer(2, 3))
    messages: list[Message] = []
    for i, country in enumerate(chain):
        name = facts.called(country)
        text = (
            world.say(facts.QUESTIONS[kind], c=name)
            if i == 0
            else world.pick(("And {c}?", "What about {c}?", "And for {c}?", "and {c}?")).format(c=name)
        )
        messages += [user(text), assistant(facts.sentence(country, kind))]
    last = chain[-1]
    messages[-1] = assistant(
        facts.sentence(last, kind), f"The question is about {facts.called(last)}: {kind}. I know this."
    )
    return Dialogue(messages, contains(facts.value(last, kind)))


def next_sum(world: World) -> Dialogue:
    """Goes on from the last result."""
    a, b = world.integer(1, 999), world.integer(1, 999)
    total = a + b
    plus = world.chance(0.6)
    c = world.integer(1, 999) if plus else world.integer(1, total)
    messages: list[Message] = [
        user(world.pick(("What is {a} + {b}?", "{a}+{b}", "Add {a} and {b}.")).format(a=a, b=b)),
        assistant(f"{a} + {b} = {total}"),
    ]
    ways = (
        ("And {c} more?", "Add {c} to that.", "Now add {c}.", "Plus {c}?")
        if plus
        else ("Now subtract {c}.", "Minus {c}?", "Take {c} away from that.")
    )
    result, sign = (total + c, "+") if plus else (total - c, "-")
    steps = digits.add_steps(total, c) if plus else digits.difference_steps(total, c)
    equation = f"{total} {sign} {c}"
    content = f"{equation} = {result}"
    if not world.thinks and max(total, c) >= 100:
        content = f"{steps}\n{content}"
    messages += [user(world.pick(ways).format(c=c)), assistant(content, f"{equation}\n{steps}")]
    return Dialogue(messages, number(result))


def with_history(world: World, earlier: list[Dialogue], last: Dialogue) -> Dialogue:
    """Other questions and answers stand before the last one; their thinking is gone, as the template drops it."""
    messages: list[Message] = []
    for dialogue in earlier:
        for message in dialogue.messages:
            messages.append({k: v for k, v in message.items() if k != "reasoning_content"})
    return Dialogue(messages + last.messages, last.expected, last.tools, last.mode, last.skill, False)
