"""`ResponseWriter`: an answer as a Responses object with its output items, and as the stream that builds it."""

import dataclasses
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from qjax.server.errors import ApiError
from qjax.server.responses_protocol import ResponsesRequest, fields_of
from qjax.server.turn import Turn
from qjax.text.parsed import CallArguments, CallEnded, CallStarted, Content, Event, Reasoning

_ID_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_TEXT_NAMES = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}
# chat's finish reason -> `reason`, which has no word for a loop
_INCOMPLETE = {"length": {"reason": "max_output_tokens"}, "repetition": {"reason": None}}
_HEADS: dict[str, dict[str, Any]] = {
    "reasoning": {"summary": [], "encrypted_content": None},
    "message": {"role": "assistant"},
}


@dataclass
class _Item:
    """An output item that is being written. `index` is its place in the output."""

    type: str
    index: int
    head: dict[str, Any] = field(default_factory=dict)  # what it has besides text
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{_ID_PREFIXES[self.type]}_{uuid.uuid4().hex}"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, text: str) -> dict[str, Any]:
        if self.type == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def as_json(self, status: str) -> dict[str, Any]:
        item = {"id": self.id, "type": self.type, "status": status, **self.head}
        if self.type == "function_call":
            return {**item, "arguments": self.text}
        return {**item, "content": [self.part(self.text)] if self.texts else []}


class ResponseWriter:
    """A `turn.Writer` of the Responses API. Events are numbered in the order of their making."""

    def __init__(self, body: ResponsesRequest, turn: Turn, model: str):
        self._body, self._turn, self._model = body, turn, model
        self._created = int(time.time())
        self._num_events = 0
        self._output: list[dict[str, Any]] = []
        self._item: _Item | None = None
        self.result = self._response("in_progress")

    def begin(self) -> list[dict[str, Any]]:
        return [
            self._event("response.created", response=self.result),
            self._event("response.in_progress", response=self.result),
        ]

    def add(self, event: Event) -> list[dict[str, Any]]:
        match event:
            case Reasoning(text):
                return self._add_text("reasoning", text)
            case Content(text):
                return self._add_text("message", text)
            case CallStarted(_, _, name):
                head = {"call_id": f"call_{uuid.uuid4().hex}", "name": name}
                return [*self._close("completed"), *self._open("function_call", head)]
            case CallArguments(_, text):
                return [self._delta(text)]
            case CallEnded(_, is_complete):
                return self._close("completed" if is_complete else "incomplete")

    def end(self) -> list[dict[str, Any]]:
        details = _INCOMPLETE.get(self._turn.finish_reason or "")
        status = "completed" if details is None else "incomplete"
        events = self._close(status)
        self.result = self._response(status, incomplete_details=details, usage=self._usage())
        return [*events, self._event(f"response.{status}", response=self.result)]

    def fail(self, error: ApiError) -> list[dict[str, Any]]:
        if self._item is not None:
            self._output.append(self._item.as_json("incomplete"))
        details = {"code": "server_error", "message": str(error)}
        self.result = self._response("failed", error=details, usage=self._usage())
        return [self._event("response.failed", response=self.result)]

    # Items

    @property
    def _open_item(self) -> _Item:
        if self._item is None:
            raise RuntimeError("no item is being written")
        return self._item

    def _add_text(self, kind: str, text: str) -> list[dict[str, Any]]:
        if self._item is not None and self._item.type == kind:
            return [self._delta(text)]
        return [*self._close("completed"), *self._open(kind, _HEADS[kind]), self._delta(text)]

    def _open(self, kind: str, head: dict[str, Any]) -> list[dict[str, Any]]:
        item = self._item = _Item(kind, len(self._output), head)
        events = [self._event("response.output_item.added", output_index=item.index, item=item.as_json("in_progress"))]
        if kind != "function_call":
            events.append(self._item_event("content_part.added", part=item.part("")))
        return events

    def _delta(self, text: str) -> dict[str, Any]:
        item = self._open_item
        item.texts.append(text)
        fields: dict[str, Any] = {"logprobs": []} if item.type == "message" else {}
        return self._item_event(f"{_TEXT_NAMES[item.type]}.delta", delta=text, **fields)

    def _close(self, status: str) -> list[dict[str, Any]]:
        """Ends the item that is being written, if there is one."""
        if self._item is None:
            return []
        item, text, name = self._item, self._item.text, f"{_TEXT_NAMES[self._item.type]}.done"
        if item.type == "function_call":
            events = [self._item_event(name, name=item.head["name"], arguments=text)]
        else:
            fields: dict[str, Any] = {"logprobs": []} if item.type == "message" else {}
            events = [self._item_event(name, text=text, **fields)]
            events.append(self._item_event("content_part.done", part=item.part(text)))
        self._item = None
        self._output.append(item.as_json(status))
        return [*events, self._event("response.output_item.done", output_index=item.index, item=self._output[-1])]

    def _item_event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        item = self._open_item
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.type != "function_call":
            place["content_index"] = 0
        return self._event(f"response.{name}", **place, **fields)

    def _event(self, type: str, /, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": type, "sequence_number": self._num_events - 1, **fields}

    # The object around them

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        body, params = self._body, self._turn.params
        text_format = body.text and body.text.format
        return {
            "id": self._turn.request_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": _given(text_format) if text_format else {"type": "text"}},
            "tool_choice": _given(body.tool_choice)
            if dataclasses.is_dataclass(body.tool_choice)
            else body.tool_choice or "auto",
            "tools": [fields_of(tool) for tool in body.tools or []],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": body.truncation,
            "usage": None,
            **fields,
        }

    def _usage(self) -> dict[str, Any]:
        turn = self._turn
        return {
            "input_tokens": turn.num_prompt,
            # the SDK's type needs the second number; it counts writes that are paid for
            "input_tokens_details": {"cached_tokens": turn.num_cached, "cache_write_tokens": 0},
            "output_tokens": turn.num_output,
            "output_tokens_details": {"reasoning_tokens": turn.num_reasoning},
            "total_tokens": turn.num_prompt + turn.num_output,
        }


def _given(value: Any) -> dict[str, Any]:
    """A part of the request as it came, without what it left out."""
    return {k: v for k, v in fields_of(value).items() if v is not None}
