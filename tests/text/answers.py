"""Answers of a model for the parsers' tests: made of parts whose meaning is known, or torn at random."""

import itertools
import json
from random import Random

from qjax.text.answer_parser import AnswerParser
from qjax.text.parsed import CallArguments, CallEnded, CallStarted, Event, ParsedAnswer, ToolCall

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "where": {"type": "object"},
                    "unit": {"type": ["string", "null"]},
                    "level": {"anyOf": [{"type": "number"}, {"type": "string"}]},
                },
            },
        },
    }
]
NASTY = [
    *("<", "</", "<think>", "</think>", "<tool", "<tool_call>", "</tool_call>", "{", "}", "[", '"', "\\", "\n", " "),
    *(
        "\u2028",
        "é",
        "日本",
        "🙂",
        '{"name": "x"}',
        "<function=f>",
        "</parameter>",
        "<parameter=city>",
        "\t",
        "a",
        "B 2",
    ),
]


def make_parser(prompt: str = "", **options) -> AnswerParser:
    ids = itertools.count()
    return AnswerParser(prompt, **{"tools": TOOLS, "new_id": lambda: f"call-{next(ids)}", **options})


def streamed(pieces, prompt: str = "", **options) -> tuple[list[Event], AnswerParser]:
    parser = make_parser(prompt, **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish(), parser


def split(random: Random, text: str) -> list[str]:
    """The text in pieces: characters, a few long ones, or of all sizes; some are empty."""
    most = random.choice([1, 4, 4, 30, 1000])
    pieces = []
    while text:
        n = random.randint(0 if random.random() < 0.05 else 1, most)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


def check_events(events: list[Event]) -> None:
    """Calls come one after the other: started once, under the next index, then arguments, then ended."""
    open_call, num = None, 0
    for event in events:
        match event:
            case CallStarted(index, id, name):
                assert open_call is None and index == num and id == f"call-{index}" and name
                open_call, num = index, num + 1
            case CallArguments(index, text):
                assert index == open_call and text
            case CallEnded(index, _):
                assert index == open_call
                open_call = None
            case _:
                assert open_call is None and event.text


def nasty_text(random: Random, most: int = 8) -> str:
    return "".join(random.choices(NASTY, k=random.randint(0, most)))


def plain_text(random: Random, words: "itertools.count") -> str:
    """Text that no parser takes for anything else, with a word that comes once."""
    extra = random.choice(["", " <b>", " a < b", " <tool", "\n\n- x", " {}", " é日🙂", " `</tool_call", " \\n"])
    return f"w{next(words)}w{extra} end."


def json_value(random: Random, depth: int = 3):
    kind = random.randrange(7 if depth else 5)
    if kind == 5:
        return [json_value(random, depth - 1) for _ in range(random.randint(0, 3))]
    if kind == 6:
        return json_object(random, depth - 1)
    return [nasty_text(random), random.randint(-99, 99), random.random() * 1e9, None, random.random() < 0.5][kind]


def json_object(random: Random, depth: int = 3) -> dict:
    return {nasty_text(random, 2) or "k": json_value(random, depth) for _ in range(random.randint(0, 3))}


def known_answer(random: Random) -> tuple[str, ParsedAnswer]:
    """An answer as a model writes it, and what it says."""
    words = itertools.count()
    expected = ParsedAnswer()
    text = ""
    if random.random() < 0.6:
        expected.reasoning = random.choice(["", plain_text(random, words), plain_text(random, words)])
        text += f"<think>\n{expected.reasoning}\n</think>\n\n"
    if random.random() < 0.6:
        expected.content = plain_text(random, words)
        text += expected.content
    for i in range(random.choice([0, 0, 1, 1, 2, 5])):
        text += "\n" if expected.content and text.endswith(".") else ""
        call = ToolCall(f"call-{i}", random.choice(["get_weather", "f", "a-b.c_d", "名前"]), is_complete=True)
        call_text, call.arguments = known_call(random, call.name)
        text += call_text
        expected.tool_calls.append(call)
        if random.random() < 0.3:
            more = plain_text(random, words)
            text += "\n" + more
            expected.content += "\n" + more if expected.content else more
        elif random.random() < 0.7:
            text += "\n"
    return text, expected


def known_call(random: Random, name: str) -> tuple[str, str]:
    """A call's text in one of many forms, and the arguments that it has."""
    if random.random() < 0.25:
        return xml_call(random, name)
    value = json_object(random)
    arguments = json.dumps(value, ensure_ascii=random.random() < 0.3, indent=random.choice([None, None, 2]))
    name_part, form = f'"name": {json.dumps(name)}', random.randrange(8)
    body = f'{name_part}, "arguments": {arguments}'
    if form == 0:
        body = f'"arguments": {arguments}, {name_part}'
    elif form == 1:
        body = f'{name_part}, "arguments": {json.dumps(arguments, ensure_ascii=False)}'
    elif form == 2:
        body, arguments = name_part, "{}"
    elif form == 3:
        body = f'"id": "{random.random()}", "type": "function", {body}, "more": [1, {{"}}": null}}]'
    inside = random.choice(["{%s}", "{%s}", "{%s}", " {\n%s\n}\n", "{%s}}", "{%s"]) % body
    return f"<tool_call>\n{inside}\n</tool_call>", arguments


def xml_call(random: Random, name: str) -> tuple[str, str]:
    parts, items = [], []
    for key in random.sample(["city", "days", "where", "unit", "level", "other"], k=random.randint(0, 4)):
        is_typed = name == "get_weather" and key in ("days", "where", "level")
        if is_typed:
            value = {"days": random.randint(-9, 9), "where": json_object(random), "level": 2.5}[key]
            written = json.dumps(value, ensure_ascii=False).replace("</parameter>", "")
            items.append(f'"{key}": {written}')
        else:
            written = nasty_text(random).replace("</parameter>", "").replace("<parameter=city>", "") + "!"
            items.append(f'"{key}": {json.dumps(written, ensure_ascii=False)}')
        parts.append(f"<parameter={key}>\n{written}\n</parameter>\n")
    arguments = "{" + ", ".join(items) + "}"
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>", arguments


def torn_answer(random: Random) -> str:
    """Parts of answers in any order, some cut, so that there are mistakes of all kinds."""
    words = itertools.count()
    parts = []
    for _ in range(random.randint(1, 7)):
        word = f"w{next(words)}w"
        call = f'<tool_call>\n{{"name": "{word}", "arguments": {{"k": "w{next(words)}w"}}}}\n</tool_call>'
        xml = f"<tool_call>\n<function={word}>\n<parameter=k>\nw{next(words)}w\n</parameter>\n</function>\n</tool_call>"
        part = random.choice(
            [
                *(call, call, xml, f"<think>\n{word}\n</think>\n\n", plain_text(random, words), nasty_text(random)),
                *("<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", word, f'"{word}"', "}", "{", ","),
            ]
        )
        if random.random() < 0.4:
            start = random.choice([0, 0, random.randint(0, len(part))])
            part = part[start : random.randint(start, len(part))]
        parts.append(part)
    return "".join(parts)
