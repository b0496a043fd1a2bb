"""Our chat template renders what the official one does, and the trainer's renderer what the template does."""

import copy
import json
from pathlib import Path

import pytest

from qjax.text.tokenizer import Tokenizer
from scripts.builtin_model import mixture, render
from scripts.builtin_model import tokenizer as builtin
from tests.text.make_golden import RENDERINGS, TOOL_TURNS, TURNS, USER, WEATHER_TOOL
from tests.text.small_tokenizer import PATTERN, PLAIN_ADDED_TOKENS, SPECIAL_TOKENS

OFFICIAL = (Path(__file__).parents[1] / "text" / "golden" / "chat_template.jinja").read_text(encoding="utf-8")
CALLS = TOOL_TURNS[1]
CONVERSATIONS = {
    "one": USER,
    "turns": TURNS,
    "answer last": [*TURNS, {"role": "assistant", "content": "6"}],
    "thought last": [*USER, {"role": "assistant", "content": "<think>\n\nA\nB\n\n</think>\n\n\nYes"}],
    "thought of its own": [*USER, {"role": "assistant", "content": "Yes", "reasoning_content": "\nHm.\n"}],
    "half a thought": [*USER, {"role": "assistant", "content": "Hm.\n</think>\nYes\n</think> no"}],
    "empty thought": [*USER, {"role": "assistant", "content": "<think>\n\n</think>\n\nYes"}, *USER],
    "old thought": [*USER, {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}, *USER],
    "calls": TOOL_TURNS,
    "calls and answer": [*TOOL_TURNS, {"role": "assistant", "content": "Cold.", "reasoning_content": "So."}],
    "calls, answer, question": [*TOOL_TURNS, {"role": "assistant", "content": "Cold."}, *USER],
    "calls last": TOOL_TURNS[:2],
    "content and calls": [*USER, {**CALLS, "content": "I look."}],
    "calls without thought": [*USER, {k: v for k, v in CALLS.items() if k != "reasoning_content"}, TOOL_TURNS[2]],
    "no function key": [*USER, {**CALLS, "tool_calls": [c["function"] for c in CALLS["tool_calls"]]}],
    "arguments as text": [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":1}'}}]},
    ],
    "response as user": [*USER, CALLS, {"role": "user", "content": "<tool_response>\n4\n</tool_response>"}],
    "only a response": [{"role": "user", "content": "<tool_response>\n4\n</tool_response>"}],
    "system in the middle": [*USER, {"role": "system", "content": "Now be long."}, *USER],
    "tool first": [{"role": "tool", "content": "4"}, *USER],
    "assistant first": [{"role": "assistant", "content": "Hello", "reasoning_content": "x"}, *USER],
    "two answers": [*USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    "content of parts": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *USER],
    "no content": [*USER, {"role": "assistant", "content": None, "tool_calls": CALLS["tool_calls"]}],
    "unknown role": [*USER, {"role": "other", "content": "x"}],
    "system only": [{"role": "system", "content": "Be brief."}],
}  # fmt: skip
OPTIONS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"add_generation_prompt": True, "enable_thinking": True},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(builtin.FILE.parent)


def both(tokenizer, messages, **options):
    """(ours, the official one), straight from transformers."""
    return [
        tokenizer._hf.apply_chat_template(
            copy.deepcopy(messages), tokenize=False, chat_template=template, **options
        )
        for template in (None, OFFICIAL)
    ]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tools", [None, [WEATHER_TOOL], [WEATHER_TOOL, WEATHER_TOOL]], ids=["", "tool", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_renders_what_the_official_template_does(tokenizer, name, tools, options):
    ours, official = both(tokenizer, CONVERSATIONS[name], tools=tools, **options)
    assert ours == official


@pytest.mark.parametrize("name", RENDERINGS)
def test_renders_the_golden_conversations(tokenizer, name):
    case = {"add_generation_prompt": True, **RENDERINGS[name]}
    ours, official = both(tokenizer, case.pop("messages"), **case)
    assert ours == official


def test_training_text_is_the_prompt_of_both_templates_and_the_answer(tokenizer):
    for i in range(300):
        dialogue = mixture.make(9, i)
        options = {"enable_thinking": False} if dialogue.mode == "off" else {}
        ours, official = both(
            tokenizer, dialogue.messages[:-1], tools=dialogue.tools, add_generation_prompt=True, **options
        )
        text = "".join(piece.text for piece in render.pieces(dialogue))
        assert ours == official
        assert text.startswith(ours)
        if dialogue.mode != "off":
            whole, _ = both(tokenizer, dialogue.messages, tools=dialogue.tools)
            assert whole == text + "\n"


class TestTokenizer:
    def test_has_6144_ids_and_qwen3s_added_tokens_last(self, encoder):
        assert encoder.get_vocab_size() == 6144
        added = [*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS]
        assert [encoder.token_to_id(t) for t in added] == list(range(6144 - len(added), 6144))
        assert builtin.PATTERN == PATTERN

    def test_any_text_comes_back(self, tokenizer):
        for text in (
            "What is 17 + 25?",
            "Tromsø, São Tomé",
            "你好 🙂👩‍🚀",
            " \n\t x  ",
            "<think>\n</think>",
            "\x00\x7f",
        ):
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text

    def test_digits_stand_alone(self, encoder):
        assert encoder.encode("1234 56").tokens == ["1", "2", "3", "4", "Ġ", "5", "6"]

    def test_configuration_names_the_tokens(self, tokenizer):
        folder = builtin.FILE.parent
        config = json.loads((folder / "config.json").read_text())
        generation = json.loads((folder / "generation_config.json").read_text())
        end, turn_end = tokenizer.encode("<|endoftext|><|im_end|>")
        assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (6144, turn_end, end)
        assert generation["eos_token_id"] == [turn_end, end] and tokenizer.eos_token_id == turn_end
