"""/v1/messages by the anthropic client, and event by event."""

import asyncio
import json

import aiohttp
import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
EVENT = TypeAdapter(RawMessageStreamEvent)
HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THOUGHT = "<think>\nLet me see.\n\nYes.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo 🙂"}}\n</tool_call>'
ALL = f"{THOUGHT}I look.\n{CALL}\n{CALL}\nDone."


@pytest.fixture
def says(start):
    async def start_saying(text, config=None, **options):
        return await start(config, answer=lambda *_: text, **{"max_model_len": 4096, **options})

    return start_saying


def client_of(server, **options):
    return anthropic.AsyncAnthropic(base_url=server.url, max_retries=0, **{"api_key": "none", **options})


async def events_of(server, **body):
    """The events of a stream, each checked against the SDK's type and its name."""
    body = {"messages": HI, "max_tokens": 1000, **body, "stream": True}
    async with server.session.post(server.url + PATH, json=body) as response:
        text = (await response.read()).decode()
        assert response.status == 200 and response.content_type == "text/event-stream", text
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        if name != "event: error":
            EVENT.validate_python(events[-1])
    return events


def rebuilt(events):
    """The message that the events add up to, by the rules of the API."""
    assert [events[0]["type"], events[-2]["type"], events[-1]["type"]] == [
        *("message_start", "message_delta", "message_stop")
    ]
    message, is_open = events[0]["message"], False
    assert message["content"] == [] and message["usage"]["output_tokens"] <= 1
    for event in events[1:-2]:
        assert event["index"] == len(message["content"]) - (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            assert not is_open
            message["content"].append(event["content_block"])
            is_open, text = True, ""
        elif event["type"] == "content_block_stop":
            block = message["content"][-1]
            if block["type"] == "tool_use":
                block["input"] = json.loads(text) if text.endswith("}") else {}
            assert is_open
            is_open = False
        else:
            assert is_open
            kind, delta = event["delta"].pop("type"), event["delta"]
            block = message["content"][-1]
            text += delta.get("partial_json", "")
            for name in {"text", "thinking", "signature"} & delta.keys():
                assert kind == f"{name}_delta"
                block[name] += delta[name]
    assert not is_open
    message.update(events[-2]["delta"])
    message["usage"].update(events[-2]["usage"])
    return message


def without_ids(message):
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return {**message, "id": None, "content": content}


async def both(server, **body):
    """The whole message, after checking that the stream says the same."""
    status, whole, headers = await server.post(PATH, {"messages": HI, "max_tokens": 1000, **body})
    assert status == 200 and headers["request-id"] == whole["id"], whole
    Message.model_validate(whole)
    assert without_ids(rebuilt(await events_of(server, **body))) == without_ids(whole)
    return whole


class TestAnswer:
    async def test_by_the_client(self, says):
        server = await says(THOUGHT + "Hi there")
        client = client_of(server)
        sampling = {"top_k": 5, "temperature": 0.5}  # the SDK has no keywords for them any more
        message = await client.messages.create(
            model="", max_tokens=100, messages=HI, system="Be kind.", extra_body=sampling
        )
        assert [(b.type, b.to_dict()) for b in message.content] == [
            ("thinking", {"type": "thinking", "thinking": "Let me see.\n\nYes.", "signature": "unsigned"}),
            ("text", {"type": "text", "text": "Hi there"}),
        ]
        assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
        assert message.id.startswith("msg_") and message.model == "org/fake-model"
        params, num_prompt = server.engine.calls[0][2], len(server.engine.calls[0][1])
        assert (params.top_k, params.temperature, params.max_tokens) == (5, 0.5, 100)
        cached = num_prompt // 16 * 16
        assert message.usage.to_dict() == {
            "input_tokens": num_prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": len(server.engine.tokenizer.encode(THOUGHT + "Hi there")) + 1,
            "output_tokens_details": {
                "thinking_tokens": len(server.engine.tokenizer.encode("\nLet me see.\n\nYes.\n"))
            },
        }
        counted = await client.messages.count_tokens(model="", messages=HI, system="Be kind.")
        assert counted.input_tokens == num_prompt

    async def test_by_the_clients_stream(self, says):
        client = client_of(await says(ALL))
        async with client.messages.stream(model="", max_tokens=1000, messages=HI, tools=[TOOL]) as stream:
            texts = [text async for text in stream.text_stream]
            message = await stream.get_final_message()
        assert [b.type for b in message.content] == ["thinking", "text", "tool_use", "tool_use", "text"]
        assert "".join(texts) == "".join(b.text for b in message.content if b.type == "text")
        calls = [b for b in message.content if b.type == "tool_use"]
        assert [(c.name, c.input) for c in calls] == [("get_weather", {"city": "Oslo 🙂"})] * 2
        assert len({c.id for c in calls}) == 2 and all(c.id.startswith("toolu_") for c in calls)
        assert message.stop_reason == "tool_use" and message.usage.output_tokens > 20

    @pytest.mark.parametrize(
        ("text", "body", "kinds", "reason"),
        [
            ("Hi", {}, ["text"], "end_turn"),
            ("", {}, [], "end_turn"),
            (THOUGHT + "Hi", {"thinking": {"type": "adaptive"}}, ["thinking", "text"], "end_turn"),
            (THOUGHT + "Hi", {"thinking": {"type": "adaptive", "display": "omitted"}}, ["text"], "end_turn"),
            (THOUGHT + "Hi", {"thinking": {"type": "disabled"}}, ["text"], "end_turn"),  # closed in the prompt
            (ALL, {"tools": [TOOL]}, ["thinking", "text", "tool_use", "tool_use", "text"], "tool_use"),
            (ALL, {"tools": [TOOL], "tool_choice": {"type": "none"}}, ["thinking", "text"], "end_turn"),
            (
                *(ALL, {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
                *(["thinking", "text", "tool_use", "text"], "tool_use"),
            ),
            (CALL + CALL, {"tools": [TOOL]}, ["tool_use", "tool_use"], "tool_use"),
            ("One two three", {"max_tokens": 3}, ["text"], "max_tokens"),
            (THOUGHT, {"max_tokens": 4}, ["thinking"], "max_tokens"),
            (CALL, {"tools": [TOOL], "max_tokens": 25}, ["tool_use"], "max_tokens"),
        ],
    )
    async def test_streamed_is_whole(self, says, text, body, kinds, reason):
        message = await both(await says(text), **body)
        assert ([b["type"] for b in message["content"]], message["stop_reason"]) == (kinds, reason)

    async def test_the_order_of_events(self, says):
        events = await events_of(await says(f"<think>\nHm\n</think>\n\nOk{CALL}"), tools=[TOOL])
        kinds = [e.get("delta", {}).get("type") or e["type"].removeprefix("content_") for e in events]
        assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == [  # neighbouring deltas as one
            "message_start",
            *("block_start", "thinking_delta", "signature_delta", "block_stop"),
            *("block_start", "text_delta", "block_stop"),
            *("block_start", "input_json_delta", "block_stop"),
            *("message_delta", "message_stop"),
        ]

    async def test_stop_sequences(self, says):
        server = await says("One, two; three")
        message = await both(server, stop_sequences=["x", "; "])
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "; ")
        assert message["content"][0]["text"] == "One, two"

    async def test_a_full_context(self, says):
        message = await both(await says("word " * 200, max_model_len=100), max_tokens=99)
        assert message["stop_reason"] == "model_context_window_exceeded"

    async def test_thinking(self, says):
        server = await says("Hi", {"default_chat_template_kwargs": {"enable_thinking": False}})

        async def is_closed(**body):
            await server.post(PATH, {"messages": HI, "max_tokens": 100, **body})
            return server.engine.tokenizer.decode(server.engine.calls[-1][1]).endswith("</think>\n\n")

        assert await is_closed(), "the server's default"
        assert not await is_closed(thinking={"type": "enabled", "budget_tokens": 50})
        assert server.engine.calls[-1][2].thinking_token_budget == 50
        assert not await is_closed(thinking={"type": "adaptive"}, output_config={"effort": "low"})
        assert not await is_closed(output_config={"effort": "low"})
        assert await is_closed(output_config={"effort": "low"}, thinking={"type": "disabled"})

    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
    async def test_demanded_calls(self, says, choice):
        server = await says(CALL)
        message = await both(server, tools=[TOOL, {**TOOL, "name": "other"}], tool_choice=choice)
        assert ([b["type"] for b in message["content"]], message["stop_reason"]) == (["tool_use"], "tool_use")
        grammar = json.dumps(server.engine.calls[-1][2].structured_outputs.structural_tag)
        assert "get_weather" in grammar and ("other" in grammar) == (choice["type"] == "any")

    async def test_a_json_schema(self, says):
        server = await says('{"a": 1}')
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        await both(server, output_config={"format": {"type": "json_schema", "schema": schema}})
        assert server.engine.calls[-1][2].structured_outputs.json == schema


class TestInput:
    async def test_the_answer_can_be_sent_back(self, says):
        """The prompt then holds the model's own text, so that it is found in the prefix cache."""
        text = f"{THOUGHT}I look.\n{CALL}\n{CALL}"
        server = await says(text)
        create = client_of(server).messages.create
        first = await create(model="", max_tokens=999, messages=HI, tools=[TOOL])
        results = [
            {"type": "tool_result", "tool_use_id": b.id, "content": "sunny"}
            for b in first.content
            if b.type == "tool_use"
        ]
        answer = {"role": "assistant", "content": first.content}
        await create(
            model="", max_tokens=999, messages=[*HI, answer, {"role": "user", "content": results}], tools=[TOOL]
        )
        one, two = (server.engine.tokenizer.decode(c[1], skip_special_tokens=False) for c in server.engine.calls)
        assert two.startswith(f"{one}{text}<|im_end|>\n") and two.count("sunny") == 2

    async def test_the_assistants_last_message_goes_on(self, says):
        server = await says(" blue.")
        message = await both(server, messages=[*HI, {"role": "assistant", "content": "The sky is"}])
        assert message["content"] == [{"type": "text", "text": " blue."}]
        assert server.engine.tokenizer.decode(server.engine.calls[-1][1]).endswith("The sky is")


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"max_tokens": None}, "max_tokens is required"),
            ({"max_tokens": 0}, "max_tokens must be at least 1"),
            ({"max_tokens": 5000}, "max_tokens=5000 cannot be greater than max_model_len=4096"),
            ({"messages": []}, "messages must hold"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
            ({"stop_sequences": [""]}, "stop_sequences must hold non-empty strings"),
            ({"temperature": 3}, "temperature must be in [0, 2]"),
            ({"tools": [TOOL, {"type": "bash_20250124", "name": "bash"}]}, 'tools[1].type must be "custom"'),
            ({"tools": [{"name": "f"}]}, "tools[0].input_schema is required"),
            ({"tool_choice": {"type": "any"}}, "tool_choice"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
            ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "x"}}, "tool_choice.name"),
            ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
            ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking.budget_tokens"),
            ({"thinking": {"type": "between_tools"}}, "thinking.type"),
            ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
            ({"service_tier": "priority"}, "service_tier"),
            *(({name: "x"}, name) for name in ("container", "mcp_servers", "stop", "nonsense", "speed")),
        ],
    )
    async def test_what_is_wrong_is_named(self, says, body, said):
        server = await says("Hi")
        got = {}
        for stream in (False, True):
            body = {"messages": HI, "max_tokens": 9, **body, "stream": stream}
            status, got[stream], headers = await server.post(PATH, body)
            assert status == 400 and headers["Content-Type"].startswith("application/json"), got
        assert got[False] == got[True] and got[True].keys() == {"type", "error"} and got[True]["type"] == "error"
        assert got[True]["error"].keys() == {"type", "message"}
        assert got[True]["error"]["type"] == "invalid_request_error" and said in got[True]["error"]["message"]
        assert not server.engine.calls

    async def test_what_clients_send_without_need_is_accepted(self, says):
        cached = {"type": "ephemeral"}
        await both(
            await says("Hi"),
            system=[{"type": "text", "text": "s", "cache_control": {**cached, "ttl": "1h"}}],
            tools=[{**TOOL, "type": "custom", "cache_control": cached, "eager_input_streaming": True}],
            metadata={"user_id": "u"},
            service_tier="auto",
            cache_control=cached,
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        )
        client = client_of(await says("Hi"), default_headers={"anthropic-beta": "x", "anthropic-version": "2023-06-01"})
        message = await client.beta.messages.create(model="", max_tokens=9, messages=HI, betas=["y"])
        assert message.content[0].text == "Hi"

    async def test_the_status_of_each_kind(self, start):
        server = await start({"api_key": ["secret"], "max_body_size": 2000})
        key = {"X-Api-Key": "secret"}

        async def kind(path=PATH, body=None, headers=key, method="POST"):
            async with server.session.request(method, server.url + path, json=body, headers=headers) as response:
                got = await response.json()
                assert got["type"] == "error" and got["error"]["message"]
                return response.status, got["error"]["type"]

        body = {"messages": HI, "max_tokens": 9}
        assert await kind(body=body, headers={}) == (401, "authentication_error")
        assert await kind(body=body, headers={"X-Api-Key": "wrong"}) == (401, "authentication_error")
        assert await kind(COUNT, body, headers={}) == (401, "authentication_error")
        assert await kind(body={**body, "model": "nope"}) == (404, "not_found_error")
        assert await kind(COUNT, {"messages": HI, "model": "nope"}) == (404, "not_found_error")
        assert await kind(COUNT, {"messages": HI, "stream": True}) == (400, "invalid_request_error")
        assert await kind(method="GET") == (405, "invalid_request_error")
        assert await kind(body={**body, "system": "x" * 2000}) == (413, "request_too_large")
        status, got, _ = await server.post("/v1/chat/completions", {"messages": HI}, headers=key)
        assert status == 401 and set(got) == {"error"}, "the key of this API alone, and other routes' errors as ever"
        for options in ({"api_key": "secret"}, {"api_key": None, "auth_token": "secret"}):
            assert (await client_of(server, **options).messages.create(model="", **body)).content
        with pytest.raises(anthropic.AuthenticationError):
            await client_of(server, api_key="wrong").messages.create(model="", **body)

    @pytest.mark.parametrize("depth", [300, 700, 900, 950, 990])
    async def test_deep_nesting_is_never_a_fault_of_the_server(self, says, depth):
        server = await says("Hi", max_model_len=8192)
        deep = '{"a":' * depth + "1" + "}" * depth
        call = '{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": %s}]}'
        for body in (
            '{"max_tokens": 1, "messages": [' + call + ', {"role": "user", "content": "x"}]}',
            '{"max_tokens": 1, "messages": [{"role": "user", "content": [%s]}]}',
            '{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "tools": [%s]}',
            '{"max_tokens": 1, "messages": [], "tools": [{"name": "f", "input_schema": %s}]}',
            '{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "metadata": %s}',
        ):
            data = (body % deep).encode()
            status, got, _ = await server.post(PATH, data=data, headers={"Content-Type": "application/json"})
            assert status in (200, 400), (body, got)

    async def test_while_loading(self, start):
        server = await start(wait=False, phases=["loading the weights"])
        status, got, headers = await server.post(PATH, {"messages": HI, "max_tokens": 9})
        assert (status, got["error"]["type"]) == (503, "overloaded_error") and headers["Retry-After"]
        server.engine.go_on.set()

    async def test_a_failure_while_streaming(self, says):
        server = await says("One two three four")
        server.engine.error_after = 2
        status, got, _ = await server.post(PATH, {"messages": HI, "max_tokens": 9})
        assert (status, got["error"]["type"]) == (500, "api_error")
        events = await events_of(server)
        assert events[-1] == got and events[-2]["type"] == "content_block_delta"
        with pytest.raises(anthropic.APIStatusError, match="could not compute"):
            stream = await client_of(server).messages.create(model="", max_tokens=9, messages=HI, stream=True)
            async for _ in stream:
                pass

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_client_that_goes_away_ends_its_request(self, says, stream):
        server = await says("word " * 1000, delay=0.01)
        async with aiohttp.ClientSession() as session:
            body = {"messages": HI, "max_tokens": 1000, "stream": stream}
            task = asyncio.ensure_future(session.post(server.url + PATH, json=body))
            while not server.engine.num_tokens:
                await asyncio.sleep(0.01)
            task.cancel()
        for _ in range(200):
            if not server.engine.num_unfinished:
                break
            await asyncio.sleep(0.01)
        assert list(server.engine.ends.values()) == ["closed"] and server.engine.num_tokens < 1000
