"""Spelling, reversing, counting letters, capital and small letters."""

from scripts.builtin_model.dialogue import Dialogue, answer, contains
from scripts.builtin_model.world import World, words

SPELL = [
    'Spell the word "{w}".',
    "Spell {w}.",
    "How do you spell {w}?",
    'Can you spell "{w}"?',
    "Spell {w} letter by letter.",
]
REVERSE = [
    'Reverse the word "{w}".',
    "Write {w} backwards.",
    'What is "{w}" spelled backwards?',
    "Reverse {w}.",
    "Spell {w} backwards.",
]
COUNT = [
    'How many letters are in "{w}"?', "How many letters does the word {w} have?", "Count the letters in {w}.",
    "How long is the word {w}?",
]  # fmt: skip
COUNT_ONE = [
    'How many times does the letter "{x}" occur in "{w}"?', "How many {x}'s are in {w}?",
    "Count the letter {x} in {w}.",
    'How often is "{x}" in "{w}"?', "How many {x} are there in {w}?",
]  # fmt: skip
ENDS = ["What is the {p} letter of {w}?", 'What is the {p} letter of "{w}"?', "Which letter is the {p} one in {w}?"]
ORDINALS = ("first", "second", "third", "fourth", "last")
UPPER = ["Write {w} in capital letters.", 'Write "{w}" in upper case.', "Put {w} in capitals."]


def _word(world: World) -> str:
    return world.new_word() if world.chance(0.35) else world.pick(words())["word"]


def spelled(word: str) -> str:
    return "-".join(word)


def spelling(world: World) -> Dialogue:
    word = _word(world)
    if world.chance(0.25):
        content = f"{word.upper()}"
        question = world.say(UPPER, w=word)
        return answer(question, f"{spelled(word)}, in capitals {spelled(word.upper())}.", content, contains(content))
    content = f"{word}: {spelled(word)}"
    work = f"{word} has the letters {' '.join(word)}."
    return answer(world.say(SPELL, w=word), work, content, contains(spelled(word)))


def reversing(world: World) -> Dialogue:
    word = _word(world)
    back = word[::-1]
    work = f"{word} is {spelled(word)}. Backwards: {spelled(back)}."
    content = f"{word} backwards is {back}."
    return answer(
        world.say(REVERSE, w=word), work, content if world.thinks else f"{work}\n{content}", contains(f"is {back}")
    )


def counting(world: World) -> Dialogue:
    word = _word(world)
    kind = world.pick(("all", "one", "one", "place"))
    if kind == "place":
        place = world.pick(ORDINALS)
        letter = word[-1] if place == "last" else word[min(ORDINALS.index(place), len(word) - 1)]
        if place != "last" and ORDINALS.index(place) >= len(word):
            place, letter = "last", word[-1]
        work = f"{word} is {spelled(word)}."
        content = f"The {place} letter of {word} is {letter}."
        question = world.say(ENDS, p=place, w=word)
        return answer(question, work, content if world.thinks else f"{work} {content}", contains(content))
    if kind == "all":
        work = " ".join(f"{letter}{n}" for n, letter in enumerate(word, 1))
        content = f"{word} has {len(word)} letters."
        question = world.say(COUNT, w=word)
        return answer(
            question, f"I count: {work}.", content if world.thinks else f"{work}. {content}", contains(content)
        )
    letter = world.pick(word) if world.chance(0.85) else world.pick("abcdefghijklmnopqrstuvwxyz")
    count, marks = 0, []
    for x in word:
        count += x == letter
        marks.append(f"{x}{count}" if x == letter else x)
    work = " ".join(marks)
    content = f"The letter {letter} occurs {count} time{'' if count == 1 else 's'} in {word}."
    question = world.say(COUNT_ONE, x=letter, w=word)
    return answer(
        question,
        f"I count {letter}: {work}. That is {count}.",
        content if world.thinks else f"{work}. {content}",
        contains(content),
    )


def alphabet(world: World) -> Dialogue:
    letters = "abcdefghijklmnopqrstuvwxyz"
    i = world.integer(1, 24)
    word = world.pick(("after", "before"))
    other = letters[i + (1 if word == "after" else -1)]
    question = world.say(
        ["Which letter comes {p} {x} in the alphabet?", "What letter comes {p} {x}?"], p=word, x=letters[i]
    )
    if world.chance(0.3):
        n = world.integer(1, 26)
        question = world.say(
            ["What is letter {n} of the alphabet?", "Which letter has number {n} in the alphabet?"], n=n
        )
        return answer(
            question, "I know the alphabet.", f"Letter {n} is {letters[n - 1]}.", contains(f"is {letters[n - 1]}")
        )
    return answer(
        question, "I know the alphabet.", f"The letter {word} {letters[i]} is {other}.", contains(f"is {other}")
    )
