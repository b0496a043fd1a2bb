"""`MessageWriter`: an answer as Anthropic's message with its content blocks, and as the stream that builds it."""

import contextlib
import json
import uuid
from typing import Any

from qjax.server.errors import ApiError
from qjax.server.messages_errors import error_body
from qjax.server.turn import Turn
from qjax.text.parsed import CallArguments, CallEnded, CallStarted, Content, Event, Reasoning

UNSIGNED = "unsigned"  # some clients send back only thinking that has a signature; none is checked


class MessageWriter:
    """A `turn.Writer` of the Messages API."""

    def __init__(self, turn: Turn, model: str):
        self._turn, self._model = turn, model
        self._content: list[dict[str, Any]] = []
        self._type: str | None = None  # of the block that is being written
        self._texts: list[str] = []
        self._has_call = False  # a whole one
        self.result = self._message()

    def begin(self) -> list[dict[str, Any]]:
        return [{"type": "message_start", "message": self._message(usage=self._usage())}]

    def add(self, event: Event) -> list[dict[str, Any]]:
        match event:
            case Reasoning(text):
                opened = self._open("thinking", {"thinking": "", "signature": ""})
                return [*opened, self._delta("thinking_delta", "thinking", text)]
            case Content(text):
                return [*self._open("text", {"text": ""}), self._delta("text_delta", "text", text)]
            case CallStarted(_, _, name):
                return self._open(
                    "tool_use", {"id": f"toolu_{uuid.uuid4().hex}", "name": name, "input": {}}, is_new=True
                )
            case CallArguments(_, text):
                return [self._delta("input_json_delta", "partial_json", text)]
            case CallEnded(_, is_complete):
                self._has_call |= is_complete
                return self._close()

    def end(self) -> list[dict[str, Any]]:
        events = self._close()
        reason, sequence = self._stop()
        stop = {"stop_reason": reason, "stop_sequence": sequence}
        usage = {**self._usage(), "output_tokens_details": {"thinking_tokens": self._turn.num_reasoning}}
        self.result = self._message(content=self._content, usage=usage, **stop)
        return [*events, {"type": "message_delta", "delta": stop, "usage": usage}, {"type": "message_stop"}]

    def fail(self, error: ApiError) -> list[dict[str, Any]]:
        return [error_body(error)]

    # Blocks

    def _open(self, kind: str, fields: dict[str, Any], is_new: bool = False) -> list[dict[str, Any]]:
        """Begins a block of this kind, unless it would go on with one."""
        if self._type == kind and not is_new:
            return []
        events = self._close()
        self._type = kind
        block = {"type": kind, **fields}
        self._content.append(dict(block))
        return [*events, {"type": "content_block_start", "index": len(self._content) - 1, "content_block": block}]

    def _delta(self, kind: str, name: str, text: str) -> dict[str, Any]:
        self._texts.append(text)
        return self._block_event("delta", delta={"type": kind, name: text})

    def _close(self) -> list[dict[str, Any]]:
        """Ends the block that is being written, if there is one."""
        if self._type is None:
            return []
        block, text, events = self._content[-1], "".join(self._texts), []
        if self._type == "tool_use":
            block["input"] = _object(text)
        else:
            block[self._type] = text
        if self._type == "thinking":
            block["signature"] = UNSIGNED
            events = [self._block_event("delta", delta={"type": "signature_delta", "signature": UNSIGNED})]
        self._type = None
        self._texts = []
        return [*events, self._block_event("stop")]

    def _block_event(self, name: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"content_block_{name}", "index": len(self._content) - 1, **fields}

    # The message around them

    def _message(self, **fields: Any) -> dict[str, Any]:
        return {
            "id": self._turn.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            **fields,
        }

    def _stop(self) -> tuple[str, str | None]:
        turn = self._turn
        if isinstance(turn.stop_reason, str):
            return "stop_sequence", turn.stop_reason
        if turn.finish_reason == "length":
            is_full = turn.num_output < (turn.body.max_tokens or 0)
            return "model_context_window_exceeded" if is_full else "max_tokens", None
        return "tool_use" if self._has_call else "end_turn", None

    def _usage(self) -> dict[str, Any]:
        """Anthropic's three counts of the prompt do not overlap. Nothing is cached at a price, so one of them is 0."""
        turn = self._turn
        return {
            "input_tokens": turn.num_prompt - turn.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": turn.num_cached,
            "output_tokens": turn.num_output,
        }


def _object(text: str) -> dict[str, Any]:
    """A call's arguments. Those of a call that was cut are no JSON; the whole answer then has none of them."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}
