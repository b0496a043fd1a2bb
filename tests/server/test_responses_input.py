"""Items of /v1/responses as messages of a chat."""

import pytest

from qjax.server.errors import ApiError
from qjax.server.responses_input import chat_messages


def test_items_of_one_answer_are_one_message():
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}], "id": "m"},
        {**call, "id": "fc", "status": "completed"},
        {**call, "call_id": "d"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    function = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert chat_messages("Be short.", items) == [
        {"role": "system", "content": "Be short."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "reasoning": "hm",
            "tool_calls": [{"id": "c", **function}, {"id": "d", **function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "tool", "tool_call_id": "d", "content": "2"},
        {"role": "assistant", "content": "c", "reasoning": "so"},
        {"role": "assistant", "content": "d"},
    ]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"type": "item_reference", "id": "x"}, "input[0].type must be one of message, function_call,"),
        ({"content": "x"}, "input[0].type must be one of"),
        ({"role": "tool", "content": "x"}, "input[0].role must be"),
        ({"role": "user"}, "input[0].content is required"),
        ({"role": "user", "content": "x", "nonsense": 1}, "input[0].nonsense"),
        (
            {"role": "user", "content": [{"type": "input_image"}]},
            'input_text or output_text or text, got "input_image"',
        ),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text must be a string"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "x"}, "cannot be read"),
        ({"type": "function_call", "call_id": "x", "name": "f"}, "input[0].arguments is required"),
    ],
)
def test_wrong_items_are_named(item, said):
    with pytest.raises(ApiError) as error:
        chat_messages(None, [item])
    assert error.value.status == 400 and said in str(error.value)
