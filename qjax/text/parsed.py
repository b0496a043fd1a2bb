"""What an answer's text is made of: the events of a parser, and the message they add up to. Plain Python."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer proper."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A tool call whose name is known. Indexes count from 0 without gaps."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """No more of this call. `is_complete` is false where the answer ended inside it."""

    index: int
    is_complete: bool


Event = Reasoning | Content | CallStarted | CallArguments | CallEnded


def joined(events: list[Event]) -> list[Event]:
    """The same events, neighbours of one kind put together, and none without text."""
    if len(events) < 2:  # as with most tokens
        return events
    out: list[Event] = []
    for _, group in itertools.groupby(events, lambda e: (type(e), getattr(e, "index", None))):
        run: list[Any] = list(group)
        if hasattr(run[0], "text"):
            text = "".join([e.text for e in run])
            run = [run[0] if len(run) == 1 else replace(run[0], text=text)] if text else []
        out += run
    return out


@dataclass
class ToolCall:
    """One call of a tool. `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str = ""
    is_complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class ParsedAnswer:
    """An answer put together from events."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> "ParsedAnswer":
        """The answer that all of its events add up to."""
        answer = cls()
        for event in joined(list(events)):
            match event:
                case Reasoning(text):
                    answer.reasoning += text
                case Content(text):
                    answer.content += text
                case CallStarted(_, id, name):
                    answer.tool_calls.append(ToolCall(id, name))
                case CallArguments(index, text):
                    answer.tool_calls[index].arguments += text
                case CallEnded(index, is_complete):
                    answer.tool_calls[index].is_complete = is_complete
        return answer

    def message(self, include_reasoning: bool = True) -> dict[str, Any]:
        """OpenAI's assistant message.

        Reasoning is there under both of its names (vLLM's and DeepSeek's), if there is any. `content` is null where
        the model wrote nothing but reasoning or calls.
        """
        is_only_other = not self.content and (self.reasoning or self.tool_calls)
        message: dict[str, Any] = {"role": "assistant", "content": None if is_only_other else self.content}
        if self.reasoning and include_reasoning:
            message["reasoning"] = message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return message


def held_back(text: str, *markers: str) -> int:
    """Length of the longest end of `text` that may be the beginning of a marker, a tag from "<" on."""
    longest = max(map(len, markers)) - 1
    i = text.find("<", max(0, len(text) - longest))
    while i >= 0:
        end = text[i:]
        if any(marker.startswith(end) and marker != end for marker in markers):
            return len(end)
        i = text.find("<", i + 1)
    return 0
