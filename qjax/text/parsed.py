"""What an answer's text is made of: the events of a parser, and the message they add up to. Plain Python."""

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


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events, neighbours of one kind put together."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Reasoning | Content | CallArguments) and not event.text:
            continue
        if (
            (isinstance(event, Reasoning) and isinstance(last, Reasoning))
            or (isinstance(event, Content) and isinstance(last, Content))
            or (isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index)
        ):
            out[-1] = replace(last, text=last.text + event.text)
        else:
            out.append(event)
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

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case CallStarted(_, id, name):
                    self.tool_calls.append(ToolCall(id, name))
                case CallArguments(index, text):
                    self.tool_calls[index].arguments += text
                case CallEnded(index, is_complete):
                    self.tool_calls[index].is_complete = is_complete

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
    """Length of the longest end of `text` that may be the beginning of a marker."""
    longest = min(len(text), max(map(len, markers)) - 1)
    for length in range(longest, 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers if length < len(marker)):
            return length
    return 0
