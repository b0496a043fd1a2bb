"""Meanings of common words, and the word for a meaning."""

from collections import Counter
from functools import cache
from typing import Any

from scripts.builtin_model.dialogue import Dialogue, answer, contains
from scripts.builtin_model.world import World, words

MEANING = [
    'What does "{w}" mean?', "What does the word {w} mean?", "Define {w}.", 'Define the word "{w}".',
    "What is the meaning of {w}?",
    "Explain the word {w}.", "Give a definition of {w}.", "What does {w} mean?", "What is the definition of {w}?",
]  # fmt: skip
MEANING_OF_NOUN = ["What is {a} {w}?", "What's {a} {w}?", "Tell me what {a} {w} is."]
WORD = [
    'Which word means "{d}"?', 'What is a word for "{d}"?', "What {k} means: {d}?", 'Find a {k} that means "{d}".',
]  # fmt: skip
KINDS = {"n": "noun", "v": "verb", "a": "adjective"}


@cache
def _unambiguous() -> list[dict[str, Any]]:
    """The words whose meaning no other word has."""
    owners = Counter(w["definition"] for w in words())
    return [w for w in words() if owners[w["definition"]] == 1]


def _a(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def meaning(world: World) -> Dialogue:
    entry = world.pick(words())
    word, kind = entry["word"], KINDS[entry["kind"]]
    templates = MEANING_OF_NOUN if kind == "noun" and world.chance(0.25) else MEANING
    question = world.say(templates, w=word, a=_a(word))
    content = f"{word} ({kind}): {entry['definition']}."
    return answer(
        question, f'The user asks what "{word}" means. It is {_a(kind)} {kind}.', content, contains(entry["definition"])
    )


def word_for(world: World) -> Dialogue:
    entry = world.pick(_unambiguous())
    question = world.say(WORD, d=entry["definition"], k=KINDS[entry["kind"]])
    content = f"The word is {entry['word']}."
    return answer(question, "I look for the word with this meaning.", content, contains(content))
