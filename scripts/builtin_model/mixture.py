"""Which skills there are and how often, and how one dialogue is made from a seed and an index."""

import random
from collections.abc import Callable
from typing import Literal

from scripts.builtin_model.dialogue import Dialogue, Mode
from scripts.builtin_model.skills import (
    arithmetic,
    chats,
    copying,
    countries,
    definitions,
    identity,
    json_answers,
    letters,
    lists,
    measures,
    refusals,
    tools,
)
from scripts.builtin_model.world import World

Skill = Callable[[World], Dialogue]
# skill -> (generator, weight: documents in a thousand, about)
SKILLS: dict[str, tuple[Skill, float]] = {
    "addition": (arithmetic.addition, 90),
    "subtraction": (arithmetic.subtraction, 90),
    "three numbers": (arithmetic.three_numbers, 14),
    "comparison": (arithmetic.comparison, 20),
    "multiplication": (arithmetic.multiplication, 30),
    "country facts": (countries.fact, 130),
    "country reverse": (countries.reverse_fact, 30),
    "country about": (countries.about, 25),
    "continents": (countries.same_continent, 10),
    "definitions": (definitions.meaning, 120),
    "word for": (definitions.word_for, 25),
    "units": (measures.units, 15),
    "weekdays": (measures.weekdays, 15),
    "months": (measures.months, 15),
    "clock": (measures.clock, 10),
    "spelling": (letters.spelling, 25),
    "reversing": (letters.reversing, 25),
    "counting letters": (letters.counting, 25),
    "alphabet": (letters.alphabet, 6),
    "sorting": (lists.sorting, 25),
    "lists": (lists.picking, 20),
    "copying": (copying.repeating, 30),
    "lookup": (copying.lookup, 25),
    "tool calls": (tools.calling, 60),
    "tool answers": (tools.answering, 50),
    "no fitting tool": (tools.unfitting, 12),
    "json": (json_answers.extraction, 75),
    "json lists": (json_answers.table, 12),
    "json reading": (json_answers.reading, 12),
    "recall": (chats.recall, 30),
    "told at once": (chats.told_at_once, 12),
    "next country": (chats.next_country, 15),
    "next sum": (chats.next_sum, 15),
    "small talk": (identity.small_talk, 18),
    "persona": (identity.persona, 6),
    "refusals": (refusals.refusal, 55),
}
NAMES = list(SKILLS)
WEIGHTS = [weight for _, weight in SKILLS.values()]
MODES: tuple[tuple[Mode, float], ...] = (("on", 0.7), ("off", 0.18), ("no_think", 0.12))
HISTORY_SHARE = 0.12  # of the dialogues that may stand after others
TOOLS_SHARE = 0.05  # have tools at hand that they do not need
SYSTEM_SHARE = 0.15
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.",
    "Be brief.",
    "You are an assistant. Answer the questions of the user.", "You are Qwen, a helpful assistant.",
    "Be precise and honest.", "You are a helpful AI.",
    "You answer questions.", "Help the user.", "You are a careful assistant that thinks before it answers.",
)  # fmt: skip
LEANS_ON_NOTHING = [
    n for n in NAMES if n not in ("tool calls", "tool answers", "no fitting tool", "persona", "json lists")
]


def make(
    seed: int, index: int, split: Literal["train", "test"] = "train", skill: str | None = None, mode: Mode | None = None
) -> Dialogue:
    """The dialogue of one index; the same for the same arguments, whatever else is made."""
    rng = random.Random(f"{split}/{seed}/{index}/{skill}/{mode}")
    mode = mode or rng.choices([m for m, _ in MODES], [w for _, w in MODES])[0]
    name = skill or rng.choices(NAMES, WEIGHTS)[0]
    world = World(rng, split, thinks=mode == "on")
    dialogue = SKILLS[name][0](world)
    dialogue.skill, dialogue.mode = name, mode
    return _framed(world, dialogue, is_plain=skill is not None)


def _framed(world: World, dialogue: Dialogue, is_plain: bool) -> Dialogue:
    """System prompt, history, tools that are not needed, and the switches of Qwen3; `is_plain`: only the switches."""
    name, mode = dialogue.skill, dialogue.mode
    if not is_plain and dialogue.can_be_history:
        if world.chance(TOOLS_SHARE) and name not in ("refusals", "units", "clock"):
            dialogue = tools.offer(world, dialogue)
        if name not in ("refusals", "recall") and world.chance(HISTORY_SHARE):
            count = world.pick((1, 1, 2, 2, 3, 5))
            earlier = [
                SKILLS[world.pick(LEANS_ON_NOTHING)][0](World(world.rng, world.split, True)) for _ in range(count)
            ]
            dialogue = chats.with_history(world, earlier, dialogue)
    has_system = dialogue.messages[0]["role"] == "system"
    if not is_plain and not has_system and world.chance(SYSTEM_SHARE):
        dialogue.messages.insert(0, {"role": "system", "content": world.pick(SYSTEM_PROMPTS)})
    _switch(world, dialogue, mode)
    return dialogue


def _switch(world: World, dialogue: Dialogue, mode: Mode) -> None:
    """Writes /think or /no_think where the mode wants it, and takes reasoning away where it has none."""
    last_user = next(m for m in reversed(dialogue.messages) if m["role"] == "user")
    first = dialogue.messages[0]
    if mode == "no_think":
        in_system = first["role"] == "system" and world.chance(0.3)
        where = first if in_system else last_user
        where["content"] += world.pick((" /no_think", " /no_think", "\n/no_think", "/no_think"))
    elif world.chance(0.08):
        last_user["content"] += " /think"  # with the block in the prompt (off) it changes nothing, as in Qwen3
    if mode != "on":
        for message in dialogue.messages:
            message.pop("reasoning_content", None)
