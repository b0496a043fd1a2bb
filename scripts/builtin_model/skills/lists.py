"""Sorting, picking, counting and joining lists of words and numbers."""

from scripts.builtin_model.dialogue import Dialogue, answer, contains, exact, number
from scripts.builtin_model.world import World, nouns

SORT_NUMBERS = [
    "Sort these numbers: {x}",
    "Sort {x} from small to large.",
    "Put in order: {x}",
    "Sort the numbers {x}.",
    "Order these numbers: {x}",
]
SORT_DOWN = [
    "Sort these numbers from large to small: {x}",
    "Sort {x} in descending order.",
    "Put the numbers {x} in descending order.",
]
SORT_WORDS = [
    "Sort these words alphabetically: {x}",
    "Put in alphabetical order: {x}",
    "Sort alphabetically: {x}",
    "Sort the words {x}.",
]
LARGEST = ["What is the largest of {x}?", "Which is the largest number: {x}?", "What is the maximum of {x}?"]
SMALLEST = ["What is the smallest of {x}?", "Which is the smallest number: {x}?", "What is the minimum of {x}?"]
COUNT = ["How many words are in this list: {x}?", "Count the items: {x}", "How many items are in the list {x}?"]
NTH = ["What is the {p} item of the list {x}?", "Which word is {p} in the list: {x}?", "Take the {p} word of: {x}"]
ORDINALS = ("first", "second", "third", "last")


def _numbers(world: World, high: int, count: int) -> list[int]:
    """Different numbers in an order that belongs to this split."""
    while True:
        items = world.some(range(high + 1), count)
        if world.fits(str(items)):
            return items


def _inserted(items: list[int], descending: bool) -> str:
    """Insertion sort as text: each number goes into the list so far, in brackets where it is new.

    Before each number only one question is open: does the new one stand here, or the next old one?
    """
    done, steps = items[:1], [f"[{items[0]}]"]
    for item in items[1:]:
        done = sorted([*done, item], reverse=descending)
        steps.append(f"{item}: " + " ".join(f"[{x}]" if x == item else str(x) for x in done))
    return f"From {'large to small' if descending else 'small to large'}.\n" + "\n".join(steps)


def _by_letter(words: list[str]) -> str:
    """The words behind their first letters, then the letters in order: a word is looked up by its letter."""
    letters = " ".join(sorted(word[0] for word in words))
    return f"{', '.join(f'{word[0]} {word}' for word in words)}.\nLetters in order: {letters}."


def sorting(world: World) -> Dialogue:
    count = world.integer(3, 6)
    if world.chance(0.6):
        items: list = _numbers(world, world.pick((9, 20, 99, 99, 999)), count)
        descending = world.chance(0.3)
        templates = SORT_DOWN if descending else SORT_NUMBERS
        work = _inserted(items, descending)
    else:
        items, descending = [], False
        while len(items) < count:  # other first letters, so that one glance orders them
            word = world.pick(nouns())
            if all(word[0] != other[0] for other in items):
                items.append(word)
        templates, work = SORT_WORDS, _by_letter(items)
    content = ", ".join(map(str, sorted(items, reverse=descending)))
    question = world.say(templates, x=", ".join(map(str, items)))
    if world.thinks:
        return answer(question, work, content, exact(content))
    return answer(question, "", f"{work}\nSorted: {content}.", contains(f"Sorted: {content}."))


def picking(world: World) -> Dialogue:
    kind = world.pick(("largest", "smallest", "count", "nth"))
    if kind in ("largest", "smallest"):
        items = _numbers(world, world.pick((9, 99, 999)), world.integer(3, 6))
        best = max(items) if kind == "largest" else min(items)
        work, seen = [], items[0]
        for item in items[1:]:
            new = max(seen, item) if kind == "largest" else min(seen, item)
            work.append(f"{seen} and {item}: {new}")
            seen = new
        question = world.say(LARGEST if kind == "largest" else SMALLEST, x=", ".join(map(str, items)))
        content = f"The {kind} number is {best}."
        steps = ", ".join(work) + "."
        return answer(question, steps, content if world.thinks else f"{steps} {content}", number(best))
    words = world.some(nouns(), world.integer(3, 8))
    joined = ", ".join(words)
    if kind == "count":
        work = ", ".join(f"{n} {word}" for n, word in enumerate(words, 1)) + "."
        content = f"The list has {len(words)} items."
        return answer(
            world.say(COUNT, x=joined), work, content if world.thinks else f"{work} {content}", contains(content)
        )
    place = world.pick(ORDINALS)
    word = words[-1] if place == "last" else words[ORDINALS.index(place)]
    question = world.say(NTH, p=place, x=joined)
    return answer(
        question, f"The list is {joined}. The {place} is {word}.", f"The {place} one is {word}.", contains(f"is {word}")
    )
