"""What is fuzzed: functions of bytes that must not raise. `test_targets` runs them on hypothesis' inputs, and
`scripts/fuzz.py` on atheris'.
"""

import contextlib
import functools
import itertools
import json
import tempfile
from collections.abc import Callable

from qjax.sampling_params import SamplingParams
from qjax.server.embeddings import EmbeddingRequest
from qjax.server.errors import ApiError
from qjax.server.messages_protocol import MessagesRequest
from qjax.server.protocol import ChatRequest, CompletionRequest
from qjax.server.rerank import RerankRequest
from qjax.server.responses_protocol import ResponsesRequest
from qjax.server.schema import parse
from qjax.text.answer_parser import AnswerParser
from qjax.text.detokenizer import Detokenizer
from qjax.text.parsed import ParsedAnswer
from qjax.text.tokenizer import Tokenizer
from tests.text.small_tokenizer import write_small_tokenizer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
# What bytes stand for, so that few of them make what the parsers look for.
PIECES = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=city>"),
    *("</parameter>", '{"name": "f", "arguments": {', '"city": "', '"days": 3', '"}', "}}", "}", "{", '"', "\\", "\n"),
    *("<", ">", "/", "[", "]", ",", ":", "null", "1e5", "\\u00e9", "\\ud83d", "é", "🙂", " ", "x", "</", "tool_call"),
]
WORDS = [
    *("role", "user", "assistant", "system", "tool", "content", "type", "text", "function", "name", "parameters", "x"),
    *("tool_calls", "arguments", "id", "call_id", "json_schema", "schema", "strict", "object", "properties", "$ref"),
    *("auto", "required", "none", "message", "function_call", "function_call_output", "reasoning", "output", "summary"),
    *(
        "input_text",
        "tool_use",
        "tool_result",
        "tool_use_id",
        "thinking",
        "regex",
        "choice",
        "grammar",
        "structural_tag",
    ),
    *("structures", "triggers", "begin", "end", "enable_thinking", "mode", "tools", "", "\ud800", "1", "{}", "[a-z"),
]
BODIES = (ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, EmbeddingRequest, RerankRequest)


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_pretrained(write_small_tokenizer(folder))


def answers(data: bytes) -> None:
    """An answer in any pieces gives the same message as in one, and no character of it is lost to an error."""
    if len(data) < 3:
        return
    options, cut, text = data[0], data[1], "".join(PIECES[byte % len(PIECES)] for byte in data[2:300])
    make = lambda: AnswerParser(
        "<think>\n" if options & 1 else "",
        tools=TOOLS if options & 2 else None,
        reasoning=("auto", "qwen3", "deepseek_r1", "none")[options >> 2 & 3],
        tool_calls=("auto", "hermes", "qwen3_coder", "none")[options >> 4 & 3],
        is_parallel=bool(options & 64),
        new_id=lambda: "call",
    )
    whole = make().parse(text)
    parser, size = make(), 1 + cut % 7
    events = [e for i in range(0, len(text), size) for e in parser.feed(text[i : i + size])]
    pieces = ParsedAnswer.of([*events, *parser.finish()])
    assert pieces == whole, f"in pieces of {size}: {pieces} is not {whole}"
    json.dumps(whole.message())


def detokenizing(data: bytes) -> None:
    """Tokens one by one give the text that they give at once; nothing comes behind a stop string."""
    ids = [(a << 8 | b) % 600 for a, b in itertools.pairwise(data[1:200])]
    stops = (None, ["a"], ["\n", "the"], ["aa", "aab", " "])[data[0] & 3 if data else 0]
    params = SamplingParams(stop=stops, include_stop_str_in_output=bool(data[:1] > b"\x80"))
    one, many = Detokenizer(tokenizer(), params), Detokenizer(tokenizer(), params)
    text = one.append(ids) + one.flush()
    pieces = "".join(many.append([token]) for token in ids) + many.flush()
    assert pieces == text and many.stop_match == one.stop_match
    if stops is not None and one.stop_match is None:
        assert not any(stop in text for stop in stops)


def bodies(data: bytes) -> None:
    """A body is taken, or refused with a message that can be sent. The bytes choose fields and values."""
    take = iter(data).__next__
    try:
        kind = BODIES[take() % len(BODIES)]
    except StopIteration:
        return
    body: dict[str, object] = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
    body = {name: value for name, value in body.items() if name in kind.__dataclass_fields__}
    names = list(kind.__dataclass_fields__)
    with contextlib.suppress(StopIteration):
        while True:
            name = names[take() % len(names)]
            body[name] = _value(take, 0)
    check_body(kind, body)


def _value(take: Callable[[], int], depth: int) -> object:
    """JSON of what OpenAI's bodies are made of. Raises StopIteration at the end of the bytes."""
    choice = take() % (8 if depth < 4 else 5)
    if choice == 0:
        return (None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 1e308)[take() % 10]
    if choice == 1:
        return (take() - 128) / 8
    if choice in (2, 3):
        return WORDS[take() % len(WORDS)]
    if choice == 4:
        return take()
    if choice == 5:
        return [_value(take, depth + 1) for _ in range(take() % 4)]
    return {WORDS[take() % len(WORDS)]: _value(take, depth + 1) for _ in range(1 + take() % 4)}


def check_body(kind: type, value: object) -> None:
    try:
        body = parse(kind, value)
        if isinstance(body, ResponsesRequest | MessagesRequest):
            body = body.chat()
        if isinstance(body, ChatRequest | CompletionRequest):
            body.sampling_params({"temperature": 0.6, "top_k": 20})
    except ApiError as error:
        assert 400 <= error.status < 500
        assert json.loads(error.response().body)["error"]["message"]


TARGETS: dict[str, Callable[[bytes], None]] = {"answers": answers, "detokenizing": detokenizing, "bodies": bodies}
