import json

import pytest

from qjax.text.json_scanner import JsonScanner
from qjax.text.parsed import CallArguments, CallEnded, CallStarted, Content, ParsedAnswer, held_back
from tests.text.answers import make_parser, streamed

Calls = list[tuple[str, str]]


def parse(text: str, **options) -> ParsedAnswer:
    """The answer, the same whole and in characters."""
    whole = make_parser(**options).parse(text)
    assert ParsedAnswer.of(streamed(text, **options)[0]) == whole
    return whole


def calls(answer: ParsedAnswer) -> Calls:
    return [(call.name, call.arguments) for call in answer.tool_calls]


def block(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


def hermes(name: str, arguments: str) -> str:
    return block(f'{{"name": "{name}", "arguments": {arguments}}}')


F = hermes("f", "{}")


@pytest.mark.parametrize(
    "arguments",
    [
        *("{}", '{"city": "Oslo"}', '{ "a":1 ,"b" : [ 1,2.50, -0e3 ]}', '{"a": {"b": {"c": [{}, [], [[]]]}}}'),
        *('{"cmd": "mkdir -p test/{test1,test2"}', '{"a": "</tool_call>"}', '{"a": "<tool_call>\\n{}"}'),
        *('{"a": "\\"}{\\\\"}', '{"a": "\\u00e9\\ud83d\\ude42"}', '{"城市": "東京 🙂"}', '{"a": "</think>"}'),
        *('{"a": true, "b": false, "c": null}', '{\n  "a": 1,\n  "b": "x"\n}'),
        *('{"a": "x", "a": "y"}', '{"name": "g", "arguments": {"z": 1}}', '{"": ""}', "{ }"),
    ],
)
def test_arguments_are_the_models_own_text(arguments: str) -> None:
    answer = parse(hermes("f", arguments))
    assert calls(answer) == [("f", arguments)] and answer.content == ""
    assert isinstance(json.loads(arguments), dict)
    assert answer.tool_calls[0].is_complete


@pytest.mark.parametrize(
    ("inside", "name", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', "f", '{"a": 1}'),
        ('{"name": "f"}', "f", "{}"),
        ('{"name": "f", "arguments": null}', "f", "{}"),
        ('{"name": "f", "arguments": ""}', "f", "{}"),
        ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\n é\\"}"}', "f", '{"a": "\\n é"}'),
        ('{"id": 7, "name": "f", "type": {"x": ["}"]}, "arguments": {}}', "f", "{}"),
        ('{"name": "f\\u00e9", "arguments": {}}', "fé", "{}"),
        ('{"name": "f", "arguments": {"a": 1}', "f", '{"a": 1}'),  # a brace too few
        ('{"name": "f"', "f", "{}"),
        ('{"name": "f", "arguments": {"a": 1}}}', "f", '{"a": 1}'),  # a brace too many
        ('{"name": "f", "arguments": {"a": "two\nlines\t"}}', "f", '{"a": "two\\nlines\\t"}'),
        ('\n\n  {"name":"f","arguments":{}}  \n\n', "f", "{}"),
    ],
)
def test_forms_of_a_call(inside: str, name: str, arguments: str) -> None:
    for text in (block(inside), f"<tool_call>{inside}</tool_call>"):
        answer = parse(text)
        assert calls(answer) == [(name, arguments)] and answer.content == ""


@pytest.mark.parametrize(
    "inside",
    [
        *("", "hello", "[]", "{}", "null", "{'name': 'f'}", '{"name": 5, "arguments": {}}', '{"name": ""}'),
        *('{"arguments": {}}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": 5}'),
        *('{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": "{} {}"}', '{"name": "f" "arguments": {}}'),
        *('{"name": "f", "arguments": {"a": }}', '{"name": "f", "arguments": {a: 1}}', '{"name": "f",, "x": 1}'),
        *('{"name": "f", "arguments": {"a": 01}}', '{"name": "f", "arguments": {"a": nul}}', '{"name": "f", }'),
        *('{"name": "f", "arguments": {"a": "\\x"}}', '{"name": "f", "arguments": {"a": "\\u12g4"}}', '{"name"}'),
        *('{"name": "f", "arguments": {"a": 1]}', '{"name": "\\ud83d"}', '{"name": "f", "name": "g"}', "</tool_call>"),
        *("<function=>", "<function=f><x>", "<function=f g>", "<function=f>text</function>", "<functions>"),
    ],
)
def test_a_bad_call_is_text_and_the_good_ones_stay(inside: str) -> None:
    bad = block(inside)
    assert parse(bad) == ParsedAnswer(content=bad)
    answer = parse(f"{F}\n{bad}\n{hermes('g', '{}')}")
    assert calls(answer) == [("f", "{}"), ("g", "{}")] and answer.content == bad
    answer = parse(f"I look.\n{bad}\n{F}\nDone.")
    assert calls(answer) == [("f", "{}")] and answer.content == f"I look.\n{bad}\nDone."


class TestMistakesBehindTheCheckedPart:
    """What has been sent cannot be taken back."""

    LONG = '{"text": "' + "x" * 40 + '", '

    def test_they_stay_in_the_arguments(self) -> None:
        answer = parse(f"{hermes('f', self.LONG + 'oops}')}\n{hermes('g', '{}')}")
        assert calls(answer) == [("f", self.LONG + "oops}}"), ("g", "{}")] and answer.content == ""

    def test_a_forgotten_closing_tag_in_front_of_the_next_call(self) -> None:
        answer = parse(f'<tool_call>\n{{"name": "f", "arguments": {self.LONG}\n{hermes("g", "{}")}')
        assert calls(answer) == [("f", self.LONG + "\n"), ("g", "{}")]

    def test_cut(self) -> None:
        events, _ = streamed(f'<tool_call>\n{{"name": "f", "arguments": {self.LONG}oops </tool')
        assert calls(ParsedAnswer.of(events)) == [("f", self.LONG + "oops </tool")]
        assert events[-1] == CallEnded(0, is_complete=False)


class TestTextAround:
    @pytest.mark.parametrize(
        ("text", "content", "num_calls"),
        [
            (f"I look.\n{F}", "I look.", 1),
            (f"I look.\n\n{F}", "I look.\n", 1),  # the template writes one newline
            (f"I look. {F}", "I look. ", 1),
            (f"\n\n{F}", "", 1),
            (f"{F}\n{F}\n\n{F}\n", "", 3),
            (f"{F}{F}", "", 2),
            (f"{F}\nDone.", "Done.", 1),
            (f"I look.\n{F}\nAnd more:\n{F}\n Done.\n", "I look.\nAnd more:\n Done.\n", 2),
            (f"{F[:-12]}\n{F}", "", 2),  # no closing tag
            (f"{F[:-12]} so.", " so.".lstrip(), 1),
            ("a <tool", "a <tool", 0),
            ("a\n<tool_call", "a\n<tool_call", 0),
            ("a\n<tool_call>", "a\n<tool_call>", 0),
            ("a\n<tool_call>\n", "a\n<tool_call>\n", 0),
            ("a\n", "a\n", 0),
            ("\n", "\n", 0),
            ("<tool_call> and <tool_call>{x}", "<tool_call> and <tool_call>{x}", 0),
            (f"<tool_call>{F}", "<tool_call>", 1),
            (f"<<tool_call{F}", "<<tool_call", 1),
            (f"{F}\n</tool_call>", "</tool_call>", 1),
        ],
    )
    def test_content(self, text: str, content: str, num_calls: int) -> None:
        answer = parse(text)
        assert (answer.content, len(answer.tool_calls)) == (content, num_calls)

    def test_without_tools_a_call_is_text(self) -> None:
        for options in ({"tools": None}, {"tools": []}, {"tool_calls": "none"}):
            assert parse(f"\nHi\n{F}\n", **options) == ParsedAnswer(content=f"\nHi\n{F}\n")

    def test_only_the_first_call(self) -> None:
        answer = parse(f"a\n{F}\n{hermes('g', '{}')}\nb", is_parallel=False)
        assert calls(answer) == [("f", "{}")] and answer.content == "a\nb"
        answer = parse(f"{block('bad')}\n{F}", is_parallel=False)
        assert calls(answer) == [("f", "{}")], "a bad one does not count"


class TestCut:
    def test_a_call_is_one_from_its_arguments_on(self) -> None:
        whole = hermes("f", '{"a": "xy"}')
        for end in range(len(whole) + 1):
            text = whole[:end]
            answer = parse(text)
            if '"arguments": {' in text:
                arguments = text.partition('"arguments": ')[2][:11]
                is_complete = '"xy"}}' in text
                call = answer.tool_calls[0]
                assert (call.name, call.arguments, call.is_complete) == ("f", arguments, is_complete)
                assert answer.content == ""
            else:
                assert answer == ParsedAnswer(content=text)

    def test_finish_reason(self) -> None:
        def reason(text: str, engine: str) -> str:
            parser = make_parser()
            parser.parse(text)
            return parser.finish_reason(engine)

        assert reason(F, "stop") == "tool_calls"
        assert reason(F, "length") == "length" and reason(F, "abort") == "abort"
        assert reason(hermes("f", '{"a": 1')[:-14], "stop") == "stop", "no whole call"
        assert reason(block("bad"), "stop") == "stop"


class TestStream:
    def test_long_arguments_come_as_they_are_written(self) -> None:
        text = hermes("f", '{"text": "' + "word " * 100 + '"}')
        parser = make_parser()
        seen = []
        for char in text:
            seen.append(parser.feed(char))
        kinds = [type(e) for events in seen for e in events]
        assert kinds == [CallStarted, *[CallArguments] * (len(kinds) - 2), CallEnded]
        lengths = [len(e.text) for events in seen for e in events if isinstance(e, CallArguments)]
        assert lengths[0] == 32 and set(lengths[1:]) == {1}

    def test_a_call_in_one_piece(self) -> None:
        assert make_parser().feed(hermes("f", '{"a": 1}')) == [
            CallStarted(0, "call-0", "f"),
            CallArguments(0, '{"a": 1}'),
            CallEnded(0, is_complete=True),
        ]

    def test_a_call_is_complete_without_waiting_for_its_tag(self) -> None:
        events = make_parser().feed('<tool_call>\n{"name": "f", "arguments": {}}')
        assert events[-1] == CallEnded(0, is_complete=True)

    def test_text_waits_only_where_it_may_be_a_tag(self) -> None:
        parser = make_parser()
        assert [parser.feed(t) for t in ("a", " \n", "b <", "t> ", "<tool_cal", "m")] == [
            [Content("a")],
            [Content(" ")],
            [Content("\nb ")],
            [Content("<t> ")],
            [],
            [Content("<tool_calm")],
        ]

    def test_ids_are_new_and_openais(self) -> None:
        from qjax.text.tool_calls import new_call_id

        assert new_call_id() != new_call_id() and new_call_id().startswith("chatcmpl-tool-")


def xml(*parameters: str, name: str = "get_weather") -> str:
    return f"<tool_call>\n<function={name}>\n{''.join(p + chr(10) for p in parameters)}</function>\n</tool_call>"


def parameter(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>"


class TestXml:
    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("city", "Oslo", '"Oslo"'),
            ("city", "7", '"7"'),
            ("city", 'a "b"\n\n{c}\\ é', '"a \\"b\\"\\n\\n{c}\\\\ é"'),
            ("city", "</parameter> and </function>", '"</parameter> and </function>"'),
            ("city", "\n x \n", '"\\n x \\n"'),
            ("city", "", '""'),
            ("days", "7", "7"),
            ("days", " 7 ", "7"),
            ("days", "seven", '"seven"'),
            ("days", "NaN", '"NaN"'),
            ("where", '{"a": [1,  2]}', '{"a": [1,  2]}'),
            ("unit", "null", "null"),
            ("unit", "None", "null"),
            ("unit", "7", '"7"'),
            ("level", "2.5", "2.5"),
            ("level", "3", "3"),
            ("level", "high", '"high"'),
            ("level", "true", '"true"'),
            ("other", "7", '"7"'),
        ],
    )
    def test_values_by_the_schema(self, name: str, value: str, expected: str) -> None:
        answer = parse(xml(parameter(name, value)))
        assert calls(answer) == [("get_weather", f'{{"{name}": {expected}}}')] and answer.content == ""
        json.loads(answer.tool_calls[0].arguments)

    def test_several_and_none(self) -> None:
        answer = parse(f"a\n{xml(parameter('city', 'x'), parameter('days', '1'))}\n{xml(name='g')}")
        assert calls(answer) == [("get_weather", '{"city": "x", "days": 1}'), ("g", "{}")] and answer.content == "a"

    def test_a_forgotten_end_of_a_parameter(self) -> None:
        text = "<tool_call>\n<function=f>\n<parameter=a>\nx\n</function>\n</tool_call>"
        assert calls(parse(text)) == [("f", '{"a": "x"}')]

    def test_cut(self) -> None:
        assert calls(parse("<tool_call><function=f><parameter=a>\nhal")) == [("f", '{"a": "hal')]

    def test_deep_schemas(self) -> None:
        schema: dict = {"type": "integer"}
        for _ in range(5000):
            schema = {"anyOf": [schema]}
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}]
        assert calls(parse(xml(parameter("a", "1"), name="f"), tools=tools)) == [("f", '{"a": "1"}')]

    def test_odd_schemas(self) -> None:
        for properties in ({"a": 5}, {"a": {"type": 5}}, {"a": {"type": [5], "anyOf": [5]}}, [], None):
            tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}, {}]
            assert calls(parse(xml(parameter("a", "1"), name="f"), tools=tools)) == [("f", '{"a": "1"}')]

    def test_only_the_wanted_form(self) -> None:
        for name in ("qwen3_coder", "qwen3_xml"):
            assert calls(parse(xml(name="g"), tool_calls=name)) == [("g", "{}")]
            assert parse(F, tool_calls=name) == ParsedAnswer(content=F)
        for name in ("hermes", "qwen3_json"):
            assert calls(parse(F, tool_calls=name)) == [("f", "{}")]
            assert parse(xml(), tool_calls=name) == ParsedAnswer(content=xml())


class TestJsonScanner:
    @pytest.mark.parametrize("text", ["{}", '"a"', "[]", '{"a": [1, "x", {"b": null}]}', "[" * 5000 + "]" * 5000])
    def test_finds_the_end(self, text: str) -> None:
        scanner = JsonScanner()
        assert scanner.scan(f" {text}, more") == len(text) + 1 and scanner.is_done
        assert scanner.take() == f" {text}"

    @pytest.mark.parametrize(
        ("text", "end"), [("{,", 1), ("[1 2", 3), ('{"a" 1', 5), ("x", 0), ("[-]", 2), ('{"a":}', 5)]
    )
    def test_finds_the_first_mistake(self, text: str, end: int) -> None:
        scanner = JsonScanner()
        assert scanner.scan(text) == end and scanner.is_broken and not scanner.is_done

    def test_agrees_with_json(self) -> None:
        """Every string of a few characters is taken for JSON exactly if Python's parser does."""
        import itertools

        for chars in itertools.product(['"', "{", "}", "[", "]", ":", ",", "1", "-", " ", "a"], repeat=5):
            text = "".join(chars).strip()
            scanner = JsonScanner()
            end = scanner.scan(text + " ")
            try:
                json.loads(text)
                is_json = True
            except ValueError:
                is_json = False
            assert (scanner.is_done and not (text + " ")[end:].strip()) is is_json, text


def test_held_back() -> None:
    assert [held_back(t, "<think>", "<tool>") for t in ("", "a", "<", "x<t", "<thin", "<think>", "<tool")] == [
        *(0, 0, 1, 2, 5, 0, 5)
    ]
