"""Whether an answer is right: its think block has the form that the mode wants, and its content what is expected."""

import json
import re
from dataclasses import dataclass
from typing import Any

from scripts.builtin_model.dialogue import Dialogue, Expected

BLOCK = re.compile(r"<think>\n(?P<thought>.*?)\n</think>\n\n(?P<content>.*)", re.DOTALL)
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Score:
    is_well_formed: bool  # ended by itself; one opened and closed think block before the answer, no other tag
    thinks_as_asked: bool  # the block has a thought where thinking is asked for, and none after /no_think
    is_right: bool  # both of these, and the content is what is expected


def score(dialogue: Dialogue, text: str, is_finished: bool) -> Score:
    """`text` is all that the model wrote after its prompt, without the end token; `is_finished`: it wrote that.

    Where thinking is off the block is in the prompt, and the text must have no tag of one.
    """
    num_tags = (text.count("<think>"), text.count("</think>"))
    if dialogue.mode == "off":
        is_well_formed = is_finished and num_tags == (0, 0)
        return Score(is_well_formed, is_well_formed, is_well_formed and is_right(dialogue.expected, text))
    match = BLOCK.fullmatch(text)
    if match is None or not is_finished or num_tags != (1, 1):
        return Score(False, False, False)
    thinks_as_asked = bool(match["thought"].strip()) == (dialogue.mode == "on")
    return Score(True, thinks_as_asked, thinks_as_asked and is_right(dialogue.expected, match["content"]))


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
