"""The API's description: it is valid, says what `parse` does, and no request made from it is a fault of the server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest

from qjax.server.app import ROUTES
from qjax.server.errors import ApiError
from qjax.server.openapi import describe
from qjax.server.schema import parse
from tests.server.fuzzing import served

HI = [{"role": "user", "content": "Hi"}]
BODIES = {body.__name__: body for route in ROUTES for body in route.bodies}


@pytest.fixture(scope="module")
def document():
    return describe(ROUTES, "", needs_key=False)


def resolved(document, node):
    """The schema with its references put in."""
    if isinstance(node, list):
        return [resolved(document, item) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return resolved(document, document["components"]["schemas"][node["$ref"].rpartition("/")[2]])
    return {name: resolved(document, item) for name, item in node.items()}


async def test_it_is_served_and_has_every_route(start):
    server = await start({"api_key": ["k"], "root_path": "/x", "server_dev_mode": True})
    assert (await server.get("/openapi.json"))[0] == 401
    status, document, _ = await server.get("/openapi.json", headers={"Authorization": "Bearer k"})
    assert status == 200 and document["openapi"] == "3.1.0" and document["servers"] == [{"url": "/x"}]
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.method, route.path.replace(":.+", "")) for route in ROUTES}
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "404", "413", "415", "500", "503"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["paths"]["/health"]["get"]["security"] == [] and document["security"] == [{"key": []}]


def test_every_schema_is_valid_and_every_reference_leads_somewhere(document):
    assert len(BODIES) >= 4
    for name, schema in document["components"]["schemas"].items():
        assert jsonschema_rs.meta.is_valid({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}), name
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))
    resolved(document, document["paths"])


def test_fields_are_described_as_they_are_checked(document):
    chat = document["components"]["schemas"]["ChatRequest"]
    fields = chat["properties"]
    assert chat["required"] == ["messages"] and chat["additionalProperties"] is False
    assert fields["n"] == {
        "description": "Answers to the same prompt",
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": 128,
        "default": 1,
    }
    assert fields["use_beam_search"] == {
        "description": "Not supported: there is no beam search.",
        "enum": [None, False],
    }
    assert fields["user"]["description"].startswith("Changes nothing")
    assert fields["stream_options"]["anyOf"][0] == {"$ref": "#/components/schemas/StreamOptions"}
    assert fields["temperature"]["maximum"] == 2 and fields["request_id"]["pattern"].startswith("^[A-Za-z")
    assert "null" not in str(fields["messages"])


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("ChatRequest", {"messages": HI, "n": 2, "seed": 3.0, "stop": ["a"], "logit_bias": {"-1": 2}}),
        ("ChatRequest", {"messages": HI, "top_k": None, "use_beam_search": None, "user": [1]}),
        ("ChatRequest", {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}),
        ("CompletionRequest", {"prompt": [[1], [2]]}),
        ("CompletionRequest", {"prompt": []}),
        ("DetokenizeRequest", {"tokens": [1, 2]}),
        *(("ChatRequest", {"messages": HI, **wrong}) for wrong in (
            {"n": 0}, {"n": "1"}, {"n": True}, {"temperature": False}, {"stop": [1]}, {"stop": ["x"] * 17},
            {"logit_bias": {" 5": 1}}, {"logit_bias": {"1_0": 1}}, {"use_beam_search": True}, {"nonsense": 1},
            {"reasoning_effort": "much"}, {"stream": True, "stream_options": {"x": 1}}, {"messages": None},
        )),
        ("ChatRequest", {}),
        ("CompletionRequest", {"prompt": None}),
        ("DetokenizeRequest", {"tokens": ["1"]}),
        ("DetokenizeRequest", []),
    ],
)  # fmt: skip
def test_the_schema_takes_what_parse_takes(document, name, body):
    schema = resolved(document, document["components"]["schemas"][name])
    try:
        parse(BODIES[name], body)
        is_taken = True
    except ApiError:
        is_taken = False
    assert jsonschema_rs.is_valid(schema, body) == is_taken


def fuzz(folder: Path, *options: str) -> int:
    """Runs schemathesis on a server in a process of its own; the number of requests, where all answers are right."""
    with served(folder) as url:
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--seed", "1"]
        command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--suppress-health-check", "all"]
        command += ["--generation-database", "none", "--no-shrink", "--continue-on-failure", *options]
        place = {**os.environ, "PWD": str(folder)}  # where it keeps what it found
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=place)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return int(re.search(r"(\d+) generated", run.stdout)[1])


SLEEP = r"^/(sleep|wake_up|is_sleeping)$"  # after which all others answer 503


def test_requests_made_from_it_are_answered_as_it_says(folder):
    assert fuzz(folder, "--phases", "fuzzing", "-n", "3", "--exclude-path-regex", SLEEP) > 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_them(folder):
    everything = ("--phases", "examples,coverage,fuzzing", "-n", "150")
    assert fuzz(folder, *everything, "--exclude-path-regex", SLEEP) > 2000
    assert fuzz(folder, *everything, "--include-path-regex", SLEEP) > 20
