"""Whatever a model writes, and wherever it is cut: the streamed answer is the whole one, and nothing is lost."""

import re
from random import Random

import pytest

from qjax.text.parsed import Content, ParsedAnswer, Reasoning, joined
from tests.text.answers import check_events, known_answer, make_parser, nasty_text, split, streamed, torn_answer

PROMPTS = ["", "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"]
OPTIONS = [{}, {}, {"reasoning": "deepseek_r1"}, {"reasoning": "none"}, {"is_parallel": False}, {"tools": None}]


def check_streams(random: Random, text: str, prompt: str = "", **options) -> ParsedAnswer:
    whole = make_parser(prompt, **options)
    events = joined([*whole.feed(text), *whole.finish()])
    check_events(events)
    for pieces in (list(text), split(random, text)):
        in_pieces, parser = streamed(pieces, prompt, **options)
        check_events(in_pieces)
        assert joined(in_pieces) == events, (text, pieces)
        assert parser.finish_reason("stop") == whole.finish_reason("stop")
    return ParsedAnswer.of(events)


def everything(answer: ParsedAnswer) -> str:
    return "\n".join([answer.reasoning, answer.content, *(f"{c.name}\n{c.arguments}" for c in answer.tool_calls)])


def check_known(seeds: range) -> None:
    for seed in seeds:
        random = Random(seed)
        text, expected = known_answer(random)
        assert check_streams(random, text) == expected, (seed, text)


def check_torn(seeds: range) -> None:
    for seed in seeds:
        random = Random(seed)
        text, prompt, options = torn_answer(random), random.choice(PROMPTS), random.choice(OPTIONS)
        answer = check_streams(random, text, prompt, **options)
        if "is_parallel" in options:  # drops calls by the user's wish
            continue
        found = everything(answer)
        for word in re.findall(r"w\d+w", text):
            assert found.count(word) == text.count(word), (seed, text, answer)


def test_known_answers_streamed_and_whole() -> None:
    check_known(range(2500))


def test_torn_answers_streamed_and_whole_lose_nothing() -> None:
    check_torn(range(2500))


@pytest.mark.slow
def test_many_more() -> None:
    check_known(range(10_000, 40_000))
    check_torn(range(10_000, 40_000))


def test_text_without_tags_is_untouched() -> None:
    """Content equals the text, character by character, where it has neither tags nor tools."""
    for seed in range(500):
        random = Random(seed)
        text = "x" + nasty_text(random, 20)
        assert check_streams(random, text, tools=None) == ParsedAnswer(content=text)
        if "<tool_call>" not in text:
            assert check_streams(random, text) == ParsedAnswer(content=text)


def test_events_of_one_piece_are_joined() -> None:
    events = [Reasoning("a"), Reasoning("b"), Content("c"), Content(""), Content("d")]
    assert joined(events) == [Reasoning("ab"), Content("cd")]


def test_a_long_answer_costs_time_in_proportion() -> None:
    """No state may be read again and again: the server parses on its event loop."""
    import time

    def seconds(text: str) -> float:
        start = time.perf_counter()
        streamed([text[i : i + 4] for i in range(0, len(text), 4)])
        return time.perf_counter() - start

    for begin, unit, end in (
        ("<think>", "so <b\n", "</think>"),
        ("<think>", "<tool_call>", ""),
        ("", "<tool_call>{", ""),
        ("", '<tool_call>{"', ""),
        ("", '<tool_call>\n{"name": "f", "arguments": {"k": "', ""),
        ('<tool_call>{"name": "f", "arguments": {"k": "', "word < ", '"}}</tool_call>'),
        ("<tool_call><function=f><parameter=city>", "</parameter> <", ""),
        ("<tool_call><function=", "name", ""),
        ("", "\n", ""),
        ("<tool_call>", "\n", ""),
        ('<tool_call>{"arguments": ', '{"k":', ""),
    ):
        assert seconds(begin + unit * (60_000 // len(unit)) + end) < 5, (begin, unit)
