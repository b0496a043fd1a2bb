"""`AnswerParser`: one answer's text to reasoning, content and tool calls, the same in pieces as in one.

The only way from text to a message, for the stream, the whole answer and `LLM.chat` alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qjax.text.parsed import Content, Event, ParsedAnswer, joined
from qjax.text.reasoning import ReasoningFormat, ReasoningParser
from qjax.text.tool_calls import ToolCallFormat, ToolCallParser, new_call_id


class AnswerParser:
    """Parses one answer. `feed` it text, `finish` at its end.

    Args:
      prompt: the rendered prompt; its end says whether the answer begins inside a think block.
      reasoning: see `ReasoningParser`.
      tools: the tools that the prompt shows; without any, `<tool_call>` is text.
      tool_calls: see `ToolCallParser`; "none": calls stay text.
      is_parallel: false: only the first call counts.
      new_id: makes the id of a call.

    Attributes:
      reasoning: the parser of the first stage; fresh, its state says where the answer begins.
    """

    def __init__(
        self,
        prompt: str = "",
        *,
        reasoning: ReasoningFormat = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_calls: ToolCallFormat = "auto",
        is_parallel: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ):
        self._calls = ToolCallParser(tool_calls, tools, is_parallel, new_id) if tools and tool_calls != "none" else None
        self.reasoning = ReasoningParser(reasoning, prompt, ends_at_call=self._calls is not None)

    def feed(self, text: str) -> list[Event]:
        """The events that new text releases; neighbours differ in kind."""
        return joined(self._second_stage(self.reasoning.feed(text)))

    def finish(self) -> list[Event]:
        """What was held back, when the answer has ended."""
        events = self._second_stage(self.reasoning.finish())
        return joined(events + (self._calls.finish() if self._calls else []))

    def parse(self, text: str) -> ParsedAnswer:
        """A whole answer."""
        return ParsedAnswer.of([*self.feed(text), *self.finish()])

    def finish_reason[T](self, reason: T) -> T | str:
        """ "tool_calls" where the answer has stopped by itself and has a whole call, else the engine's reason."""
        return "tool_calls" if reason == "stop" and self._calls and self._calls.num_complete else reason

    def _second_stage(self, events: list[Event]) -> list[Event]:
        if self._calls is None:
            return events
        out: list[Event] = []
        for event in events:
            if not isinstance(event, Content):
                out.append(event)
                continue
            if self.reasoning.was_ended_by_call:
                self.reasoning.was_ended_by_call = False
                self._calls.drops_end_think = True
            out += self._calls.feed(event.text)
        return out
