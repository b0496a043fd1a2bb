"""Chat messages in OpenAI's form, brought into the form that Qwen's chat templates read.

The template drops content that is a list of parts, and reads reasoning under one name only; clients send both ways.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of the messages with plain-string content, `reasoning_content`, and tool arguments as objects.

    Raises:
      ValueError: a message has no known role, holds an image, or is not of OpenAI's form; names the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a non-empty list of objects, got {_short(messages)}.")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be an object, got {_short(message)}.")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, got {_short(role)}.")
    out = {k: v for k, v in message.items() if v is not None}
    if role == "developer":
        out["role"] = "system"  # OpenAI's newer name; Qwen's template knows only the older one
    if "content" in out:
        out["content"] = _content(out["content"], f"{where}.content")
    elif role in ("user", "system", "developer", "tool"):
        raise ValueError(f"{where}.content must be a string or a list of text parts, got null.")
    else:
        out["content"] = ""  # an assistant that only called tools
    if role == "assistant":
        _reasoning(out, where)
        if "tool_calls" in out:
            out["tool_calls"] = _tool_calls(out["tool_calls"], f"{where}.tool_calls")
    return out


def _content(content: Any, where: str) -> str:
    """A string as it is; a list of text parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} must be a string or a list of text parts, got {_short(content)}.")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS:
            raise ValueError(
                f"{where}[{i}] must be a text part, got {_short(kind or part)}: the model reads only text."
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{i}].text must be a string, got {_short(part.get('text'))}.")
        texts.append(part["text"])
    return "".join(texts)


def _reasoning(message: dict[str, Any], where: str) -> None:
    """`reasoning` (vLLM's name) and `reasoning_content` (the template's) mean the same; it gets its own name."""
    given = {name: message.pop(name) for name in ("reasoning", "reasoning_content") if name in message}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}.{name} must be a string, got {_short(value)}.")
    if reasoning := given.get("reasoning_content") or given.get("reasoning"):
        message["reasoning_content"] = reasoning  # left out when empty: the template then looks into the content


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI sends `arguments` as JSON text; the template writes an object with its own spacing, so it gets one."""
    if not isinstance(calls, list):
        raise ValueError(f"{where} must be a list, got {_short(calls)}.")
    out = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}[{i}] must have a function with a name, got {_short(call)}.")
        arguments = function.get("arguments")
        if isinstance(arguments, str) or arguments is None:
            with contextlib.suppress(ValueError, RecursionError):  # a model wrote it wrong: rendered as it is
                arguments = json.loads(arguments or "{}")
        out.append({**call, "function": {**function, "arguments": arguments}})
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
