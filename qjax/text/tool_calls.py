"""`ToolCallParser`: tells the tool calls in an answer's content from its text, as the text comes.

A call is announced when its name and the first `CHECKED_CHARS` characters of its arguments, or all of them, are known
to be well formed. Until then a mistake gives the whole text back as content. What has been announced cannot be taken
back: a mistake behind that stays in the arguments, as the model wrote it, and it is the client that finds it. So the
streamed and the whole answer are always the same.

Of the white space around calls what the official template writes is dropped: one newline in front of a call, and all
of it between calls and behind the last. Text before, between and after calls is content.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qjax.text.call_bodies import END_CALL, FUNCTION, CallBody, JsonBody, XmlBody
from qjax.text.parsed import CallArguments, CallEnded, CallStarted, Content, Event, held_back

ToolCallFormat = Literal["auto", "hermes", "qwen3_json", "qwen3_coder", "qwen3_xml", "none"]
CALL, END_THINK = "<tool_call>", "</think>"
CHECKED_CHARS = 32
_SPACE_AND_BRACES = " \t\n\r}"


def new_call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


class ToolCallParser:
    """Parses one answer's content. `feed` it text, `finish` at its end.

    Args:
      format: which calls are known: JSON ("hermes", "qwen3_json"), XML ("qwen3_coder", "qwen3_xml"), or both.
      tools: OpenAI's tool definitions; XML arguments get their types from them.
      is_parallel: false: only the first call counts, the text of others is dropped.
      new_id: makes the id of a call.

    Attributes:
      num_complete: calls that have ended by themselves.
      drops_end_think: the next `</think>` in the content is not text: it closes reasoning that a call has ended.
    """

    def __init__(
        self,
        format: ToolCallFormat = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
        is_parallel: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ):
        self.num_complete = 0
        self.drops_end_think = False
        self._is_json = format in ("auto", "hermes", "qwen3_json")
        self._is_xml = format in ("auto", "qwen3_coder", "qwen3_xml")
        self._schemas = _schemas(tools or ())
        self._is_parallel = is_parallel
        self._new_id = new_id
        self._events: list[Event] = []
        self._step = self._text
        self._buffer = ""  # not yet read
        self._has_content = False
        self._is_after_call = False  # nothing but white space since a call
        self._num_calls = 0
        # Of the call that is being read:
        self._body: CallBody = JsonBody()
        self._raw: list[str] = []  # its text, until it is announced
        self._num_raw_lead = 0  # white space in front of the tag
        self._arguments: list[str] = []  # not yet given out
        self._is_announced = False
        self._is_muted = False

    def feed(self, text: str) -> list[Event]:
        """The events that new text releases."""
        self._buffer += text
        while self._step():
            pass
        return self._take_events()

    def finish(self) -> list[Event]:
        """The rest, when the answer has ended. A call that was cut is one if its arguments had begun, else text."""
        while self._step == self._opening or (self._step == self._inside and not self._has_begun):
            self._give_up()
            while self._step():
                pass
        if self._step == self._inside:
            self._announce()
            self._end(is_complete=False)
        elif self._step == self._broken:
            self._arguments.append(self._buffer)
            self._end(is_complete=False)
        elif self._step == self._text and not (self._is_after_call and not self._buffer.strip()):
            self._content(self._buffer)
        self._buffer = ""
        return self._take_events()

    # The states. Each reads from the buffer; true if the buffer should be looked at again.

    def _text(self) -> bool:
        """Outside of calls."""
        buffer, markers = self._buffer, (CALL, END_THINK) if self.drops_end_think else (CALL,)
        found = [(i, marker) for marker in markers if (i := buffer.find(marker)) >= 0]
        is_blank_dropped = self._is_after_call or not self._has_content  # if a call follows
        if not found:
            end = len(buffer) - held_back(buffer, *markers)
            kept = buffer[:end]
            end = 0 if is_blank_dropped and not kept.strip() else len(kept.removesuffix("\n"))
            self._content(buffer[:end])
            self._buffer = buffer[end:]
            return False
        start, marker = min(found)
        before = buffer[:start]
        text = "" if is_blank_dropped and not before.strip() else before.removesuffix("\n")
        self._content(text)
        self._buffer = buffer[start + len(marker) :]
        if marker == END_THINK:
            self.drops_end_think, self._is_after_call = False, True
            return True
        self._raw = [before[len(text) :] + CALL]
        self._num_raw_lead = len(before) - len(text)
        self._body, self._arguments = JsonBody(), []
        self._is_announced, self._is_muted = False, not self._is_parallel and self._num_calls > 0
        self._step = self._opening
        return True

    def _opening(self) -> bool:
        """Behind the tag: which form has the call?"""
        begin = self._buffer.lstrip()
        if self._is_json and begin.startswith("{"):
            self._body = JsonBody()
        elif self._is_xml and begin.startswith(FUNCTION):
            self._body = XmlBody(self._schemas)
        elif not begin or (self._is_xml and FUNCTION.startswith(begin)):
            return False
        else:
            self._give_up()
            return True
        self._raw.append(self._buffer[: len(self._buffer) - len(begin)])
        self._buffer = begin
        self._step = self._inside
        return True

    def _inside(self) -> bool:
        body = self._body
        end = body.read(self._buffer)
        if not self._is_announced:
            self._raw.append(self._buffer[:end])
        self._buffer = self._buffer[end:]
        self._arguments.append(body.take())
        if body.is_done or (body.name and sum(map(len, self._arguments)) >= CHECKED_CHARS):
            self._announce()
        if body.is_done:
            self._end(is_complete=True)
            self._step = self._closing
        elif body.is_broken and self._is_announced:
            self._step = self._broken
        elif body.is_broken:
            self._give_up()
        else:
            if self._is_announced:
                self._give_arguments()
            return False
        return True

    def _broken(self) -> bool:
        """In arguments that are wrong: up to the closing tag they stay as they are."""
        ends = [i for tag in (END_CALL, CALL) if (i := self._buffer.find(tag)) >= 0]
        end = min(ends) if ends else len(self._buffer) - held_back(self._buffer, END_CALL, CALL)
        text = self._buffer[:end].rstrip()
        self._arguments.append(text)
        if not ends:
            self._give_arguments()
            self._buffer = self._buffer[len(text) :]
            return False
        self._buffer = self._buffer[end:]
        self._end(is_complete=True)
        self._step = self._closing
        return True

    def _closing(self) -> bool:
        """Behind a call: its closing tag, which models forget, or put a brace too many in front of."""
        rest = self._buffer.lstrip(_SPACE_AND_BRACES)
        if rest.startswith(END_CALL):
            self._buffer = rest.removeprefix(END_CALL)
        elif END_CALL.startswith(rest):
            return False
        self._step, self._is_after_call = self._text, True
        return True

    # What they do

    def _content(self, text: str) -> None:
        if not text:
            return
        if self._is_after_call and not self._has_content:
            text = text.lstrip()
        self._is_after_call, self._has_content = False, True
        self._events.append(Content(text))

    def _give_up(self) -> None:
        """What looked like a call is text, at least up to its tag; behind that another one may begin."""
        raw = "".join(self._raw)
        end = self._num_raw_lead + len(CALL)
        self._content(raw[:end])
        self._buffer = raw[end:] + self._buffer
        self._step = self._text

    def _announce(self) -> None:
        if self._is_announced:
            return
        self._is_announced = True
        self._raw.clear()
        if not self._is_muted:
            self._events.append(CallStarted(self._num_calls, self._new_id(), self._body.name or ""))
            self._num_calls += 1

    def _give_arguments(self) -> None:
        if not self._is_muted:
            self._events += [CallArguments(self._num_calls - 1, text) for text in self._arguments if text]
        self._arguments.clear()

    @property
    def _has_begun(self) -> bool:
        return self._is_announced or (self._body.name is not None and any(self._arguments))

    def _end(self, is_complete: bool) -> None:
        self._give_arguments()
        if not self._is_muted:
            self.num_complete += is_complete
            self._events.append(CallEnded(self._num_calls - 1, is_complete))

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The properties of each tool's parameters."""
    out = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            out[name] = properties if isinstance(properties, Mapping) else {}
    return out
