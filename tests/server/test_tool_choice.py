"""Tool calls that a grammar makes: what requests become, what is refused, and what a model of random weights writes."""

import json

import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator
from openai import AsyncOpenAI

from qjax import EngineConfig
from qjax.sampling_params import StructuredOutputsParams
from tests.engine.conftest import tiny_folder  # noqa: F401 (a fixture)
from tests.server.serving import serving
from tests.server.test_real_engine import OPTIONS
from tests.server.test_reasoning_and_tools import both, collect, says  # noqa: F401 (a fixture)

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen </tool_call>"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 14}},
}
TIME = {"type": "object", "properties": {"zone": {"type": "string", "maxLength": 4}}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME, "ping": {"type": "object", "maxProperties": 0}}
NAMED = {"type": "function", "function": {"name": "get_time"}}
FORMAT = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": FORMAT}}


def tool(name, **fields):
    parameters = {"parameters": SCHEMAS[name]} if name != "ping" else {}
    return {"type": "function", "function": {"name": name, **parameters, **fields}}


TOOLS = [tool("get_weather"), tool("get_time"), tool("ping")]
STRICT = [tool(name, strict=True) for name in SCHEMAS]


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


async def structure_of(server, **body):
    status, answer, _ = await server.post(CHAT, {"messages": HI, "max_tokens": 5, **body})
    assert status == 200, answer
    return server.engine.calls[-1][2].structured_outputs


@pytest.fixture
async def server(start):
    return await start(max_model_len=4096)


class TestRequests:
    async def test_free_calls_need_no_grammar(self, server):
        for fields in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}, {"tool_choice": "none"}):
            assert await structure_of(server, tools=TOOLS, **fields) is None
        only = await structure_of(server, tools=TOOLS, tool_choice="none", response_format=RESPONSE_FORMAT)
        assert only == StructuredOutputsParams(json=FORMAT, after_thinking=True)

    @pytest.mark.parametrize(
        ("fields", "kind", "names", "only_one"),
        [
            ({"tool_choice": "required"}, "tags_with_separator", list(SCHEMAS), False),
            ({"tool_choice": "required", "parallel_tool_calls": False}, "tags_with_separator", list(SCHEMAS), True),
            ({"tool_choice": NAMED}, "tags_with_separator", ["get_time"], True),
            (
                {"tool_choice": allowed("required", "ping", "get_time")},
                "tags_with_separator",
                ["get_time", "ping"],
                False,
            ),
            ({"tool_choice": allowed("auto", "ping")}, "triggered_tags", ["ping"], False),
            ({"tools": STRICT}, "triggered_tags", list(SCHEMAS), False),
            ({"tools": STRICT, "parallel_tool_calls": False}, "triggered_tags", list(SCHEMAS), True),
        ],
    )
    async def test_choices_become_grammars(self, server, fields, kind, names, only_one):
        structure = await structure_of(server, **{"tools": TOOLS, **fields})
        assert structure.after_thinking
        fmt = structure.structural_tag["format"]
        found = [json.loads(tag["begin"].split("\n")[1].partition(", ")[0] + "}")["name"] for tag in fmt["tags"]]
        assert (fmt["type"], found, fmt["stop_after_first"]) == (kind, names, only_one)

    async def test_all_tools_are_shown_to_the_model(self, server):
        await structure_of(server, tools=TOOLS, tool_choice=NAMED)
        assert "get_weather" in server.engine.tokenizer.decode(server.engine.calls[-1][1])

    @pytest.mark.parametrize(
        ("fields", "message", "param"),
        [
            ({"tool_choice": "required", "tools": None}, "needs tools", "tool_choice"),
            ({"tool_choice": "always"}, 'must be "none", "auto"', "tool_choice"),
            ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "'nope'", "tool_choice"),
            ({"tool_choice": {"type": "function"}}, "not in tools", "tool_choice"),
            ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "must be", "tool_choice"),
            ({"tool_choice": allowed("auto", "nope")}, "'nope'", "tool_choice"),
            ({"tool_choice": allowed("auto")}, "must be", "tool_choice"),
            ({"tool_choice": allowed("always", "ping")}, "must be", "tool_choice"),
            ({"tools": [tool("ping", strict="yes")]}, "true or false", "tools[0].function.strict"),
            ({"tools": [tool("ping", strict=True, parameters={"type": "string"})]}, "of an object", "tools"),
        ],
    )
    async def test_wrong_choices_are_refused_by_name(self, server, fields, message, param):
        body = {"messages": HI, "tools": TOOLS, **fields}
        status, answer, _ = await server.post(CHAT, body)
        assert status == 400 and message in answer["error"]["message"] and answer["error"]["param"] == param, answer

    @pytest.mark.parametrize("config", [{"tool_call_parser": "none"}, {"tool_call_parser": "qwen3_coder"}])
    async def test_a_server_that_would_not_read_the_calls_refuses(self, start, config):
        server = await start(config, max_model_len=4096)
        for fields in ({"tool_choice": "required"}, {"tools": STRICT}, {"response_format": RESPONSE_FORMAT}):
            status, answer, _ = await server.post(CHAT, {"messages": HI, "tools": TOOLS, **fields})
            assert status == 400 and "--tool-call-parser" in answer["error"]["message"]

    async def test_the_finish_reason_is_openais(self, says):  # noqa: F811
        text = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
        server = await says(text, {"enable_auto_tool_choice": False})
        for choice, expected in (("required", "tool_calls"), (NAMED, "stop")):
            message, calls, reason = await both(server, tools=TOOLS, tool_choice=choice)
            assert (calls, message.content, reason) == ([("get_time", "{}")], None, expected)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tiny_folder):  # noqa: F811
    """A client of a model with random weights, and its engine."""
    longer = {"hf_overrides": {"max_position_embeddings": 2048}, "max_num_batched_tokens": 1024}
    config = EngineConfig(model=str(tiny_folder), **(OPTIONS | longer))
    async with serving(config, served_model_name=["tiny"]) as (url, engine):
        yield AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), engine


OFF = {"chat_template_kwargs": {"enable_thinking": False}}
ASKED = {"model": "tiny", "messages": HI, "temperature": 1.0, "max_tokens": 300}


def check_calls(message, names=tuple(SCHEMAS)):
    assert message.tool_calls and message.content is None
    for call in message.tool_calls:
        assert call.function.name in names
        Draft202012Validator(SCHEMAS[call.function.name]).validate(json.loads(call.function.arguments))


@pytest.mark.asyncio(loop_scope="module")
class TestAnswers:
    @pytest.mark.parametrize("seed", range(4))
    async def test_demanded_calls_obey_their_schemas(self, real, seed):
        client, _ = real
        for choice, names, reason in (
            ("required", tuple(SCHEMAS), "tool_calls"),
            (NAMED, ("get_time",), "stop"),
            (allowed("required", "get_weather", "ping"), ("get_weather", "ping"), "tool_calls"),
        ):
            body = {**ASKED, "seed": seed, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
            answer = (await client.chat.completions.create(**body, extra_body=OFF)).choices[0]
            check_calls(answer.message, names)
            assert answer.finish_reason == reason and len(answer.message.tool_calls) == 1

    async def test_several_calls_and_the_stream_is_the_whole(self, real):
        client, engine = real
        end = engine.tokenizer.encode("</tool_call>")[0]
        body = {**ASKED, "seed": 1, "tools": TOOLS, "tool_choice": "required", "max_tokens": 400}
        more = {"logit_bias": {str(i): -5 for i in engine.engine.eos_token_ids} | {str(end): 5}}
        whole = (await client.chat.completions.create(**body, **more, extra_body=OFF)).choices[0].message
        check_calls(type(whole)(role="assistant", tool_calls=whole.tool_calls[:-1]))
        assert len(whole.tool_calls) > 2
        server = type("Server", (), {"client": client})
        del body["model"], body["messages"]
        streamed, _, _ = await collect(server, **body, **more, extra_body=OFF)
        calls = [(c.function.name, c.function.arguments) for c in whole.tool_calls]
        assert [(name, arguments) for _, name, arguments in streamed["tool_calls"]] == calls

    @pytest.mark.parametrize("seed", range(3))
    async def test_strict_tools_under_auto(self, real, seed):
        """Text is free; the token that begins a call, made likely, begins one that obeys."""
        client, engine = real
        call = engine.tokenizer.encode("<tool_call>")[0]
        body = {**ASKED, "seed": seed, "tools": STRICT, "parallel_tool_calls": False}
        answer = await client.chat.completions.create(**body, logit_bias={str(call): 3}, extra_body=OFF)
        message = answer.choices[0].message
        assert len(message.tool_calls) == 1
        check_calls(type(message)(role="assistant", tool_calls=message.tool_calls))
        assert answer.choices[0].finish_reason == "tool_calls"
        free = await client.chat.completions.create(
            **{**body, "max_tokens": 30}, logit_bias={str(call): -100}, extra_body=OFF
        )
        assert free.choices[0].message.tool_calls is None and free.choices[0].message.content

    async def test_reasoning_then_calls_or_a_format(self, real):
        """One request with all three: thinking first, within its budget, then the calls or the format."""
        client, engine = real
        think, call = (str(engine.tokenizer.encode(tag)[0]) for tag in ("<think>", "<tool_call>"))
        body = {**ASKED, "tools": STRICT, "parallel_tool_calls": False, "response_format": RESPONSE_FORMAT}
        body["extra_body"] = {"thinking_token_budget": 4}
        kinds = set()
        for seed in range(4):
            for bias in ({think: 100, call: 5}, {think: 100, call: -100}):
                answer = await client.chat.completions.create(**body, seed=seed, logit_bias=bias)
                message = answer.choices[0].message
                num_reasoning = answer.usage.completion_tokens_details.reasoning_tokens
                assert 0 < num_reasoning <= 4 or (bias[call] == 5 and num_reasoning == 0)
                kinds.add(answer.choices[0].finish_reason)
                if message.tool_calls:
                    check_calls(message)
                else:
                    Draft202012Validator(FORMAT).validate(json.loads(message.content))
        assert kinds == {"stop", "tool_calls"}

    async def test_a_call_ends_thinking_that_nobody_closed(self, real):
        client, engine = real
        think, call = (str(engine.tokenizer.encode(tag)[0]) for tag in ("<think>", "<tool_call>"))
        for seed in range(3):
            answer = await client.chat.completions.create(
                **{**ASKED, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
                seed=seed,
                logit_bias={think: 6, call: 4, str(engine.tokenizer.encode("</think>")[0]): -100},
            )
            check_calls(answer.choices[0].message)

    async def test_a_schema_that_cannot_be_obeyed_is_refused(self, real):
        client, engine = real
        bad = tool("ping", parameters={"type": "object", "properties": {"a": {"not": {}}}})
        with pytest.raises(Exception, match="Unimplemented keys") as error:
            await client.chat.completions.create(**ASKED, tools=[bad], tool_choice="required")
        assert error.value.status_code == 400
        await client.chat.completions.create(**{**ASKED, "max_tokens": 3}, tools=[bad])
        assert engine.num_unfinished == 0
