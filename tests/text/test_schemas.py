"""What 250 JSON schemas allow: an answer of any tokens that the mask allows is valid, or the schema is refused."""

import json
import re
from random import Random

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from qjax.sampling_params import StructuredOutputsParams
from qjax.text.grammar import GrammarCompiler
from qjax.text.tokenizer import Tokenizer
from tests.text.json_schemas import schemas

VOCAB = 600
EOS = frozenset({486, 488})
LIMIT = 400  # tokens


def random_answer(state, tokenizer: Tokenizer, random: Random, ends: np.ndarray) -> str | None:
    """Text of random allowed tokens, those preferred that end something; None if it did not come to an end."""
    mask, tokens = np.zeros(-(-VOCAB // 32), np.int32), []
    for _ in range(LIMIT):
        state.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB])
        assert len(allowed) and state.error is None, "a grammar must always allow something"
        preferred = np.intersect1d(allowed, ends)
        token = int(random.choice(preferred if len(preferred) and random.random() < 0.6 else allowed))
        if token in EOS:
            break
        tokens.append(token)
        assert state.accept(token)
        if state.is_finished:
            break
    else:
        return None
    return tokenizer.decode(tokens, skip_special_tokens=False)


def test_answers_validate_or_the_schema_is_refused(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS)
    ends = np.array([*EOS, *(tokenizer.encode(c)[0] for c in '"}]')])
    num_answers, num_cut, refused = 0, 0, {}
    for i, schema in enumerate(schemas()):
        try:
            grammar = compiler.compile(StructuredOutputsParams(json=schema))
        except ValueError as error:
            refused[json.dumps(schema)] = str(error)
            continue
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for seed in range(3):
            text = random_answer(grammar.start(), tokenizer, Random(1000 * i + seed), ends)
            num_cut += text is None
            if text is None:
                continue
            num_answers += 1
            errors = list(validator.iter_errors(json.loads(text)))
            assert not errors, (schema, text, errors[0].message)
    assert num_answers > 500 and num_cut < 20, (num_answers, num_cut)
    assert len(refused) < 50 and all(error.startswith("Grammar error: ") for error in refused.values()), refused


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "no text can obey it"),
        ({"enum": []}, "Unsatisfiable schema: anyOf is empty"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, r"minimum \(5\) is greater than maximum \(4\)"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
        ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]$'),
        ({"not": {"type": "string"}}, r'Unimplemented keys: \["not"\]$'),
        ({"type": "string", "format": "nope", "x-guidance": {"lenient": True}}, "Unknown format: nope"),
        ({"$ref": "#/prefixItems/0"}, "Pointer '/prefixItems/0' does not exist"),
        ({"type": "integer", "minimum": -(10**30)}, "not JSON serializable|Grammar error"),
        ({"enum": [f"value {i}" for i in range(100_000)]}, "characters; at most|too big"),
        ({"allOf": [{"anyOf": [{"properties": {f"p{i}{k}": {}}} for k in range(5)]} for i in range(9)]}, "too large"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(tokenizer, schema, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        GrammarCompiler(tokenizer, VOCAB, EOS).compile(StructuredOutputsParams(json=schema))


def test_a_model_that_likes_blanks_comes_to_an_end(tokenizer: Tokenizer) -> None:
    """White space is bounded at each place, in front of and behind everything, and in tool calls alike."""
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS)
    blanks = np.array([i for i in range(512) if tokenizer.token_bytes(i) and not tokenizer.token_bytes(i).strip()])
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}, "maxItems": 2}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    for seed in range(10):
        state, random = compiler.compile(StructuredOutputsParams(json=schema)).start(), Random(seed)
        text = random_answer(state, tokenizer, random, blanks)
        assert text is not None and text == text.strip() and len(text) < 150
        json.loads(text)
    compact = compiler.compile(StructuredOutputsParams(json=schema, disable_any_whitespace=True)).start()
    text = random_answer(compact, tokenizer, Random(0), blanks)
    assert text is not None and not re.search(r"\s", text)
    one = compiler.compile(StructuredOutputsParams(json=schema, whitespace_pattern=" ?")).start()
    text = random_answer(one, tokenizer, Random(0), blanks)
    assert text is not None and re.search(r" ", text) and not re.search(r"\s\s|\n", text)
