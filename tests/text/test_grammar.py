"""Structured output without a model: what a grammar's mask allows, walked by random tokens."""

import json
import random
import re

import numpy as np
import pytest

from qjax.sampling_params import StructuredOutputsParams
from qjax.text.constraint import Constraint, ThinkBlock
from qjax.text.grammar import MAX_CACHED, GrammarCompiler
from qjax.text.tokenizer import Tokenizer
from tests.text.small_tokenizer import write_small_tokenizer

VOCAB = 600  # padded: the tokenizer has 512
EOS = frozenset({486, 488})
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(write_small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, EOS)


def allowed(state):
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    state.fill(mask)
    return [i for i in range(VOCAB) if mask[i // 32] >> (i % 32) & 1]


def walk(state, tokenizer, rng, limit=400):
    """Random allowed tokens until the end: the text, EOS left out."""
    tokens = []
    for _ in range(limit):
        choices = allowed(state)
        assert choices, "a grammar must always allow something"
        token = rng.choice(choices)
        if token in EOS:
            break
        tokens.append(token)
        assert state.accept(token)
        if state.is_finished:
            break
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("seed", range(10))
def test_random_walks_obey_the_schema(compiler, tokenizer, seed):
    text = walk(compiler.compile(StructuredOutputsParams(json=SCHEMA)).start(), tokenizer, random.Random(seed))
    value = json.loads(text)
    assert set(value) <= {"name", "age", "tags"} and {"name", "age"} <= set(value)
    assert 0 <= value["age"] <= 150 and len(value["name"]) <= 12
    assert re.search(r"\s{9}", text) is None, "white space is bounded"


@pytest.mark.parametrize("seed", range(5))
def test_regex_choice_and_grammars(compiler, tokenizer, seed):
    rng = random.Random(seed)

    def text(**kind):
        return walk(compiler.compile(StructuredOutputsParams(**kind)).start(), tokenizer, rng)

    assert re.fullmatch(r"[0-9]{3}-[a-c]+", text(regex=r"[0-9]{3}-[a-c]{1,9}"))
    assert text(choice=["yes", "no", 'say "hi"\n', "été"]) in ("yes", "no", 'say "hi"\n', "été")
    assert re.fullmatch(r"(ab)+", text(grammar='start: "ab" start?'))
    assert text(grammar='root ::= "x" | "yy"') in ("x", "yy")
    assert isinstance(json.loads(text(json='{"type": "array", "maxItems": 2, "items": {"type": "boolean"}}')), list)


def test_an_answer_ends_where_nothing_can_follow(compiler, tokenizer):
    state = compiler.compile(StructuredOutputsParams(choice=["yes"])).start()
    for token in tokenizer.encode("yes"):
        assert not state.is_finished and state.accept(token)
    assert state.is_finished
    open_end = compiler.compile(StructuredOutputsParams(regex="a+")).start()
    assert EOS.isdisjoint(allowed(open_end))
    open_end.accept(tokenizer.encode("a")[0])
    assert not open_end.is_finished and set(allowed(open_end)) >= EOS


def prompt_ids(tokenizer, end):
    return tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + end)


def constraint(compiler, tokenizer, end="", budget=None, is_free=False):
    grammar = None if is_free else compiler.compile(StructuredOutputsParams(choice=["yes"])).start()
    return Constraint(grammar, ThinkBlock.after(prompt_ids(tokenizer, end), tokenizer), budget)


def test_the_prompt_says_whether_thinking_is_over(tokenizer):
    for end, expected in (("", "possible"), ("<think>\n", "open"), ("<think>\n\n</think>\n\n", "over")):
        assert ThinkBlock.after(prompt_ids(tokenizer, end), tokenizer).state == expected
        later = prompt_ids(tokenizer, end) + prompt_ids(tokenizer, "")  # what earlier turns thought is no matter
        assert ThinkBlock.after(later, tokenizer).state == "possible"
    assert ThinkBlock.after([], tokenizer).state == "possible"


def test_a_think_block_is_free_and_the_grammar_starts_after_it(compiler, tokenizer):
    start, end = (tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    hybrid = constraint(compiler, tokenizer)
    assert start in allowed(hybrid) and tokenizer.encode("yes")[0] in allowed(hybrid)
    hybrid.accept(start)
    assert len(allowed(hybrid)) >= VOCAB
    for token in [*tokenizer.encode("anything at all {["), end]:
        assert hybrid.accept(token) and not hybrid.is_finished
    assert start not in allowed(hybrid)
    assert walk(hybrid, tokenizer, random.Random(0)) == "yes"

    opened = constraint(compiler, tokenizer, "<think>\n")
    assert len(allowed(opened)) >= VOCAB
    opened.accept(end)
    assert walk(opened, tokenizer, random.Random(0)) == "yes"
    assert start not in allowed(constraint(compiler, tokenizer, "<think>\n\n</think>\n\n"))


def test_a_budget_closes_the_think_block_and_nothing_else(compiler, tokenizer):
    start, end = (tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    for is_free in (True, False):
        state = constraint(compiler, tokenizer, budget=3, is_free=is_free)
        state.accept(start)
        for token in (5, 6, 7):
            assert len(allowed(state)) >= VOCAB
            state.accept(token)
        assert allowed(state) == [end]
        state.accept(end)
        if is_free:
            for token in (5, 6, 7, 8):
                assert len(allowed(state)) >= VOCAB and state.accept(token)
        else:
            assert walk(state, tokenizer, random.Random(0)) == "yes"
    never = constraint(compiler, tokenizer, budget=0, is_free=True)
    for token in (5, 6, 7, 8):  # an answer without thinking has no budget
        assert len(allowed(never)) >= VOCAB and never.accept(token)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json": {"type": "nope"}}, "Invalid type: nope"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "3"}, "must be a JSON schema"),
        ({"json": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"regex": "a(b"}, "unclosed group"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": "root ::= ("}, "Grammar error"),
    ],
)
def test_what_cannot_be_honoured_is_refused(compiler, params, message):
    with pytest.raises(ValueError, match=message):
        compiler.compile(StructuredOutputsParams(**params))


@pytest.mark.parametrize(
    "params", [{}, {"regex": "a", "json_object": True}, {"choice": []}, {"choice": [""]}, {"regex": 3}]
)
def test_wrong_parameters_are_refused(params):
    with pytest.raises(ValueError, match="structured_outputs"):
        StructuredOutputsParams(**params)


def test_compiled_grammars_are_kept_and_forgotten(compiler):
    params = StructuredOutputsParams(regex="k1")
    first = compiler.compile(params)
    assert compiler.compile(params) is first
    for i in range(MAX_CACHED):
        compiler.compile(StructuredOutputsParams(regex=f"other{i}"))
    assert compiler.compile(params) is not first
