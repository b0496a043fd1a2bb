"""Whether an answer is right: its think block has the form that the mode wants, and its content what is expected."""

import json
import re
from dataclasses import dataclass
from typing import Any

from scripts.builtin_model.dialogue import Dialogue, Expected

EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = re.compile(r"<think>\n(?P<thought>\S.*?)\n</think>\n\n(?P<content>.*)", re.DOTALL)
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Score:
    is_well_formed: bool  # the think block: there, closed and not empty; or empty; or absent, as the mode wants it
    is_right: bool


def score(dialogue: Dialogue, text: str, is_finished: bool) -> Score:
    """`text` is all that the model wrote after its prompt, without the end token; `is_finished`: it wrote that."""
    content = text
    if dialogue.mode == "on":
        match = THOUGHT.fullmatch(text)
        is_well_formed = match is not None
        content = match["content"] if match else text
    elif dialogue.mode == "no_think":
        is_well_formed = text.startswith(EMPTY)
        content = text.removeprefix(EMPTY)
    else:
        is_well_formed = True
    is_well_formed = is_well_formed and is_finished and "<think>" not in content and "</think>" not in content
    return Score(is_well_formed, is_well_formed and is_right(dialogue.expected, content))


def is_right(expected: Expected, content: str) -> bool:
    match expected.kind:
        case "number":
            found = re.findall(r"-?\d+", content.replace(" - ", " "))
            return bool(found) and found[-1] == expected.value
        case "contains":
            return expected.value in content
        case "exact":
            return content == expected.value
        case "json":
            return _json(content) == (expected.value,)
        case "calls":
            return CALL.sub("", content).strip() == "" and [_json(c) for c in CALL.findall(content)] == [
                (call,) for call in expected.value
            ]
    raise RuntimeError(f"unknown kind of expectation: {expected.kind}")


def _json(text: str) -> tuple[Any] | None:
    try:
        return (json.loads(text),)
    except ValueError:
        return None
