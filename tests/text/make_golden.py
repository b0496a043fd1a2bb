"""Writes golden/qwen3.json: encodings and chat renderings of the official Qwen3 tokenizer, by transformers itself.

python tests/text/make_golden.py FOLDER    # FOLDER: tokenizer files of any Qwen3 checkpoint
"""

import json
import sys
from pathlib import Path
from typing import Any

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city – today's",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tromsø"}}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3? /no_think"},
]
TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Tromsø and Oslo?"},
    {"role": "assistant", "content": "", "reasoning_content": "Two calls.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": -4}'},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 2}'},
]
USER = [{"role": "user", "content": "Give me a short introduction to large language models."}]
RENDERINGS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": USER},
    "thinking off": {"messages": USER, "enable_thinking": False},
    "thinking on": {"messages": USER, "enable_thinking": True},
    "no generation prompt": {"messages": USER, "add_generation_prompt": False},
    "several turns": {"messages": TURNS},
    "several turns, thinking off": {"messages": TURNS, "enable_thinking": False},
    "tools": {"messages": USER, "tools": [WEATHER_TOOL]},
    "tools and system": {"messages": TURNS, "tools": [WEATHER_TOOL]},
    "tool results": {"messages": TOOL_TURNS, "tools": [WEATHER_TOOL]},
    "continued": {
        "messages": [*USER, {"role": "assistant", "content": "They are"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
}
TEXTS = [
    "Hello, world!",
    "",
    "   leading, trailing   \n\n\t x",
    "The year 2026: 12345.678 € — naïve café, Straße",
    "你好，世界。日本語のテキスト、한국어",
    "🙂👩‍🚀🇳🇴 ☃",
    "def f(x):\n    return x ** 2  # it's\r\n",
    "<think>\nhm\n</think>\n\n<tool_call>{}</tool_call><|im_end|><|endoftext|>",
    "e\u0301 is NFC-normalised",
    "Привет مرحبا שלום नमस्ते ไทย",
]


def main(folder: str) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    renderings = []
    for name, case in RENDERINGS.items():
        options = {"add_generation_prompt": True, **case}
        text = tokenizer.apply_chat_template(options.pop("messages"), tokenize=False, **options)
        renderings.append({"name": name, "text": text, "ids": tokenizer(text).input_ids})
    encodings = [{"text": text, "ids": tokenizer(text).input_ids} for text in TEXTS]
    golden = {"transformers": transformers.__version__, "renderings": renderings, "encodings": encodings}
    out = Path(__file__).parent / "golden" / "qwen3.json"
    lines = json.dumps(golden, ensure_ascii=False, indent=1)
    out.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
