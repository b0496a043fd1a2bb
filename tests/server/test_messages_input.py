"""Blocks of /v1/messages as messages of a chat."""

import pytest

from qjax.server.errors import ApiError
from qjax.server.messages_input import InputMessage, chat_messages


def test_blocks():
    cached = {"cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "t"}
    messages = [
        InputMessage(role="user", content=[{"type": "text", "text": "a", **cached}, {"type": "text", "text": "b"}]),
        InputMessage(
            role="assistant",
            content=[
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "c"},
                {"type": "text", "text": "d"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"x": "ö"}},
            ],
        ),
        InputMessage(
            role="user",
            content=[
                {**result, "content": "1"},
                {**result, "content": [{"type": "text", "text": "2"}], "is_error": True, **cached},
                result,
                {"type": "text", "text": "e"},
            ],
        ),
        InputMessage(role="system", content="f"),
    ]
    function = {"name": "f", "arguments": '{"x": "ö"}'}
    assert chat_messages([{"type": "text", "text": "s", **cached}, {"type": "text", "text": "t"}], messages) == [
        {"role": "system", "content": "s\nt"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "cd",
            "reasoning": "hm",
            "tool_calls": [{"id": "t", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t", "content": "1"},
        {"role": "tool", "tool_call_id": "t", "content": "Error: 2"},
        {"role": "tool", "tool_call_id": "t", "content": ""},
        {"role": "user", "content": "e"},
        {"role": "system", "content": "f"},
    ]


@pytest.mark.parametrize(
    ("role", "block", "said"),
    [
        (
            "user",
            {"type": "image", "source": {}},
            'messages[0].content[0].type must be text or tool_result, got "image"',
        ),
        ("user", {"type": "tool_use"}, "messages[0].content[0].type"),
        ("user", {"type": "text"}, "messages[0].content[0].text is required"),
        ("user", {"type": "text", "text": "x", "nonsense": 1}, "messages[0].content[0].nonsense"),
        ("user", {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}, ".content[0].type"),
        ("assistant", {"type": "redacted_thinking", "data": "x"}, "messages[0].content[0].type"),
        ("assistant", {"type": "server_tool_use"}, "messages[0].content[0].type"),
        ("assistant", {"type": "tool_use", "id": "x", "name": "f", "input": {}}, "with its tool_result"),
    ],
)
def test_wrong_blocks_are_named(role, block, said):
    with pytest.raises(ApiError) as error:
        chat_messages(None, [InputMessage(role=role, content=[block])])
    assert error.value.status == 400 and said in str(error.value)
