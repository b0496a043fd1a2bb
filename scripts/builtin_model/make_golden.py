"""Greedy answers of the built-in model by transformers, which the tests compare qjax with.

    python scripts/builtin_model/make_golden.py      # needs torch and transformers; no qjax

Writes tests/golden/builtin_model.json: for each conversation the rendered prompt and the greedy answer in float32 on a
CPU, with the versions that made it.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTIONS = [
    "What is 17 + 25?",
    "What is 4821 - 1977?",
    "What is 999 + 1?",
    "Which is larger, 734 or 743?",
    "What is the capital of Norway?",
    "What is the capital of Kenya?",
    "What is the currency of Japan?",
    "Hello!",
    "Who are you?",
    "Spell the word banana.",
    "Reverse the word garden.",
    "Sort these numbers: 7, 3, 9, 1.",
    "What will the weather be tomorrow?",
    "What is 12 x 7?",
    "What is 340 + 77? /no_think",
    "How many minutes are 3 hours?",
]


def conversations() -> list[dict]:
    cases = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    cases.append({"messages": [{"role": "user", "content": "What is 8 + 9?"}], "enable_thinking": False})
    cases.append(
        {
            "messages": [
                {"role": "user", "content": "My name is Lena."},
                {"role": "assistant", "content": "Nice to meet you, Lena!"},
                {"role": "user", "content": "What is my name?"},
            ]
        }
    )
    asked = [{"role": "user", "content": "What is the weather in Oslo?"}]
    cases.append({"messages": asked, "tools": [WEATHER]})
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    answered = [
        *asked,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"temperature": 7, "sky": "cloudy"}'},
    ]
    cases.append({"messages": answered, "tools": [WEATHER]})
    return cases


def main() -> None:
    import torch
    import transformers

    folder = ROOT / "qjax" / "builtin_model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for case in conversations():
        options = {"enable_thinking": False} if case.get("enable_thinking") is False else {}
        prompt = tokenizer.apply_chat_template(
            case["messages"], tools=case.get("tools"), tokenize=False, add_generation_prompt=True, **options
        )
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            answer = model.generate(ids, do_sample=False, max_new_tokens=256, temperature=None, top_p=None, top_k=None)
        case |= {"prompt": prompt, "answer_ids": answer[0, ids.shape[1] :].tolist()}
        case["answer"] = tokenizer.decode(case["answer_ids"], skip_special_tokens=True)
        out.append(case)
        print(repr(case["messages"][-1]["content"]), "->", repr(case["answer"]), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = ROOT / "tests" / "golden" / "builtin_model.json"
    path.write_text(json.dumps({"versions": versions, "cases": out}, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
