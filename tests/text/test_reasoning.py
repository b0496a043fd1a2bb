import pytest

from qjax.text.parsed import Content, ParsedAnswer, Reasoning
from qjax.text.reasoning import ReasoningParser, ReasoningTokens
from tests.text.answers import make_parser, streamed

HYBRID = "<|im_start|>user\nWhat does <think> do?<|im_end|>\n<|im_start|>assistant\n"
OPENED = HYBRID + "<think>\n"  # Thinking-2507
CLOSED = HYBRID + "<think>\n\n</think>\n\n"  # enable_thinking false
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def parse(text: str, prompt: str = HYBRID, **options) -> ParsedAnswer:
    """The answer, the same whole and in characters."""
    whole = make_parser(prompt, **options).parse(text)
    assert ParsedAnswer.of(streamed(text, prompt, **options)[0]) == whole
    return whole


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        # Hybrid: the model opens the block itself, or not.
        (HYBRID, "<think>\nhm\n</think>\n\nHi", "hm", "Hi"),
        (HYBRID, "<think>\n\n</think>\n\nHi", "", "Hi"),
        (HYBRID, "Hi", "", "Hi"),
        (HYBRID, "\n\nHi\n", "", "\n\nHi\n"),
        (HYBRID, "\n<think>hm</think>Hi", "hm", "Hi"),
        (HYBRID, "Use <think> for this.", "", "Use <think> for this."),
        (HYBRID, "Hi</think>", "", "Hi</think>"),
        # Thinking-2507: the template opened it.
        (OPENED, "hm\n</think>\n\nHi", "hm", "Hi"),
        (OPENED, "<think>\nhm\n</think>\n\nHi", "hm", "Hi"),
        (OPENED, "\n\nhm\n\nso\n\n</think>\n\nHi", "hm\n\nso", "Hi"),
        (OPENED, "</think>\n\nHi", "", "Hi"),
        # Thinking is off, or the model knows none.
        (CLOSED, "Hi", "", "Hi"),
        (CLOSED, "\n\nHi", "", "Hi"),
        (CLOSED, "<think> is a tag.", "", "<think> is a tag."),
        # A second closing tag is text.
        (OPENED, "hm\n</think>\n\nWrite </think> here", "hm", "Write </think> here"),
        # Spaces are the model's own.
        (OPENED, "  hm \n</think>\n\n  Hi ", "  hm ", "  Hi "),
        # Cut anywhere.
        (HYBRID, "<thi", "", "<thi"),
        (HYBRID, "<think>", "", ""),
        (HYBRID, "<think>\nhm", "hm", ""),
        (HYBRID, "<think>\nhm\n</thi", "hm\n</thi", ""),
        (HYBRID, "<think>\nhm\n</think>", "hm", ""),
        (HYBRID, "<think>\nhm\n</think>\n\n", "hm", ""),
        (OPENED, "if a<b\n", "if a<b", ""),
        (HYBRID, "", "", ""),
        (HYBRID, "\n", "", "\n"),
        (HYBRID, "done <tool", "", "done <tool"),
        # Continued messages: the prompt holds the beginning.
        (CLOSED + "They", "\n\nare <think>", "", "\n\nare <think>"),
        (OPENED + "so far", "\n\nmore\n</think>\n\nHi", "\n\nmore", "Hi"),
        (CLOSED + "The tag <think> is", " closed by </think>.", "", " closed by </think>."),
        (HYBRID + "They", " are", "", " are"),
        # The last turn is closed: there is nothing to continue.
        (OPENED + "hm\n</think>\n\nHi<|im_end|>\n", "<think>a</think>b", "a", "b"),
        # Templates with other turns.
        ("[INST] Hi [/INST]", "<think>\nhm\n</think>\n\nHi", "hm", "Hi"),
        ("[INST] <think> [/INST] <think>\n", "hm\n</think>\n\nHi", "hm", "Hi"),
        ("[INST] Hi [/INST] <think>\n\n</think>\n\n", "<think>", "", "<think>"),
        ("", "<think>\nhm\n</think>\n\nHi", "hm", "Hi"),
    ],
)
def test_auto(prompt: str, text: str, reasoning: str, content: str) -> None:
    for name in ("auto", "qwen3"):
        for tools in (None, [{}]):
            assert parse(text, prompt, reasoning=name, tools=tools) == ParsedAnswer(reasoning, content)


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        (HYBRID, "hm\n</think>\n\nHi", "hm", "Hi"),
        (HYBRID, "<think>\nhm\n</think>\n\nHi", "hm", "Hi"),
        (HYBRID, "hm", "hm", ""),
        (OPENED, "<think>\nhm\n</think>\n\nHi", "hm", "Hi"),
        (CLOSED, "Hi", "", "Hi"),
        (HYBRID, "<thi", "<thi", ""),
    ],
)
def test_deepseek_r1_thinks_first(prompt: str, text: str, reasoning: str, content: str) -> None:
    assert parse(text, prompt, reasoning="deepseek_r1") == ParsedAnswer(reasoning, content)


@pytest.mark.parametrize("prompt", [HYBRID, OPENED, CLOSED])
def test_none_leaves_the_text_alone(prompt: str) -> None:
    text = "\n<think>\nhm\n</think>\n\nHi"
    assert parse(text, prompt, reasoning="none", tools=None) == ParsedAnswer(content=text)


class TestCallsInReasoning:
    def test_a_call_ends_reasoning_that_was_not_closed(self) -> None:
        answer = parse(f"I need it.\n{CALL}", OPENED)
        assert (answer.reasoning, answer.content, len(answer.tool_calls)) == ("I need it.", "", 1)

    def test_the_closing_tag_may_still_come(self) -> None:
        for between in ("", "\n", "\n\n"):
            answer = parse(f"I need it.\n{CALL}{between}</think>\n\nHi </think>", OPENED)
            assert (answer.reasoning, answer.content, len(answer.tool_calls)) == ("I need it.", "Hi </think>", 1)

    def test_the_tag_alone_is_a_remark(self) -> None:
        for remark in ("I use <tool_call> here", "<tool_call>", "<tool_call>\n<", "<tool_call></think"):
            answer = parse(f"{remark}\n</think>\n\n{CALL}", OPENED)
            assert (answer.reasoning, answer.content, len(answer.tool_calls)) == (remark, "", 1)

    def test_without_tools_it_is_reasoning(self) -> None:
        answer = parse(f"like {CALL}\n</think>\n\nHi", OPENED, tools=None)
        assert answer == ParsedAnswer(f"like {CALL}", "Hi")

    def test_xml(self) -> None:
        answer = parse("hm\n<tool_call>\n<function=f>\n</function>\n</tool_call>", OPENED)
        assert (answer.reasoning, answer.content, answer.tool_calls[0].arguments) == ("hm", "", "{}")


class TestStream:
    def test_text_is_given_out_at_once(self) -> None:
        """Only what may belong to a tag, or to the newlines in front of one, waits."""
        parser = ReasoningParser("auto", OPENED)
        assert parser.feed("\n") == []
        assert parser.feed("a") == [Reasoning("a")]
        assert parser.feed("b\n\n") == [Reasoning("b")]
        assert parser.feed("c </th") == [Reasoning("\n\nc ")]
        assert parser.feed("at") == [Reasoning("</that")]
        assert parser.feed("\n</think>\n") == []
        assert parser.feed("\nHi <") == [Content("Hi <")]
        assert parser.finish() == []

    def test_an_empty_delta_is_nothing(self) -> None:
        parser = ReasoningParser()
        assert parser.feed("") == [] and parser.state == "start"
        parser.feed("x")
        assert parser.feed("") == [] and parser.state == "content"


class TestReasoningTokens:
    def count(self, tokenizer, text: str, prompt: str = HYBRID, **options) -> int:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        counts = set()
        for size in (1, 3, 1000):
            counter = ReasoningTokens(tokenizer, make_parser(prompt, **options).reasoning)
            for i in range(0, len(ids), size):
                counter.add(ids[i : i + size])
            counts.add(counter.count)
        assert len(counts) == 1
        return counts.pop()

    def test_tokens_between_the_tags(self, tokenizer) -> None:
        for inside in ("\nLet me think.\n", "\n\n"):
            num = len(tokenizer.encode(inside))
            assert self.count(tokenizer, f"<think>{inside}</think>\n\nHi") == num
            assert self.count(tokenizer, f"{inside}</think>\n\nHi", OPENED) == num
            assert self.count(tokenizer, inside, OPENED) == num, "cut"
            assert self.count(tokenizer, f"<think>{inside}</think>Hi", OPENED) == num, "opened twice"
            assert self.count(tokenizer, f"{inside}{CALL}", OPENED) == num, "ended by a call"
            assert self.count(tokenizer, f"{inside}</think>", reasoning="deepseek_r1") == num

    def test_none_without_reasoning(self, tokenizer) -> None:
        for prompt, text in ((HYBRID, "Hi <think>x"), (CLOSED, "<think>"), (HYBRID, "")):
            assert self.count(tokenizer, text, prompt) == 0
        assert self.count(tokenizer, "<think>x</think>", reasoning="none") == 0


def test_a_parsed_message_renders_to_the_models_own_text(tokenizer) -> None:
    """So the next turn finds its prompt in the prefix cache."""
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages)
    for text in (
        "<think>\nhm\n\n- so\n</think>\n\nIt is\nfine.",
        "<think>\n\n</think>\n\nIt is fine. ",
        f"<think>\nhm\n</think>\n\n{CALL}",
        f"<think>\nhm\n</think>\n\nI look.\n{CALL}\n{CALL}",
        f"<think>\nhm\n</think>\n\nI look.\n\n{CALL}",
    ):
        message = parse(text, prompt).message()
        assert tokenizer.apply_chat_template([*messages, message], add_generation_prompt=False) == (
            prompt + text + "<|im_end|>\n"
        )
