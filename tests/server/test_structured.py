"""Structured output over HTTP: what the fields become, what is refused, and real answers that obey."""

import asyncio
import json
import re
import threading

import pytest
from openai import AsyncOpenAI

from qjax import EngineConfig
from qjax.sampling_params import StructuredOutputsParams
from tests.engine.conftest import tiny_folder  # noqa: F401 (a fixture)
from tests.server.serving import serving
from tests.server.test_real_engine import OPTIONS

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 0, "maximum": 9}}
CALL = {"begin": "<f=a>", "content": INTEGER, "end": "</f>"}
TAG = {"format": {"type": "triggered_tags", "triggers": ["<f="], "tags": [CALL], "at_least_one": True}}
OLD = {"structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f="]}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("response_format", {"type": "text"}, None),
        ("response_format", {"type": "json_object"}, {"json_object": True}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, {"json": SCHEMA}),
        ("response_format", {"type": "structural_tag", **TAG}, {"structural_tag": {"type": "structural_tag", **TAG}}),
        ("response_format", {"type": "structural_tag", **OLD}, {"structural_tag": {"type": "structural_tag", **OLD}}),
        ("structured_outputs", {"structural_tag": json.dumps(TAG)}, {"structural_tag": json.dumps(TAG)}),
        (
            "structured_outputs",
            {"json": {}, "disable_any_whitespace": True},
            {"json": {}, "disable_any_whitespace": True},
        ),
        ("structured_outputs", {"regex": "a+"}, {"regex": "a+"}),
        ("structured_outputs", {"json": SCHEMA}, {"json": SCHEMA}),
        ("guided_json", SCHEMA, {"json": SCHEMA}),
        ("guided_json", json.dumps(SCHEMA), {"json": json.dumps(SCHEMA)}),
        ("guided_regex", "a+", {"regex": "a+"}),
        ("guided_choice", ["a", "b"], {"choice": ["a", "b"]}),
        ("guided_grammar", 'start: "a"', {"grammar": 'start: "a"'}),
    ],
)
async def test_fields_become_parameters(server, field, value, expected):
    for path, body, is_chat in (("chat/completions", CHAT, True), ("completions", {"prompt": "Hi"}, False)):
        status, answer, _ = await server.post(f"/v1/{path}", body | {field: value})
        assert status == 200, answer
        params = server.engine.calls[-1][2].structured_outputs
        wanted = None if expected is None else StructuredOutputsParams(**expected, after_thinking=is_chat)
        assert params == wanted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "nope"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "dispatch"}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}}, "response_format.json_schema"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "nope": 1}}, "structured_outputs.nope"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
async def test_wrong_fields_are_refused_by_name(server, fields, param):
    status, answer, _ = await server.post("/v1/chat/completions", CHAT | fields)
    assert (status, answer["error"]["param"]) == (400, param), answer


async def test_real_answers_obey_streamed_and_whole(tiny_folder):  # noqa: F811
    async with serving(EngineConfig(model=str(tiny_folder), **OPTIONS), served_model_name=["tiny"]) as (url, engine):
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}}
        # A closed think block in the prompt: the grammar holds from the first token on.
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        asked = {"model": "tiny", **CHAT, "max_tokens": 80, "temperature": 1.0, "seed": 3}
        whole = await client.chat.completions.create(**asked, response_format=form, extra_body=off)
        value = json.loads(whole.choices[0].message.content)
        assert value["answer"] in ("yes", "no") and isinstance(value["sure"], bool)
        assert whole.choices[0].finish_reason == "stop"
        stream = await client.chat.completions.create(**asked, response_format=form, extra_body=off, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        assert text == whole.choices[0].message.content
        completion = await client.completions.create(
            model="tiny", prompt="Pick", max_tokens=20, extra_body={"guided_choice": ["left", "right"]}
        )
        assert completion.choices[0].text in ("left", "right")
        with pytest.raises(Exception, match="Invalid type: nope") as error:
            await client.chat.completions.create(**asked, extra_body={"guided_json": {"type": "nope"}})
        assert error.value.status_code == 400
        assert engine.num_unfinished == 0


async def test_real_answers_of_odd_forms(tiny_folder, monkeypatch):  # noqa: F811
    async with serving(EngineConfig(model=str(tiny_folder), **OPTIONS), served_model_name=["tiny"]) as (url, engine):
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        async def text(**fields):
            asked = {"model": "tiny", "prompt": "Pick", "max_tokens": 60, "seed": 1}
            return (await client.completions.create(**asked, extra_body=fields)).choices[0]

        # Text that reads like an added token
        for choice in ("<think>x", "a <tool_call>", "<|im_end|>"):
            assert (await text(guided_choice=[choice])).text == choice
            assert (await text(guided_json={"const": choice})).text == json.dumps(choice)
        stopped = TAG["format"] | {"stop_after_first": True}
        found = await text(response_format={"type": "structural_tag", "format": stopped})
        assert re.fullmatch("<f=a>[0-9]</f>", found.text) and found.finish_reason == "stop"

        # A loop ends the answer
        bias = {str(engine.tokenizer.encode("a")[0]): 100}
        asked = {"model": "tiny", **CHAT, "max_tokens": 60, "logit_bias": bias}
        loops = {"repetition_detection": {"max_pattern_size": 2, "min_count": 4}}
        looped = (await client.chat.completions.create(**asked, extra_body=loops)).choices[0]
        assert (looped.message.content, looped.finish_reason, looped.stop_reason) == (
            "aaaa",
            "repetition",
            "repetition_detected",
        )

        # A schema that is slow to compile holds nobody up; one that is too slow is given up
        compiler, may_end = engine.engine.grammars, threading.Event()
        compile_at_once = compiler._compile

        def compile_slowly(source):
            if "slow" in source:
                may_end.wait(60)
            return compile_at_once(source)

        monkeypatch.setattr(compiler, "_compile", compile_slowly)
        slow = asyncio.ensure_future(text(guided_json={"const": "slow 1"}))
        await asyncio.sleep(0.05)
        assert (await text(guided_choice=["quick"])).text == "quick" and not slow.done()
        may_end.set()
        assert (await slow).text == '"slow 1"'
        may_end.clear()
        monkeypatch.setattr("qjax.text.grammar.COMPILE_SECONDS", 0.1)
        with pytest.raises(Exception, match=r"more than 0\.1 seconds") as error:
            await text(guided_json={"const": "slow 2"})
        may_end.set()
        assert error.value.status_code == 400
        assert engine.num_unfinished == 0
