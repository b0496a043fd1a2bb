"""Which skills there are and how often, and how one dialogue is made from a seed and an index."""

import random
from collections.abc import Callable
from typing import Literal

from scripts.builtin_model.dialogue import Dialogue, Message, Mode
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
    "addition": (arithmetic.addition, 65),
    "subtraction": (arithmetic.subtraction, 65),
    "three numbers": (arithmetic.three_numbers, 14),
    "comparison": (arithmetic.comparison, 20),
    "multiplication": (arithmetic.multiplication, 30),
    "country facts": (countries.fact, 90),
    "country reverse": (countries.reverse_fact, 30),
    "country about": (countries.about, 25),
    "continents": (countries.same_continent, 10),
    "definitions": (definitions.meaning, 95),
    "word for": (definitions.word_for, 80),
    "units": (measures.units, 15),
    "weekdays": (measures.weekdays, 15),
    "months": (measures.months, 15),
    "clock": (measures.clock, 10),
    "spelling": (letters.spelling, 45),
    "reversing": (letters.reversing, 50),
    "counting letters": (letters.counting, 30),
    "alphabet": (letters.alphabet, 6),
    "sorting": (lists.sorting, 65),
    "lists": (lists.picking, 30),
    "copying": (copying.repeating, 65),
    "lookup": (copying.lookup, 55),
    "tool calls": (tools.calling, 100),
    "tool answers": (tools.answering, 38),
    "no fitting tool": (tools.unfitting, 30),
    "json": (json_answers.extraction, 80),
    "json lists": (json_answers.table, 16),
    "json reading": (json_answers.reading, 16),
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
MODES: tuple[tuple[Mode, float], ...] = (("on", 0.62), ("off", 0.18), ("no_think", 0.20))
Frame = Literal["plain", "any", "history"]  # plain: only switches; any: as in training; history: turns before it
SWITCHES = {"on": "/think", "no_think": "/no_think"}
HISTORY_SHARE = 0.15  # of the dialogues that may stand after others
EARLIER_SWITCH_SHARE = 0.3  # of the system prompts and of the turns before the last one
NO_SWITCHES = (" /", " /no", " no_think", " /not", " /nothing", " /yes", " think", " /t", "/", " no think")
NO_SWITCH_SKILLS = ("addition", "country facts", "definitions", "recall", "small talk", "refusals", "spelling", "units")
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
    seed: int,
    index: int,
    split: Literal["train", "test"] = "train",
    skill: str | None = None,
    mode: Mode | None = None,
    frame: Frame | None = None,
) -> Dialogue:
    """The dialogue of one index; the same for the same arguments, whatever else is made.

    Args:
      frame: what stands around the question; None: "plain" for a given skill, else "any".
    """
    rng = random.Random(f"{split}/{seed}/{index}/{skill}/{mode}")
    mode = mode or rng.choices([m for m, _ in MODES], [w for _, w in MODES])[0]
    name = skill or rng.choices(NAMES, WEIGHTS)[0]
    world = World(rng, split, thinks=mode == "on")
    dialogue = SKILLS[name][0](world)
    dialogue.skill, dialogue.mode = name, mode
    return _framed(world, dialogue, frame or ("plain" if skill else "any"))


def _framed(world: World, dialogue: Dialogue, frame: Frame) -> Dialogue:
    """System prompt, history, tools that are not needed, and the switches of Qwen3."""
    name = dialogue.skill
    if frame != "plain" and dialogue.can_be_history:
        if world.chance(TOOLS_SHARE) and name not in ("refusals", "units", "clock"):
            dialogue = tools.offer(world, dialogue)
        if name not in ("refusals", "recall") and (frame == "history" or world.chance(HISTORY_SHARE)):
            count = world.pick((1, 1, 2, 2, 3, 5))
            earlier = [
                SKILLS[world.pick(LEANS_ON_NOTHING)][0](World(world.rng, world.split, True)) for _ in range(count)
            ]
            dialogue = chats.with_history(world, earlier, dialogue)
    has_system = dialogue.messages[0]["role"] == "system"
    if frame != "plain" and not has_system and world.chance(SYSTEM_SHARE):
        dialogue.messages.insert(0, {"role": "system", "content": world.pick(SYSTEM_PROMPTS)})
    _switch(world, dialogue)
    return dialogue


def _switch(world: World, dialogue: Dialogue) -> None:
    """Writes /think and /no_think so that the newest of them says the mode, and takes reasoning away where it has none.

    As in Qwen3 the newest switch counts, wherever it stands: the system prompt, an earlier turn or the last one. With
    the block in the prompt (off) they change nothing.
    """
    mode = dialogue.mode
    last_user = max(i for i, m in enumerate(dialogue.messages) if m["role"] == "user")
    newest: str = "on"
    for message in dialogue.messages[:last_user]:
        if message["role"] in ("system", "user") and world.chance(EARLIER_SWITCH_SHARE):
            newest = world.pick(tuple(SWITCHES))
            _write(world, message, newest)
    last = dialogue.messages[last_user]
    if mode == "off":
        if world.chance(0.1):
            _write(world, last, world.pick(tuple(SWITCHES)))
    elif newest != mode or world.chance(0.12):
        _write(world, last, mode)
    elif mode == "on" and dialogue.skill in NO_SWITCH_SKILLS and world.chance(0.05):
        last["content"] += world.pick(NO_SWITCHES)
    if mode != "on":
        for message in dialogue.messages:
            message.pop("reasoning_content", None)


def _write(world: World, message: Message, mode: str) -> None:
    switch = SWITCHES[mode]
    if world.chance(0.1):
        message["content"] = f"{switch} {message['content']}"
    else:
        message["content"] += world.pick((" ", " ", "\n", "")) + switch
