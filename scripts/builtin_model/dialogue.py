"""`Dialogue`: one conversation that ends with the answer to learn, and what a right answer must hold."""

from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
# on: the model opens <think> itself. off: the prompt holds the empty block. no_think: the user says so, and the model
# writes the empty block.
Mode = Literal["on", "off", "no_think"]


@dataclass
class Expected:
    """How an answer is scored: `number` (the last number in it), `contains`, `exact`, `calls` or `json`."""

    kind: Literal["number", "contains", "exact", "calls", "json"]
    value: Any


@dataclass
class Dialogue:
    """`messages` end with the assistant's turn. Its `reasoning_content` is absent where it does not think."""

    messages: list[Message]
    expected: Expected
    tools: list[dict[str, Any]] | None = None
    mode: Mode = "on"
    skill: str = ""
    can_be_history: bool = field(default=True)  # may stand before another question, and have a system prompt


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str = "", calls: list[dict[str, Any]] | None = None) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def answer(question: str, reasoning: str, content: str, expected: Expected) -> Dialogue:
    """One question, one answer."""
    return Dialogue([user(question), assistant(content, reasoning)], expected)


def number(value: int) -> Expected:
    return Expected("number", str(value))


def contains(value: str) -> Expected:
    return Expected("contains", value)


def exact(value: str) -> Expected:
    return Expected("exact", value)
