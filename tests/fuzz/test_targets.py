"""The fuzzing targets on inputs that hypothesis makes: the same in every run. What was found is a test of its own."""

import dataclasses
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.server.errors import ApiError
from qjax.server.messages_protocol import MessagesRequest
from qjax.server.responses_protocol import ResponsesRequest
from qjax.server.schema import parse
from tests.fuzz.targets import BODIES, TARGETS, answers, bodies, check_body, detokenizing

quick = settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=6), values, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "type"]), JSON | st.just("user")), max_size=3
)


@quick
@given(st.binary(min_size=3, max_size=120))
def test_answers(data):
    answers(data)


@quick
@given(st.binary(max_size=120))
def test_detokenizing(data):
    detokenizing(data)


@quick
@given(st.binary(max_size=200))
def test_bodies(data):
    bodies(data)


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_fields(kind):
    """Any JSON in any field, beside the fields that must be there."""
    names = [f.name for f in dataclasses.fields(kind)]
    needed = {"messages": MESSAGES, "prompt": JSON, "input": JSON | MESSAGES, "max_tokens": st.just(5)}
    body = st.fixed_dictionaries(
        {name: strategy for name, strategy in needed.items() if name in names},
        optional={name: JSON for name in names if name not in needed},
    )

    @quick
    @given(body | st.dictionaries(st.sampled_from(names), JSON, max_size=6))
    def check(value):
        check_body(kind, value)

    check()


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        (ResponsesRequest, {"input": [{"role": "user", "content": "x", "type": []}]}, "input[0].type"),
        (
            MessagesRequest,
            {"messages": [{"role": "user", "content": [{"type": {}}]}], "max_tokens": 1},
            "content[0].type",
        ),
    ],
)
def test_what_was_found(kind, body, named):
    """Each of these was a 500."""
    with pytest.raises(ApiError, match=re.escape(named)):
        parse(kind, body).chat()


def test_every_target_is_tested():
    assert set(TARGETS) == {"answers", "detokenizing", "bodies"}
