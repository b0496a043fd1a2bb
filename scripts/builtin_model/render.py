"""A dialogue as text pieces, each prompt or target: what the chat template renders, and what the model must write.

Targets are the assistant's answers after the last question, with `<|im_end|>`. The empty think block belongs to the
prompt where thinking is off, and to the target where the user said /no_think. Earlier answers are prompt: the template
renders them without their thinking, so as targets they would teach to skip it; and so are calls that came back without
it. Written in Python since jinja is slow; the tests hold it against the template.
"""

import json
from dataclasses import dataclass
from typing import Any

from scripts.builtin_model.dialogue import Dialogue, Message

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass
class Piece:
    text: str
    is_target: bool


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def pieces(dialogue: Dialogue) -> list[Piece]:
    """The whole conversation in order; neighbours of the same kind are joined, and the last piece is a target."""
    messages = dialogue.messages
    last_question = max(i for i, m in enumerate(messages) if m["role"] == "user")
    out: list[Piece] = []

    def add(text: str, is_target: bool = False) -> None:
        if out and out[-1].is_target == is_target:
            out[-1].text += text
        else:
            out.append(Piece(text, is_target))

    add(_head(messages[0], dialogue.tools))
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "user" or (role == "system" and i > 0):
            add(f"<|im_start|>{role}\n{message['content']}<|im_end|>\n")
        elif role == "tool":
            is_first = messages[i - 1]["role"] != "tool"
            is_last = messages[i + 1]["role"] != "tool"
            start = "<|im_start|>user" if is_first else ""
            add(f"{start}\n<tool_response>\n{message['content']}\n</tool_response>{'<|im_end|>\n' if is_last else ''}")
        elif role == "assistant":
            is_last_message = i == len(messages) - 1
            reasoning = message.get("reasoning_content", "")
            is_target = is_last_message or (i > last_question and bool(reasoning))
            add("<|im_start|>assistant\n")
            if is_target and dialogue.mode == "off":
                add(NO_THOUGHT)
            elif is_target:
                add(f"<think>\n{reasoning}\n</think>\n\n" if reasoning else NO_THOUGHT, True)
            add(spoken(message) + "<|im_end|>", is_target)
            if not is_last_message:
                add("\n")
    return out


def spoken(message: Message) -> str:
    """Content and tool calls of an assistant's turn."""
    calls = []
    for call in message.get("tool_calls", []):
        name, arguments = call["function"]["name"], _json(call["function"]["arguments"])
        calls.append(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def _head(first: Message, tools: list[dict[str, Any]] | None) -> str:
    system = first["content"] if first["role"] == "system" else None
    if tools:
        listed = "".join("\n" + _json(tool) for tool in tools)
        before = f"{system}\n\n" if system is not None else ""
        return f"<|im_start|>system\n{before}{TOOLS_BEFORE}{listed}{TOOLS_AFTER}<|im_end|>\n"
    return f"<|im_start|>system\n{system}<|im_end|>\n" if system is not None else ""
