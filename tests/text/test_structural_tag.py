"""Structural tags: which texts each format allows, token by token as the tokenizer writes them."""

import json
import re

import numpy as np
import pytest

from qjax.sampling_params import SamplingParams, StructuredOutputsParams
from qjax.text.constraint import make_constraint
from qjax.text.grammar import GrammarCompiler
from qjax.text.structural_tag import lark_source
from qjax.text.tokenizer import Tokenizer
from qjax.text.tool_grammar import ToolChoice, with_tools
from tests.text.test_grammar import EOS, allowed

VOCAB = 600
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
ANY = {"type": "any_text"}


def const(value):
    return {"type": "const_string", "value": value}


def tag(begin, content, end):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def tags(kind, *items, **fields):
    return {"type": kind, "tags": list(items), **fields}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, EOS)


def accepts(compiler: GrammarCompiler, state, text: str) -> bool:
    """Whether the mask allows each token of the text, and the end behind it."""
    for token in compiler.tokenizer.encode(text):
        if token not in allowed(state) or not state.accept(token):
            return False
    return state.is_finished or not EOS.isdisjoint(allowed(state))


FUNCTIONS = [tag("<f=a>", INTEGER, "</f>"), tag("<f=b>", {"type": "regex", "pattern": "[xy]/?"}, "</f>")]
CALLS = tags("triggered_tags", tag("<tool_call>", INTEGER, "</tool_call>"), triggers=["<tool_call>"])


@pytest.mark.parametrize(
    ("fmt", "good", "bad"),
    [
        (const("a</think>b"), ["a</think>b"], ["", "ab", "a</think>bc"]),
        (INTEGER, ["12", "-3"], ["1.5", '"1"', " 1"]),
        ({"type": "regex", "pattern": "^a/b+$"}, ["a/b", "a/bbb"], ["a", "a/"]),
        ({"type": "grammar", "grammar": 'root ::= "x" | "yy"'}, ["x", "yy"], ["y"]),
        (ANY, ["", "any <text> {[\n"], []),
        ({"type": "any_text", "excludes": ["bad", "</"]}, ["ba d <b>"], ["so bad", "x</y"]),
        ({"type": "sequence", "elements": [const("n="), INTEGER, const("!")]}, ["n=5!"], ["n=5", "5!"]),
        ({"type": "or", "elements": [INTEGER, const("none")]}, ["4", "none"], ["no", "4none"]),
        (
            {"type": "sequence", "elements": [{"type": "optional", "content": const("x")}, const("y")]},
            ["y", "xy"],
            ["x"],
        ),
        ({"type": "star", "content": const("ab")}, ["", "abab"], ["aba"]),
        ({"type": "plus", "content": const("ab")}, ["ab", "ababab"], [""]),
        ({"type": "repeat", "min": 2, "max": 3, "content": const("a")}, ["aa", "aaa"], ["a", "aaaa"]),
        ({"type": "repeat", "min": 1, "max": -1, "content": const("a")}, ["a", "aaaaa"], [""]),
        (tag("<b>", ANY, "</b>"), ["<b></b>", "<b>x </a> y</b>"], ["<b>x", "<b>x</b>y"]),
        (tag("<b>", ANY, ["</b>", "."]), ["<b>x.", "<b>x</b>"], ["<b>x.y."]),
        (tag("<think>", ANY, "</think>\n"), ["<think>so</think>\n"], ["<think>so</think>", "<think>so\n"]),
        (
            {"type": "sequence", "elements": [tag("<a>", ANY, "</a>"), INTEGER]},
            ["<a>1</a>2"],
            ["<a>1</a>", "<a>1</a>x"],
        ),
        (
            tags("triggered_tags", *FUNCTIONS, triggers=["<f="]),
            ["", "no call", "a <f=a>1</f> b <f=b>x/</f>", "<f=b>y</f>", "< f"],
            ["<f=c>", "<f=a>x</f>", "<f=a>1", "a <f="],
        ),
        (
            tags("triggered_tags", *FUNCTIONS, triggers=["<f=a", "<f=b"], at_least_one=True),
            ["<f=a>1</f>", "<f=a>1</f>, <f=b>x</f>."],
            ["", "text", "a <f=a>1</f>"],
        ),
        (
            tags("triggered_tags", *FUNCTIONS, triggers=["<f="], stop_after_first=True),
            ["text", "a <f=a>1</f>"],
            ["a <f=a>1</f>.", "<f=a>1</f><f=a>1</f>"],
        ),
        (
            tags("triggered_tags", *FUNCTIONS, triggers=["<f="], stop_after_first=True, at_least_one=True),
            ["<f=a>1</f>"],
            ["text", "<f=a>1</f>."],
        ),
        (
            tags("triggered_tags", *FUNCTIONS, triggers=["<f="], excludes=["no"]),
            ["yes <f=a>1</f>"],
            ["no", "<f=a>1</f>no"],
        ),
        (CALLS, ["x<tool_call>1</tool_call>y", "x"], ["<tool_call>x", "<tool_call>1"]),
        (tag("<o>", CALLS, "</o>"), ["<o>x<tool_call>1</tool_call>y</o>", "<o></o>"], ["<o>x</o>y", "<o>"]),
        (
            tags("tags_with_separator", *FUNCTIONS, separator=", "),
            ["", "<f=a>1</f>", "<f=a>1</f>, <f=b>x</f>"],
            ["<f=a>1</f>,", "x"],
        ),
        (
            tags("tags_with_separator", *FUNCTIONS, separator="\n", at_least_one=True, stop_after_first=True),
            ["<f=a>1</f>"],
            ["", "<f=a>1</f>\n<f=a>1</f>"],
        ),
    ],
)
def test_formats(compiler, fmt, good, bad):
    params = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": fmt})
    grammar = compiler.compile(params)
    for text in good:
        assert accepts(compiler, grammar.start(), text), text
    for text in bad:
        assert not accepts(compiler, grammar.start(), text), text


def test_the_older_form_and_json_text(compiler):
    older = {
        "type": "structural_tag",
        "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}],
        "triggers": ["<f="],
    }
    newer = tags("triggered_tags", FUNCTIONS[0], triggers=["<f="])
    for one in (older, json.dumps(older), {"type": "structural_tag", "format": newer}):
        assert accepts(compiler, compiler.compile(StructuredOutputsParams(structural_tag=one)).start(), "a <f=a>1</f>")


def test_a_tag_of_letters_is_not_the_token(compiler):
    """Free text cannot spell what would be taken for a call."""
    spelled = [t for char in "<tool_call>" for t in compiler.tokenizer.encode(char)]
    state = compiler.compile_format(CALLS).start()
    for token in spelled[:-1]:
        assert state.accept(token)
    assert spelled[-1] not in allowed(state)


@pytest.mark.parametrize(
    "text", ["<think>x", "a<tool_call>b</tool_call>", "<|im_end|>", "e\u0301", "\u212b", "<|endoftext|><think>"]
)
def test_text_like_added_tokens(compiler, text):
    """A choice, a regex and a JSON string may hold any text, and the answer is that text."""
    for params in ({"choice": [text]}, {"json": {"const": text}}, {"regex": re.escape(text)}, {"choice": ["no", text]}):
        state, tokens = compiler.compile(StructuredOutputsParams(**params)).start(), []
        while not state.is_finished:
            token = max(allowed(state), key=lambda t: (t in compiler.tokenizer.encode(text), t))
            assert state.accept(token), params
            tokens.append(token)
        found = compiler.tokenizer.decode(tokens)
        assert (json.loads(found) if "json" in params else found) in (text, "no")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be an object"),
        ("{", "not valid JSON"),
        ({}, "needs a format"),
        ({"type": "x", "format": ANY}, "must be"),
        ({"format": ANY, "triggers": []}, "triggers is not supported"),
        ({"format": {"type": "dispatch"}}, "format.type must be one of const_string"),
        ({"format": {"type": "any_text", "max_tokens": 3}}, "format.max_tokens is not supported"),
        ({"format": {**INTEGER, "style": "qwen_xml"}}, 'style must be "json"'),
        ({"format": {"type": "sequence", "elements": [ANY, const("x")]}}, r"elements\[0\] is free text with something"),
        ({"format": {"type": "star", "content": ANY}}, "is free text with something behind it"),
        ({"format": {"type": "sequence", "elements": []}}, "at least one item"),
        ({"format": tag("<a>", ANY, "")}, "end is empty"),
        ({"format": tag(3, ANY, "x")}, "begin must be a string"),
        ({"format": tags("triggered_tags", FUNCTIONS[0], triggers=["<g="])}, "exactly one of the triggers"),
        ({"format": tags("triggered_tags", FUNCTIONS[0], triggers=["<", "<f"])}, "exactly one of the triggers"),
        ({"format": {"type": "repeat", "min": 3, "max": 2, "content": const("a")}}, "needs min and max"),
        ({"structures": [{"begin": "<a>", "schema": 3, "end": "</a>"}], "triggers": ["<a>"]}, "must be a JSON schema"),
    ],
)
def test_what_is_not_known_is_refused(compiler, value, message):
    with pytest.raises(ValueError, match=message):
        compiler.compile(StructuredOutputsParams(structural_tag=value))


def test_deep_formats_are_refused():
    fmt = const("x")
    for _ in range(200):
        fmt = {"type": "or", "elements": [fmt]}
    with pytest.raises(ValueError, match="deep"):
        lark_source(fmt, {})


# Tool calls

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"properties": {"n": {"type": "integer"}}, "required": ["n"]}},
    },
    {"type": "function", "function": {"name": 'p"ing'}},
]
ADD = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'
PING = '<tool_call>\n{"name": "p\\"ing", "arguments": {}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "add", "arguments": {"n": "1"}}\n</tool_call>'


def strict(tools):
    return [{**t, "function": {**t["function"], "strict": True}} for t in tools]


@pytest.mark.parametrize(
    ("tools", "choice", "fields", "good", "bad"),
    [
        (TOOLS, "required", {}, [ADD, PING, f"{ADD}\n{PING}"], ["", "text", WRONG, f"{ADD}\n", f"text{ADD}"]),
        (TOOLS, "required", {"is_parallel": False}, [ADD], [f"{ADD}\n{PING}"]),
        (TOOLS, {"type": "function", "function": {"name": "add"}}, {}, [ADD], [PING, f"{ADD}\n{ADD}"]),
        (strict(TOOLS), "auto", {}, ["text", f"text {ADD} {PING}", ADD], [WRONG, f"text {WRONG}"]),
        (strict(TOOLS[1:]) + TOOLS[:1], "auto", {}, [WRONG, PING], [PING.replace("{}", '{"a": 1}')]),
        (strict(TOOLS), "auto", {"is_parallel": False}, ["text", f"text {ADD}"], [f"{ADD}\n{ADD}", f"{ADD} text"]),
        (TOOLS, "auto", {"structure": {"json_object": True}}, ["{}", ADD, f"{ADD}\n{PING}"], ["text", f"{{}}{ADD}"]),
        (TOOLS, "auto", {"structure": {"choice": ["yes", "no"]}}, ["yes", ADD], ["maybe"]),
        (TOOLS, "required", {"structure": {"json_object": True}}, [ADD], ["{}"]),
    ],
)
def test_tool_grammars(compiler, tools, choice, fields, good, bad):
    fields = dict(fields)
    structure = fields.pop("structure", None)
    structure = StructuredOutputsParams(**structure) if structure else None
    params = with_tools(structure, tools, ToolChoice.of(choice, tools), **fields)
    for texts, expected in ((good, True), (bad, False)):
        for text in texts:
            assert accepts(compiler, compiler.compile(params).start(), text) == expected, text


def prompt(compiler, end=""):
    return compiler.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + end)


def test_a_call_ends_an_open_think_block_and_nothing_else_does(compiler):
    params = SamplingParams(structured_outputs=with_tools(None, TOOLS, ToolChoice("required")))
    constraint = make_constraint(compiler, prompt(compiler, "<think>\n"), params)
    call = compiler.tokenizer.encode("<tool_call>")[0]
    assert EOS.isdisjoint(allowed(constraint)), "an answer may not end without its calls"
    assert accepts(compiler, constraint, "I need it." + ADD) and not constraint.is_thinking
    spelled = [t for char in "<tool_call>" for t in compiler.tokenizer.encode(char)]
    constraint = make_constraint(compiler, prompt(compiler, "<think>\n"), params)
    for token in spelled[:-1]:
        assert constraint.accept(token)
    assert spelled[-1] not in allowed(constraint) and call in allowed(constraint)
    # Where the grammar has no calls, the token is a word among others.
    free = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes"], after_thinking=True))
    constraint = make_constraint(compiler, prompt(compiler, "<think>\n"), free)
    assert accepts(compiler, constraint, "a<tool_call>b</think>yes")


def test_a_grammar_with_its_own_think_block(compiler):
    own = {"type": "sequence", "elements": [tag("<think>", ANY, "</think>"), const("yes")]}
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(structural_tag={"format": own}, after_thinking=True)
    )
    assert accepts(compiler, make_constraint(compiler, prompt(compiler), params), "<think>so</think>yes")


def test_a_mask_that_fails_is_an_error(compiler):
    """llguidance has limits in each step too; it then allows only the end, which must not pass for an answer."""
    state = compiler.compile(StructuredOutputsParams(regex="a{3}")).start()
    assert state.error is None and not state.accept(compiler.tokenizer.encode("b")[0])
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    state.fill(mask)
    assert state.error is not None


def test_calls_are_allowed_as_the_official_tokenizer_writes_them(official: Tokenizer):
    """Tokens that reach over the edges of the grammar's parts are what the model has learnt."""
    compiler = GrammarCompiler(official, 151_936, frozenset({151_645}))
    calls = compiler.compile(with_tools(None, strict(TOOLS), ToolChoice("required")))
    state = calls.start()
    mask = np.zeros(151_936 // 32, np.int32)
    for token in official.encode(f"{ADD}\n{PING}\n{ADD}"):
        state.fill(mask)
        assert mask[token // 32] >> (token % 32) & 1, official.token_text(token)
        assert state.accept(token)
