"""The `system` and `messages` of an Anthropic request: their blocks, checked, as the messages of a chat."""

import json
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

from qjax.server.errors import bad_request, shorten
from qjax.server.schema import Refused, body_field, parse

CACHE_CONTROL = {"cache_control": "prompts are cached by themselves"}


@dataclass(frozen=True, kw_only=True)
class TextBlock:
    type: Literal["text"] = body_field("A text", MISSING)
    text: str = body_field("The text", MISSING)

    NO_EFFECT: ClassVar[dict[str, str]] = CACHE_CONTROL
    REFUSED: ClassVar[dict[str, Refused]] = {"citations": Refused("there are none.", ([],))}


@dataclass(frozen=True, kw_only=True)
class ThinkingBlock:
    type: Literal["thinking"] = body_field("What the model thought", MISSING)
    thinking: str = body_field("The text", MISSING)

    NO_EFFECT: ClassVar[dict[str, str]] = {"signature": "thinking is not signed, so nothing is checked"}


@dataclass(frozen=True, kw_only=True)
class ToolUseBlock:
    type: Literal["tool_use"] = body_field("A call that the model made", MISSING)
    id: str = body_field("Its result names it", MISSING)
    name: str = body_field("The tool", MISSING)
    input: dict[str, Any] = body_field("The arguments", MISSING)

    NO_EFFECT: ClassVar[dict[str, str]] = CACHE_CONTROL
    REFUSED: ClassVar[dict[str, Refused]] = {
        "caller": Refused("only the model calls tools.", ({"type": "direct"},)),
        "toolset_name": Refused("there are no toolsets."),
    }


@dataclass(frozen=True, kw_only=True)
class ToolResultBlock:
    type: Literal["tool_result"] = body_field("What the client's tool answered", MISSING)
    tool_use_id: str = body_field("The call's", MISSING)
    content: str | list[dict[str, Any]] | None = body_field("A text or text blocks")
    is_error: bool = body_field('The tool failed: the model reads "Error: " before the content', False)

    NO_EFFECT: ClassVar[dict[str, str]] = CACHE_CONTROL
    REFUSED: ClassVar[dict[str, Refused]] = {"toolset_name": Refused("there are no toolsets.")}


BLOCKS: dict[str, dict[str, type]] = {
    "system": {"text": TextBlock},
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {"text": TextBlock, "thinking": ThinkingBlock, "tool_use": ToolUseBlock},
}


@dataclass(frozen=True, kw_only=True)
class InputMessage:
    role: Literal["user", "assistant", "system"] = body_field("Who speaks", MISSING)
    content: str | list[dict[str, Any]] = body_field("A text or blocks", MISSING)


def chat_messages(system: str | list[dict[str, Any]] | None, messages: list[InputMessage]) -> list[dict[str, Any]]:
    """The conversation in chat's form; a tool's result is a message of its own there.

    Neighbouring text blocks of system, user and tools are lines of one text. The assistant's are joined as they are:
    an answer that is sent back renders to what the model wrote.

    Raises:
      ApiError: 400, there is no message, or a block is wrong; names it.
    """
    if not messages:
        raise bad_request("messages must hold at least one message.", "messages")
    out: list[dict[str, Any]] = []
    if system is not None:
        out.append({"role": "system", "content": _text(system, "system")})
    for i, message in enumerate(messages):
        where = f"messages[{i}].content"
        if message.role == "assistant":
            out.append(_assistant(message.content, where))
        elif message.role == "system":
            out.append({"role": "system", "content": _text(message.content, where)})
        else:
            out += _user(message.content, where)
    if out[-1].get("tool_calls"):
        raise bad_request("messages must go on after a tool_use: with its tool_result.", "messages")
    return out


def _user(content: str | list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    if not content:
        raise bad_request(f"{where} must hold at least one block.", where)
    out: list[dict[str, Any]] = []
    for i, value in enumerate(content):
        block = _block(value, "user", f"{where}[{i}]")
        if isinstance(block, ToolResultBlock):
            text = _text(block.content or "", f"{where}[{i}].content")
            text = f"Error: {text}" if block.is_error else text
            out.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
        elif out and out[-1]["role"] == "user":
            out[-1]["content"] += f"\n{block.text}"
        else:
            out.append({"role": "user", "content": block.text})
    return out


def _assistant(content: str | list[dict[str, Any]], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content if isinstance(content, str) else ""}
    if isinstance(content, str):
        return message
    for i, value in enumerate(content):
        block = _block(value, "assistant", f"{where}[{i}]")
        if isinstance(block, ThinkingBlock):
            message["reasoning"] = message.get("reasoning", "") + block.thinking
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
        else:
            message["content"] += block.text
    return message


def _text(content: str | list[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join([_block(value, "system", f"{where}[{i}]").text for i, value in enumerate(content)])


def _block(value: dict[str, Any], role: str, where: str) -> Any:
    kinds = BLOCKS[role]
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        message = f"{where}.type must be {' or '.join(kinds)}, got {shorten(kind)}: the model reads only text."
        raise bad_request(message, f"{where}.type")
    return parse(kinds[kind], value, where)
