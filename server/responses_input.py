"""The `input` of a Responses request: its items, checked, as the messages of a chat."""

from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

from qjax.server.errors import bad_request, shorten
from qjax.server.schema import Refused, body_field, parse

_LABELS = {
    "id": "items are not stored, so they are not found by it",
    "status": "an item is taken as it is",
    "phase": "the template knows none",
}
_TEXT_TYPES = ("input_text", "output_text", "text")


@dataclass(frozen=True, kw_only=True)
class MessageItem:
    type: Literal["message"] = body_field("May be left out", "message")
    role: Literal["user", "assistant", "system", "developer"] = body_field("Who speaks", MISSING)
    content: str | list[dict[str, Any]] = body_field("A text or text parts", MISSING)

    NO_EFFECT: ClassVar[dict[str, str]] = _LABELS


@dataclass(frozen=True, kw_only=True)
class FunctionCallItem:
    type: Literal["function_call"] = body_field("A call that the model made", MISSING)
    call_id: str = body_field("Its output names it", MISSING)
    name: str = body_field("The function", MISSING)
    arguments: str = body_field("JSON text", MISSING)

    NO_EFFECT: ClassVar[dict[str, str]] = _LABELS
    REFUSED: ClassVar[dict[str, Refused]] = {
        "namespace": Refused("functions have none."),
        "caller": Refused("only the model calls functions.", ({"type": "direct"},)),
        "async": Refused("calls are answered before the model goes on.", (False,)),
    }


@dataclass(frozen=True, kw_only=True)
class FunctionCallOutputItem:
    type: Literal["function_call_output"] = body_field("What the client's function answered", MISSING)
    call_id: str = body_field("The call's", MISSING)
    output: str | list[dict[str, Any]] = body_field("A text or text parts", MISSING)

    NO_EFFECT: ClassVar[dict[str, str]] = {**_LABELS, "name": "the call has it"}
    REFUSED: ClassVar[dict[str, Refused]] = {k: FunctionCallItem.REFUSED[k] for k in ("namespace", "caller")}


@dataclass(frozen=True, kw_only=True)
class ReasoningItem:
    type: Literal["reasoning"] = body_field("What the model thought", MISSING)
    content: list[dict[str, Any]] | None = body_field("Parts of type reasoning_text")
    summary: list[dict[str, Any]] | None = body_field("Parts of type summary_text; read where there is no content")
    encrypted_content: str | None = body_field("Only beside content or summary: it cannot be read")

    NO_EFFECT: ClassVar[dict[str, str]] = _LABELS


ITEMS: dict[str, type] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}


def chat_messages(instructions: str | None, items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in chat's form.

    The items of one answer (its reasoning, text and calls) become one message of the assistant.

    Raises:
      ApiError: 400, there is no item, or one is wrong; names it.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not items:
        raise bad_request("input must be a text or a list of at least one item.", "input")
    answer: dict[str, Any] | None = None  # the assistant's message that the next item may belong to
    for i, value in enumerate(items):
        where = f"input[{i}]"
        item = _item(value, where)
        if isinstance(item, FunctionCallOutputItem):
            content = _text(item.output, f"{where}.output", _TEXT_TYPES)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            answer = None
        elif isinstance(item, MessageItem) and item.role != "assistant":
            content = _text(item.content, f"{where}.content", _TEXT_TYPES)
            messages.append({"role": item.role, "content": content})
            answer = None
        else:
            if answer is None or not _goes_on(answer, item):
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            _add(answer, item, where)
    return messages


def _item(value: dict[str, Any], where: str) -> Any:
    kind = value.get("type", "message" if "role" in value else None)
    if not isinstance(kind, str) or kind not in ITEMS:
        message = f"{where}.type must be one of {', '.join(ITEMS)}, got {shorten(kind)}."
        raise bad_request(message, f"{where}.type")
    return parse(ITEMS[kind], value, where)


def _goes_on(answer: dict[str, Any], item: Any) -> bool:
    """Whether the item can belong to the answer so far: reasoning comes first, text after text is the next one's."""
    if isinstance(item, ReasoningItem):
        return not answer["content"] and "tool_calls" not in answer
    return isinstance(item, FunctionCallItem) or not answer["content"] or "tool_calls" in answer


def _add(answer: dict[str, Any], item: Any, where: str) -> None:
    if isinstance(item, MessageItem):
        answer["content"] += _text(item.content, f"{where}.content", _TEXT_TYPES)
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        answer.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, ReasoningItem):
        name, kind = ("content", "reasoning_text") if item.content else ("summary", "summary_text")
        text = _text(getattr(item, name) or [], f"{where}.{name}", (kind,))
        if not text and item.encrypted_content:
            message = f"{where} has only encrypted_content, which cannot be read: send content, as this server does."
            raise bad_request(message, f"{where}.encrypted_content")
        answer["reasoning"] = answer.get("reasoning", "") + text


def _text(content: str | list[dict[str, Any]], where: str, types: tuple[str, ...]) -> str:
    """A string as it is; the parts of a list joined."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if part.get("type") not in types:
            got = shorten(part.get("type"))
            message = f"{where}[{i}].type must be {' or '.join(types)}, got {got}: the model reads only text."
            raise bad_request(message, f"{where}[{i}].type")
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{where}[{i}].text must be a string, got {shorten(part.get('text'))}.", where)
        texts.append(part["text"])
    return "".join(texts)
